//! Telling neighbours where an address lives now: gratuitous ARP (RFC 5227) and unsolicited neighbour
//! advertisements (RFC 4861, 7.2.6), as raw Ethernet frames.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use super::netlink;

const ETH_P_ARP: u16 = 0x0806;
const ETH_P_IPV6: u16 = 0x86dd;

/// Announces every address of every Ethernet link that is up; returns how many were announced.
pub fn announce() -> io::Result<usize> {
    let links = netlink::links()?;
    let addresses = netlink::addresses()?;
    let mut announced = 0;
    for link in links.iter().filter(|l| !l.loopback && l.up) {
        let Ok(mac) = <[u8; 6]>::try_from(link.mac.as_slice()) else {
            continue;
        };
        for address in addresses.iter().filter(|a| a.index == link.index) {
            let frame = match address.ip {
                IpAddr::V4(ip) => gratuitous_arp(mac, ip),
                IpAddr::V6(ip) => advertisement(mac, ip),
            };
            send(link.index, &frame)?;
            announced += 1;
        }
    }
    Ok(announced)
}

fn gratuitous_arp(mac: [u8; 6], ip: Ipv4Addr) -> Vec<u8> {
    let mut frame = vec![0xff; 6];
    frame.extend_from_slice(&mac);
    frame.extend_from_slice(&ETH_P_ARP.to_be_bytes());
    // Ethernet, IPv4, lengths 6 and 4, request: sender and target are the same address.
    frame.extend_from_slice(&[0, 1, 8, 0, 6, 4, 0, 1]);
    frame.extend_from_slice(&mac);
    frame.extend_from_slice(&ip.octets());
    frame.extend_from_slice(&[0; 6]);
    frame.extend_from_slice(&ip.octets());
    frame
}

fn advertisement(mac: [u8; 6], ip: Ipv6Addr) -> Vec<u8> {
    let all_nodes = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
    // Type 136, override flag, target address, target link-layer address option.
    let mut message = vec![136, 0, 0, 0, 0x20, 0, 0, 0];
    message.extend_from_slice(&ip.octets());
    message.extend_from_slice(&[2, 1]);
    message.extend_from_slice(&mac);
    let sum = checksum(ip, all_nodes, &message);
    message[2..4].copy_from_slice(&sum.to_be_bytes());

    let mut frame = vec![0x33, 0x33, 0, 0, 0, 1];
    frame.extend_from_slice(&mac);
    frame.extend_from_slice(&ETH_P_IPV6.to_be_bytes());
    frame.extend_from_slice(&[0x60, 0, 0, 0]);
    frame.extend_from_slice(&(message.len() as u16).to_be_bytes());
    // ICMPv6, hop limit 255 as neighbour discovery demands.
    frame.extend_from_slice(&[58, 255]);
    frame.extend_from_slice(&ip.octets());
    frame.extend_from_slice(&all_nodes.octets());
    frame.extend_from_slice(&message);
    frame
}

fn checksum(source: Ipv6Addr, destination: Ipv6Addr, message: &[u8]) -> u16 {
    let mut bytes = source.octets().to_vec();
    bytes.extend_from_slice(&destination.octets());
    bytes.extend_from_slice(&(message.len() as u32).to_be_bytes());
    bytes.extend_from_slice(&[0, 0, 0, 58]);
    bytes.extend_from_slice(message);
    let mut sum: u32 = bytes
        .chunks(2)
        .map(|c| u32::from(c[0]) << 8 | u32::from(*c.get(1).unwrap_or(&0)))
        .sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

fn send(index: u32, frame: &[u8]) -> io::Result<()> {
    // SAFETY: socket has no memory arguments; the result is checked before it is owned. Protocol 0: it
    // receives nothing.
    let fd = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor was just made and belongs to nobody else.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    // SAFETY: all-zero is a valid sockaddr_ll.
    let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    address.sll_family = libc::AF_PACKET as u16;
    address.sll_ifindex = index as i32;
    address.sll_halen = 6;
    address.sll_addr[..6].copy_from_slice(&frame[..6]);
    let length = size_of::<libc::sockaddr_ll>() as libc::socklen_t;
    // SAFETY: frame and address outlive the call, and their true lengths are given.
    let sent = unsafe {
        libc::sendto(
            fd.as_raw_fd(),
            frame.as_ptr().cast(),
            frame.len(),
            0,
            (&raw const address).cast(),
            length,
        )
    };
    if sent < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_are_what_the_standards_say() {
        let mac = [2, 0, 0, 0, 0, 9];
        let arp = gratuitous_arp(mac, Ipv4Addr::new(10, 0, 0, 5));
        assert_eq!(arp.len(), 42);
        assert_eq!(
            (&arp[28..32], &arp[38..42]),
            (&[10, 0, 0, 5][..], &[10, 0, 0, 5][..])
        );
        let ip: Ipv6Addr = "fe80::9".parse().unwrap();
        let na = advertisement(mac, ip);
        assert_eq!(na.len(), 14 + 40 + 32);
        // A message with its checksum in place sums up to nothing.
        let all_nodes = "ff02::1".parse().unwrap();
        assert_eq!(checksum(ip, all_nodes, &na[54..]), 0);
    }
}
