//! What can go wrong in a reconcile. The variants' names are event reasons and metric labels.

use kube::core::dynamic::ParseDynamicObjectError;
use kube::runtime::reflector::ObjectRef;

/// Why an object was not reconciled; it is tried again.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The lease is not held any more: this process must not write.
    #[error("{action} was left out: this process does not lead any more")]
    NotLeading {
        /// What was about to be written.
        action: String,
    },
    /// The API server took too long: by now another process may lead.
    #[error("{action} was given up: the API server did not answer in time")]
    TooLate {
        /// What was written.
        action: String,
    },
    /// Another writer owns a field with another value.
    #[error("{action} was refused, because another manager owns a field: {message}")]
    Conflict {
        /// What was written.
        action: String,
        /// The API server's words.
        message: String,
    },
    /// The object has changed since it was read.
    #[error("{action} was refused, because the object has changed meanwhile")]
    Changed {
        /// What was written.
        action: String,
    },
    /// A right is missing.
    #[error("{action} was forbidden: {message}; give the operator's role this right")]
    Forbidden {
        /// What was asked.
        action: String,
        /// The API server's words.
        message: String,
    },
    /// The API server finds the object not valid.
    #[error("{action} was refused as not valid: {message}")]
    Refused {
        /// What was written.
        action: String,
        /// The API server's words.
        message: String,
    },
    /// The API server is away, or answered otherwise.
    #[error("{action} failed: {source}")]
    Api {
        /// What was asked.
        action: String,
        /// Why.
        source: Box<kube::Error>,
    },
    /// A credential could not be made or read.
    #[error("{action} failed: {source}")]
    Credential {
        /// What was tried.
        action: String,
        /// Why.
        source: understudy_sealing::SealError,
    },
    /// Something could not be encoded.
    #[error("{action}: cannot be encoded: {source}")]
    Encode {
        /// What was about to be written.
        action: String,
        /// Why.
        source: serde_json::Error,
    },
    /// What the server answered is no object of the kind that was written.
    #[error("{action}: the server's answer is not understood: {source}")]
    Answer {
        /// What was written.
        action: String,
        /// Why.
        source: ParseDynamicObjectError,
    },
}

impl Error {
    /// From what the client says of `action`, such as "applying the status of Guest default/web".
    pub fn from_kube(action: &str, error: kube::Error) -> Error {
        let action = action.to_owned();
        let kube::Error::Api(status) = &error else {
            return Error::Api {
                action,
                source: Box::new(error),
            };
        };
        let message = status.message.clone();
        match (status.code, status.reason.as_str()) {
            (409, _) if message.contains("Apply failed") => Error::Conflict { action, message },
            (409, _) => Error::Changed { action },
            (403, _) => Error::Forbidden { action, message },
            (422, _) | (400, _) => Error::Refused { action, message },
            _ => Error::Api {
                action,
                source: Box::new(error),
            },
        }
    }

    /// The variant's name.
    pub fn reason(&self) -> &'static str {
        match self {
            Error::NotLeading { .. } => "NotLeading",
            Error::TooLate { .. } => "TooLate",
            Error::Conflict { .. } => "Conflict",
            Error::Changed { .. } => "Changed",
            Error::Forbidden { .. } => "Forbidden",
            Error::Refused { .. } => "Refused",
            Error::Api { .. } => "Api",
            Error::Credential { .. } => "Credential",
            Error::Encode { .. } => "Encode",
            Error::Answer { .. } => "Answer",
        }
    }

    /// Whether what was written is not there.
    pub fn is_not_found(&self) -> bool {
        matches!(self.refusal(), Some(status) if status.code == 404)
    }

    /// The API server's own words, where it has answered.
    pub fn answer(&self) -> Option<&str> {
        match self {
            Error::Conflict { message, .. }
            | Error::Forbidden { message, .. }
            | Error::Refused { message, .. } => Some(message),
            Error::Changed { .. } => Some("it has changed meanwhile"),
            Error::NotLeading { .. }
            | Error::TooLate { .. }
            | Error::Credential { .. }
            | Error::Encode { .. }
            | Error::Answer { .. } => None,
            Error::Api { .. } => self.refusal().map(|status| status.message.as_str()),
        }
    }

    fn refusal(&self) -> Option<&kube::core::Status> {
        match self {
            Error::Api { source, .. } => match source.as_ref() {
                kube::Error::Api(status) => Some(status),
                _ => None,
            },
            _ => None,
        }
    }

    /// Whether the object's own reader should see it: what passes by itself is only logged and counted.
    pub fn concerns_user(&self) -> bool {
        matches!(
            self,
            Error::Conflict { .. }
                | Error::Forbidden { .. }
                | Error::Refused { .. }
                | Error::Credential { .. }
        )
    }
}

/// `Guest default/web`, for messages.
pub fn named<K: kube::Resource<DynamicType = ()>>(object: &K) -> String {
    let reference = ObjectRef::from_obj(object);
    match &reference.namespace {
        Some(namespace) => format!("{} {namespace}/{}", K::kind(&()), reference.name),
        None => format!("{} {}", K::kind(&()), reference.name),
    }
}
