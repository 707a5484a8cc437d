//! The node VM itself: the ground on which the other tests stand.

use anyhow::{Result, ensure};

use understudy_tests::e2e::Context;

pub fn node_vm_has_real_kvm(context: &Context) -> Result<()> {
    let modules = context.ssh().run("cut -d ' ' -f 1 /proc/modules")?;
    ensure!(
        modules.lines().any(|module| module == "kvm_amd"),
        "kvm_amd is not loaded in the node:\n{modules}"
    );
    let nested_paging = context
        .ssh()
        .run("test -c /dev/kvm && cat /sys/module/kvm_amd/parameters/npt")?;
    ensure!(
        matches!(nested_paging.trim(), "Y" | "1"),
        "KVM in the node has no nested paging: {nested_paging}"
    );
    Ok(())
}
