//! The state of a virtual CPU, as it is saved and restored.
//!
//! The order of the calls matters on both sides, because KVM's accessors are not independent of each other
//! (KVM API, sections 4.38, 4.31 and those of the single calls). On saving, `MP_STATE` comes first: reading
//! it takes in INIT and SIPI that are pending, which changes registers. `VCPU_EVENTS` comes last: the
//! others may still deliver or cancel events. On restoring, CPUID comes first, because it decides which
//! registers exist; the local APIC comes after the system registers, which hold its base address and mode,
//! and before MSRs, because `TSC_DEADLINE` is dropped unless the APIC's timer is in that mode. That MSR is
//! the last of all: it is a point on the TSC, which must have its value by then.

use kvm_bindings::{
    CpuId, KVM_CAP_SREGS2, KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET, Msrs, Xsave, kvm_debugregs,
    kvm_device_attr, kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_sregs, kvm_sregs2,
    kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};
use serde::{Deserialize, Serialize};

use super::ioctl;

/// `IA32_TIME_STAMP_COUNTER`.
const TSC: u32 = 0x10;
/// `IA32_TSC_DEADLINE`.
const TSC_DEADLINE: u32 = 0x6e0;
/// MSRs that are not carried over, each with its reason.
const WITHHELD_MSRS: [u32; 2] = [
    // MSR_KVM_WALL_CLOCK and its successor: a write makes KVM put the host's wall clock of *now* into guest
    // RAM at the address written, at a moment that the guest did not choose. Nothing else is behind them.
    0x11,
    0x4b56_4d00,
];
/// MSRs of one request: KVM takes less than 256.
const BATCH: usize = 128;
/// How far the host's TSC may run from the saved one's frequency, in 1/1000, where it cannot be scaled. It
/// is the same machine, so that the two differ by errors of calibration at boot, which an emulated or busy
/// host makes large. The guest's time is that of kvm-clock, which is right in any case; its APIC timer is
/// off by as much.
const TSC_TOLERANCE: u32 = 100;

/// One model-specific register.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Msr {
    /// Its number.
    pub index: u32,
    /// Its value.
    pub data: u64,
}

/// System registers in one of KVM's two forms.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum SystemRegisters {
    /// `struct kvm_sregs`.
    V1(Box<kvm_sregs>),
    /// `struct kvm_sregs2` as 64-bit words: as the first, with the page-directory pointers of PAE paging,
    /// which otherwise would be read anew from memory.
    V2(Vec<u64>),
}

/// The state of one vCPU. Types of KVM's interface are kept as their bytes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct VcpuState {
    /// Running, halted, waiting for SIPI.
    pub mp_state: kvm_mp_state,
    /// General registers.
    pub regs: kvm_regs,
    /// System registers.
    pub system: SystemRegisters,
    /// FPU, SSE, AVX and what else `XSAVE` keeps, as 32-bit words: as many as `KVM_CAP_XSAVE2` says.
    pub xsave: Vec<u32>,
    /// `XCR0`.
    pub xcrs: kvm_xcrs,
    /// Debug registers.
    pub debug: kvm_debugregs,
    /// Local APIC.
    pub lapic: kvm_lapic_state,
    /// Frequency of the guest's TSC.
    pub tsc_khz: u32,
    /// The TSC's offset to the host's, by which vCPUs are compared; `None` where KVM does not tell.
    pub tsc_offset: Option<u64>,
    /// MSRs, but for those that have a reason not to be carried over.
    pub msrs: Vec<Msr>,
    /// Exceptions, interrupts and NMIs on their way.
    pub events: kvm_vcpu_events,
}

/// Why a vCPU's state could not be saved or restored.
#[derive(Debug, thiserror::Error)]
pub enum VcpuStateError {
    /// KVM refused.
    #[error("vCPU {id}: {action}: {source}")]
    Kvm {
        /// Number of the vCPU.
        id: usize,
        /// What was tried.
        action: &'static str,
        /// Why it failed.
        source: kvm_ioctls::Error,
    },
    /// An MSR has another value than it shall have, and does not take it.
    #[error(
        "vCPU {id}: MSR {index:#x} does not take the saved value {data:#x}; this host's CPU or KVM is not like the saving one's"
    )]
    Msr {
        /// Number of the vCPU.
        id: usize,
        /// The register.
        index: u32,
        /// The value.
        data: u64,
    },
    /// The host's KVM lacks something that the state needs.
    #[error("vCPU {id}: {reason}")]
    Incompatible {
        /// Number of the vCPU.
        id: usize,
        /// What is missing.
        reason: String,
    },
}

impl VcpuStateError {
    /// Whether the host is at fault, and another one might do.
    pub fn is_incompatible(&self) -> bool {
        matches!(self, Self::Msr { .. } | Self::Incompatible { .. })
    }
}

/// What KVM offers for saving and restoring, asked once for all vCPUs.
pub struct Abilities {
    sregs2: bool,
    /// Words of `struct kvm_xsave` with its extension.
    xsave_words: usize,
    tsc_scaling: bool,
    msrs: Vec<u32>,
}

impl Abilities {
    /// Asks KVM and the virtual machine.
    pub fn of(kvm: &Kvm, vm: &VmFd) -> Result<Abilities, kvm_ioctls::Error> {
        let list = kvm.get_msr_index_list()?;
        let msrs = list.as_slice().iter().copied();
        let xsave = usize::try_from(vm.check_extension_int(Cap::Xsave2)).unwrap_or(0);
        Ok(Abilities {
            sregs2: vm.check_extension_raw(KVM_CAP_SREGS2.into()) > 0,
            xsave_words: xsave.max(size_of::<kvm_xsave>()).div_ceil(4),
            tsc_scaling: vm.check_extension(Cap::TscControl),
            msrs: msrs.filter(|index| !WITHHELD_MSRS.contains(index)).collect(),
        })
    }

    /// Names what a saved state needs and this host lacks. Cheap: nothing is set.
    pub fn check(&self, id: usize, state: &VcpuState, host_khz: u32) -> Result<(), VcpuStateError> {
        let lacks = |reason: String| Err(VcpuStateError::Incompatible { id, reason });
        let missing: Vec<String> = state
            .msrs
            .iter()
            .filter(|msr| msr.data != 0 && !self.msrs.contains(&msr.index))
            .map(|msr| format!("{:#x}", msr.index))
            .collect();
        if !missing.is_empty() {
            return lacks(format!(
                "this host's KVM does not know MSRs {}",
                missing.join(", ")
            ));
        }
        if state.xsave.len() > self.xsave_words {
            return lacks(format!(
                "its extended registers take {} bytes, this host's KVM keeps {}",
                state.xsave.len() * 4,
                self.xsave_words * 4
            ));
        }
        if matches!(state.system, SystemRegisters::V2(_)) && !self.sregs2 {
            return lacks(
                "its system registers need KVM_CAP_SREGS2 (Linux 5.14), which this host lacks".into(),
            );
        }
        let apart = state.tsc_khz.abs_diff(host_khz);
        if !self.tsc_scaling && u64::from(apart) * 1000 > u64::from(host_khz) * u64::from(TSC_TOLERANCE) {
            return lacks(format!(
                "its TSC runs at {} kHz, that of this host at {host_khz} kHz and cannot be scaled",
                state.tsc_khz
            ));
        }
        Ok(())
    }
}

fn failed(id: usize, action: &'static str) -> impl Fn(kvm_ioctls::Error) -> VcpuStateError {
    move |source| VcpuStateError::Kvm { id, action, source }
}

/// Reads the state of vCPU `id`, which does not run.
pub fn save(vcpu: &VcpuFd, id: usize, abilities: &Abilities) -> Result<VcpuState, VcpuStateError> {
    let failed = |action| failed(id, action);
    let mp_state = vcpu.get_mp_state().map_err(failed("reading whether it runs"))?;
    let regs = vcpu.get_regs().map_err(failed("reading registers"))?;
    let system = read_system(vcpu, abilities).map_err(failed("reading system registers"))?;
    let xsave = read_xsave(vcpu, abilities).map_err(failed("reading extended registers"))?;
    let xcrs = vcpu.get_xcrs().map_err(failed("reading XCR0"))?;
    let debug = vcpu.get_debug_regs().map_err(failed("reading debug registers"))?;
    let lapic = vcpu.get_lapic().map_err(failed("reading its local APIC"))?;
    let tsc_khz = vcpu
        .get_tsc_khz()
        .map_err(failed("reading the frequency of its TSC"))?;
    let msrs = read_msrs(vcpu, &abilities.msrs).map_err(failed("reading MSRs"))?;
    let events = vcpu.get_vcpu_events().map_err(failed("reading its events"))?;
    Ok(VcpuState {
        mp_state,
        regs,
        system,
        xsave,
        xcrs,
        debug,
        lapic,
        tsc_khz,
        tsc_offset: tsc_offset(vcpu),
        msrs,
        events,
    })
}

/// Has the TSCs of all vCPUs agree on one instant. They were read one after the other; what sets them apart
/// must be nothing but their offsets, or each save would drive them apart by the time between the reads.
pub fn align_tscs(states: &mut [VcpuState]) {
    let Some(first) = states.first() else { return };
    let (Some(base), Some(offset)) = (first.tsc(), first.tsc_offset) else {
        return;
    };
    for state in states {
        let Some(own) = state.tsc_offset else { continue };
        let aligned = base.wrapping_add(own.wrapping_sub(offset));
        for msr in &mut state.msrs {
            if msr.index == TSC {
                msr.data = aligned;
            }
        }
    }
}

impl VcpuState {
    /// Value of the TSC.
    pub fn tsc(&self) -> Option<u64> {
        let msr = self.msrs.iter().find(|msr| msr.index == TSC)?;
        Some(msr.data)
    }
}

/// Gives vCPU `id`, which is new, CPUID and its state.
pub fn restore(
    vcpu: &VcpuFd,
    id: usize,
    cpuid: &CpuId,
    state: &VcpuState,
    abilities: &Abilities,
) -> Result<(), VcpuStateError> {
    let failed = |action| failed(id, action);
    let host_khz = vcpu
        .get_tsc_khz()
        .map_err(failed("reading the frequency of the host's TSC"))?;
    abilities.check(id, state, host_khz)?;
    vcpu.set_cpuid2(cpuid).map_err(failed("setting CPUID"))?;
    if abilities.tsc_scaling {
        // Without scaling KVM would emulate a faster TSC by catching up at every entry, which is slow, and
        // refuse a slower one.
        vcpu.set_tsc_khz(state.tsc_khz)
            .map_err(failed("setting the frequency of its TSC"))?;
    }
    vcpu.set_mp_state(state.mp_state)
        .map_err(failed("setting whether it runs"))?;
    vcpu.set_regs(&state.regs).map_err(failed("setting registers"))?;
    write_system(vcpu, &state.system).map_err(failed("setting system registers"))?;
    write_xsave(vcpu, &state.xsave, abilities).map_err(failed("setting extended registers"))?;
    vcpu.set_xcrs(&state.xcrs).map_err(failed("setting XCR0"))?;
    vcpu.set_debug_regs(&state.debug)
        .map_err(failed("setting debug registers"))?;
    vcpu.set_lapic(&state.lapic)
        .map_err(failed("setting its local APIC"))?;
    write_msrs(vcpu, id, &state.msrs)?;
    vcpu.set_vcpu_events(&state.events)
        .map_err(failed("setting its events"))
}

fn read_system(vcpu: &VcpuFd, abilities: &Abilities) -> Result<SystemRegisters, kvm_ioctls::Error> {
    if !abilities.sregs2 {
        return vcpu.get_sregs().map(|sregs| SystemRegisters::V1(Box::new(sregs)));
    }
    let mut words = [0u64; SREGS2_WORDS];
    // SAFETY: KVM writes a `struct kvm_sregs2`, which is as large as `words` and of no stricter alignment.
    unsafe { ioctl::call(vcpu, ioctl::KVM_GET_SREGS2, words.as_mut_ptr()) }?;
    Ok(SystemRegisters::V2(words.to_vec()))
}

const SREGS2_WORDS: usize = size_of::<kvm_sregs2>() / 8;

fn write_system(vcpu: &VcpuFd, system: &SystemRegisters) -> Result<(), kvm_ioctls::Error> {
    let words = match system {
        SystemRegisters::V1(sregs) => return vcpu.set_sregs(sregs),
        SystemRegisters::V2(words) => words,
    };
    let mut words: [u64; SREGS2_WORDS] = words
        .as_slice()
        .try_into()
        .map_err(|_| kvm_ioctls::Error::new(libc::EINVAL))?;
    // SAFETY: KVM reads a `struct kvm_sregs2`, which is as large as `words` and of no stricter alignment.
    unsafe { ioctl::call(vcpu, ioctl::KVM_SET_SREGS2, words.as_mut_ptr()) }
}

/// Words of `struct kvm_xsave` without its extension.
const XSAVE_WORDS: usize = size_of::<kvm_xsave>() / 4;

fn read_xsave(vcpu: &VcpuFd, abilities: &Abilities) -> Result<Vec<u32>, kvm_ioctls::Error> {
    let extra = abilities.xsave_words - XSAVE_WORDS;
    if extra == 0 {
        return Ok(vcpu.get_xsave()?.region.to_vec());
    }
    let mut xsave = Xsave::new(extra).map_err(|_| kvm_ioctls::Error::new(libc::ENOMEM))?;
    // SAFETY: the buffer has the size that KVM_CAP_XSAVE2 tells, and no feature is enabled after that.
    unsafe { vcpu.get_xsave2(&mut xsave) }?;
    let mut words = xsave.as_fam_struct_ref().xsave.region.to_vec();
    words.extend_from_slice(xsave.as_slice());
    Ok(words)
}

/// The state may be shorter than what this host keeps: what is beyond is in its initial state, of zeroes.
fn write_xsave(vcpu: &VcpuFd, words: &[u32], abilities: &Abilities) -> Result<(), kvm_ioctls::Error> {
    let invalid = || kvm_ioctls::Error::new(libc::EINVAL);
    let extra = abilities.xsave_words - XSAVE_WORDS;
    let mut xsave = Xsave::new(extra).map_err(|_| kvm_ioctls::Error::new(libc::ENOMEM))?;
    let (region, rest) = words.split_at_checked(XSAVE_WORDS).ok_or_else(invalid)?;
    let to = xsave.as_mut_slice().get_mut(..rest.len()).ok_or_else(invalid)?;
    to.copy_from_slice(rest);
    // SAFETY: the length of the flexible part is not touched.
    unsafe { xsave.as_mut_fam_struct() }
        .xsave
        .region
        .copy_from_slice(region);
    // SAFETY: KVM reads as much as KVM_CAP_XSAVE2 says, or the fixed part alone, which the buffer has.
    unsafe { vcpu.set_xsave2(&xsave) }
}

/// Reads all of `indices` that the vCPU has. KVM lists what the host could have; an MSR that the guest's
/// CPUID leaves out cannot be read, and has no state.
fn read_msrs(vcpu: &VcpuFd, indices: &[u32]) -> Result<Vec<Msr>, kvm_ioctls::Error> {
    let mut found = Vec::with_capacity(indices.len());
    let mut rest = indices;
    while !rest.is_empty() {
        let part = &rest[..rest.len().min(BATCH)];
        let entries: Vec<kvm_msr_entry> = part.iter().map(|&index| entry(index, 0)).collect();
        let mut msrs = batch(&entries)?;
        // KVM stops at the first that it cannot read, and tells how many it has read.
        let read = vcpu.get_msrs(&mut msrs)?;
        found.extend(msrs.as_slice().iter().take(read).map(|entry| Msr {
            index: entry.index,
            data: entry.data,
        }));
        let skipped = usize::from(read < part.len());
        rest = rest.get(read + skipped..).unwrap_or(&[]);
    }
    Ok(found)
}

fn write_msrs(vcpu: &VcpuFd, id: usize, msrs: &[Msr]) -> Result<(), VcpuStateError> {
    let last = |index| match index {
        TSC => 1,
        TSC_DEADLINE => 2,
        _ => 0,
    };
    let mut ordered = msrs.to_vec();
    ordered.sort_by_key(|msr| last(msr.index));
    let mut rest = ordered.as_slice();
    while !rest.is_empty() {
        let part = &rest[..rest.len().min(BATCH)];
        let entries: Vec<kvm_msr_entry> = part.iter().map(|msr| entry(msr.index, msr.data)).collect();
        let set = batch(&entries)
            .and_then(|msrs| vcpu.set_msrs(&msrs))
            .map_err(failed(id, "setting MSRs"))?;
        let Some(refused) = part.get(set) else {
            rest = rest.get(set..).unwrap_or(&[]);
            continue;
        };
        // Some can be read and not written, such as those that tell what the CPU can do: it matters only
        // whether they differ. One that is not there is as good as one of zero.
        let has = read_msrs(vcpu, &[refused.index]).map_err(failed(id, "reading an MSR"))?;
        if has.first().map_or(0, |has| has.data) != refused.data {
            return Err(VcpuStateError::Msr {
                id,
                index: refused.index,
                data: refused.data,
            });
        }
        rest = rest.get(set + 1..).unwrap_or(&[]);
    }
    Ok(())
}

fn entry(index: u32, data: u64) -> kvm_msr_entry {
    kvm_msr_entry {
        index,
        data,
        ..Default::default()
    }
}

fn batch(entries: &[kvm_msr_entry]) -> Result<Msrs, kvm_ioctls::Error> {
    Msrs::from_entries(entries).map_err(|_| kvm_ioctls::Error::new(libc::E2BIG))
}

fn tsc_offset(vcpu: &VcpuFd) -> Option<u64> {
    let mut offset = 0u64;
    let mut attribute = kvm_device_attr {
        group: KVM_VCPU_TSC_CTRL,
        attr: KVM_VCPU_TSC_OFFSET.into(),
        addr: (&raw mut offset) as u64,
        flags: 0,
    };
    // SAFETY: KVM writes the eight bytes of `offset`, whose address the attribute holds.
    unsafe { ioctl::call(vcpu, ioctl::KVM_GET_DEVICE_ATTR, &raw mut attribute) }.ok()?;
    Some(offset)
}

#[cfg(test)]
#[path = "vcpu_state_test.rs"]
mod tests;
