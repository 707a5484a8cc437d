//! What saving costs: space and time, reckoned before anything is paused.

use std::time::Duration;

use understudy_vmm_control::config::VmConfig;

use crate::durable;
use crate::node::Node;
use crate::vmm::Instance;

/// Beside memory a checkpoint holds devices, an index and a manifest: little, and this is more.
const OVERHEAD: u64 = 4 << 20;
/// One part in so many of memory: what is dirtied while it is written is written again.
const AGAIN: u64 = 4;
/// Space that is left to others.
pub(super) const SPARE: u64 = 64 << 20;
/// Bytes from which on a save says something of the disk's throughput.
const TELLING: u64 = 16 << 20;

/// What saving all sessions costs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Estimate {
    /// Sessions.
    pub sessions: usize,
    /// Memory of their guests, in bytes.
    pub memory_bytes: u64,
    /// Space that must be free, in bytes.
    pub space_bytes: u64,
    /// How long it takes, at the throughput that was measured last.
    pub time: Duration,
}

/// Reckons what saving the sessions of all running guests costs: as if no page were zero.
pub fn estimate(node: &Node) -> Estimate {
    let memory: Vec<u64> = node
        .objects
        .guests()
        .iter()
        .filter_map(|guest| super::save::running(node, guest))
        .filter_map(|instance| memory_bytes(&instance))
        .collect();
    reckon(&memory, rate(node))
}

/// Memory of the guest behind a VMM, in bytes.
pub fn memory_bytes(instance: &Instance) -> Option<u64> {
    let config: VmConfig = durable::read_json(&instance.config).ok().flatten()?;
    Some(config.memory_mib << 20)
}

/// Space for one session that a save may need, in bytes.
pub fn space_bytes(memory: u64) -> u64 {
    memory + memory / AGAIN + OVERHEAD
}

fn reckon(memory: &[u64], bytes_per_second: u64) -> Estimate {
    let sum: u64 = memory.iter().sum();
    let space = memory.iter().map(|bytes| space_bytes(*bytes)).sum::<u64>();
    Estimate {
        sessions: memory.len(),
        memory_bytes: sum,
        space_bytes: if memory.is_empty() { 0 } else { space + SPARE },
        time: Duration::from_millis(sum.saturating_mul(1000) / bytes_per_second.max(1)),
    }
}

/// Bytes a second of the last save, or what the configuration assumes.
fn rate(node: &Node) -> u64 {
    match durable::read_json::<u64>(&rate_file(node)) {
        Ok(Some(rate)) if rate > 0 => rate,
        _ => node.config.host.assumed_save_mib_per_second << 20,
    }
}

fn rate_file(node: &Node) -> std::path::PathBuf {
    node.sessions.records.dir().join("bytes-per-second.json")
}

/// Remembers how fast a save of `bytes` was, which took `took_us` microseconds.
pub fn remember_rate(node: &Node, bytes: u64, took_us: i64) {
    let took = u64::try_from(took_us).unwrap_or(0).max(1);
    if bytes < TELLING {
        return;
    }
    let rate = bytes.saturating_mul(1_000_000) / took;
    if let Err(error) = durable::write_json_relaxed(&rate_file(node), &rate.max(1)) {
        tracing::warn!(%error, "the throughput of saves is not remembered");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn space_and_time_grow_with_the_guests_and_nothing_needs_nothing() {
        let gib = 1u64 << 30;
        assert_eq!(reckon(&[], 1), Estimate::default());
        let one = reckon(&[gib], gib / 10);
        assert_eq!(one.time, Duration::from_secs(10));
        assert!(one.space_bytes > gib);
        let two = reckon(&[gib, gib], gib / 10);
        assert_eq!(two.time, Duration::from_secs(20));
        assert!(two.space_bytes > one.space_bytes + gib);
    }
}
