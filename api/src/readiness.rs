//! Probes by which a clone shows that it is ready: a bounded type of our own with core/v1's names.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// A question to the clone before it takes over. It has exactly one of `httpGet`, `tcpSocket` and `exec`.
///
/// It is asked inside the clone, by the guest agent: addresses are those of the clone's own loopback, so that what
/// listens on another address only is asked by a command. Units named in `services.hold` do not run on the clone
/// before the cutover: a probe of one of them cannot succeed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Probe {
    /// What it is called in `status.result.readiness`.
    pub name: String,
    /// Ready when an HTTP request is answered with a status from 200 to 399. Redirects are not followed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub http_get: Option<HttpGet>,
    /// Ready when a TCP connection is accepted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tcp_socket: Option<TcpSocket>,
    /// Ready when a command exits with 0.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exec: Option<Exec>,
    /// Seconds before it is asked first, counted from the end of the probe before it.
    #[serde(default)]
    #[schemars(range(min = 0, max = 600))]
    pub initial_delay_seconds: i64,
    /// Seconds from one try to the next.
    #[serde(default = "ten")]
    #[schemars(range(min = 1, max = 300))]
    pub period_seconds: i64,
    /// Seconds after which a try that was not answered has failed; its command is killed then.
    #[serde(default = "one")]
    #[schemars(range(min = 1, max = 60))]
    pub timeout_seconds: i64,
    /// So many tries in a row must succeed until the probe has.
    #[serde(default = "one")]
    #[schemars(range(min = 1, max = 10))]
    pub success_threshold: i64,
    /// So many tries in a row must fail until the probe has.
    #[serde(default = "three")]
    #[schemars(range(min = 1, max = 100))]
    pub failure_threshold: i64,
}

fn one() -> i64 {
    1
}

fn three() -> i64 {
    3
}

fn ten() -> i64 {
    10
}

/// An HTTP request to the clone's loopback, without TLS; `exec` asks in any other way.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct HttpGet {
    /// Path with its query, such as `/healthz`.
    #[serde(default = "root")]
    pub path: String,
    /// Port.
    #[schemars(range(min = 1, max = 65535))]
    pub port: i64,
}

fn root() -> String {
    "/".to_owned()
}

/// A TCP connection to the clone's loopback.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct TcpSocket {
    /// Port.
    #[schemars(range(min = 1, max = 65535))]
    pub port: i64,
}

/// A command run in the clone.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Exec {
    /// Program with arguments, run as root in `/`; no shell. What it writes first is in the status when it fails. What
    /// it changes on the clone's disk stays when the clone takes over.
    #[schemars(length(min = 1, max = 32), inner(length(max = 1024)))]
    pub command: Vec<String>,
}

/// How a probe ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ProbeResult {
    /// Its name.
    pub name: String,
    /// Whether the clone was ready; absent while it is being asked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ready: Option<bool>,
    /// How often it was asked.
    pub tries: i64,
    /// What the last try brought.
    pub message: String,
}
