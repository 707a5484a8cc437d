//! IPv6: neighbour discovery (RFC 4861), one router advertisement, and rejections.

use std::net::{IpAddr, Ipv6Addr};

use smoltcp::phy::ChecksumCapabilities;
use smoltcp::time::Duration;
use smoltcp::wire::{
    EthernetAddress, EthernetFrame, EthernetProtocol, Icmpv6DstUnreachable, Icmpv6Packet, Icmpv6Repr,
    IpAddress, IpProtocol, Ipv6Packet, Ipv6Repr, NdiscNeighborFlags, NdiscPrefixInfoFlags,
    NdiscPrefixInformation, NdiscRepr, NdiscRouterFlags, TcpPacket,
};

use super::answer::{QUOTED, ethernet, reset_for};
use super::facts::Facts;

/// Lifetime that the advertisement tells for router and prefix. After the cutover the real router's
/// advertisements take over; until they come the clone goes on with this one.
const LIFETIME: Duration = Duration::from_secs(1800);
/// Neighbour discovery requires it (RFC 4861 §7.1).
const ND_HOP_LIMIT: u8 = 255;

/// Answers one IPv6 frame.
pub(super) fn answer(facts: &Facts, frame: &EthernetFrame<&[u8]>) -> Option<Vec<u8>> {
    let packet = Ipv6Packet::new_checked(frame.payload()).ok()?;
    let header = Ipv6Repr::parse(&packet).ok()?;
    let client = frame.src_addr();
    let payload = packet.payload();
    if header.next_header == IpProtocol::Icmpv6 {
        let icmp = Icmpv6Packet::new_checked(payload).ok()?;
        let message = Icmpv6Repr::parse(
            &header.src_addr,
            &header.dst_addr,
            &icmp,
            &ChecksumCapabilities::ignored(),
        )
        .ok()?;
        return answer_icmpv6(facts, client, &header, &message, payload);
    }
    let to = header.dst_addr;
    if to.is_multicast() || header.src_addr.is_unspecified() || facts.is_own(IpAddr::V6(to)) {
        return None;
    }
    if header.next_header == IpProtocol::Tcp {
        let reset = reset_for(payload)?;
        return Some(emit(
            facts.mac_of(IpAddr::V6(to)),
            client,
            back(&header, IpProtocol::Tcp, reset.buffer_len()),
            |buffer| {
                reset.emit(
                    &mut TcpPacket::new_unchecked(buffer),
                    &IpAddress::Ipv6(to),
                    &IpAddress::Ipv6(header.src_addr),
                    &ChecksumCapabilities::default(),
                );
            },
        ));
    }
    let reason = match header.next_header {
        IpProtocol::Udp => Icmpv6DstUnreachable::PortUnreachable,
        _ => Icmpv6DstUnreachable::AddrUnreachable,
    };
    Some(reject(facts, client, &header, reason, payload))
}

fn answer_icmpv6(
    facts: &Facts,
    client: EthernetAddress,
    header: &Ipv6Repr,
    message: &Icmpv6Repr,
    payload: &[u8],
) -> Option<Vec<u8>> {
    match message {
        Icmpv6Repr::Ndisc(NdiscRepr::NeighborSolicit { target_addr, .. }) => {
            let target = *target_addr;
            // From the unspecified address: duplicate address detection (RFC 4862 §5.4.3).
            if header.src_addr.is_unspecified() || facts.is_own(IpAddr::V6(target)) || target.is_multicast() {
                return None;
            }
            let mac = facts.mac_of(IpAddr::V6(target));
            let mut flags = NdiscNeighborFlags::SOLICITED | NdiscNeighborFlags::OVERRIDE;
            if facts.is_gateway(IpAddr::V6(target)) {
                flags |= NdiscNeighborFlags::ROUTER;
            }
            let reply = Icmpv6Repr::Ndisc(NdiscRepr::NeighborAdvert {
                flags,
                target_addr: target,
                lladdr: Some(mac.into()),
            });
            Some(emit_icmpv6(
                mac,
                client,
                target,
                header.src_addr,
                ND_HOP_LIMIT,
                &reply,
            ))
        }
        Icmpv6Repr::Ndisc(NdiscRepr::RouterSolicit { .. }) => advertise(facts, client, header),
        Icmpv6Repr::EchoRequest { ident, seq_no, data } => {
            let to = header.dst_addr;
            if to.is_multicast() || facts.is_own(IpAddr::V6(to)) {
                return None;
            }
            if !facts.is_gateway(IpAddr::V6(to)) {
                let reason = Icmpv6DstUnreachable::AddrUnreachable;
                return Some(reject(facts, client, header, reason, payload));
            }
            let reply = Icmpv6Repr::EchoReply {
                ident: *ident,
                seq_no: *seq_no,
                data,
            };
            let mac = facts.mac_of(IpAddr::V6(to));
            Some(emit_icmpv6(mac, client, to, header.src_addr, 64, &reply))
        }
        _ => None,
    }
}

/// The guest's own router and prefix; silence where the guest has no IPv6 router.
fn advertise(facts: &Facts, client: EthernetAddress, header: &Ipv6Repr) -> Option<Vec<u8>> {
    let router = facts.gateway(|address| match address {
        IpAddr::V6(address) if is_link_local(address) => Some(address),
        _ => None,
    })?;
    let prefix_info = facts
        .ipv6
        .iter()
        .find(|(address, prefix)| *prefix == 64 && !is_link_local(*address))
        .map(|(address, prefix)| NdiscPrefixInformation {
            prefix_len: *prefix,
            flags: NdiscPrefixInfoFlags::ON_LINK | NdiscPrefixInfoFlags::ADDRCONF,
            valid_lifetime: LIFETIME,
            preferred_lifetime: LIFETIME,
            prefix: Ipv6Addr::from(u128::from(*address) >> 64 << 64),
        });
    let mac = facts.mac_of(IpAddr::V6(router));
    let reply = Icmpv6Repr::Ndisc(NdiscRepr::RouterAdvert {
        hop_limit: 64,
        flags: NdiscRouterFlags::empty(),
        router_lifetime: LIFETIME,
        reachable_time: Duration::ZERO,
        retrans_time: Duration::ZERO,
        lladdr: Some(mac.into()),
        mtu: None,
        prefix_info,
    });
    let to = if header.src_addr.is_unspecified() {
        Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1)
    } else {
        header.src_addr
    };
    Some(emit_icmpv6(mac, client, router, to, ND_HOP_LIMIT, &reply))
}

fn reject(
    facts: &Facts,
    client: EthernetAddress,
    header: &Ipv6Repr,
    reason: Icmpv6DstUnreachable,
    payload: &[u8],
) -> Vec<u8> {
    let reply = Icmpv6Repr::DstUnreachable {
        reason,
        header: *header,
        data: &payload[..payload.len().min(QUOTED)],
    };
    let to = header.dst_addr;
    emit_icmpv6(
        facts.mac_of(IpAddr::V6(to)),
        client,
        to,
        header.src_addr,
        64,
        &reply,
    )
}

fn is_link_local(address: Ipv6Addr) -> bool {
    address.segments()[0] & 0xffc0 == 0xfe80
}

fn back(header: &Ipv6Repr, next_header: IpProtocol, payload_len: usize) -> Ipv6Repr {
    Ipv6Repr {
        src_addr: header.dst_addr,
        dst_addr: header.src_addr,
        next_header,
        payload_len,
        hop_limit: 64,
    }
}

fn emit_icmpv6(
    mac: EthernetAddress,
    client: EthernetAddress,
    from: Ipv6Addr,
    to: Ipv6Addr,
    hop_limit: u8,
    reply: &Icmpv6Repr,
) -> Vec<u8> {
    let header = Ipv6Repr {
        src_addr: from,
        dst_addr: to,
        next_header: IpProtocol::Icmpv6,
        payload_len: reply.buffer_len(),
        hop_limit,
    };
    emit(mac, client, header, |buffer| {
        reply.emit(
            &from,
            &to,
            &mut Icmpv6Packet::new_unchecked(buffer),
            &ChecksumCapabilities::default(),
        );
    })
}

fn emit(
    mac: EthernetAddress,
    client: EthernetAddress,
    header: Ipv6Repr,
    fill: impl FnOnce(&mut [u8]),
) -> Vec<u8> {
    let mut frame = ethernet(mac, client, EthernetProtocol::Ipv6);
    let start = frame.len();
    frame.resize(start + header.buffer_len() + header.payload_len, 0);
    let (head, payload) = frame[start..].split_at_mut(header.buffer_len());
    header.emit(&mut Ipv6Packet::new_unchecked(head));
    fill(payload);
    frame
}
