//! A blocking client of the control API.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::api::{
    Activate, ActivateReport, Commit, ConsoleTail, DiskInfo, ErrorBody, GiveNetwork, HoldReport, HoldRequest,
    PrepareSplit, Split, SplitReport, VmInfo,
};
use crate::session::{CancelSave, KeepSaved, PauseForSave, SaveInfo, SaveRequest};

/// Largest answer that is read.
const MAX_BODY: u64 = 1 << 20;

/// Why a request failed.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The VMM could not be reached or fell silent.
    #[error("{method} {path} on {socket}: {source}")]
    Transport {
        /// HTTP method.
        method: &'static str,
        /// Route.
        path: String,
        /// Control socket.
        socket: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// The VMM refused.
    #[error("{method} {path}: {status}: {message}")]
    Refused {
        /// HTTP method.
        method: &'static str,
        /// Route.
        path: String,
        /// HTTP status.
        status: u16,
        /// The VMM's own words.
        message: String,
    },
}

/// One VMM's control socket. Cheap to make; each request is a connection of its own, so that a restarted
/// agent needs no state to adopt a VMM.
#[derive(Clone, Debug)]
pub struct Client {
    socket: PathBuf,
    timeout: Duration,
}

impl Client {
    /// A client for the control socket at `socket`; each request ends within `timeout`.
    pub fn new(socket: impl Into<PathBuf>, timeout: Duration) -> Client {
        Client {
            socket: socket.into(),
            timeout,
        }
    }

    /// The control socket.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// `GET /v1/vm`.
    pub fn info(&self) -> Result<VmInfo, ClientError> {
        self.request("GET", "/v1/vm", None::<&()>)
    }

    /// `GET /v1/console`.
    pub fn console(&self) -> Result<ConsoleTail, ClientError> {
        self.request("GET", "/v1/console", None::<&()>)
    }

    /// `PUT /v1/vm/{action}`: boot, power-button, reset or stop.
    pub fn vm(&self, action: &str) -> Result<(), ClientError> {
        self.put(&format!("/v1/vm/{action}"), &Empty {})
            .map(|_: Empty| ())
    }

    /// `PUT /v1/hold`.
    pub fn hold(&self, request: &HoldRequest) -> Result<HoldReport, ClientError> {
        self.put("/v1/hold", request)
    }

    /// `PUT /v1/release`.
    pub fn release(&self) -> Result<HoldReport, ClientError> {
        self.put("/v1/release", &Empty {})
    }

    /// `PUT /v1/disks/{name}/prepare-split`.
    pub fn prepare_split(&self, disk: &str, request: &PrepareSplit) -> Result<(), ClientError> {
        self.put(&format!("/v1/disks/{disk}/prepare-split"), request)
            .map(|_: Empty| ())
    }

    /// `PUT /v1/disks/{name}/split`.
    pub fn split(&self, disk: &str, request: &Split) -> Result<SplitReport, ClientError> {
        self.put(&format!("/v1/disks/{disk}/split"), request)
    }

    /// `PUT /v1/disks/{name}/merge`.
    pub fn merge(&self, disk: &str) -> Result<DiskInfo, ClientError> {
        self.put(&format!("/v1/disks/{disk}/merge"), &Empty {})
    }

    /// `PUT /v1/commit`.
    pub fn commit(&self, request: &Commit) -> Result<(), ClientError> {
        self.put("/v1/commit", request).map(|_: Empty| ())
    }

    /// `PUT /v1/network/give`.
    pub fn give_network(&self, request: &GiveNetwork) -> Result<(), ClientError> {
        self.put("/v1/network/give", request).map(|_: Empty| ())
    }

    /// `PUT /v1/activate`.
    pub fn activate(&self, request: &Activate) -> Result<ActivateReport, ClientError> {
        self.put("/v1/activate", request)
    }

    /// `PUT /v1/save`.
    pub fn begin_save(&self, request: &SaveRequest) -> Result<SaveInfo, ClientError> {
        self.put("/v1/save", request)
    }

    /// `GET /v1/save`.
    pub fn save(&self) -> Result<SaveInfo, ClientError> {
        self.request("GET", "/v1/save", None::<&()>)
    }

    /// `PUT /v1/save/pause`.
    pub fn pause_for_save(&self, request: &PauseForSave) -> Result<SaveInfo, ClientError> {
        self.put("/v1/save/pause", request)
    }

    /// `PUT /v1/save/keep`.
    pub fn keep_saved(&self, request: &KeepSaved) -> Result<SaveInfo, ClientError> {
        self.put("/v1/save/keep", request)
    }

    /// `PUT /v1/save/cancel`.
    pub fn cancel_save(&self, request: &CancelSave) -> Result<SaveInfo, ClientError> {
        self.put("/v1/save/cancel", request)
    }

    fn put<B: Serialize, A: DeserializeOwned>(&self, path: &str, body: &B) -> Result<A, ClientError> {
        self.request("PUT", path, Some(body))
    }

    fn request<B: Serialize, A: DeserializeOwned>(
        &self,
        method: &'static str,
        path: &str,
        body: Option<&B>,
    ) -> Result<A, ClientError> {
        let transport = |source| ClientError::Transport {
            method,
            path: path.to_owned(),
            socket: self.socket.clone(),
            source,
        };
        let body = match body {
            Some(body) => serde_json::to_vec(body).map_err(|e| transport(io::Error::other(e)))?,
            None => Vec::new(),
        };
        let (status, answer) = self.exchange(method, path, &body).map_err(transport)?;
        if status == 200 {
            return serde_json::from_slice(&answer).map_err(|e| transport(io::Error::other(e)));
        }
        let message = match serde_json::from_slice::<ErrorBody>(&answer) {
            Ok(body) => body.error,
            Err(_) => String::from_utf8_lossy(&answer).into_owned(),
        };
        Err(ClientError::Refused {
            method,
            path: path.to_owned(),
            status,
            message,
        })
    }

    /// One HTTP/1.1 exchange; the server always sends `Content-Length`.
    fn exchange(&self, method: &str, path: &str, body: &[u8]) -> io::Result<(u16, Vec<u8>)> {
        let stream = UnixStream::connect(&self.socket)?;
        stream.set_read_timeout(Some(self.timeout))?;
        stream.set_write_timeout(Some(self.timeout))?;
        let mut request = format!(
            "{method} {path} HTTP/1.1\r\nHost: vmm\r\nConnection: close\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n",
            body.len()
        )
        .into_bytes();
        request.extend_from_slice(body);
        (&stream).write_all(&request)?;

        let mut reader = BufReader::new(stream.take(MAX_BODY));
        let mut line = String::new();
        reader.read_line(&mut line)?;
        let status = line
            .split(' ')
            .nth(1)
            .and_then(|code| code.parse().ok())
            .ok_or_else(|| {
                io::Error::new(io::ErrorKind::InvalidData, format!("no HTTP status in {line:?}"))
            })?;
        let mut length = 0usize;
        loop {
            line.clear();
            reader.read_line(&mut line)?;
            let header = line.trim_end();
            if header.is_empty() {
                break;
            }
            if let Some((name, value)) = header.split_once(':')
                && name.eq_ignore_ascii_case("content-length")
            {
                length = value.trim().parse().map_err(io::Error::other)?;
            }
        }
        let mut answer = Vec::new();
        reader.take(length as u64).read_to_end(&mut answer)?;
        if answer.len() < length {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        Ok((status, answer))
    }
}

/// `{}`.
#[derive(serde::Serialize, serde::Deserialize)]
struct Empty {}
