//! DHCPv4 (RFC 2131) in the name of the guest's own server: the one lease that the guest has.

use std::net::{IpAddr, Ipv4Addr};

use smoltcp::phy::ChecksumCapabilities;
use smoltcp::wire::{
    DhcpMessageType, DhcpOption, DhcpPacket, DhcpRepr, EthernetAddress, EthernetProtocol, IpAddress,
    IpProtocol, Ipv4Repr, UDP_HEADER_LEN, UdpPacket, UdpRepr,
};

use super::answer::{emit_ipv4, ethernet};
use super::facts::Facts;

/// UDP port of DHCP servers.
pub(super) const SERVER_PORT: u16 = 67;
const CLIENT_PORT: u16 = 68;
/// BOOTP's smallest message (RFC 1542 §2.1): some clients drop shorter ones.
const MIN_MESSAGE: usize = 300;
/// Shortest lease that is given, so that the clone does not renew while it boots.
const MIN_LEASE_SECONDS: u32 = 600;

const OPTION_DNS: u8 = 6;
const OPTION_CLIENT_ID: u8 = 61;

/// Answers one DHCP message, the payload of a UDP datagram to port 67.
pub(super) fn answer(facts: &Facts, client: EthernetAddress, payload: &[u8]) -> Option<Vec<u8>> {
    let packet = DhcpPacket::new_checked(payload).ok()?;
    let request = DhcpRepr::parse(&packet).ok()?;
    let (address, prefix) = *facts.ipv4.first()?;
    let router = facts.gateway(as_ipv4);
    let (server, seconds) = facts
        .lease
        .unwrap_or((router.unwrap_or(neighbour_of(address)), MIN_LEASE_SECONDS));
    let wanted = request
        .requested_ip
        .or((!request.client_ip.is_unspecified()).then_some(request.client_ip));
    let kind = match request.message_type {
        DhcpMessageType::Discover => DhcpMessageType::Offer,
        DhcpMessageType::Inform => DhcpMessageType::Ack,
        DhcpMessageType::Request if request.server_identifier.is_some_and(|chosen| chosen != server) => {
            return None;
        }
        DhcpMessageType::Request if wanted == Some(address) => DhcpMessageType::Ack,
        DhcpMessageType::Request => DhcpMessageType::Nak,
        _ => return None,
    };

    let dns: Vec<u8> = facts
        .dns
        .iter()
        .copied()
        .filter_map(as_ipv4)
        .flat_map(|server| server.octets())
        .collect();
    let client_id = packet
        .options()
        .find(|option| option.kind == OPTION_CLIENT_ID)
        .map(|option| option.data);
    let granted = kind != DhcpMessageType::Nak;
    let mut options = Vec::new();
    if granted && !dns.is_empty() {
        options.push(DhcpOption {
            kind: OPTION_DNS,
            data: &dns,
        });
    }
    // RFC 6842: the identifier comes back as it was sent.
    if let Some(data) = client_id {
        options.push(DhcpOption {
            kind: OPTION_CLIENT_ID,
            data,
        });
    }
    let reply = DhcpRepr {
        message_type: kind,
        transaction_id: request.transaction_id,
        secs: 0,
        client_hardware_address: request.client_hardware_address,
        client_ip: if granted {
            request.client_ip
        } else {
            Ipv4Addr::UNSPECIFIED
        },
        your_ip: if granted { address } else { Ipv4Addr::UNSPECIFIED },
        server_ip: server,
        router: router.filter(|_| granted),
        subnet_mask: granted.then(|| mask(prefix)),
        relay_agent_ip: Ipv4Addr::UNSPECIFIED,
        broadcast: request.broadcast,
        requested_ip: None,
        client_identifier: None,
        server_identifier: Some(server),
        parameter_request_list: None,
        dns_servers: None,
        max_size: None,
        lease_duration: (granted && request.message_type != DhcpMessageType::Inform)
            .then(|| seconds.max(MIN_LEASE_SECONDS)),
        renew_duration: None,
        rebind_duration: None,
        additional_options: &options,
    };
    let to = if request.broadcast || !granted {
        Ipv4Addr::BROADCAST
    } else {
        address
    };
    let mac = facts.mac_of(IpAddr::V4(server));
    let destination = if to.is_broadcast() {
        EthernetAddress::BROADCAST
    } else {
        client
    };
    let length = reply.buffer_len().max(MIN_MESSAGE);
    let mut frame = ethernet(mac, destination, EthernetProtocol::Ipv4);
    emit_ipv4(
        &mut frame,
        Ipv4Repr {
            src_addr: server,
            dst_addr: to,
            next_header: IpProtocol::Udp,
            payload_len: UDP_HEADER_LEN + length,
            hop_limit: 64,
        },
        |buffer| {
            let udp = UdpRepr {
                src_port: SERVER_PORT,
                dst_port: CLIENT_PORT,
            };
            udp.emit(
                &mut UdpPacket::new_unchecked(buffer),
                &IpAddress::Ipv4(server),
                &IpAddress::Ipv4(to),
                length,
                |payload| {
                    // The buffer has room for all options, which is all that emitting can miss.
                    let _ = reply.emit(&mut DhcpPacket::new_unchecked(payload));
                },
                &ChecksumCapabilities::default(),
            );
        },
    );
    Some(frame)
}

fn as_ipv4(address: IpAddr) -> Option<Ipv4Addr> {
    match address {
        IpAddr::V4(address) => Some(address),
        IpAddr::V6(_) => None,
    }
}

/// Another address of the same network, for a server that nobody named.
fn neighbour_of(address: Ipv4Addr) -> Ipv4Addr {
    Ipv4Addr::from(u32::from(address) ^ 1)
}

fn mask(prefix: u8) -> Ipv4Addr {
    Ipv4Addr::from(u32::MAX.checked_shl(32 - u32::from(prefix)).unwrap_or(0))
}
