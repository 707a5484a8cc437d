//! Which operation a request asks for.

use std::sync::Arc;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use understudy_vmm_control::api::{ConsoleTail, PrepareSplit, Split};

use super::http::Request;
use super::server::error_body;
use crate::supervisor::{OperationError, Supervisor};

/// Body and answer `{}`.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Empty {}

/// Carries a request out; returns status and body of the answer.
pub fn handle(supervisor: &Arc<Supervisor>, request: &Request) -> (u16, Vec<u8>) {
    let path: Vec<&str> = request.path.trim_start_matches('/').split('/').collect();
    let result = match (request.method.as_str(), path.as_slice()) {
        ("GET", ["v1", "vm"]) => answer(&supervisor.info()),
        ("GET", ["v1", "console"]) => answer(&ConsoleTail {
            text: supervisor.console_tail(),
        }),
        ("PUT", ["v1", "vm", "boot"]) => empty(request, || supervisor.boot()),
        ("PUT", ["v1", "vm", "power-button"]) => empty(request, || supervisor.power_button()),
        ("PUT", ["v1", "vm", "reset"]) => empty(request, || supervisor.reset()),
        ("PUT", ["v1", "vm", "stop"]) => empty(request, || supervisor.stop()),
        ("PUT", ["v1", "hold"]) => body(request)
            .and_then(|hold| supervisor.hold(&hold))
            .and_then(|report| answer(&report)),
        ("PUT", ["v1", "release"]) => body::<Empty>(request)
            .and_then(|_| supervisor.release())
            .and_then(|report| answer(&report)),
        ("PUT", ["v1", "commit"]) => body(request)
            .and_then(|commit| supervisor.commit(&commit))
            .and_then(|()| answer(&Empty {})),
        ("PUT", ["v1", "network", "give"]) => body(request)
            .and_then(|give| supervisor.give_network(&give))
            .and_then(|()| answer(&Empty {})),
        ("PUT", ["v1", "activate"]) => body(request)
            .and_then(|activate| supervisor.activate(&activate))
            .and_then(|report| answer(&report)),
        ("PUT", ["v1", "disks", disk, "prepare-split"]) => body::<PrepareSplit>(request)
            .and_then(|prepare| supervisor.prepare_split(disk, &prepare))
            .and_then(|()| answer(&Empty {})),
        ("PUT", ["v1", "disks", disk, "split"]) => body::<Split>(request)
            .and_then(|split| supervisor.split(disk, &split))
            .and_then(|report| answer(&report)),
        ("PUT", ["v1", "disks", disk, "merge"]) => body::<Empty>(request)
            .and_then(|_| supervisor.merge(disk))
            .and_then(|info| answer(&info)),
        ("GET", ["v1", "save"]) => supervisor.save_info().and_then(|info| answer(&info)),
        ("PUT", ["v1", "save"]) => body(request)
            .and_then(|save| supervisor.begin_save(save))
            .and_then(|info| answer(&info)),
        ("PUT", ["v1", "save", "pause"]) => body(request)
            .and_then(|pause| supervisor.pause_for_save(&pause))
            .and_then(|info| answer(&info)),
        ("PUT", ["v1", "save", "keep"]) => body(request)
            .and_then(|keep| supervisor.keep_saved(&keep))
            .and_then(|info| answer(&info)),
        ("PUT", ["v1", "save", "cancel"]) => body(request)
            .and_then(|cancel| supervisor.cancel_save(&cancel))
            .and_then(|info| answer(&info)),
        (method, _) => Err(OperationError::NotFound(format!(
            "{method} {} is not a route of this API; GET /v1/vm is one",
            request.path
        ))),
    };
    result.unwrap_or_else(|error| {
        let status = match error {
            OperationError::Bad(_) => 400,
            OperationError::NotFound(_) => 404,
            OperationError::Conflict(_) => 409,
            OperationError::Failed(_) => 500,
        };
        (status, error_body(&error.to_string()))
    })
}

fn answer<T: Serialize>(value: &T) -> Result<(u16, Vec<u8>), OperationError> {
    serde_json::to_vec(value)
        .map(|body| (200, body))
        .map_err(|error| OperationError::Failed(error.to_string()))
}

fn body<T: DeserializeOwned>(request: &Request) -> Result<T, OperationError> {
    serde_json::from_slice(&request.body)
        .map_err(|error| OperationError::Bad(format!("body of {}: {error}", request.path)))
}

fn empty(
    request: &Request,
    act: impl FnOnce() -> Result<(), OperationError>,
) -> Result<(u16, Vec<u8>), OperationError> {
    body::<Empty>(request)?;
    act()?;
    answer(&Empty {})
}
