//! `/etc/default/grub` and its fragments: shell assignments, of which we understand quoting, joining and
//! references to variables that were assigned before. Anything else is left alone.

use std::collections::BTreeMap;

/// The variables assigned so far.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Defaults {
    variables: BTreeMap<String, String>,
}

impl Defaults {
    /// Value of a variable; empty when it was not assigned.
    pub fn get(&self, name: &str) -> &str {
        self.variables.get(name).map_or("", String::as_str)
    }

    /// Carries out the assignments of `text`.
    pub fn read(&mut self, text: &str) {
        for line in text.replace("\\\n", "").lines() {
            let line = line.trim();
            let line = line.strip_prefix("export ").unwrap_or(line);
            let Some((name, value)) = line.split_once('=') else {
                continue;
            };
            let append = name.ends_with('+');
            let name = name.trim_end_matches('+');
            let is_name = !name.is_empty() && name.chars().all(|c| c == '_' || c.is_ascii_alphanumeric());
            if !is_name {
                continue;
            }
            // Commands and arithmetic are not ours to carry out.
            if let Some(value) = self.expand(value) {
                let variable = self.variables.entry(name.to_owned()).or_default();
                if append {
                    variable.push_str(&value);
                } else {
                    *variable = value;
                }
            }
        }
    }

    /// The value of one word; `None` when it is not a plain one.
    fn expand(&self, word: &str) -> Option<String> {
        let mut value = String::new();
        let mut chars = word.chars().peekable();
        let mut quoted = false;
        while let Some(c) = chars.next() {
            match c {
                '\'' if !quoted => loop {
                    match chars.next()? {
                        '\'' => break,
                        c => value.push(c),
                    }
                },
                '"' => quoted = !quoted,
                '\\' => {
                    let next = chars.next()?;
                    if quoted && !matches!(next, '"' | '\\' | '$' | '`') {
                        value.push('\\');
                    }
                    value.push(next);
                }
                '`' => return None,
                '$' => {
                    let braces = chars.next_if_eq(&'{').is_some();
                    let mut name = String::new();
                    while let Some(c) = chars.next_if(|c| *c == '_' || c.is_ascii_alphanumeric()) {
                        name.push(c);
                    }
                    if name.is_empty() || (braces && chars.next() != Some('}')) {
                        return None;
                    }
                    value.push_str(self.get(&name));
                }
                c if !quoted && c.is_whitespace() => break,
                c if !quoted && matches!(c, ';' | '&' | '|' | '<' | '>' | '(' | ')') => return None,
                c => value.push(c),
            }
        }
        (!quoted).then_some(value)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn assignments_are_read_as_a_shell_does() {
        let mut defaults = Defaults::default();
        defaults.read(
            "# GRUB_CMDLINE_LINUX=\"no\"\nGRUB_DEFAULT=0\nGRUB_CMDLINE_LINUX=\"console=tty0 \\\n console=ttyS0\"\nGRUB_CMDLINE_LINUX_DEFAULT=quiet # comment\nGRUB_DISTRIBUTOR=`lsb_release -i`\n",
        );
        defaults.read(
            "GRUB_CMDLINE_LINUX_DEFAULT=\"$GRUB_CMDLINE_LINUX_DEFAULT ${GRUB_DEFAULT}x\"' a b'\nexport GRUB_CMDLINE_LINUX+=\" panic=5\"\n",
        );
        assert_eq!(
            defaults.get("GRUB_CMDLINE_LINUX"),
            "console=tty0  console=ttyS0 panic=5"
        );
        assert_eq!(defaults.get("GRUB_CMDLINE_LINUX_DEFAULT"), "quiet 0x a b");
        assert_eq!(defaults.get("GRUB_DISTRIBUTOR"), "");
    }

    #[test]
    fn unfinished_quotes_and_commands_change_nothing() {
        let mut defaults = Defaults::default();
        defaults.read("GRUB_CMDLINE_LINUX=before\n");
        for bad in ["\"open", "'open", "$(id)", "a;id", "${x"] {
            defaults.read(&format!("GRUB_CMDLINE_LINUX={bad}\n"));
            assert_eq!(defaults.get("GRUB_CMDLINE_LINUX"), "before", "{bad}");
        }
    }
}
