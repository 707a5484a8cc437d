//! Disks as installers make them: the whole disk, or partitions by MBR or GPT.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;

use understudy_vmm_control::config::{self, DiskRole, Role};

use super::*;

fn names(names: &[&str]) -> Vec<String> {
    names.iter().map(|name| (*name).to_owned()).collect()
}

#[test]
fn the_newest_kernel_that_has_its_initrd_is_chosen() {
    let found = choose(
        "root",
        &names(&[
            "vmlinuz-6.1.0-9-cloud-amd64",
            "initrd.img-6.1.0-9-cloud-amd64",
            "vmlinuz-6.1.0-56-cloud-amd64",
            "initrd.img-6.1.0-56-cloud-amd64",
            "vmlinuz-6.12.1-cloud-amd64",
            "vmlinuz-7.0.dpkg-new",
            "config-6.1.0-56-cloud-amd64",
        ]),
    )
    .unwrap();
    assert_eq!(found.0, "vmlinuz-6.1.0-56-cloud-amd64");
    assert_eq!(found.1, "initrd.img-6.1.0-56-cloud-amd64");
}

#[test]
fn a_disk_without_kernel_or_initrd_is_told_what_to_install() {
    assert!(matches!(
        choose("root", &names(&["grub"])),
        Err(DiskBootError::NoKernel { .. })
    ));
    let error = choose("root", &names(&["vmlinuz-6.1"])).unwrap_err().to_string();
    assert!(error.contains("/boot/initrd.img-6.1"), "{error}");
}

const MIB: u64 = 1 << 20;
const SIZE: u64 = 24 * MIB;

/// An ext4 with a kernel whose content is `kernel`, or without `/boot` where that is empty.
fn ext4(dir: &Path, kernel: &str, size: u64) -> Vec<u8> {
    let (tree, image) = (dir.join("tree"), dir.join("fs.ext4"));
    let _ = fs::remove_dir_all(&tree);
    let _ = fs::remove_file(&image);
    fs::create_dir_all(tree.join("etc/default/grub.d")).unwrap();
    if !kernel.is_empty() {
        fs::create_dir(tree.join("boot")).unwrap();
        fs::write(tree.join("boot/vmlinuz-6.1.0-9-amd64"), "old").unwrap();
        fs::write(tree.join("boot/initrd.img-6.1.0-9-amd64"), "old").unwrap();
        fs::write(tree.join("boot/vmlinuz-6.1.0-10-amd64"), kernel).unwrap();
        fs::write(tree.join("boot/initrd.img-6.1.0-10-amd64"), "initrd").unwrap();
    }
    fs::write(
        tree.join("etc/default/grub"),
        "GRUB_CMDLINE_LINUX_DEFAULT=\"quiet\"\nGRUB_CMDLINE_LINUX=\"\"\n",
    )
    .unwrap();
    fs::write(
        tree.join("etc/default/grub.d/50-console.cfg"),
        "GRUB_CMDLINE_LINUX=\"$GRUB_CMDLINE_LINUX console=ttyS0\"\n",
    )
    .unwrap();
    let made = Command::new("mke2fs")
        .args([
            "-q",
            "-t",
            "ext4",
            "-U",
            "5c0c4b17-e5ea-468a-9d59-3df6af75a2ec",
            "-d",
        ])
        .arg(&tree)
        .arg(&image)
        .arg(format!("{}k", size / 1024))
        .status()
        .unwrap();
    assert!(made.success());
    fs::read(image).unwrap()
}

/// Opens an image with `pieces` written at their offsets.
fn disk(dir: &Path, pieces: &[(u64, &[u8])]) -> Arc<Disk> {
    let source = dir.join("disk.raw");
    let file = fs::File::create(&source).unwrap();
    file.set_len(SIZE).unwrap();
    for (at, bytes) in pieces {
        file.write_all_at(bytes, *at).unwrap();
    }
    let config = config::Disk {
        name: "root".to_owned(),
        role: DiskRole::Root,
        source,
        read_only: true,
        layer: None,
    };
    Disk::open(&config, Role::Active).unwrap()
}

fn expect(disk: &Arc<Disk>) {
    let payload = find(disk).unwrap();
    assert_eq!(payload.kernel, b"new kernel");
    assert_eq!(payload.kernel_name, "/boot/vmlinuz-6.1.0-10-amd64");
    assert_eq!(payload.initrd.unwrap(), b"initrd");
    assert_eq!(
        payload.cmdline,
        "BOOT_IMAGE=/boot/vmlinuz-6.1.0-10-amd64 root=UUID=5c0c4b17-e5ea-468a-9d59-3df6af75a2ec ro console=ttyS0 quiet"
    );
}

fn mbr(entries: &[(u8, u64, u64)]) -> Vec<u8> {
    let mut sector = vec![0; 512];
    for (index, (kind, start, size)) in entries.iter().enumerate() {
        let at = 446 + index * 16;
        sector[at + 4] = *kind;
        sector[at + 8..at + 12].copy_from_slice(&((start / 512) as u32).to_le_bytes());
        sector[at + 12..at + 16].copy_from_slice(&((size / 512) as u32).to_le_bytes());
    }
    sector[510..].copy_from_slice(&[0x55, 0xaa]);
    sector
}

#[test]
fn a_file_system_on_the_whole_disk_is_booted() {
    let dir = tempfile::tempdir().unwrap();
    let fs = ext4(dir.path(), "new kernel", SIZE);
    expect(&disk(dir.path(), &[(0, &fs)]));
}

#[test]
fn the_partition_that_holds_boot_is_found_by_mbr() {
    let dir = tempfile::tempdir().unwrap();
    let data = ext4(dir.path(), "", 12 * MIB);
    let root = ext4(dir.path(), "new kernel", 8 * MIB);
    let table = mbr(&[
        (0x82, MIB, MIB),
        (0x83, 2 * MIB, 12 * MIB),
        (0x83, 15 * MIB, 8 * MIB),
        (0x83, 100 * MIB, MIB),
    ]);
    expect(&disk(
        dir.path(),
        &[(0, &table), (2 * MIB, &data), (15 * MIB, &root)],
    ));
}

#[test]
fn the_partition_of_the_root_type_goes_before_a_larger_one_by_gpt() {
    let dir = tempfile::tempdir().unwrap();
    let other = ext4(dir.path(), "another system", 12 * MIB);
    let root = ext4(dir.path(), "new kernel", 8 * MIB);
    let mut header = vec![0; 512];
    header[0..8].copy_from_slice(b"EFI PART");
    header[72..80].copy_from_slice(&2u64.to_le_bytes());
    header[80..84].copy_from_slice(&128u32.to_le_bytes());
    header[84..88].copy_from_slice(&128u32.to_le_bytes());
    let entry = |kind: [u8; 16], start: u64, size: u64| {
        let mut entry = vec![0; 128];
        entry[0..16].copy_from_slice(&kind);
        entry[32..40].copy_from_slice(&(start / 512).to_le_bytes());
        entry[40..48].copy_from_slice(&((start + size) / 512 - 1).to_le_bytes());
        entry
    };
    let root_type = [
        0xe3, 0xbc, 0x68, 0x4f, 0xcd, 0xe8, 0xb1, 0x4d, 0x96, 0xe7, 0xfb, 0xca, 0xf9, 0x84, 0xb7, 0x09,
    ];
    let entries = [
        entry([1; 16], 2 * MIB, 12 * MIB),
        entry(root_type, 15 * MIB, 8 * MIB),
    ]
    .concat();
    let table = mbr(&[(0xee, 512, SIZE - 512)]);
    expect(&disk(
        dir.path(),
        &[
            (0, &table),
            (512, &header),
            (1024, &entries),
            (2 * MIB, &other),
            (15 * MIB, &root),
        ],
    ));
}

#[test]
fn a_disk_that_cannot_be_booted_says_why() {
    let dir = tempfile::tempdir().unwrap();
    let error = find(&disk(dir.path(), &[])).unwrap_err().to_string();
    assert!(error.contains("no ext4 root file system"), "{error}");
    let data = ext4(dir.path(), "", 8 * MIB);
    let error = find(&disk(dir.path(), &[(0, &data)])).unwrap_err().to_string();
    assert!(error.contains("has no /boot"), "{error}");
    // A partition table of nonsense, and a file system cut short.
    let table = mbr(&[
        (0x83, 23 * MIB, 8 * MIB),
        (0x83, 0xffff_ffff * 512, 0xffff_ffff * 512),
    ]);
    let error = find(&disk(dir.path(), &[(0, &table)])).unwrap_err().to_string();
    assert!(error.contains("disk root"), "{error}");
    let root = ext4(dir.path(), "new kernel", SIZE);
    let cut = &root[..64 << 10];
    let error = find(&disk(dir.path(), &[(0, cut)])).unwrap_err().to_string();
    assert!(error.contains("disk root"), "{error}");
}
