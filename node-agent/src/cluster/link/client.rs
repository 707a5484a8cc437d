//! A client of the API server from an [`Access`], and what its errors mean.

use std::time::Duration;

use kube::core::Status;
use kube::runtime::watcher;
use kube::{Client, Config};
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;

use crate::cluster::access::Access;
use crate::cluster::reports::Answer;

/// How long a request may take; watches are bounded by their own time.
pub const REQUEST: Duration = Duration::from_secs(10);
const CONNECT: Duration = Duration::from_secs(5);

/// The message of an apply that names a field which the kind's schema does not have.
const NOT_IN_SCHEMA: &str = "field not declared in schema";

/// Why there is no client.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The URL is none.
    #[error("{server:?} is not the URL of an API server: {reason}")]
    Server {
        /// What is given.
        server: String,
        /// What is wrong.
        reason: String,
    },
    /// The CA's certificates cannot be read.
    #[error("the certificates of the API server's CA cannot be read: {0}")]
    Ca(String),
    /// It could not be made.
    #[error("no client for the API server: {0}")]
    Client(#[from] kube::Error),
}

/// Makes a client.
pub fn client(access: &Access) -> Result<Client, ClientError> {
    let server = access.server.parse().map_err(|error| ClientError::Server {
        server: access.server.clone(),
        reason: format!("{error:?}"),
    })?;
    let mut config = Config::new(server);
    let certificates: Vec<Vec<u8>> = CertificateDer::pem_slice_iter(access.ca_data.as_bytes())
        .map(|certificate| certificate.map(|der| der.as_ref().to_vec()))
        .collect::<Result<_, _>>()
        .map_err(|error| ClientError::Ca(format!("{error:?}")))?;
    if certificates.is_empty() {
        return Err(ClientError::Ca("there is none".to_owned()));
    }
    config.root_cert = Some(certificates);
    config.auth_info.token = Some(access.token.clone().into());
    config.default_namespace = access.namespace.clone();
    config.connect_timeout = Some(CONNECT);
    // Pauses are ours to choose.
    config.default_retry = false;
    Ok(Client::try_from(config)?)
}

/// What a failed request means.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Trouble {
    /// The API server does not answer, or does not know us: a token that died with its Pod is replaced sooner or
    /// later, so 401 is the same.
    Away(String),
    /// It has answered.
    Answer(Answer),
}

/// Reads an error.
pub fn trouble(error: &kube::Error) -> Trouble {
    match error {
        kube::Error::Api(status) => of_status(status),
        kube::Error::SerdeError(error) => Trouble::Answer(Answer::Refused(format!(
            "the API server's answer is not understood: {error}"
        ))),
        other => Trouble::Away(causes(other)),
    }
}

fn of_status(status: &Status) -> Trouble {
    let message = status.message.clone();
    match status.code {
        401 => Trouble::Away(format!("it refuses the token (401): {message}")),
        404 => Trouble::Answer(Answer::Gone),
        // 429: it is busy; another moment is as good.
        409 | 429 => Trouble::Answer(Answer::Conflict(message)),
        400..=499 => Trouble::Answer(Answer::Refused(message)),
        // What the API server says of a field that its CRD does not have: no fault of its own, whatever the code.
        500 if message.contains(NOT_IN_SCHEMA) => Trouble::Answer(Answer::Refused(format!(
            "{message}; are the cluster's CRDs older than the agent?"
        ))),
        code => Trouble::Away(format!("it fails ({code}): {message}")),
    }
}

/// What a watch that failed means; `None` for what the watcher sets right itself.
pub fn watch_trouble(error: &watcher::Error) -> Option<Trouble> {
    let trouble = match error {
        watcher::Error::InitialListFailed(error) | watcher::Error::WatchStartFailed(error) => trouble(error),
        watcher::Error::WatchError(status) if status.code != 410 => of_status(status),
        _ => return None,
    };
    match trouble {
        // No list of such a kind: its CRD is missing.
        Trouble::Answer(Answer::Gone) => Some(Trouble::Answer(Answer::Refused(
            "the API server does not know the kind; are Understudy's CRDs installed?".to_owned(),
        ))),
        // The version of a watch is too old: it lists again.
        Trouble::Answer(Answer::Conflict(_)) => None,
        trouble => Some(trouble),
    }
}

/// An error with its causes: libraries tell the first in general words only.
fn causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        source = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(code: u16, message: &str) -> Trouble {
        let status = Status {
            code,
            message: message.to_owned(),
            ..Status::default()
        };
        trouble(&kube::Error::Api(Box::new(status)))
    }

    #[test]
    fn an_error_is_an_absence_a_conflict_or_a_refusal() {
        for code in [401, 500, 502, 503, 504] {
            assert!(matches!(of(code, ""), Trouble::Away(_)), "{code}");
        }
        assert_eq!(of(404, ""), Trouble::Answer(Answer::Gone));
        for code in [409, 429] {
            assert!(
                matches!(of(code, ""), Trouble::Answer(Answer::Conflict(_))),
                "{code}"
            );
        }
        for code in [400, 403, 422] {
            assert!(
                matches!(of(code, ""), Trouble::Answer(Answer::Refused(_))),
                "{code}"
            );
        }
        // CRDs that were not upgraded stall one kind, not the link.
        let older =
            "failed to create typed patch object (/web; Kind=Guest): .status.x: field not declared in schema";
        let Trouble::Answer(Answer::Refused(why)) = of(500, older) else {
            panic!("an API server that is away");
        };
        assert!(why.contains("CRDs"), "{why}");
    }
}
