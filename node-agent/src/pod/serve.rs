//! Health and metrics, for the kubelet and for Prometheus: what the service has noted of itself on the host.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use axum::routing::get;
use jiff::Timestamp;
use understudy_api::conditions::types;
use understudy_api::{Guest, Host, NodeUpdate, SeamlessReboot};

use crate::cluster::kinds::Mirrored;
use crate::cluster::link::{Health, health_path};
use crate::durable;
use crate::store::Store;

/// How old a heartbeat may be: the operator calls an agent silent then as well.
const FRESH_S: i64 = 40;

/// Where the service notes what it does.
#[derive(Clone, Debug)]
pub struct Service {
    /// Its state directory, as the Pod sees it.
    pub state_dir: PathBuf,
}

/// Serves until the process ends.
pub fn serve(listen: SocketAddr, service: Service) -> std::io::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(2)
        .build()?;
    runtime.block_on(async move {
        let listener = tokio::net::TcpListener::bind(listen).await?;
        tracing::info!(%listen, "health and metrics");
        let router = Router::new()
            .route("/livez", get(|| async { "ok\n" }))
            .route("/healthz", get(healthz))
            .route("/metrics", get(metrics))
            .with_state(Arc::new(service));
        axum::serve(listener, router).await
    })
}

async fn healthz(State(service): State<Arc<Service>>) -> impl IntoResponse {
    let looked = tokio::task::spawn_blocking(move || service.health(Timestamp::now())).await;
    match looked {
        Ok(Ok(())) => (StatusCode::OK, "ok\n".to_owned()),
        Ok(Err(why)) => (StatusCode::SERVICE_UNAVAILABLE, why + "\n"),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()),
    }
}

async fn metrics(State(service): State<Arc<Service>>) -> impl IntoResponse {
    let looked = tokio::task::spawn_blocking(move || service.metrics(Timestamp::now())).await;
    match looked {
        Ok(text) => {
            let kind = "text/plain; version=0.0.4; charset=utf-8";
            (StatusCode::OK, [(header::CONTENT_TYPE, kind)], text).into_response()
        }
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response(),
    }
}

impl Service {
    fn store(&self) -> Option<Store> {
        // Not made where it is missing: the service does that.
        let is_there = self.state_dir.join("objects").is_dir();
        is_there.then(|| Store::open(&self.state_dir).ok()).flatten()
    }

    fn host(&self) -> Option<Host> {
        self.store()?.list::<Host>().pop()
    }

    /// Whether the service lives, or why that is not known.
    pub fn health(&self, now: Timestamp) -> Result<(), String> {
        match self.heartbeat_age(now) {
            Some(age) if age <= FRESH_S => Ok(()),
            Some(age) => Err(format!(
                "the service understudy-node has not given a sign of life for {age} s; `systemctl status understudy-node` on the node tells"
            )),
            None => Err("the service understudy-node has not given a sign of life yet".to_owned()),
        }
    }

    fn heartbeat_age(&self, now: Timestamp) -> Option<i64> {
        let heartbeat = self.host()?.status?.heartbeat?;
        Some((now.as_second() - heartbeat.0.as_second()).max(0))
    }

    /// Metrics in the text format.
    pub fn metrics(&self, now: Timestamp) -> String {
        let mut out = Metrics::default();
        let age = self.heartbeat_age(now);
        let up = age.is_some_and(|age| age <= FRESH_S);
        out.gauge(
            "node_up",
            "Whether the service on the host lives.",
            "",
            i64::from(up),
        );
        if let Some(age) = age {
            let help = "Age of the service's last sign of life.";
            out.gauge("node_heartbeat_age_seconds", help, "", age);
        }
        let health: Health = durable::read_json(&health_path(&self.state_dir))
            .ok()
            .flatten()
            .unwrap_or_default();
        let connected = i64::from(health.connected);
        out.gauge(
            "node_api_connected",
            "Whether the API server answers the agent.",
            "",
            connected,
        );
        for (name, help, value) in [
            ("node_api_writes_total", "Statuses written.", health.writes),
            (
                "node_api_conflicts_total",
                "Writes that another writer's stood against.",
                health.conflicts,
            ),
            (
                "node_api_refused_total",
                "Writes that the API server refused.",
                health.refused,
            ),
            ("node_api_events_total", "Events written.", health.events),
            ("node_api_lists_total", "Complete lists read.", health.lists),
        ] {
            out.counter(name, help, value);
        }
        if let Some(status) = self.host().and_then(|host| host.status) {
            let label = |text: Option<&String>| escape(text.map_or("", String::as_str));
            let labels = format!(
                "agent_version=\"{}\",vmm_version=\"{}\",kernel=\"{}\"",
                label(status.agent_version.as_ref()),
                label(status.vmm_version.as_ref()),
                label(status.kernel_release.as_ref())
            );
            out.gauge("node_info", "Versions on the host.", &labels, 1);
            let is_true = |kind: &str| {
                let mut conditions = status.conditions.iter();
                i64::from(conditions.any(|there| there.type_ == kind && there.status == "True"))
            };
            let help = "Whether a reboot that the host begins would wait until all sessions are saved.";
            out.gauge("node_sessions_safe", help, "", is_true(types::SESSIONS_SAFE));
            let help = "Whether something runs that is not assigned to the node.";
            out.gauge("node_orphans", help, "", is_true(types::ORPHANS));
            let bytes = [
                (
                    "node_free_memory_bytes",
                    "Memory that new guests can have.",
                    status.free_memory_bytes,
                ),
                (
                    "node_free_disk_bytes",
                    "Free space where sessions are saved.",
                    status.free_disk_bytes,
                ),
            ];
            for (name, help, value) in bytes {
                if let Some(value) = value {
                    out.gauge(name, help, "", value);
                }
            }
        }
        if let Some(store) = self.store() {
            out.phases::<Guest>("guests", "Guests on the node, by phase.", &store);
            out.phases::<SeamlessReboot>(
                "seamless_reboots",
                "SeamlessReboots on the node, by phase.",
                &store,
            );
            out.phases::<NodeUpdate>("node_updates", "NodeUpdates of the node, by phase.", &store);
        }
        out.text
    }
}

/// The text format of Prometheus.
#[derive(Default)]
struct Metrics {
    text: String,
}

impl Metrics {
    fn head(&mut self, name: &str, help: &str, kind: &str) {
        // Writing to a String does not fail.
        let _ = writeln!(
            self.text,
            "# HELP understudy_{name} {help}\n# TYPE understudy_{name} {kind}"
        );
    }

    fn gauge(&mut self, name: &str, help: &str, labels: &str, value: i64) {
        self.head(name, help, "gauge");
        self.sample(name, labels, value);
    }

    fn counter(&mut self, name: &str, help: &str, value: u64) {
        self.head(name, help, "counter");
        let _ = writeln!(self.text, "understudy_{name} {value}");
    }

    fn sample(&mut self, name: &str, labels: &str, value: i64) {
        let labels = match labels {
            "" => String::new(),
            labels => format!("{{{labels}}}"),
        };
        let _ = writeln!(self.text, "understudy_{name}{labels} {value}");
    }

    fn phases<O: Mirrored>(&mut self, name: &str, help: &str, store: &Store) {
        let mut counts: BTreeMap<String, i64> = BTreeMap::new();
        for object in store.list::<O>() {
            let phase = Mirrored::phase(&object).unwrap_or_else(|| "Pending".to_owned());
            *counts.entry(phase).or_default() += 1;
        }
        self.head(name, help, "gauge");
        for (phase, count) in counts {
            self.sample(name, &format!("phase=\"{}\"", escape(&phase)), count);
        }
    }
}

/// A label's value.
fn escape(text: &str) -> String {
    text.replace('\\', "\\\\")
        .replace('"', "\\\"")
        .replace('\n', "\\n")
}

/// The state directory of a service, as the Pod sees it.
pub fn state_dir(host_root: &Path, state_dir: &Path) -> PathBuf {
    host_root.join(state_dir.strip_prefix("/").unwrap_or(state_dir))
}

#[cfg(test)]
mod tests {
    use understudy_api::{HostSpec, Time};

    use super::*;
    use crate::store::{Key, Object};

    #[test]
    fn a_service_is_healthy_while_its_heartbeat_is_fresh() {
        let dir = tempfile::tempdir().unwrap();
        let service = Service {
            state_dir: dir.path().to_owned(),
        };
        let now = Timestamp::now();
        assert!(service.health(now).unwrap_err().contains("yet"));
        assert!(service.metrics(now).contains("understudy_node_up 0\n"));
        assert!(!dir.path().join("objects").exists(), "looking makes nothing");

        let store = Store::open(dir.path()).unwrap();
        store.apply(&Host::new("alpha", HostSpec {}), now).unwrap();
        let host: Host = store.get(&Key::new("", "alpha")).unwrap().unwrap();
        store
            .update_status::<Host>(&host.key(), &host.uid(), true, |status| {
                status.heartbeat = Some(Time(now));
                status.agent_version = Some("1\"2".into());
            })
            .unwrap();
        assert_eq!(service.health(now), Ok(()));
        let metrics = service.metrics(now);
        assert!(metrics.contains("understudy_node_up 1\n"), "{metrics}");
        assert!(metrics.contains("agent_version=\"1\\\"2\""), "{metrics}");
        let later = now + jiff::SignedDuration::from_secs(60);
        assert!(service.health(later).unwrap_err().contains("60 s"));
        // Every line is a comment or `name{labels} value`.
        for line in metrics.lines().filter(|line| !line.starts_with("# ")) {
            let (name, value) = line.rsplit_once(' ').unwrap();
            assert!(name.starts_with("understudy_"), "{line}");
            assert!(value.parse::<i64>().is_ok(), "{line}");
        }
    }

    #[test]
    fn the_dashboard_shows_what_is_served() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let now = Timestamp::now();
        store.apply(&Host::new("alpha", HostSpec {}), now).unwrap();
        let host: Host = store.get(&Key::new("", "alpha")).unwrap().unwrap();
        store
            .update_status::<Host>(&host.key(), &host.uid(), true, |status| {
                status.heartbeat = Some(Time(now));
                status.free_memory_bytes = Some(1);
                status.free_disk_bytes = Some(1);
            })
            .unwrap();
        let service = Service {
            state_dir: dir.path().to_owned(),
        };
        let served = service.metrics(now);
        let dashboard = include_str!("../../../charts/understudy/files/dashboards/understudy.json");
        let words = dashboard.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
        let shown: Vec<&str> = words
            .filter(|word| word.starts_with("understudy_") && !word.starts_with("understudy_operator_"))
            .collect();
        assert!(!shown.is_empty());
        for name in shown {
            assert!(
                served.contains(&format!("# TYPE {name} ")),
                "{name} is not served"
            );
        }
    }
}
