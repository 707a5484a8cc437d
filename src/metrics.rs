//! Metrics in the OpenMetrics format.

use std::sync::atomic::{AtomicI64, AtomicU64};
use std::time::Duration;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::{Registry, Unit};

/// Everything that is counted.
pub struct Metrics {
    registry: Registry,
    reconciles: Family<Reconcile, Counter<u64, AtomicU64>>,
    durations: Family<Controller, Histogram>,
    writes: Family<Write, Counter<u64, AtomicU64>>,
    objects: Family<Kind, Gauge<i64, AtomicI64>>,
    invalid: Family<Kind, Counter<u64, AtomicU64>>,
    watch_errors: Family<Kind, Counter<u64, AtomicU64>>,
    leading: Gauge<i64, AtomicI64>,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Reconcile {
    controller: &'static str,
    /// `Ok`, or the name of the error.
    outcome: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Controller {
    controller: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Write {
    kind: String,
    verb: &'static str,
    outcome: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Kind {
    kind: String,
}

impl Default for Metrics {
    fn default() -> Metrics {
        let mut registry = Registry::with_prefix("understudy_operator");
        let mut metrics = Metrics {
            reconciles: Family::default(),
            durations: Family::new_with_constructor(|| Histogram::new(exponential_buckets(0.000_1, 4.0, 10))),
            writes: Family::default(),
            objects: Family::default(),
            invalid: Family::default(),
            watch_errors: Family::default(),
            leading: Gauge::default(),
            registry: Registry::default(),
        };
        registry.register(
            "reconciles",
            "Reconciles, by controller and outcome",
            metrics.reconciles.clone(),
        );
        registry.register_with_unit(
            "reconcile_duration",
            "How long a reconcile took",
            Unit::Seconds,
            metrics.durations.clone(),
        );
        registry.register(
            "writes",
            "Writes to the API server, by kind, verb and outcome",
            metrics.writes.clone(),
        );
        registry.register("objects", "Objects that are known", metrics.objects.clone());
        registry.register(
            "invalid_objects",
            "Objects that could not be read, as often as they were seen",
            metrics.invalid.clone(),
        );
        registry.register(
            "watch_errors",
            "Errors of watches; each is begun anew",
            metrics.watch_errors.clone(),
        );
        registry.register("leading", "1 while this process leads", metrics.leading.clone());
        metrics.registry = registry;
        metrics
    }
}

impl Metrics {
    /// A reconcile has come to its end.
    pub fn reconciled(&self, controller: &'static str, outcome: &'static str, took: Duration) {
        self.reconciles
            .get_or_create(&Reconcile { controller, outcome })
            .inc();
        self.durations
            .get_or_create(&Controller { controller })
            .observe(took.as_secs_f64());
    }

    /// Something was written, or was not.
    pub fn wrote(&self, kind: &str, verb: &'static str, outcome: &'static str) {
        let kind = kind.to_owned();
        self.writes.get_or_create(&Write { kind, verb, outcome }).inc();
    }

    /// So many objects of a kind are known.
    pub fn known(&self, kind: &str, count: usize) {
        let labels = Kind {
            kind: kind.to_owned(),
        };
        self.objects
            .get_or_create(&labels)
            .set(i64::try_from(count).unwrap_or(i64::MAX));
    }

    /// An object could not be read.
    pub fn saw_invalid(&self, kind: &str) {
        self.invalid
            .get_or_create(&Kind {
                kind: kind.to_owned(),
            })
            .inc();
    }

    /// A watch has failed.
    pub fn watch_failed(&self, kind: &str) {
        self.watch_errors
            .get_or_create(&Kind {
                kind: kind.to_owned(),
            })
            .inc();
    }

    /// Whether this process leads.
    pub fn leads(&self, leads: bool) {
        self.leading.set(i64::from(leads));
    }

    /// The text that Prometheus reads.
    pub fn encode(&self) -> Result<String, std::fmt::Error> {
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &self.registry)?;
        Ok(text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_counted_is_told_under_its_name() {
        let metrics = Metrics::default();
        metrics.reconciled("guest", "Ok", Duration::from_millis(1));
        metrics.wrote("Guest", "apply", "Ok");
        metrics.leads(true);
        let text = metrics.encode().unwrap();
        for line in [
            "understudy_operator_reconciles_total{controller=\"guest\",outcome=\"Ok\"} 1",
            "understudy_operator_writes_total{kind=\"Guest\",verb=\"apply\",outcome=\"Ok\"} 1",
            "understudy_operator_leading 1",
            "understudy_operator_reconcile_duration_seconds_count{controller=\"guest\"} 1",
        ] {
            assert!(text.lines().any(|there| there == line), "{line} in {text}");
        }
    }

    #[test]
    fn the_dashboard_shows_what_is_served() {
        // A family is served from its first member on.
        let metrics = Metrics::default();
        metrics.reconciled("guest", "Ok", Duration::from_millis(1));
        metrics.wrote("Guest", "apply", "Ok");
        metrics.known("Guest", 1);
        metrics.saw_invalid("Guest");
        metrics.watch_failed("Guest");
        let served = metrics.encode().unwrap();
        let dashboard = include_str!("../charts/understudy/files/dashboards/understudy.json");
        let words = dashboard.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
        let shown: Vec<&str> = words
            .filter(|word| word.starts_with("understudy_operator_"))
            .collect();
        assert!(!shown.is_empty());
        for name in shown {
            // Types are of the family, samples have its suffix.
            let family = name.trim_end_matches("_total").trim_end_matches("_bucket");
            assert!(
                served.contains(&format!("# TYPE {family} ")),
                "{name} is not served:\n{served}"
            );
        }
    }
}
