//! Whether a file is a static binary for the platform of the images (ELF-64, System V gABI, chapters 4 and 5).

/// Program header that names an interpreter, the dynamic loader.
const PT_INTERP: u32 = 3;
/// `e_machine` of x86-64.
const EM_X86_64: u16 = 62;

/// Checks that `file` is an x86-64 binary which needs no dynamic loader; `Err` says what it is instead.
pub fn check_static(file: &[u8]) -> Result<(), &'static str> {
    if file.get(..4) != Some(b"\x7fELF") {
        return Err("is no ELF binary");
    }
    // EI_CLASS: 64 bit; EI_DATA: little endian.
    if file.get(4..6) != Some(&[2, 1]) || half(file, 18) != Some(EM_X86_64) {
        return Err("is no binary for x86-64");
    }
    let headers = || -> Option<(usize, usize, usize)> {
        let offset = usize::try_from(u64::from_le_bytes(file.get(32..40)?.try_into().ok()?)).ok()?;
        Some((offset, half(file, 54)?.into(), half(file, 56)?.into()))
    };
    let (offset, size, count) = headers().ok_or("is cut short")?;
    for index in 0..count {
        let start = index
            .checked_mul(size)
            .and_then(|start| start.checked_add(offset))
            .ok_or("is cut short")?;
        let kind = file
            .get(start..)
            .and_then(|rest| rest.first_chunk::<4>())
            .ok_or("is cut short")?;
        if u32::from_le_bytes(*kind) == PT_INTERP {
            return Err("needs a dynamic loader");
        }
    }
    Ok(())
}

fn half(file: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_le_bytes(*file.get(at..)?.first_chunk::<2>()?))
}

#[cfg(test)]
pub mod tests {
    use super::*;

    /// A binary with one program header of this type.
    pub fn binary(kind: u32) -> Vec<u8> {
        let mut file = vec![0_u8; 64 + 56];
        file[..6].copy_from_slice(b"\x7fELF\x02\x01");
        file[18..20].copy_from_slice(&EM_X86_64.to_le_bytes());
        file[32..40].copy_from_slice(&64_u64.to_le_bytes());
        file[54..56].copy_from_slice(&56_u16.to_le_bytes());
        file[56..58].copy_from_slice(&1_u16.to_le_bytes());
        file[64..68].copy_from_slice(&kind.to_le_bytes());
        file
    }

    #[test]
    fn what_needs_a_loader_or_another_machine_is_told_from_a_static_binary() {
        assert_eq!(check_static(&binary(1)), Ok(()));
        assert_eq!(check_static(&binary(PT_INTERP)), Err("needs a dynamic loader"));
        assert_eq!(check_static(b"#!/bin/sh\n"), Err("is no ELF binary"));
        let mut other = binary(1);
        other[18] = 183;
        assert_eq!(check_static(&other), Err("is no binary for x86-64"));
        assert_eq!(check_static(&binary(1)[..66]), Err("is cut short"));
        let far = {
            let mut file = binary(1);
            file[32..40].copy_from_slice(&u64::MAX.to_le_bytes());
            file
        };
        assert_eq!(check_static(&far), Err("is cut short"));
    }

    #[test]
    fn this_very_test_is_as_the_build_made_it() {
        let file = std::fs::read("/proc/self/exe").unwrap();
        assert_eq!(check_static(&file).is_ok(), cfg!(target_feature = "crt-static"));
    }
}
