//! A server that speaks as much of Prometheus' API as blockers ask for: `GET /api/v1/alerts`.

use std::sync::{Arc, Mutex, PoisonError};

use anyhow::Result;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;

/// The server; it ends when this is dropped.
pub struct Prometheus {
    address: String,
    /// What it answers; none: it fails.
    answer: Arc<Mutex<Option<Value>>>,
    task: JoinHandle<()>,
}

impl Prometheus {
    pub async fn start() -> Result<Prometheus> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let address = format!("http://{}", listener.local_addr()?);
        let answer: Arc<Mutex<Option<Value>>> = Arc::default();
        let told = answer.clone();
        let task = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let answer = told.lock().unwrap_or_else(PoisonError::into_inner).clone();
                // Whoever hangs up has no answer.
                let _ = serve(stream, answer).await;
            }
        });
        Ok(Prometheus {
            address,
            answer,
            task,
        })
    }

    pub fn address(&self) -> &str {
        &self.address
    }

    /// These alerts fire, and another one is pending.
    pub fn fire(&self, names: &[&str]) {
        let mut alerts = vec![
            json!({"labels": {"alertname": "CephPending"}, "annotations": {}, "state": "pending",
            "activeAt": "2026-11-27T12:00:00Z", "value": "1e+00"}),
        ];
        for name in names {
            alerts.push(
                json!({"labels": {"alertname": name, "severity": "critical"}, "annotations": {"summary": "x"},
                "state": "firing", "activeAt": "2026-11-27T12:00:00Z", "value": "1e+00"}),
            );
        }
        self.says(Some(json!({"status": "success", "data": {"alerts": alerts}})));
    }

    /// It answers nothing but errors.
    pub fn fail(&self) {
        self.says(None);
    }

    fn says(&self, answer: Option<Value>) {
        *self.answer.lock().unwrap_or_else(PoisonError::into_inner) = answer;
    }
}

impl Drop for Prometheus {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn serve(mut stream: TcpStream, answer: Option<Value>) -> std::io::Result<()> {
    let mut request = Vec::new();
    while !request.ends_with(b"\r\n\r\n") {
        if stream.read_buf(&mut request).await? == 0 {
            return Ok(());
        }
    }
    let is_asked = request.starts_with(b"GET /api/v1/alerts HTTP/1.1\r\n");
    let (status, body) = match answer {
        Some(answer) if is_asked => ("200 OK", answer),
        Some(_) => ("404 Not Found", json!({"status": "error", "error": "not found"})),
        None => (
            "503 Service Unavailable",
            json!({"status": "error", "error": "starting"}),
        ),
    };
    let body = body.to_string();
    let head = format!(
        "HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
        body.len()
    );
    stream.write_all(head.as_bytes()).await?;
    stream.write_all(body.as_bytes()).await?;
    stream.shutdown().await
}
