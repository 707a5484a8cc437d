use std::net::{IpAddr, Ipv4Addr};
use std::os::unix::net::UnixDatagram;
use std::time::Duration;

use smoltcp::wire::{
    ArpPacket, DhcpMessageType, DhcpPacket, DhcpRepr, EthernetAddress, EthernetFrame, EthernetProtocol,
    Icmpv4DstUnreachable, Icmpv4Packet, Icmpv6Packet, Icmpv6Repr, Ipv4Packet, Ipv6Packet, NdiscRepr,
    TcpPacket, UdpPacket,
};

use super::super::Responder;
use super::super::facts::STAND_IN;
use super::*;
use understudy_channel::{Gateway, Interface, Lease};

const MAC: EthernetAddress = EthernetAddress([0x52, 0x54, 0, 0, 0, 5]);
const GATEWAY_MAC: EthernetAddress = EthernetAddress([0x52, 0x54, 0, 0, 0, 1]);

fn facts() -> Facts {
    Facts::of(
        MAC,
        Some(&Interface {
            name: "enp0s3".into(),
            mac: "52:54:00:00:00:05".into(),
            addresses: vec![
                "10.0.0.5/24".into(),
                "fe80::5/64".into(),
                "2001:db8::5/64".into(),
                "nonsense".into(),
            ],
            gateways: vec![
                Gateway {
                    address: "10.0.0.1".into(),
                    mac: Some("52:54:00:00:00:01".into()),
                },
                Gateway {
                    address: "fe80::1".into(),
                    mac: Some("52:54:00:00:00:01".into()),
                },
            ],
            lease: Some(Lease {
                server: "10.0.0.2".into(),
                seconds: 3600,
            }),
            dns: vec!["10.0.0.3".into()],
        }),
    )
}

/// An Ethernet frame as the clone's kernel sends it.
fn frame(protocol: EthernetProtocol, payload: &[u8]) -> Vec<u8> {
    let mut frame = ethernet(MAC, EthernetAddress::BROADCAST, protocol);
    frame.extend_from_slice(payload);
    frame
}

fn hex(text: &str) -> Vec<u8> {
    let digits: Vec<u8> = text.bytes().filter(u8::is_ascii_hexdigit).collect();
    digits
        .chunks(2)
        .map(|pair| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap())
        .collect()
}

fn arp(sender: [u8; 4], target: [u8; 4]) -> Vec<u8> {
    let mut packet = hex("0001 0800 06 04 0001 525400000005");
    packet.extend_from_slice(&sender);
    packet.extend_from_slice(&[0; 6]);
    packet.extend_from_slice(&target);
    frame(EthernetProtocol::Arp, &packet)
}

fn ipv4(protocol: u8, to: [u8; 4], payload: &[u8]) -> Vec<u8> {
    // As a guest with checksum offload sends it: the transport's checksum is not filled in.
    let mut packet = hex("4500 0000 1234 4000 40 00 0000 0a000005");
    packet[2..4].copy_from_slice(&(20 + payload.len() as u16).to_be_bytes());
    packet[9] = protocol;
    packet.extend_from_slice(&to);
    packet.extend_from_slice(payload);
    frame(EthernetProtocol::Ipv4, &packet)
}

#[test]
fn the_gateway_answers_arp_with_its_real_mac_and_neighbours_with_a_stand_in() {
    for (target, mac) in [([10, 0, 0, 1], GATEWAY_MAC), ([10, 0, 0, 9], STAND_IN)] {
        let reply = answer(&facts(), &arp([10, 0, 0, 5], target)).unwrap();
        let ethernet = EthernetFrame::new_checked(reply.as_slice()).unwrap();
        assert_eq!(ethernet.dst_addr(), MAC);
        let arp = ArpPacket::new_checked(ethernet.payload()).unwrap();
        assert_eq!(arp.operation(), ArpOperation::Reply);
        assert_eq!(arp.source_hardware_addr(), mac.as_bytes());
        assert_eq!(arp.source_protocol_addr(), target);
    }
}

#[test]
fn duplicate_address_detection_of_the_clone_passes() {
    let facts = facts();
    // RFC 5227 probe, gratuitous announcement, and a request for its own address.
    assert_eq!(answer(&facts, &arp([0, 0, 0, 0], [10, 0, 0, 5])), None);
    assert_eq!(answer(&facts, &arp([10, 0, 0, 5], [10, 0, 0, 5])), None);
    assert_eq!(answer(&facts, &arp([169, 254, 1, 1], [10, 0, 0, 5])), None);
    // IPv6 DAD: a solicitation from the unspecified address.
    let mut packet =
        hex("60000000 0018 3a ff 00000000000000000000000000000000 ff0200000000000000000001ff000005");
    packet.extend(hex("87 00 0000 00000000 fe800000000000000000000000000005"));
    assert_eq!(answer(&facts, &frame(EthernetProtocol::Ipv6, &packet)), None);
}

/// What systemd-networkd sends: client identifier of type 255 (DUID), no broadcast flag.
fn dhcp(kind: u8, requested: Option<[u8; 4]>) -> Vec<u8> {
    let mut message = hex("01 01 06 00 deadbeef 0001 0000");
    message.extend_from_slice(&[0; 16]);
    message.extend(hex("525400000005"));
    message.extend_from_slice(&[0; 10 + 64 + 128]);
    message.extend(hex("63825363"));
    message.extend([53, 1, kind]);
    message.extend(hex("3d 05 ff 01020304"));
    if let Some(address) = requested {
        message.extend([50, 4]);
        message.extend(address);
    }
    message.push(255);
    let mut datagram = hex("0044 0043 0000 0000");
    datagram[4..6].copy_from_slice(&(8 + message.len() as u16).to_be_bytes());
    datagram.extend(message);
    let mut packet = ipv4(17, [255; 4], &datagram);
    packet[26..30].copy_from_slice(&[0; 4]);
    packet
}

fn with_dhcp(reply: &[u8], check: impl FnOnce(&Ipv4Packet<&[u8]>, &DhcpPacket<&[u8]>, DhcpRepr)) {
    let ethernet = EthernetFrame::new_checked(reply).unwrap();
    let ip = Ipv4Packet::new_checked(ethernet.payload()).unwrap();
    assert!(ip.verify_checksum());
    let udp = UdpPacket::new_checked(ip.payload()).unwrap();
    assert!(udp.verify_checksum(&ip.src_addr().into(), &ip.dst_addr().into()));
    let packet = DhcpPacket::new_checked(udp.payload()).unwrap();
    let repr = DhcpRepr::parse(&packet).unwrap();
    check(&ip, &packet, repr);
}

#[test]
fn dhcp_gives_the_guests_own_lease_and_refuses_any_other_address() {
    let offer = answer(&facts(), &dhcp(1, None)).unwrap();
    with_dhcp(&offer, |ip, packet, offer| {
        assert_eq!(offer.message_type, DhcpMessageType::Offer);
        assert_eq!(offer.your_ip, Ipv4Addr::new(10, 0, 0, 5));
        assert_eq!(offer.subnet_mask, Some(Ipv4Addr::new(255, 255, 255, 0)));
        assert_eq!(offer.router, Some(Ipv4Addr::new(10, 0, 0, 1)));
        assert_eq!(offer.server_identifier, Some(Ipv4Addr::new(10, 0, 0, 2)));
        assert_eq!(
            offer.dns_servers.unwrap().as_slice(),
            [Ipv4Addr::new(10, 0, 0, 3)]
        );
        assert_eq!(offer.lease_duration, Some(3600));
        assert_eq!(offer.transaction_id, 0xdead_beef);
        assert_eq!(ip.dst_addr(), Ipv4Addr::new(10, 0, 0, 5));
        assert!(
            packet
                .options()
                .any(|o| o.kind == 61 && o.data == [255, 1, 2, 3, 4])
        );
    });
    let ack = answer(&facts(), &dhcp(3, Some([10, 0, 0, 5]))).unwrap();
    with_dhcp(&ack, |_, _, ack| {
        assert_eq!(ack.message_type, DhcpMessageType::Ack);
        assert_eq!(ack.your_ip, Ipv4Addr::new(10, 0, 0, 5));
    });
    let nak = answer(&facts(), &dhcp(3, Some([10, 0, 0, 66]))).unwrap();
    with_dhcp(&nak, |ip, _, nak| {
        assert_eq!(nak.message_type, DhcpMessageType::Nak);
        assert!(ip.dst_addr().is_broadcast());
    });
}

#[test]
fn a_connection_is_reset_at_once() {
    // SYN to port 443, sequence number 1000.
    let syn = hex("c350 01bb 000003e8 00000000 5002 faf0 0000 0000");
    let reply = answer(&facts(), &ipv4(6, [93, 184, 216, 34], &syn)).unwrap();
    let ethernet = EthernetFrame::new_checked(reply.as_slice()).unwrap();
    assert_eq!(ethernet.dst_addr(), MAC);
    let ip = Ipv4Packet::new_checked(ethernet.payload()).unwrap();
    assert!(ip.verify_checksum());
    assert_eq!(ip.src_addr(), Ipv4Addr::new(93, 184, 216, 34));
    let tcp = TcpPacket::new_checked(ip.payload()).unwrap();
    assert!(tcp.verify_checksum(&ip.src_addr().into(), &ip.dst_addr().into()));
    assert!(tcp.rst() && tcp.ack());
    assert_eq!(tcp.ack_number(), TcpSeqNumber(1001));
    assert_eq!((tcp.src_port(), tcp.dst_port()), (443, 50000));
    // Never a reset for a reset: two stacks would answer each other for ever.
    let mut reset = syn;
    reset[13] = 0x04;
    assert_eq!(answer(&facts(), &ipv4(6, [93, 184, 216, 34], &reset)), None);
}

#[test]
fn a_datagram_is_refused_at_once_and_a_multicast_is_not() {
    let query = hex("c350 0035 000c 0000 01020304");
    let reply = answer(&facts(), &ipv4(17, [10, 0, 0, 3], &query)).unwrap();
    let ethernet = EthernetFrame::new_checked(reply.as_slice()).unwrap();
    let ip = Ipv4Packet::new_checked(ethernet.payload()).unwrap();
    let icmp = Icmpv4Packet::new_checked(ip.payload()).unwrap();
    assert!(icmp.verify_checksum());
    let Icmpv4Repr::DstUnreachable { reason, header, data } =
        Icmpv4Repr::parse(&icmp, &ChecksumCapabilities::ignored()).unwrap()
    else {
        panic!("not an error");
    };
    assert_eq!(reason, Icmpv4DstUnreachable::PortUnreachable);
    assert_eq!(header.dst_addr, Ipv4Addr::new(10, 0, 0, 3));
    assert_eq!(data, query);
    for to in [[224, 0, 0, 251], [255; 4], [10, 0, 0, 255], [10, 0, 0, 5]] {
        assert_eq!(answer(&facts(), &ipv4(17, to, &query)), None, "{to:?}");
    }
}

#[test]
fn only_the_gateway_answers_a_ping() {
    let ping = hex("0800 0000 0001 0002 cafe");
    let reply = answer(&facts(), &ipv4(1, [10, 0, 0, 1], &ping)).unwrap();
    let ip = Ipv4Packet::new_checked(&reply[14..]).unwrap();
    assert_eq!(ip.payload()[0], 0);
    let reply = answer(&facts(), &ipv4(1, [8, 8, 8, 8], &ping)).unwrap();
    let ip = Ipv4Packet::new_checked(&reply[14..]).unwrap();
    assert_eq!(ip.payload()[0], 3);
}

#[test]
fn the_router_of_the_guest_advertises_itself() {
    let mut packet =
        hex("60000000 0008 3a ff fe800000000000000000000000000005 ff020000000000000000000000000002");
    packet.extend(hex("85 00 0000 00000000"));
    let reply = answer(&facts(), &frame(EthernetProtocol::Ipv6, &packet)).unwrap();
    let ethernet = EthernetFrame::new_checked(reply.as_slice()).unwrap();
    assert_eq!(ethernet.src_addr(), GATEWAY_MAC);
    let ip = Ipv6Packet::new_checked(ethernet.payload()).unwrap();
    assert_eq!(ip.hop_limit(), 255);
    let icmp = Icmpv6Packet::new_checked(ip.payload()).unwrap();
    let caps = ChecksumCapabilities::default();
    let Icmpv6Repr::Ndisc(NdiscRepr::RouterAdvert {
        prefix_info,
        router_lifetime,
        ..
    }) = Icmpv6Repr::parse(&ip.src_addr(), &ip.dst_addr(), &icmp, &caps).unwrap()
    else {
        panic!("not an advertisement");
    };
    assert!(router_lifetime.secs() > 0);
    let prefix = prefix_info.unwrap();
    assert_eq!(IpAddr::V6(prefix.prefix), "2001:db8::".parse::<IpAddr>().unwrap());
}

#[test]
fn no_frame_makes_it_panic() {
    let facts = facts();
    let seeds = [
        arp([10, 0, 0, 5], [10, 0, 0, 1]),
        dhcp(1, None),
        ipv4(
            6,
            [1, 2, 3, 4],
            &hex("c350 01bb 000003e8 00000000 5002 faf0 0000 0000"),
        ),
        frame(
            EthernetProtocol::Ipv6,
            &hex(
                "60000000 0018 3a ff fe800000000000000000000000000005 ff0200000000000000000001ff000001
                  87 00 0000 00000000 fe800000000000000000000000000001",
            ),
        ),
    ];
    let mut random = 0x2545_f491_4f6c_dd1du64;
    for seed in &seeds {
        for cut in 0..=seed.len() {
            answer(&facts, &seed[..cut]);
        }
        for _ in 0..20_000 {
            let mut frame = seed.clone();
            for _ in 0..4 {
                random ^= random << 13;
                random ^= random >> 7;
                random ^= random << 17;
                let at = (random >> 8) as usize % frame.len();
                frame[at] = random as u8;
            }
            answer(&facts, &frame);
        }
    }
}

#[test]
fn a_responder_answers_the_clone_on_its_socket() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("peer");
    let responder = Responder::start(&path, facts()).unwrap();
    let clone = UnixDatagram::bind(dir.path().join("clone")).unwrap();
    clone.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    clone.connect(&path).unwrap();
    clone.send(b"runt").unwrap();
    clone.send(&arp([10, 0, 0, 5], [10, 0, 0, 1])).unwrap();
    let mut buffer = [0; 2048];
    let length = clone.recv(&mut buffer).unwrap();
    let ethernet = EthernetFrame::new_checked(&buffer[..length]).unwrap();
    assert_eq!(ethernet.ethertype(), EthernetProtocol::Arp);
    // It counts after it has sent.
    let deadline = std::time::Instant::now() + Duration::from_secs(10);
    while responder.counters() != (2, 1) {
        assert!(std::time::Instant::now() < deadline, "{:?}", responder.counters());
        std::thread::yield_now();
    }
    drop(responder);
    assert!(!path.exists());
}
