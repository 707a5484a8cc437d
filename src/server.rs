//! `/healthz`, `/readyz` and `/metrics` over HTTP.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use axum::routing::get;
use tokio::net::TcpListener;
use tokio::time::Instant;

use crate::metrics::Metrics;

/// How long the process may take to come back to its own clock before it counts as stuck.
const STUCK: Duration = Duration::from_secs(60);

/// What the probes ask of.
pub struct Health {
    started: Instant,
    beat: std::sync::atomic::AtomicU64,
    ready: AtomicBool,
}

impl Default for Health {
    fn default() -> Health {
        Health {
            started: Instant::now(),
            beat: 0.into(),
            ready: false.into(),
        }
    }
}

impl Health {
    /// The process lives: told by a task that does nothing else.
    pub async fn beat(self: Arc<Health>) {
        loop {
            self.beat
                .store(self.started.elapsed().as_secs(), Ordering::Relaxed);
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
    }

    /// It has reached the API server: it leads and knows what there is, or it stands by.
    pub fn is_ready(&self, ready: bool) {
        self.ready.store(ready, Ordering::Relaxed);
    }

    fn is_alive(&self) -> bool {
        let beat = self.beat.load(Ordering::Relaxed);
        self.started.elapsed().as_secs().saturating_sub(beat) < STUCK.as_secs()
    }
}

#[derive(Clone)]
struct Served {
    health: Arc<Health>,
    metrics: Arc<Metrics>,
}

/// Listens at `address`.
pub async fn bind(address: SocketAddr) -> std::io::Result<TcpListener> {
    TcpListener::bind(address).await
}

/// Answers until the process ends.
pub async fn serve(listener: TcpListener, health: Arc<Health>, metrics: Arc<Metrics>) -> std::io::Result<()> {
    let app = Router::new()
        .route("/healthz", get(healthz))
        .route("/readyz", get(readyz))
        .route("/metrics", get(scrape))
        .with_state(Served { health, metrics });
    axum::serve(listener, app).await
}

async fn healthz(State(served): State<Served>) -> (StatusCode, &'static str) {
    match served.health.is_alive() {
        true => (StatusCode::OK, "ok"),
        false => (StatusCode::INTERNAL_SERVER_ERROR, "the operator is stuck"),
    }
}

async fn readyz(State(served): State<Served>) -> (StatusCode, &'static str) {
    match served.health.ready.load(Ordering::Relaxed) {
        true => (StatusCode::OK, "ok"),
        false => (
            StatusCode::SERVICE_UNAVAILABLE,
            "the API server was not reached yet",
        ),
    }
}

async fn scrape(State(served): State<Served>) -> axum::response::Response {
    const OPEN_METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    match served.metrics.encode() {
        Ok(text) => ([(header::CONTENT_TYPE, OPEN_METRICS)], text).into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response(),
    }
}
