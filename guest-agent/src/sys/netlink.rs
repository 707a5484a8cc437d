//! Links, addresses, routes and neighbours over `rtnetlink(7)`: dumps, and forgetting neighbours.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::time::Duration;

/// A network link.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Link {
    /// Index.
    pub index: u32,
    /// Kernel name.
    pub name: String,
    /// Hardware address; empty where there is none.
    pub mac: Vec<u8>,
    /// Whether it is a loopback link.
    pub loopback: bool,
    /// Whether it is administratively up.
    pub up: bool,
}

/// An address of a link.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Address {
    /// Link.
    pub index: u32,
    /// Address.
    pub ip: IpAddr,
    /// Prefix length.
    pub prefix: u8,
}

/// A route to everywhere.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DefaultRoute {
    /// Link.
    pub index: u32,
    /// Gateway.
    pub gateway: IpAddr,
}

/// A neighbour whose hardware address is known.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Neighbour {
    /// Link.
    pub index: u32,
    /// Address.
    pub ip: IpAddr,
    /// Hardware address.
    pub mac: Vec<u8>,
}

const RTM_GETLINK: u16 = 18;
const RTM_GETADDR: u16 = 22;
const RTM_GETROUTE: u16 = 26;
const RTM_DELNEIGH: u16 = 29;
const RTM_GETNEIGH: u16 = 30;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const NLM_F_REQUEST_ACK: u16 = 0x5;
const NLM_F_REQUEST_DUMP: u16 = 0x301;
/// Fixed part of neighbour messages (`struct ndmsg`), in bytes: family, index at 4, state at 8, flags at 10.
const NDMSG: usize = 12;
const NUD_NOARP: u16 = 0x40;
const NUD_PERMANENT: u16 = 0x80;
const NTF_EXT_LEARNED: u8 = 0x10;

/// All links.
pub fn links() -> io::Result<Vec<Link>> {
    let mut found = Vec::new();
    dump(RTM_GETLINK, &[0u8; 16], 16, |header, attributes| {
        let flags = u32_at(header, 8);
        let mut link = Link {
            index: u32_at(header, 4),
            name: String::new(),
            mac: Vec::new(),
            loopback: flags & libc::IFF_LOOPBACK as u32 != 0,
            up: flags & libc::IFF_UP as u32 != 0,
        };
        for (kind, value) in attributes {
            match kind {
                1 => link.mac = value.to_vec(),
                3 => link.name = String::from_utf8_lossy(value.strip_suffix(b"\0").unwrap_or(value)).into(),
                _ => {}
            }
        }
        found.push(link);
    })?;
    Ok(found)
}

/// All addresses.
pub fn addresses() -> io::Result<Vec<Address>> {
    let mut found = Vec::new();
    dump(RTM_GETADDR, &[0u8; 8], 8, |header, attributes| {
        // IFA_LOCAL is the address itself; on point-to-point links IFA_ADDRESS is the peer's.
        let mut ip = None;
        for (kind, value) in attributes {
            match (kind, parse_ip(value)) {
                (2, Some(local)) => ip = Some(local),
                (1, Some(address)) => ip = ip.or(Some(address)),
                _ => {}
            }
        }
        if let Some(ip) = ip {
            found.push(Address {
                index: u32_at(header, 4),
                ip,
                prefix: header[1],
            });
        }
    })?;
    Ok(found)
}

/// Default routes of the main table that have a gateway.
pub fn default_routes() -> io::Result<Vec<DefaultRoute>> {
    let mut found = Vec::new();
    dump(RTM_GETROUTE, &[0u8; 12], 12, |header, attributes| {
        let (destination_length, table, kind) = (header[1], header[4], header[7]);
        if destination_length != 0 || table != libc::RT_TABLE_MAIN || kind != libc::RTN_UNICAST {
            return;
        }
        let (mut index, mut gateway) = (None, None);
        for (kind, value) in attributes {
            match kind {
                4 if value.len() == 4 => index = Some(u32_at(value, 0)),
                5 => gateway = parse_ip(value),
                // RTA_VIA: a gateway of another family, after two bytes of family.
                18 if value.len() > 2 => gateway = parse_ip(&value[2..]),
                _ => {}
            }
        }
        if let (Some(index), Some(gateway)) = (index, gateway) {
            found.push(DefaultRoute { index, gateway });
        }
    })?;
    Ok(found)
}

/// Neighbours whose hardware address is known.
pub fn neighbours() -> io::Result<Vec<Neighbour>> {
    let mut found = Vec::new();
    dump(RTM_GETNEIGH, &[0u8; NDMSG], NDMSG, |header, attributes| {
        let (mut ip, mut mac) = (None, None);
        for (kind, value) in attributes {
            match kind {
                1 => ip = parse_ip(value),
                2 => mac = Some(value.to_vec()),
                _ => {}
            }
        }
        if let (Some(ip), Some(mac)) = (ip, mac) {
            found.push(Neighbour {
                index: u32_at(header, 4),
                ip,
                mac,
            });
        }
    })?;
    Ok(found)
}

/// Forgets every neighbour that was learned, on all links, whatever its state; returns how many. Those that
/// somebody has set stay: permanent ones, ones that need no resolution, and those of a routing daemon.
pub fn forget_neighbours() -> io::Result<usize> {
    let mut learned = Vec::new();
    dump(RTM_GETNEIGH, &[0u8; NDMSG], NDMSG, |header, attributes| {
        let family = i32::from(header[0]);
        let (state, flags) = (u16_at(header, 8), header[10]);
        let is_ip = family == libc::AF_INET || family == libc::AF_INET6;
        if !is_ip || state & (NUD_PERMANENT | NUD_NOARP) != 0 || flags & NTF_EXT_LEARNED != 0 {
            return;
        }
        if let Some((kind, ip)) = attributes.into_iter().find(|(kind, _)| *kind == 1) {
            let mut body = vec![header[0], 0, 0, 0];
            body.extend_from_slice(&header[4..8]);
            body.extend_from_slice(&[0; 4]);
            body.extend_from_slice(&(4 + ip.len() as u16).to_ne_bytes());
            body.extend_from_slice(&kind.to_ne_bytes());
            body.extend_from_slice(ip);
            learned.push(body);
        }
    })?;
    let socket = open()?;
    let mut forgotten = 0;
    for body in &learned {
        send(&socket, RTM_DELNEIGH, NLM_F_REQUEST_ACK, body)?;
        match acknowledgement(&socket) {
            Ok(()) => forgotten += 1,
            // The kernel forgot it by itself meanwhile, or its link is gone.
            Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENODEV)) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(forgotten)
}

/// `aa:bb:cc:dd:ee:ff`.
pub fn format_mac(mac: &[u8]) -> String {
    mac.iter()
        .map(|b| format!("{b:02x}"))
        .collect::<Vec<_>>()
        .join(":")
}

fn parse_ip(bytes: &[u8]) -> Option<IpAddr> {
    match bytes.len() {
        4 => Some(IpAddr::V4(Ipv4Addr::new(bytes[0], bytes[1], bytes[2], bytes[3]))),
        16 => <[u8; 16]>::try_from(bytes)
            .ok()
            .map(|b| IpAddr::V6(Ipv6Addr::from(b))),
        _ => None,
    }
}

/// Reads a native u32; 0 where the bytes are not there.
fn u32_at(bytes: &[u8], at: usize) -> u32 {
    bytes
        .get(at..at + 4)
        .and_then(|b| b.try_into().ok())
        .map_or(0, u32::from_ne_bytes)
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    bytes
        .get(at..at + 2)
        .and_then(|b| b.try_into().ok())
        .map_or(0, u16::from_ne_bytes)
}

/// Asks for a dump and calls `each` with the fixed part and the attributes of every answer.
fn dump(
    request: u16,
    body: &[u8],
    fixed: usize,
    mut each: impl FnMut(&[u8], Vec<(u16, &[u8])>),
) -> io::Result<()> {
    let socket = open()?;
    send(&socket, request, NLM_F_REQUEST_DUMP, body)?;

    let mut buffer = vec![0u8; 64 * 1024];
    loop {
        let received = rustix::io::retry_on_intr(|| rustix::io::read(&socket, &mut buffer[..]))?;
        let mut rest = &buffer[..received];
        if rest.is_empty() {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        while rest.len() >= 16 {
            let length = u32_at(rest, 0) as usize;
            if length < 16 || length > rest.len() {
                return Err(io::ErrorKind::InvalidData.into());
            }
            let payload = &rest[16..length];
            match u16_at(rest, 4) {
                NLMSG_DONE => return Ok(()),
                NLMSG_ERROR => {
                    let code = u32_at(payload, 0) as i32;
                    return Err(io::Error::from_raw_os_error(-code));
                }
                _ if payload.len() >= fixed => each(&payload[..fixed], attributes(&payload[fixed..])),
                _ => {}
            }
            rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
        }
    }
}

fn send(socket: &OwnedFd, request: u16, flags: u16, body: &[u8]) -> io::Result<()> {
    let mut message = Vec::with_capacity(16 + body.len());
    message.extend_from_slice(&((16 + body.len()) as u32).to_ne_bytes());
    message.extend_from_slice(&request.to_ne_bytes());
    message.extend_from_slice(&flags.to_ne_bytes());
    message.extend_from_slice(&1u32.to_ne_bytes());
    message.extend_from_slice(&0u32.to_ne_bytes());
    message.extend_from_slice(body);
    rustix::net::send(socket, &message, rustix::net::SendFlags::empty())?;
    Ok(())
}

/// Waits for the answer to a request that is no dump.
fn acknowledgement(socket: &OwnedFd) -> io::Result<()> {
    let mut buffer = [0u8; 1024];
    let received = rustix::io::retry_on_intr(|| rustix::io::read(socket, &mut buffer[..]))?;
    let answer = &buffer[..received];
    if answer.len() < 20 || u16_at(answer, 4) != NLMSG_ERROR {
        return Err(io::ErrorKind::InvalidData.into());
    }
    match u32_at(answer, 16) as i32 {
        0 => Ok(()),
        code => Err(io::Error::from_raw_os_error(-code)),
    }
}

fn open() -> io::Result<OwnedFd> {
    // SAFETY: socket has no memory arguments; the result is checked before it is owned.
    let fd = unsafe {
        libc::socket(
            libc::AF_NETLINK,
            libc::SOCK_RAW | libc::SOCK_CLOEXEC,
            libc::NETLINK_ROUTE,
        )
    };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor was just made and belongs to nobody else.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    // SAFETY: all-zero is a valid sockaddr_nl (kernel chooses the port).
    let mut address: libc::sockaddr_nl = unsafe { std::mem::zeroed() };
    address.nl_family = libc::AF_NETLINK as libc::sa_family_t;
    let length = size_of::<libc::sockaddr_nl>() as libc::socklen_t;
    // SAFETY: the address outlives the call and its true length is given.
    if unsafe { libc::bind(fd.as_raw_fd(), (&raw const address).cast(), length) } != 0 {
        return Err(io::Error::last_os_error());
    }
    use rustix::net::sockopt::{Timeout, set_socket_timeout};
    set_socket_timeout(&fd, Timeout::Recv, Some(Duration::from_secs(2)))?;
    Ok(fd)
}

fn attributes(mut bytes: &[u8]) -> Vec<(u16, &[u8])> {
    let mut found = Vec::new();
    while bytes.len() >= 4 {
        let length = u16_at(bytes, 0) as usize;
        if length < 4 || length > bytes.len() {
            break;
        }
        // The two highest bits are flags (nested, byte order).
        found.push((u16_at(bytes, 2) & 0x3fff, &bytes[4..length]));
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_loopback_link_and_its_address_are_seen() {
        let links = links().unwrap();
        let lo = links.iter().find(|l| l.loopback).unwrap();
        assert_eq!(lo.name, "lo");
        let addresses = addresses().unwrap();
        let of_lo = |a: &&Address| a.index == lo.index && a.ip == IpAddr::V4(Ipv4Addr::LOCALHOST);
        assert_eq!(addresses.iter().find(of_lo).unwrap().prefix, 8);
        default_routes().unwrap();
        neighbours().unwrap();
    }

    #[test]
    fn attributes_that_lie_about_their_length_are_left_out() {
        assert_eq!(
            attributes(&[8, 0, 1, 0, 9, 9, 9, 9]),
            vec![(1, &[9u8, 9, 9, 9][..])]
        );
        assert_eq!(attributes(&[200, 0, 1, 0, 9, 9, 9, 9]), vec![]);
        assert_eq!(attributes(&[0, 0, 1, 0]), vec![]);
    }
}
