//! CPUID of the guest: one template a guest, recorded at its first boot, and from it one for each vCPU.

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::{Cap, Kvm};
use serde::{Deserialize, Serialize};

/// One leaf as KVM takes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Leaf {
    /// EAX that selects the leaf.
    pub function: u32,
    /// ECX that selects the subleaf.
    pub index: u32,
    /// `KVM_CPUID_FLAG_*`.
    pub flags: u32,
    /// EAX.
    pub eax: u32,
    /// EBX.
    pub ebx: u32,
    /// ECX.
    pub ecx: u32,
    /// EDX.
    pub edx: u32,
}

/// Why a guest's CPUID could not be had.
#[derive(Debug, thiserror::Error)]
pub enum CpuidError {
    /// KVM refused.
    #[error("reading the CPUID that KVM supports: {0}")]
    Kvm(kvm_ioctls::Error),
    /// The list does not fit.
    #[error("the guest's CPUID has {0} leaves, more than KVM takes")]
    TooManyLeaves(usize),
    /// The host lacks features that the guest has seen at its first boot.
    #[error(
        "the guest's recorded CPU has features that this host lacks (CPUID leaf {leaf:#x}, {register}: {missing:#010x}); run it on a host with the same CPU model, or remove its platform record while it is off"
    )]
    HostLacks {
        /// Leaf.
        leaf: u32,
        /// Register of the leaf.
        register: &'static str,
        /// Bits that are missing.
        missing: u32,
    },
}

const HYPERVISOR: u32 = 1 << 31;
const TSC_DEADLINE: u32 = 1 << 24;
const INVARIANT_TSC: u32 = 1 << 8;
/// Virtualisation in the guest: the state of guests within the guest is not part of a saved session.
const VMX: u32 = 1 << 5;
const SVM: u32 = 1 << 2;
/// Leaves with masks of features, in each of which the host must have what the guest has.
const FEATURE_LEAVES: [(u32, u32); 4] = [(1, 0), (7, 0), (7, 1), (0x8000_0001, 0)];
/// Bits of KVM's leaf 0x40000001 that are withheld: asynchronous page faults (4, 10, 14). They would
/// reach a guest whose memory is filled in lazily when it resumes, and are of no use otherwise.
const ASYNC_PAGE_FAULTS: u32 = 1 << 4 | 1 << 10 | 1 << 14;
const KVM_FEATURES: u32 = 0x4000_0001;
/// `KVM_CPUID_FLAG_SIGNIFCANT_INDEX`.
const SIGNIFICANT_INDEX: u32 = 1;

/// What the host offers, without what would not survive a move to another boot of the host: the TSC is
/// calibrated anew at each boot of the host, so that invariant TSC is hidden and kvm-clock is used; and
/// virtualisation within the guest is hidden.
pub fn template(kvm: &Kvm) -> Result<Vec<Leaf>, CpuidError> {
    let supported = kvm
        .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
        .map_err(CpuidError::Kvm)?;
    let mut leaves: Vec<Leaf> = supported
        .as_slice()
        .iter()
        .map(|entry| Leaf {
            function: entry.function,
            index: entry.index,
            flags: entry.flags,
            eax: entry.eax,
            ebx: entry.ebx,
            ecx: entry.ecx,
            edx: entry.edx,
        })
        .collect();
    let deadline = kvm.check_extension(Cap::TscDeadlineTimer);
    for leaf in &mut leaves {
        if leaf.function == 1 {
            leaf.ecx |= HYPERVISOR;
            if deadline {
                leaf.ecx |= TSC_DEADLINE;
            }
        }
    }
    withhold(&mut leaves);
    Ok(leaves)
}

/// Takes away what no guest shall see, from what the host offers and from what an earlier version recorded.
pub fn withhold(leaves: &mut [Leaf]) {
    for leaf in leaves {
        match leaf.function {
            1 => leaf.ecx &= !VMX,
            KVM_FEATURES => leaf.eax &= !ASYNC_PAGE_FAULTS,
            0x8000_0001 => leaf.ecx &= !SVM,
            0x8000_0007 => leaf.edx &= !INVARIANT_TSC,
            // Features of SVM.
            0x8000_000a => (leaf.eax, leaf.ebx, leaf.ecx, leaf.edx) = (0, 0, 0, 0),
            _ => {}
        }
    }
}

/// Whether this host (`offered`) has every feature that a recorded template has.
pub fn check_recorded(recorded: &[Leaf], offered: &[Leaf]) -> Result<(), CpuidError> {
    let find = |leaves: &[Leaf], (function, index): (u32, u32)| {
        leaves
            .iter()
            .copied()
            .find(|leaf| leaf.function == function && leaf.index == index)
    };
    for key in FEATURE_LEAVES {
        let Some(recorded) = find(recorded, key) else {
            continue;
        };
        let offered = find(offered, key);
        let lacks = |register, wanted: u32, offered: Option<u32>| {
            let missing = wanted & !offered.unwrap_or(0);
            if missing == 0 {
                return Ok(());
            }
            Err(CpuidError::HostLacks {
                leaf: key.0,
                register,
                missing,
            })
        };
        lacks("ECX", recorded.ecx, offered.map(|leaf| leaf.ecx))?;
        lacks("EDX", recorded.edx, offered.map(|leaf| leaf.edx))?;
        // EBX of leaf 1 is no feature mask.
        if key.0 == 7 && key.1 == 0 {
            lacks("EBX", recorded.ebx, offered.map(|leaf| leaf.ebx))?;
        }
    }
    Ok(())
}

/// The CPUID of vCPU `id` of `cpus`: one socket, one thread a core, APIC IDs counted from 0.
pub fn for_vcpu(template: &[Leaf], id: u8, cpus: u8) -> Result<CpuId, CpuidError> {
    let id = u32::from(id);
    let cpus = u32::from(cpus);
    // Bits of the APIC ID below the socket.
    let core_bits = cpus.next_power_of_two().trailing_zeros();
    let mut entries = Vec::with_capacity(template.len() + 2);
    let mut extended_topology = None;
    for leaf in template {
        let mut leaf = *leaf;
        match leaf.function {
            1 => {
                leaf.ebx &= 0x0000_ff00;
                leaf.ebx |= id << 24 | cpus << 16;
                const HTT: u32 = 1 << 28;
                leaf.edx = if cpus > 1 { leaf.edx | HTT } else { leaf.edx & !HTT };
            }
            // Intel cache topology: caches belong to one core, but the last level to all of them.
            4 => {
                let level = leaf.eax >> 5 & 7;
                let sharing = if level >= 3 { cpus } else { 1 };
                leaf.eax &= 0x0000_3fff;
                if leaf.eax & 0x1f != 0 {
                    leaf.eax |= (cpus.next_power_of_two() - 1) << 26 | (sharing - 1) << 14;
                }
            }
            0xb | 0x1f => {
                // Rebuilt below: the host's own topology has nothing to do with the guest's.
                extended_topology.get_or_insert(leaf.function);
                continue;
            }
            0x8000_0001 => {
                const COMPATIBILITY_LEGACY: u32 = 1 << 1;
                const TOPOLOGY_EXTENSIONS: u32 = 1 << 22;
                leaf.ecx &= !COMPATIBILITY_LEGACY;
                // The AMD cache leaves that come with it describe the host's sharing.
                leaf.ecx &= !TOPOLOGY_EXTENSIONS;
            }
            0x8000_0008 => leaf.ecx = leaf.ecx & !0xf0ff | core_bits << 12 | (cpus - 1),
            0x8000_001d | 0x8000_001e => continue,
            _ => {}
        }
        entries.push(entry(leaf));
    }
    if extended_topology.is_some() {
        let base = Leaf {
            function: 0xb,
            index: 0,
            flags: SIGNIFICANT_INDEX,
            eax: 0,
            ebx: 1,
            ecx: 1 << 8,
            edx: id,
        };
        entries.push(entry(base));
        entries.push(entry(Leaf {
            index: 1,
            eax: core_bits,
            ebx: cpus,
            ecx: 2 << 8 | 1,
            ..base
        }));
        entries.push(entry(Leaf {
            index: 2,
            ebx: 0,
            ecx: 2,
            ..base
        }));
    }
    CpuId::from_entries(&entries).map_err(|_| CpuidError::TooManyLeaves(entries.len()))
}

fn entry(leaf: Leaf) -> kvm_cpuid_entry2 {
    kvm_cpuid_entry2 {
        function: leaf.function,
        index: leaf.index,
        flags: leaf.flags,
        eax: leaf.eax,
        ebx: leaf.ebx,
        ecx: leaf.ecx,
        edx: leaf.edx,
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaf(function: u32, index: u32) -> Leaf {
        Leaf {
            function,
            index,
            flags: 0,
            eax: 0,
            ebx: 0,
            ecx: 0,
            edx: 0,
        }
    }

    #[test]
    fn every_vcpu_has_its_apic_id_and_all_are_cores_of_one_socket() {
        let template = [leaf(1, 0), leaf(0xb, 0), leaf(0xb, 1), leaf(0x8000_0008, 0)];
        for id in 0..3u8 {
            let cpuid = for_vcpu(&template, id, 3).unwrap();
            let find = |function, index| {
                *cpuid
                    .as_slice()
                    .iter()
                    .find(|e| e.function == function && e.index == index)
                    .unwrap()
            };
            assert_eq!(find(1, 0).ebx >> 24, u32::from(id));
            assert_eq!(find(1, 0).ebx >> 16 & 0xff, 3);
            assert_eq!(find(0xb, 1).edx, u32::from(id));
            assert_eq!((find(0xb, 1).eax, find(0xb, 1).ebx), (2, 3));
            assert_eq!(find(0x8000_0008, 0).ecx & 0xff, 2);
        }
    }

    #[test]
    fn what_a_saved_session_could_not_carry_is_hidden_from_guests() {
        let mut leaves = [
            leaf(1, 0),
            leaf(0x8000_0001, 0),
            leaf(0x8000_0007, 0),
            leaf(0x8000_000a, 0),
        ];
        for leaf in &mut leaves {
            (leaf.eax, leaf.ebx, leaf.ecx, leaf.edx) = (u32::MAX, u32::MAX, u32::MAX, u32::MAX);
        }
        withhold(&mut leaves);
        assert_eq!(leaves[0].ecx, !VMX);
        assert_eq!(leaves[1].ecx, !SVM);
        assert_eq!(leaves[2].edx, !INVARIANT_TSC);
        assert_eq!((leaves[3].eax, leaves[3].edx), (0, 0));
    }

    #[test]
    fn a_host_that_lacks_a_recorded_feature_is_refused_and_one_that_has_more_is_not() {
        let mut recorded = leaf(7, 0);
        recorded.ebx = 0b101;
        let mut offered = leaf(7, 0);
        offered.ebx = 0b1101;
        check_recorded(&[recorded], &[offered]).unwrap();
        offered.ebx = 0b100;
        let error = check_recorded(&[recorded], &[offered]).unwrap_err();
        assert!(
            matches!(error, CpuidError::HostLacks { missing: 1, .. }),
            "{error}"
        );
    }
}
