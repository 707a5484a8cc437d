//! At its activation a clone forgets the neighbours that it learned while it was isolated, and tells the true
//! ones where its addresses are.
#![allow(clippy::unwrap_used)]

#[path = "common/root.rs"]
mod root;

use std::io::Read;
use std::net::IpAddr;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::thread;
use std::time::Duration;

use root::{is_root, run};
use understudy_guest::activate::meet_neighbours;
use understudy_guest::sys::netlink::{links, neighbours};

fn ip(arguments: &str) {
    run("ip", &arguments.split_whitespace().collect::<Vec<_>>());
}

/// Runs `test` in a network namespace of its own, in which `here` and `there` are the ends of a cable.
fn in_a_network(test: impl FnOnce() + Send + 'static) {
    let tested = thread::spawn(|| {
        // SAFETY: unshare has no memory arguments; the namespace is this thread's alone.
        assert_eq!(unsafe { libc::unshare(libc::CLONE_NEWNET) }, 0);
        ip("link add here address 02:00:00:00:00:01 type veth peer name there address 02:00:00:00:00:02");
        ip("addr add 10.9.0.1/24 dev here");
        ip("addr add fd09::1/64 dev here nodad");
        ip("link set there up");
        ip("link set here up");
        // Nobody answers for the neighbours that are made up here: the kernel must not give them up meanwhile.
        for family in ["ipv4", "ipv6"] {
            let patience = format!("/proc/sys/net/{family}/neigh/here/ucast_solicit");
            std::fs::write(patience, "1000").unwrap();
        }
        test();
    });
    if let Err(panic) = tested.join() {
        std::panic::resume_unwind(panic);
    }
}

fn known() -> Vec<String> {
    let mut known: Vec<String> = neighbours().unwrap().iter().map(|n| n.ip.to_string()).collect();
    known.retain(|ip| !ip.parse::<IpAddr>().unwrap().is_multicast());
    known.sort();
    known
}

#[test]
fn neighbours_of_the_time_of_isolation_are_forgotten_and_set_ones_are_not() {
    if !is_root() {
        return;
    }
    in_a_network(|| {
        let mut learned = Vec::new();
        for (number, state) in ["reachable", "stale", "delay", "probe"].iter().enumerate() {
            for address in [format!("10.9.0.1{number}"), format!("fd09::1{number}")] {
                ip(&format!(
                    "neigh add {address} lladdr 02:00:00:00:00:99 dev here nud {state}"
                ));
                learned.push(address);
            }
        }
        ip("neigh add 10.9.0.20 lladdr 02:00:00:00:00:99 dev here nud permanent");
        ip("neigh add fd09::20 lladdr 02:00:00:00:00:99 dev here nud permanent");
        ip("neigh add 10.9.0.21 lladdr 02:00:00:00:00:99 dev here nud noarp");
        let before = known();
        assert!(learned.iter().all(|l| before.contains(l)), "{before:?}");
        meet_neighbours();
        assert_eq!(known(), ["10.9.0.20", "10.9.0.21", "fd09::20"]);
    });
}

#[test]
fn the_true_neighbours_hear_where_the_addresses_are() {
    if !is_root() {
        return;
    }
    in_a_network(|| {
        let there = links().unwrap().into_iter().find(|l| l.name == "there").unwrap();
        let mut heard = listen(there.index);
        meet_neighbours();
        let mut frame = [0; 2048];
        // Other frames (the kernel's own neighbour discovery) may come between.
        let announced = (0..100).any(|_| {
            let length = heard.read(&mut frame).unwrap();
            let is_arp = length >= 42 && frame[12..14] == [8, 6];
            is_arp && frame[22..28] == [2, 0, 0, 0, 0, 1] && frame[28..32] == [10, 9, 0, 1]
        });
        assert!(announced);
    });
}

/// Everything that arrives at a link.
fn listen(index: u32) -> std::fs::File {
    let all = (libc::ETH_P_ALL as u16).to_be();
    let kind = libc::SOCK_RAW | libc::SOCK_CLOEXEC;
    // SAFETY: socket has no memory arguments; the result is checked before it is owned.
    let fd = unsafe { libc::socket(libc::AF_PACKET, kind, all.into()) };
    assert!(fd >= 0);
    // SAFETY: the descriptor was just made and belongs to nobody else.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    // SAFETY: all-zero is a valid sockaddr_ll.
    let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    address.sll_family = libc::AF_PACKET as u16;
    address.sll_protocol = all;
    address.sll_ifindex = index as i32;
    let length = size_of::<libc::sockaddr_ll>() as libc::socklen_t;
    // SAFETY: the address outlives the call and its true length is given.
    let bound = unsafe { libc::bind(fd.as_raw_fd(), (&raw const address).cast(), length) };
    assert_eq!(bound, 0);
    use rustix::net::sockopt::{Timeout, set_socket_timeout};
    set_socket_timeout(&fd, Timeout::Recv, Some(Duration::from_secs(30))).unwrap();
    fd.into()
}
