//! Interfaces as the guest has them configured: what the host's isolation must answer for on a clone.

use std::fs;
use std::net::IpAddr;
use std::path::Path;

use understudy_channel::{Gateway, Interface, Lease};

use crate::sys::netlink::{self, format_mac};

/// All interfaces but loopback ones. What the kernel does not tell is left empty.
pub fn interfaces() -> Vec<Interface> {
    let links = netlink::links().unwrap_or_default();
    let addresses = netlink::addresses().unwrap_or_default();
    let routes = netlink::default_routes().unwrap_or_default();
    let neighbours = netlink::neighbours().unwrap_or_default();
    let servers = name_servers(Path::new("/"));
    let is_ethernet = |l: &&netlink::Link| !l.loopback && l.mac.len() == 6;
    let one = |link: &netlink::Link| Interface {
        name: link.name.clone(),
        mac: format_mac(&link.mac),
        addresses: addresses
            .iter()
            .filter(|a| a.index == link.index)
            .map(|a| format!("{}/{}", a.ip, a.prefix))
            .collect(),
        gateways: routes
            .iter()
            .filter(|r| r.index == link.index)
            .map(|r| Gateway {
                address: r.gateway.to_string(),
                mac: neighbours
                    .iter()
                    .find(|n| n.index == link.index && n.ip == r.gateway && n.mac.len() == 6)
                    .map(|n| format_mac(&n.mac)),
            })
            .collect(),
        lease: lease(Path::new("/"), link.index, &link.name),
        dns: servers.clone(),
    };
    links.iter().filter(is_ethernet).map(one).collect()
}

/// Name servers: those that networkd or resolved know, else the ones in `/etc/resolv.conf`.
fn name_servers(root: &Path) -> Vec<String> {
    for file in ["run/systemd/resolve/resolv.conf", "etc/resolv.conf"] {
        let Ok(text) = fs::read_to_string(root.join(file)) else {
            continue;
        };
        let servers: Vec<String> = text
            .lines()
            .filter_map(|l| l.trim().strip_prefix("nameserver"))
            .map(|s| s.trim().to_owned())
            .filter(|s| s.split('%').next().is_some_and(|ip| ip.parse::<IpAddr>().is_ok()))
            .take(16)
            .collect();
        if !servers.is_empty() {
            return servers;
        }
    }
    Vec::new()
}

/// The DHCPv4 lease of an interface, from networkd's state or a lease file of dhclient.
fn lease(root: &Path, index: u32, name: &str) -> Option<Lease> {
    if let Ok(text) = fs::read_to_string(root.join(format!("run/systemd/netif/leases/{index}"))) {
        let get = |key: &str| text.lines().find_map(|l| l.strip_prefix(key)?.strip_prefix('='));
        return Some(Lease {
            server: get("SERVER_ADDRESS")?.to_owned(),
            seconds: get("LIFETIME").and_then(|s| s.parse().ok()).unwrap_or(0),
        });
    }
    let candidates = [
        format!("run/dhclient.{name}.leases"),
        format!("var/lib/dhcp/dhclient.{name}.leases"),
        "var/lib/dhcp/dhclient.leases".to_owned(),
        format!("run/dhclient-{name}.lease"),
    ];
    candidates
        .iter()
        .find_map(|file| dhclient_lease(&fs::read_to_string(root.join(file)).ok()?, name))
}

/// The last lease of the interface in a file of `dhclient.leases(5)`.
fn dhclient_lease(text: &str, name: &str) -> Option<Lease> {
    let of_interface = |block: &&str| {
        let wanted = format!("interface \"{name}\"");
        !block.contains("interface \"") || block.contains(&wanted)
    };
    let block = text.split("lease {").skip(1).filter(of_interface).last()?;
    let option = |key: &str| {
        let line = block.lines().map(str::trim).find(|l| l.starts_with(key))?;
        Some(line[key.len()..].trim().trim_end_matches(';').to_owned())
    };
    Some(Lease {
        server: option("option dhcp-server-identifier ")?,
        seconds: option("option dhcp-lease-time ")
            .and_then(|s| s.parse().ok())
            .unwrap_or(0),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lease_is_found_in_the_state_of_networkd_and_of_dhclient() {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir_all(root.path().join("run/systemd/netif/leases")).unwrap();
        fs::create_dir_all(root.path().join("var/lib/dhcp")).unwrap();
        let state = "# private\nADDRESS=10.0.0.5\nSERVER_ADDRESS=10.0.0.1\nLIFETIME=3600\n";
        fs::write(root.path().join("run/systemd/netif/leases/2"), state).unwrap();
        assert_eq!(
            lease(root.path(), 2, "ens3"),
            Some(Lease {
                server: "10.0.0.1".into(),
                seconds: 3600
            })
        );
        let leases = "lease {\n  interface \"ens4\";\n  option dhcp-lease-time 60;\n  option dhcp-server-identifier 10.0.0.9;\n}\n\
                      lease {\n  interface \"ens4\";\n  option dhcp-lease-time 120;\n  option dhcp-server-identifier 10.0.0.2;\n}\n";
        fs::write(root.path().join("var/lib/dhcp/dhclient.leases"), leases).unwrap();
        assert_eq!(
            lease(root.path(), 3, "ens4"),
            Some(Lease {
                server: "10.0.0.2".into(),
                seconds: 120
            })
        );
        assert_eq!(lease(root.path(), 3, "ens5"), None);
    }

    #[test]
    fn name_servers_come_from_resolved_first() {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir_all(root.path().join("etc")).unwrap();
        fs::write(
            root.path().join("etc/resolv.conf"),
            "# x\nnameserver 1.1.1.1\nnameserver junk\n",
        )
        .unwrap();
        assert_eq!(name_servers(root.path()), ["1.1.1.1"]);
    }
}
