//! A server that speaks as much of Prometheus' API as blockers ask for: `GET /api/v1/alerts`.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::Result;
use serde_json::{Value, json};

/// The server; it ends when this is dropped.
pub struct Prometheus {
    address: SocketAddr,
    /// What it answers; none: it fails.
    answer: Arc<Mutex<Option<Value>>>,
    ends: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Prometheus {
    pub fn start() -> Result<Prometheus> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let address = listener.local_addr()?;
        let (answer, ends): (Arc<Mutex<Option<Value>>>, Arc<AtomicBool>) = Default::default();
        let (told, asked) = (answer.clone(), ends.clone());
        let thread = std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                if asked.load(Ordering::Relaxed) {
                    return;
                }
                let answer = told.lock().unwrap_or_else(PoisonError::into_inner).clone();
                // Whoever hangs up has no answer.
                let _ = serve(stream, answer);
            }
        });
        Ok(Prometheus {
            address,
            answer,
            ends,
            thread: Some(thread),
        })
    }

    pub fn address(&self) -> String {
        format!("http://{}", self.address)
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
        self.ends.store(true, Ordering::Relaxed);
        // It waits for somebody to come.
        let _ = TcpStream::connect(self.address);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn serve(mut stream: TcpStream, answer: Option<Value>) -> std::io::Result<()> {
    stream.set_read_timeout(Some(Duration::from_secs(30)))?;
    let mut request = Vec::new();
    let mut part = [0; 1024];
    while !request.ends_with(b"\r\n\r\n") {
        match stream.read(&mut part)? {
            0 => return Ok(()),
            count => request.extend_from_slice(&part[..count]),
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
    stream.write_all(head.as_bytes())?;
    stream.write_all(body.as_bytes())
}
