//! Alerts of a Prometheus server that keep passes from beginning.

use std::time::Duration;

use kube::{Client, Config};
use serde::Deserialize;
use understudy_api::host_update::AlertSelector;

/// How long the server may take to answer.
const LIMIT: Duration = Duration::from_secs(5);

/// What `/api/v1/alerts` answers.
#[derive(Debug, Deserialize)]
struct Answer {
    data: Data,
}

#[derive(Debug, Deserialize)]
struct Data {
    alerts: Vec<Alert>,
}

#[derive(Debug, Deserialize)]
struct Alert {
    #[serde(default)]
    labels: std::collections::BTreeMap<String, String>,
    state: String,
}

/// Why nothing may begin, where one of these alerts fires or the server cannot be asked: whoever does not know waits.
pub async fn block(alerts: &AlertSelector) -> Option<String> {
    let server = &alerts.server;
    let answer = match tokio::time::timeout(LIMIT, ask(server)).await {
        Ok(Ok(answer)) => answer,
        Ok(Err(error)) => return Some(format!("Prometheus at {server} cannot be asked: {error}")),
        Err(_) => {
            let limit = LIMIT.as_secs();
            return Some(format!("Prometheus at {server} does not answer within {limit} s"));
        }
    };
    let firing = firing(alerts, &answer);
    (!firing.is_empty()).then(|| format!("alert {} fires", firing.join(", ")))
}

/// A client of the API server is one of any server: TLS, proxies and time limits are the same. It has no credentials.
async fn ask(server: &str) -> Result<Answer, Box<dyn std::error::Error + Send + Sync>> {
    let mut config = Config::new(server.trim_end_matches('/').parse()?);
    config.connect_timeout = Some(LIMIT);
    config.read_timeout = Some(LIMIT);
    config.default_retry = false;
    let client = Client::try_from(config)?;
    let request = http::Request::get("/api/v1/alerts").body(Vec::new())?;
    Ok(serde_json::from_str(&client.request_text(request).await?)?)
}

/// Names of the selected alerts that fire, each once, in order: the same alerts make the same message.
fn firing(alerts: &AlertSelector, answer: &Answer) -> Vec<String> {
    let all = answer.data.alerts.iter().filter(|alert| alert.state == "firing");
    let names = all.filter_map(|alert| alert.labels.get("alertname"));
    let mut names: Vec<String> = names.filter(|name| alerts.selects(name)).cloned().collect();
    names.sort_unstable();
    names.dedup();
    names
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_alerts_that_fire_and_are_named_block() {
        let answer: Answer = serde_json::from_str(
            r#"{"status": "success", "data": {"alerts": [
                {"labels": {"alertname": "CephOSDDown", "osd": "2"}, "annotations": {}, "state": "firing", "value": "1e+00"},
                {"labels": {"alertname": "CephOSDDown", "osd": "1"}, "state": "firing"},
                {"labels": {"alertname": "CephFull"}, "state": "pending"},
                {"labels": {"alertname": "Watchdog"}, "state": "firing"}]}}"#,
        )
        .unwrap();
        let alerts = AlertSelector {
            server: String::new(),
            names: vec!["Ceph*".to_owned()],
        };
        assert_eq!(firing(&alerts, &answer), ["CephOSDDown"]);
    }
}
