//! What a ServiceAccount's token says of itself. It is not verified here: the API server does that; we only need to
//! know for which node it was made.

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde::Deserialize;

/// Why a token does not do.
#[derive(Debug, thiserror::Error)]
pub enum TokenError {
    /// It is no JWT.
    #[error("the ServiceAccount's token is no JSON Web Token")]
    NoToken,
    /// It names no node.
    #[error(
        "the ServiceAccount's token names no node: it must be one that the kubelet has asked for, for a Pod, of an API server of Kubernetes 1.32 or newer"
    )]
    NoNode,
}

/// Claims that we use.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Claims {
    /// Name of the Node on which the Pod runs.
    pub node_name: String,
    /// Its UID.
    pub node_uid: String,
    /// Namespace of the Pod.
    pub namespace: String,
}

#[derive(Deserialize)]
struct Payload {
    #[serde(rename = "kubernetes.io")]
    kubernetes: Option<Kubernetes>,
}

#[derive(Deserialize)]
struct Kubernetes {
    #[serde(default)]
    namespace: String,
    node: Option<Reference>,
}

#[derive(Deserialize)]
struct Reference {
    name: String,
    uid: String,
}

/// Reads a token.
pub fn claims(token: &str) -> Result<Claims, TokenError> {
    let payload = token.split('.').nth(1).ok_or(TokenError::NoToken)?;
    let payload = URL_SAFE_NO_PAD
        .decode(payload.trim_end_matches('='))
        .map_err(|_| TokenError::NoToken)?;
    let payload: Payload = serde_json::from_slice(&payload).map_err(|_| TokenError::NoToken)?;
    let kubernetes = payload.kubernetes.ok_or(TokenError::NoNode)?;
    let node = kubernetes.node.ok_or(TokenError::NoNode)?;
    Ok(Claims {
        node_name: node.name,
        node_uid: node.uid,
        namespace: kubernetes.namespace,
    })
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// A token with these claims, of nobody's signature.
    pub(crate) fn token(payload: &serde_json::Value) -> String {
        let part = |value: &str| URL_SAFE_NO_PAD.encode(value);
        format!(
            "{}.{}.{}",
            part("{}"),
            part(&payload.to_string()),
            part("signature")
        )
    }

    #[test]
    fn a_token_tells_the_node_and_its_uid() {
        let payload = serde_json::json!({"sub": "x", "kubernetes.io": {
            "namespace": "understudy", "node": {"name": "alpha", "uid": "n"}, "pod": {"name": "p", "uid": "q"}}});
        let claims = claims(&token(&payload)).unwrap();
        assert_eq!(
            (claims.node_name.as_str(), claims.node_uid.as_str()),
            ("alpha", "n")
        );
        assert_eq!(claims.namespace, "understudy");
    }

    #[test]
    fn a_token_that_names_no_node_is_refused_with_what_would_do() {
        let payload = serde_json::json!({"kubernetes.io": {"namespace": "understudy"}});
        let error = claims(&token(&payload)).unwrap_err().to_string();
        assert!(error.contains("1.32"), "{error}");
        assert!(matches!(claims("secret"), Err(TokenError::NoToken)));
        assert!(matches!(claims("a.%%%.b"), Err(TokenError::NoToken)));
    }
}
