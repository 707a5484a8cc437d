//! Amounts of memory as manifests write them.

/// Reads a quantity of memory (`512Mi`, `2Gi`, `1Ti`) in mebibytes. Other units that Kubernetes knows
/// (`M`, `1.5Gi`, `1e9`) are refused, so that nobody gets a guest of 488.28 MiB.
pub fn mebibytes(text: &str) -> Option<u64> {
    let (digits, factor) = [("Mi", 1u64), ("Gi", 1 << 10), ("Ti", 1 << 20)]
        .iter()
        .find_map(|(unit, factor)| text.strip_suffix(unit).map(|digits| (digits, *factor)))?;
    if digits.is_empty() || digits.len() > 7 || !digits.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    digits.parse::<u64>().ok()?.checked_mul(factor)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whole_mebibytes_are_read_and_everything_else_is_refused() {
        assert_eq!(mebibytes("512Mi"), Some(512));
        assert_eq!(mebibytes("2Gi"), Some(2048));
        assert_eq!(mebibytes("1Ti"), Some(1 << 20));
        for text in [
            "",
            "Mi",
            "512",
            "512M",
            "1.5Gi",
            "-1Gi",
            "+1Gi",
            "99999999999Ti",
            "1 Gi",
        ] {
            assert_eq!(mebibytes(text), None, "{text}");
        }
    }
}
