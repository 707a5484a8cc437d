//! What the responder knows of the network of the running guest.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use smoltcp::wire::EthernetAddress;
use understudy_channel::Interface;

/// The MAC address in whose name neighbours answer that the guest did not tell the MAC address of.
/// Locally administered, so that it is nobody's.
pub(super) const STAND_IN: EthernetAddress = EthernetAddress([0x02, 0x75, 0x6e, 0x64, 0x65, 0x72]);

/// A host on the guest's network.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Neighbour {
    /// Its address.
    pub address: IpAddr,
    /// Its MAC address, where the guest's neighbour table has it.
    pub mac: Option<EthernetAddress>,
}

/// One network interface of the running guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Facts {
    /// MAC address of guest and clone.
    pub mac: EthernetAddress,
    /// IPv4 addresses with prefix length; the first is what DHCP offers.
    pub ipv4: Vec<(Ipv4Addr, u8)>,
    /// IPv6 addresses with prefix length.
    pub ipv6: Vec<(Ipv6Addr, u8)>,
    /// Default gateways.
    pub gateways: Vec<Neighbour>,
    /// Name servers.
    pub dns: Vec<IpAddr>,
    /// DHCP server identifier and lease time in seconds.
    pub lease: Option<(Ipv4Addr, u32)>,
}

/// Most addresses, gateways and name servers that are taken from a guest's description.
const MAX_ITEMS: usize = 16;

impl Facts {
    /// Takes what `interface`, as described by the (untrusted) guest, says of itself; what does not parse
    /// is left out. `mac` is the configured one.
    pub fn of(mac: EthernetAddress, interface: Option<&Interface>) -> Facts {
        let mut facts = Facts {
            mac,
            ipv4: Vec::new(),
            ipv6: Vec::new(),
            gateways: Vec::new(),
            dns: Vec::new(),
            lease: None,
        };
        let Some(interface) = interface else {
            return facts;
        };
        for text in interface.addresses.iter().take(MAX_ITEMS) {
            match parse_prefix(text) {
                Some((IpAddr::V4(address), prefix)) => facts.ipv4.push((address, prefix)),
                Some((IpAddr::V6(address), prefix)) => facts.ipv6.push((address, prefix)),
                None => {}
            }
        }
        for gateway in interface.gateways.iter().take(MAX_ITEMS) {
            if let Ok(address) = gateway.address.parse() {
                facts.gateways.push(Neighbour {
                    address,
                    mac: gateway.mac.as_deref().and_then(parse_mac),
                });
            }
        }
        facts.dns = interface
            .dns
            .iter()
            .take(MAX_ITEMS)
            .filter_map(|text| text.parse().ok())
            .collect();
        facts.lease = interface
            .lease
            .as_ref()
            .and_then(|lease| Some((lease.server.parse().ok()?, lease.seconds)));
        facts
    }

    /// Whether `address` is the guest's own: never answered for, so that the clone's duplicate address
    /// detection passes.
    pub(super) fn is_own(&self, address: IpAddr) -> bool {
        match address {
            IpAddr::V4(address) => self.ipv4.iter().any(|(own, _)| *own == address),
            IpAddr::V6(address) => self.ipv6.iter().any(|(own, _)| *own == address),
        }
    }

    /// MAC address in which `address` answers: its own where known.
    pub(super) fn mac_of(&self, address: IpAddr) -> EthernetAddress {
        self.gateways
            .iter()
            .find(|gateway| gateway.address == address)
            .and_then(|gateway| gateway.mac)
            .unwrap_or(STAND_IN)
    }

    /// Whether `address` is a default gateway.
    pub(super) fn is_gateway(&self, address: IpAddr) -> bool {
        self.gateways.iter().any(|gateway| gateway.address == address)
    }

    /// The first gateway that `pick` takes.
    pub(super) fn gateway<T>(&self, pick: impl Fn(IpAddr) -> Option<T>) -> Option<T> {
        self.gateways.iter().find_map(|gateway| pick(gateway.address))
    }
}

/// Parses `aa:bb:cc:dd:ee:ff`.
pub(crate) fn parse_mac(text: &str) -> Option<EthernetAddress> {
    let mut bytes = [0u8; 6];
    let mut parts = text.split(':');
    for byte in &mut bytes {
        let part = parts.next()?;
        if part.len() != 2 {
            return None;
        }
        *byte = u8::from_str_radix(part, 16).ok()?;
    }
    parts.next().is_none().then_some(EthernetAddress(bytes))
}

fn parse_prefix(text: &str) -> Option<(IpAddr, u8)> {
    let (address, prefix) = text.split_once('/')?;
    let address: IpAddr = address.parse().ok()?;
    let prefix: u8 = prefix.parse().ok()?;
    let longest = if address.is_ipv4() { 32 } else { 128 };
    (prefix <= longest).then_some((address, prefix))
}
