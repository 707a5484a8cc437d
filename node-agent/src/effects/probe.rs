//! Probes of the clone, asked by its guest agent.

use std::time::Duration;

use understudy_api::readiness;
use understudy_channel::Probe;

use super::World;
use super::errors::Side;
use crate::handover::effects::Answer;
use crate::handover::readiness::current;
use crate::handover::{EffectError, Effected, ErrorKind, Operation};

impl World {
    pub(super) fn do_probe(&mut self, operation: &Operation) -> Effected<Answer> {
        let refused = |message: &str| EffectError::new(ErrorKind::Refused, message);
        let probe = current(operation).ok_or_else(|| refused("no probe is to be asked"))?;
        let question = question(probe).ok_or_else(|| refused("the probe asks nothing"))?;
        let timeout = Duration::from_secs(u64::try_from(probe.timeout_seconds).unwrap_or(1));
        let probed = self
            .clone_agent(operation)?
            .probe(question, timeout)
            .map_err(|error| Side::Clone.agent(&error))?;
        Ok(Answer {
            ready: probed.ready,
            message: probed.message,
        })
    }
}

/// A probe in the words of the channel; `None` where it asks nothing, or of a port that there is not.
fn question(probe: &readiness::Probe) -> Option<Probe> {
    let port = |port: i64| u16::try_from(port).ok();
    if let Some(get) = &probe.http_get {
        return Some(Probe::Http {
            port: port(get.port)?,
            path: get.path.clone(),
        });
    }
    if let Some(socket) = &probe.tcp_socket {
        return Some(Probe::Tcp {
            port: port(socket.port)?,
        });
    }
    Some(Probe::Exec {
        command: probe.exec.as_ref()?.command.clone(),
    })
}
