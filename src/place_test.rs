use serde_json::json;

use super::*;

pub fn node(name: &str, uid: &str) -> Node {
    serde_json::from_value(json!({"metadata": {"name": name, "uid": uid},
        "status": {"nodeInfo": {"kernelVersion": "6.1.0-47", "bootID": "boot-1", "architecture": "", "containerRuntimeVersion": "",
            "kubeProxyVersion": "", "kubeletVersion": "", "machineID": "", "operatingSystem": "", "osImage": "", "systemUUID": ""}}}))
    .unwrap()
}

fn host(uid: &str) -> Host {
    serde_json::from_value(json!({"apiVersion": "understudy.dev/v1alpha1", "kind": "Host",
        "metadata": {"name": "a"}, "spec": {},
        "status": {"nodeUID": uid, "bootID": "boot-1", "bootedAt": "2026-01-01T00:00:00Z", "heartbeat": "2026-01-01T00:00:10Z"}}))
    .unwrap()
}

fn reason(place: &Place) -> &'static str {
    place.vacancy().unwrap_err().reason
}

#[test]
fn a_node_takes_what_is_new_only_while_its_own_agent_speaks() {
    let (node, host) = (node("a", "1"), host("1"));
    let place = |node: Option<&Node>, host: Option<&Host>, silent| Place::new("a", node, host, silent);
    assert_eq!(place(Some(&node), Some(&host), false).vacancy(), Ok("1"));
    assert_eq!(reason(&place(None, Some(&host), false)), reasons::NODE_NOT_FOUND);
    assert_eq!(reason(&place(Some(&node), None, false)), reasons::NO_AGENT);
    assert_eq!(
        reason(&place(Some(&node), Some(&host), true)),
        reasons::AGENT_SILENT
    );
    // The Host tells of the node that had the name before.
    let before = super::tests::host("0");
    assert_eq!(
        reason(&place(Some(&node), Some(&before), false)),
        reasons::NO_AGENT
    );
    let mut tainted = node.clone();
    tainted.spec.get_or_insert_default().taints = Some(vec![
        serde_json::from_value(json!({"key": OUT_OF_SERVICE, "effect": "NoExecute"})).unwrap(),
    ]);
    let place = place(Some(&tainted), Some(&host), false);
    assert_eq!(reason(&place), reasons::NODE_OUT_OF_SERVICE);
    assert_eq!(place.standing("1"), Standing::OutOfService);
}

#[test]
fn another_uid_is_another_node() {
    let place = Place::new("a", Some(&node("a", "2")), None, false);
    assert_eq!(place.standing("1"), Standing::Replaced);
    assert_eq!(place.standing("2"), Standing::Here);
    assert_eq!(Place::new("a", None, None, false).standing("1"), Standing::Gone);
    assert_eq!(Standing::Replaced.loss("a").reason, reasons::NODE_REPLACED);
}

#[test]
fn when_a_host_was_booted_is_known_only_of_the_boot_that_runs() {
    let mut node = node("a", "1");
    let host = host("1");
    assert!(
        Place::new("a", Some(&node), Some(&host), false)
            .booted_at
            .is_some()
    );
    let info = node.status.as_mut().unwrap().node_info.as_mut().unwrap();
    info.boot_id = "boot-2".into();
    assert_eq!(Place::new("a", Some(&node), Some(&host), false).booted_at, None);
}
