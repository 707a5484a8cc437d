//! How long a bare `fsfreeze -f; fsfreeze -u` freezes a guest, beside which the freeze of a split is judged.

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};

use super::statistics::Sample;
use crate::bed::Ssh;

/// Bare freezes of a guest's root file system while it serves.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct BareFreeze {
    /// Both commands, from before the first to after the second.
    pub commands: Sample,
    /// The two ioctls alone, one after the other in one process: what the file system itself needs.
    pub ioctls: Sample,
}

/// A shell and a perl that measure themselves, since nothing outside can see into a frozen guest. Each
/// repetition begins with a `sync`, as the agent does before it freezes for a split. What a frozen file
/// system would have to read is in memory after a first round that is not counted; whatever goes wrong,
/// the last word is a thaw. Numbers are of Linux on x86-64: 228 is `clock_gettime` (1: monotonic),
/// 0xC0045877 `FIFREEZE`, 0xC0045878 `FITHAW`.
const SCRIPT: &str = r#"
trap 'fsfreeze -u / 2>/dev/null || true' EXIT
set -e
commands=
for i in $(seq 0 REPETITIONS); do
    sync -f /
    a=${EPOCHREALTIME//[.,]/}
    fsfreeze -f /; fsfreeze -u /
    b=${EPOCHREALTIME//[.,]/}
    [ $i = 0 ] || commands="$commands $((b - a))"
done
echo commands $commands
exec 3</
perl -e '
    sub now { my $t = "\0" x 16; syscall(228, 1, $t); my ($s, $n) = unpack("qq", $t); $s * 1e6 + $n / 1e3 }
    open(my $root, "<&=", 3) or die "root: $!";
    print "ioctls";
    for my $i (0 .. REPETITIONS) {
        system("sync -f /") == 0 or die "sync: $?";
        my $a = now();
        ioctl($root, 0xC0045877, 0) or die "freeze: $!";
        ioctl($root, 0xC0045878, 0) or die "thaw: $!";
        my $b = now();
        printf(" %d", $b - $a) if $i;
    }
    print "\n";
'
"#;

/// Freezes and thaws the guest's root file system `repetitions` times in each way.
pub fn measure(guest: &Ssh, repetitions: usize) -> Result<BareFreeze> {
    let script = SCRIPT.replace("REPETITIONS", &repetitions.to_string());
    let quoted = script.replace('\'', r"'\''");
    let printed = guest
        .run(&format!("bash -c '{quoted}'"))
        .context("freezing the guest's root file system with fsfreeze")?;
    let bare = parse(&printed)?;
    ensure!(
        bare.commands.count == repetitions && bare.ioctls.count == repetitions,
        "{repetitions} freezes of each kind were asked for, and the guest printed: {printed}"
    );
    Ok(bare)
}

fn parse(printed: &str) -> Result<BareFreeze> {
    let sample = |name: &str| -> Result<Sample> {
        let numbers = printed
            .lines()
            .find_map(|line| line.strip_prefix(name))
            .with_context(|| format!("no line '{name}' in: {printed}"))?;
        let values: Vec<f64> = numbers
            .split_whitespace()
            .map(|number| {
                number
                    .parse()
                    .with_context(|| format!("'{number}' is no number, in: {printed}"))
            })
            .collect::<Result<_>>()?;
        Sample::of(&values).with_context(|| format!("no number after '{name}' in: {printed}"))
    };
    Ok(BareFreeze {
        commands: sample("commands")?,
        ioctls: sample("ioctls")?,
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn what_the_guest_prints_is_read_and_nonsense_is_quoted() {
        let bare = parse("commands 30 10 20\nioctls 3 1 2\n").unwrap();
        assert_eq!((bare.commands.median_us, bare.ioctls.median_us), (20.0, 2.0));
        let error = parse("commands 30\nioctls freeze: no\n").unwrap_err();
        assert!(error.to_string().contains("'freeze:' is no number"), "{error}");
    }
}
