//! Against the kernel's ext4: file systems are changed while mounted, copied as a power cut leaves them,
//! and what we read is compared with what `e2fsck` makes of the copy.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;

use proptest::prelude::*;

use super::*;

/// A mounted loop device, unmounted when dropped.
struct Mount<'a>(&'a Path);

impl Drop for Mount<'_> {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(self.0).status();
    }
}

fn run(program: &str, arguments: &[&str]) -> bool {
    let output = Command::new(program).args(arguments).output();
    output.is_ok_and(|output| output.status.success())
}

fn read_file(file: &File) -> impl FnMut(u64, &mut [u8]) -> io::Result<()> + '_ {
    |at, buffer| file.read_exact_at(buffer, at)
}

/// Churns `dir` so that the journal wraps and blocks are revoked: directories (whose blocks are metadata)
/// come and go, and files take their places.
fn churn(dir: &Path, round: u32) {
    let sub = dir.join(format!("d{}", round % 7));
    fs::create_dir_all(&sub).unwrap();
    for name in 0..120 {
        fs::write(
            sub.join(format!("a-rather-long-name-{name:04}")),
            [round as u8; 10],
        )
        .unwrap();
    }
    File::open(&sub).unwrap().sync_all().unwrap();
    if round % 3 == 2 {
        fs::remove_dir_all(&sub).unwrap();
        let file = dir.join(format!("file{}", round % 9));
        fs::write(&file, vec![round as u8; 300_000]).unwrap();
        File::open(&file).unwrap().sync_all().unwrap();
    }
}

/// What a cut through a file system showed about its journal.
#[derive(Default)]
struct Seen {
    /// Its end lies before its beginning.
    wrapped: bool,
    /// Blocks were revoked.
    revoked: bool,
}

/// Cuts the power of `image` and compares what its journal holds, or with `all` every block, with what
/// `e2fsck` makes of it.
fn compare(image: &Path, dir: &Path, all: bool) -> Seen {
    let (cut, replayed) = (dir.join("cut.ext4"), dir.join("replayed.ext4"));
    fs::copy(image, &cut).unwrap();
    fs::copy(&cut, &replayed).unwrap();
    // Its exit code tells that it changed the file system.
    let _ = Command::new("e2fsck")
        .args(["-E", "journal_only", "-y", replayed.to_str().unwrap()])
        .output()
        .unwrap();
    let (cut, replayed) = (File::open(cut).unwrap(), File::open(replayed).unwrap());
    let mut read = read_file(&cut);
    let overlay = Overlay::load(&mut read).unwrap();
    if overlay.blocks.is_empty() {
        return Seen::default();
    }
    let mut superblock = vec![0; SUPERBLOCK_SIZE];
    read(SUPERBLOCK, &mut superblock).unwrap();
    let journal = Layout::read(&mut read, &superblock).unwrap();
    let in_journal = |block: u64| {
        let holds = |e: &Extent| (e.physical..e.physical + u64::from(e.length)).contains(&block);
        journal.extents.iter().any(holds)
    };
    let size = overlay.block_size;
    let (mut ours, mut theirs) = (vec![0; size as usize], vec![0; size as usize]);
    let blocks: Vec<u64> = match all {
        true => (0..cut.metadata().unwrap().len() / size).collect(),
        false => overlay.blocks.keys().copied().collect(),
    };
    for block in blocks {
        // e2fsck changes the superblock and the journal by itself.
        if in_journal(block) || block <= SUPERBLOCK / size {
            continue;
        }
        overlay.read(&mut read, block * size, &mut ours).unwrap();
        replayed.read_exact_at(&mut theirs, block * size).unwrap();
        assert!(ours == theirs, "block {block} differs from what e2fsck replays");
    }
    let mut revoked = HashMap::new();
    Replay::scan(&mut read, &journal, &mut revoked).unwrap();
    let before_start = |newer: &Newer| {
        (journal.first..journal.start).any(|logical| journal.physical(logical).unwrap() == newer.block)
    };
    Seen {
        wrapped: overlay.blocks.values().any(before_start),
        revoked: !revoked.is_empty(),
    }
}

#[test]
fn a_killed_guests_file_system_reads_as_its_kernel_would_replay_it() {
    for block_size in ["4096", "1024"] {
        // Hundreds of syncs: in memory where there is room for them.
        let dir = tempfile::tempdir_in("/dev/shm")
            .or_else(|_| tempfile::tempdir())
            .unwrap();
        let (image, point) = (dir.path().join("fs.ext4"), dir.path().join("mnt"));
        let (image_text, point_text) = (image.to_str().unwrap(), point.to_str().unwrap());
        fs::create_dir(&point).unwrap();
        let options = [
            "-q", "-t", "ext4", "-b", block_size, "-J", "size=4", image_text, "40M",
        ];
        assert!(run("mke2fs", &options));
        if !run("mount", &["-o", "loop", image_text, point_text]) {
            eprintln!("SKIPPED: loop devices cannot be mounted here");
            return;
        }
        let _mount = Mount(&point);
        let mut seen = Seen::default();
        let mut round = 0;
        while !(seen.wrapped && seen.revoked) {
            assert!(round < 300, "the journal never wrapped, or nothing was revoked");
            churn(&point, round);
            round += 1;
            let now = compare(&image, dir.path(), round % 8 == 1);
            seen.wrapped |= now.wrapped;
            seen.revoked |= now.revoked;
        }
    }
}

#[test]
fn a_clean_file_system_has_an_empty_overlay() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("fs.ext4");
    assert!(run(
        "mke2fs",
        &["-q", "-t", "ext4", image.to_str().unwrap(), "16M"]
    ));
    let file = File::open(&image).unwrap();
    let overlay = Overlay::load(&mut read_file(&file)).unwrap();
    assert!(overlay.blocks.is_empty() && overlay.superblock.is_none());
}

proptest! {
    /// The disk is the guest's: whatever it wrote there, we neither panic nor hang.
    #[test]
    fn no_journal_makes_the_reader_panic(
        changes in proptest::collection::vec((0usize..24576, any::<u8>()), 0..200),
        start in any::<u32>(),
    ) {
        let mut image = vec![0u8; 64 << 10];
        let put = |image: &mut Vec<u8>, at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
        put(&mut image, 1024 + 0x5c, &4u32.to_le_bytes());
        put(&mut image, 1024 + 0x60, &4u32.to_le_bytes());
        put(&mut image, 1024 + 0xe0, &8u32.to_le_bytes());
        put(&mut image, 1024 + 0x28, &32u32.to_le_bytes());
        put(&mut image, 1024 + 0x58, &128u16.to_le_bytes());
        // Inode table in block 4, journal in blocks 16 to 31.
        put(&mut image, 2048 + 8, &4u32.to_le_bytes());
        let inode = 4 * 1024 + 7 * 128;
        put(&mut image, inode + 0x20, &0x8_0000u32.to_le_bytes());
        put(&mut image, inode + 0x28, &[0x0a, 0xf3, 1, 0, 4, 0, 0, 0]);
        put(&mut image, inode + 0x28 + 16, &16u16.to_le_bytes());
        put(&mut image, inode + 0x28 + 20, &16u32.to_le_bytes());
        let journal = 16 * 1024;
        for (at, value) in [(0, MAGIC), (4, 4), (0xc, 1024), (0x10, 16), (0x14, 1), (0x18, 7), (0x1c, start % 17)] {
            put(&mut image, journal + at, &value.to_be_bytes());
        }
        for block in 17..32u32 {
            put(&mut image, block as usize * 1024, &MAGIC.to_be_bytes());
            put(&mut image, block as usize * 1024 + 4, &(1 + block % 5).to_be_bytes());
            put(&mut image, block as usize * 1024 + 8, &(7 + block / 9).to_be_bytes());
        }
        for (at, value) in changes {
            image[8192 + at] ^= value;
        }
        let mut read = |at: u64, buffer: &mut [u8]| {
            let bytes = usize::try_from(at).ok()
                .and_then(|at| image.get(at..at.checked_add(buffer.len())?))
                .ok_or(io::ErrorKind::UnexpectedEof)?;
            buffer.copy_from_slice(bytes);
            Ok(())
        };
        if let Ok(overlay) = Overlay::load(&mut read) {
            let _ = overlay.read(&mut read, 0, &mut [0; 4096]);
        }
    }
}
