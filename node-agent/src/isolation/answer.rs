//! One frame of a clone in, at most one frame out.

use std::net::{IpAddr, Ipv4Addr};

use smoltcp::phy::ChecksumCapabilities;
use smoltcp::wire::{
    ArpOperation, ArpPacket, ArpRepr, ETHERNET_HEADER_LEN, EthernetAddress, EthernetFrame, EthernetProtocol,
    EthernetRepr, Icmpv4DstUnreachable, Icmpv4Message, Icmpv4Packet, Icmpv4Repr, IpAddress, IpProtocol,
    Ipv4Packet, Ipv4Repr, TcpControl, TcpPacket, TcpRepr, TcpSeqNumber, UdpPacket,
};

use super::facts::Facts;
use super::{dhcp, ipv6};

/// Bytes of an offending datagram's payload that an ICMP error quotes (RFC 792: 8; RFC 1812: more).
pub(super) const QUOTED: usize = 64;

/// The answer to `frame`, an Ethernet frame of the clone; `None`: silence. Never panics on any input.
///
/// Checksums of the input are not verified: the guest leaves them to the device (virtio-net
/// `VIRTIO_NET_F_CSUM`).
pub fn answer(facts: &Facts, frame: &[u8]) -> Option<Vec<u8>> {
    let ethernet = EthernetFrame::new_checked(frame).ok()?;
    match ethernet.ethertype() {
        EthernetProtocol::Arp => answer_arp(facts, ethernet.payload()),
        EthernetProtocol::Ipv4 => answer_ipv4(facts, &ethernet),
        EthernetProtocol::Ipv6 => ipv6::answer(facts, &ethernet),
        _ => None,
    }
}

fn answer_arp(facts: &Facts, payload: &[u8]) -> Option<Vec<u8>> {
    let request = ArpRepr::parse(&ArpPacket::new_checked(payload).ok()?).ok()?;
    let ArpRepr::EthernetIpv4 {
        operation: ArpOperation::Request,
        source_hardware_addr: sender_mac,
        source_protocol_addr: sender,
        target_protocol_addr: target,
        ..
    } = request
    else {
        return None;
    };
    // A probe (RFC 5227) asks whether an address is in use: an answer would make the clone give it up.
    if sender.is_unspecified() || target == sender || facts.is_own(IpAddr::V4(target)) {
        return None;
    }
    if target.is_unspecified() || target.is_broadcast() || target.is_multicast() {
        return None;
    }
    let mac = facts.mac_of(IpAddr::V4(target));
    let reply = ArpRepr::EthernetIpv4 {
        operation: ArpOperation::Reply,
        source_hardware_addr: mac,
        source_protocol_addr: target,
        target_hardware_addr: sender_mac,
        target_protocol_addr: sender,
    };
    let mut frame = ethernet(mac, sender_mac, EthernetProtocol::Arp);
    let start = frame.len();
    frame.resize(start + reply.buffer_len(), 0);
    reply.emit(&mut ArpPacket::new_unchecked(&mut frame[start..]));
    Some(frame)
}

fn answer_ipv4(facts: &Facts, ethernet_frame: &EthernetFrame<&[u8]>) -> Option<Vec<u8>> {
    let packet = Ipv4Packet::new_checked(ethernet_frame.payload()).ok()?;
    let header = Ipv4Repr::parse(&packet, &ChecksumCapabilities::ignored()).ok()?;
    let client = ethernet_frame.src_addr();
    let payload = packet.payload();
    if header.next_header == IpProtocol::Udp
        && let Ok(datagram) = UdpPacket::new_checked(payload)
        && datagram.dst_port() == dhcp::SERVER_PORT
    {
        return dhcp::answer(facts, client, datagram.payload());
    }
    // Errors are sent for what was meant for one host, came from one, and for first fragments only
    // (RFC 1122 §3.2.2).
    let to = header.dst_addr;
    let one = |address: Ipv4Addr| {
        !(address.is_unspecified()
            || address.is_broadcast()
            || address.is_multicast()
            || is_subnet_broadcast(facts, address))
    };
    if !one(to) || !one(header.src_addr) || facts.is_own(IpAddr::V4(to)) || packet.frag_offset() != 0 {
        return None;
    }
    let mac = facts.mac_of(IpAddr::V4(to));
    let mut frame = ethernet(mac, client, EthernetProtocol::Ipv4);
    let back = |next_header, payload_len| Ipv4Repr {
        src_addr: to,
        dst_addr: header.src_addr,
        next_header,
        payload_len,
        hop_limit: 64,
    };
    match header.next_header {
        IpProtocol::Tcp => {
            let reset = reset_for(payload)?;
            emit_ipv4(&mut frame, back(IpProtocol::Tcp, reset.buffer_len()), |buffer| {
                reset.emit(
                    &mut TcpPacket::new_unchecked(buffer),
                    &IpAddress::Ipv4(to),
                    &IpAddress::Ipv4(header.src_addr),
                    &ChecksumCapabilities::default(),
                );
            });
        }
        IpProtocol::Icmp => {
            let icmp = Icmpv4Packet::new_checked(payload).ok()?;
            if icmp.msg_type() != Icmpv4Message::EchoRequest {
                return None;
            }
            // The gateway answers probes of reachability; beyond it there is nobody.
            let reply = if facts.is_gateway(IpAddr::V4(to)) {
                Icmpv4Repr::EchoReply {
                    ident: icmp.echo_ident(),
                    seq_no: icmp.echo_seq_no(),
                    data: icmp.data(),
                }
            } else {
                unreachable(Icmpv4DstUnreachable::HostUnreachable, header, payload)
            };
            emit_icmpv4(&mut frame, back(IpProtocol::Icmp, reply.buffer_len()), &reply);
        }
        protocol => {
            let reason = match protocol {
                IpProtocol::Udp => Icmpv4DstUnreachable::PortUnreachable,
                _ => Icmpv4DstUnreachable::ProtoUnreachable,
            };
            let reply = unreachable(reason, header, payload);
            emit_icmpv4(&mut frame, back(IpProtocol::Icmp, reply.buffer_len()), &reply);
        }
    }
    Some(frame)
}

fn unreachable(reason: Icmpv4DstUnreachable, mut header: Ipv4Repr, payload: &[u8]) -> Icmpv4Repr<'_> {
    let data = &payload[..payload.len().min(QUOTED)];
    header.payload_len = payload.len();
    Icmpv4Repr::DstUnreachable { reason, header, data }
}

fn emit_icmpv4(frame: &mut Vec<u8>, header: Ipv4Repr, reply: &Icmpv4Repr) {
    emit_ipv4(frame, header, |buffer| {
        reply.emit(
            &mut Icmpv4Packet::new_unchecked(buffer),
            &ChecksumCapabilities::default(),
        );
    });
}

fn is_subnet_broadcast(facts: &Facts, address: Ipv4Addr) -> bool {
    facts.ipv4.iter().any(|(own, prefix)| {
        let host_bits = u32::MAX.checked_shr(u32::from(*prefix)).unwrap_or(0);
        host_bits > 1 && u32::from(*own) | host_bits == u32::from(address)
    })
}

/// The reset that refuses a segment (RFC 9293 §3.5.2); none for a reset.
pub(super) fn reset_for(segment: &[u8]) -> Option<TcpRepr<'static>> {
    let tcp = TcpPacket::new_checked(segment).ok()?;
    if tcp.rst() {
        return None;
    }
    let (seq_number, ack_number) = if tcp.ack() {
        (tcp.ack_number(), None)
    } else {
        // `segment_len` counts SYN and FIN.
        (TcpSeqNumber(0), Some(tcp.seq_number() + tcp.segment_len()))
    };
    Some(TcpRepr {
        src_port: tcp.dst_port(),
        dst_port: tcp.src_port(),
        control: TcpControl::Rst,
        seq_number,
        ack_number,
        window_len: 0,
        window_scale: None,
        max_seg_size: None,
        sack_permitted: false,
        sack_ranges: [None, None, None],
        timestamp: None,
        payload: &[],
    })
}

/// An Ethernet header.
pub(super) fn ethernet(from: EthernetAddress, to: EthernetAddress, protocol: EthernetProtocol) -> Vec<u8> {
    let mut frame = vec![0; ETHERNET_HEADER_LEN];
    EthernetRepr {
        src_addr: from,
        dst_addr: to,
        ethertype: protocol,
    }
    .emit(&mut EthernetFrame::new_unchecked(frame.as_mut_slice()));
    frame
}

/// Appends an IPv4 header and `payload_len` bytes that `fill` writes.
pub(super) fn emit_ipv4(frame: &mut Vec<u8>, header: Ipv4Repr, fill: impl FnOnce(&mut [u8])) {
    let start = frame.len();
    frame.resize(start + header.buffer_len() + header.payload_len, 0);
    let (head, payload) = frame[start..].split_at_mut(header.buffer_len());
    // The header's checksum covers the header only; its length fields need the whole packet's size,
    // which `emit` takes from the representation.
    header.emit(
        &mut Ipv4Packet::new_unchecked(head),
        &ChecksumCapabilities::default(),
    );
    fill(payload);
}

#[cfg(test)]
#[path = "answer_test.rs"]
mod tests;
