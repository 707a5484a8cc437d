//! What a save costs beside plain direct writes of the same bytes, in one run on the same disk.
//!
//! ```text
//! cargo run --release -p understudy-checkpoint --example throughput -- [directory] [MiB] [threads]
//! ```
#![forbid(unsafe_code)]

use std::error::Error;
use std::fs::{self, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::OFlags;
use rustix::time::{ClockId, clock_gettime};
use understudy_checkpoint::{CHUNK, ChunkBuffer, Description, Identity, Key, Lane, RamRange, Reader, Writer};
use uuid::Uuid;

const ROUNDS: usize = 5;

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let directory = PathBuf::from(arguments.next().unwrap_or_else(|| ".".into()));
    let mib: u64 = arguments.next().map_or(Ok(1024), |text| text.parse())?;
    let threads: usize = arguments.next().map_or(Ok(2), |text| text.parse())?;
    let directory = directory.join(format!("throughput-{}", Uuid::new_v4()));
    fs::create_dir(&directory)?;
    let result = measure(&directory, mib, threads);
    fs::remove_dir_all(&directory)?;
    result
}

fn measure(directory: &Path, mib: u64, threads: usize) -> Result<(), Box<dyn Error>> {
    // A guest's memory: nothing in it is zero, nothing is compressed, so that all of it is written.
    let memory: Vec<u8> = (0..mib << 20).map(|at| (at >> 3) as u8 | 1).collect();
    let (mut plain, mut sealed, mut end, mut read) = (vec![], vec![], vec![], vec![]);
    let (mut large, mut large_cpu) = (vec![], vec![]);
    let (mut plain_cpu, mut sealed_cpu, mut open) = (vec![], vec![], vec![]);
    for _ in 0..ROUNDS {
        let cpu = cpu_time();
        plain.push(plain_writes(&directory.join("plain"), &memory, 16)?);
        plain_cpu.push(cpu_time() - cpu);
        let cpu = cpu_time();
        large.push(plain_writes(&directory.join("plain"), &memory, Lane::CHUNKS)?);
        large_cpu.push(cpu_time() - cpu);
        let checkpoint = directory.join("checkpoint");
        fs::create_dir(&checkpoint)?;
        let cpu = cpu_time();
        let (total, last) = save(&checkpoint, &memory, threads)?;
        sealed_cpu.push(cpu_time() - cpu);
        sealed.push(total);
        end.push(last);
        let (opened, total) = read_back(&checkpoint, &memory)?;
        open.push(opened);
        read.push(total);
        fs::remove_dir_all(&checkpoint)?;
    }
    let rate = |times: &[Duration]| (mib << 20) as f64 / 1e6 / best(times).as_secs_f64();
    println!(
        "{mib} MiB, {threads} threads, best of {ROUNDS}; in brackets: bytes for the CPU time of all threads"
    );
    for (what, times, cpu) in [
        ("plain O_DIRECT writes of 1 MiB, sync", &plain, &plain_cpu),
        ("plain O_DIRECT writes of 4 MiB, sync", &large, &large_cpu),
        ("save: copy, seal, write, sync", &sealed, &sealed_cpu),
    ] {
        println!("  {what:40} {:6.0} MB/s ({:.0} MB/s)", rate(times), rate(cpu));
    }
    let speed = best(&plain).as_secs_f64() / best(&sealed).as_secs_f64();
    println!("  {:40} {speed:6.2}", "save / plain writes of 1 MiB");
    println!(
        "  {:40} {:6.1} ms",
        "end of the save, after the last chunk",
        best(&end).as_secs_f64() * 1e3
    );
    println!(
        "  {:40} {:6.1} ms",
        "open: manifest, index, state verified",
        best(&open).as_secs_f64() * 1e3
    );
    println!(
        "  {:40} {:6.0} MB/s",
        "read back by one thread, verified",
        rate(&read)
    );
    Ok(())
}

/// What all threads of the process have used.
fn cpu_time() -> Duration {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

fn best(times: &[Duration]) -> Duration {
    times.iter().min().copied().unwrap_or_default()
}

/// What `dd oflag=direct conv=fsync` does.
fn plain_writes(path: &Path, memory: &[u8], chunks: usize) -> Result<Duration, Box<dyn Error>> {
    let mut buffer = ChunkBuffer::new(chunks);
    let start = Instant::now();
    let file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .custom_flags(OFlags::DIRECT.bits() as i32)
        .open(path)?;
    for (number, piece) in memory.chunks(buffer.len()).enumerate() {
        buffer[..piece.len()].copy_from_slice(piece);
        file.write_all_at(&buffer[..piece.len()], (number * chunks * CHUNK) as u64)?;
    }
    file.sync_data()?;
    let time = start.elapsed();
    fs::remove_file(path)?;
    Ok(time)
}

fn identity(boot: &str) -> Identity {
    Identity {
        checkpoint: Uuid::nil(),
        guest_uid: "guest".into(),
        machine_id: "machine".into(),
        host_boot_id: boot.into(),
    }
}

fn save(directory: &Path, memory: &[u8], threads: usize) -> Result<(Duration, Duration), Box<dyn Error>> {
    let length = memory.len() as u64;
    let start = Instant::now();
    let writer = Writer::open(directory, &Key::new([7; 32]), identity("one"), length)?;
    writer.write(
        std::slice::from_ref(&(0..length / CHUNK as u64)),
        threads,
        |chunk, buffer| {
            let at = chunk as usize * CHUNK;
            buffer.copy_from_slice(&memory[at..at + buffer.len()]);
            Ok(())
        },
    )?;
    let written = Instant::now();
    let description = Description {
        guest_name: "throughput".into(),
        incarnation: 1,
        owner_epoch: 1,
        vmm_version: env!("CARGO_PKG_VERSION").into(),
        saved_at_ms: 0,
        cpus: 1,
        memory_mib: length >> 20,
        ram: vec![RamRange {
            start: 0,
            offset: 0,
            length,
        }],
        disks: Vec::new(),
        compatibility: serde_json::Value::Null,
    };
    writer.finish(&[1; 64 << 10], description)?;
    Ok((start.elapsed(), written.elapsed()))
}

fn read_back(directory: &Path, memory: &[u8]) -> Result<(Duration, Duration), Box<dyn Error>> {
    let start = Instant::now();
    let reader = Reader::open(directory, &Key::new([7; 32]), &identity("two"))?;
    let opened = start.elapsed();
    let mut buffer = ChunkBuffer::new(Lane::CHUNKS);
    for first in (0..reader.chunks()).step_by(Lane::CHUNKS) {
        let count = Lane::CHUNKS.min((reader.chunks() - first) as usize);
        let bytes = reader.read(first, count, &mut buffer)?;
        let at = first as usize * CHUNK;
        if bytes != &memory[at..at + bytes.len()] {
            return Err("read other bytes than were written".into());
        }
    }
    Ok((opened, start.elapsed()))
}
