//! Leader election on a Lease, and the fence that it puts before every write.
//!
//! A lease is held until a time on this process's own monotonic clock, reckoned from *before* the renewal was
//! sent, and shorter than what others wait. So it runs out here first, also where the API server is away or
//! this process was stopped for a while. (kube-lease-manager reports a loss only once the API server has told
//! of it, and compares wall clocks of different machines: neither makes a fence.)

use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use kube::api::{ObjectMeta, PostParams};
use kube::{Api, Client};
use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout};

/// How long others wait after the last renewal that they saw.
pub const DURATION: Duration = Duration::from_secs(15);
/// How long the holder relies on a renewal.
const HELD: Duration = Duration::from_secs(10);
/// How often it is renewed, or looked at.
const PERIOD: Duration = Duration::from_secs(2);

/// Whether this process leads, asked before every write.
#[derive(Clone, Debug)]
pub struct Fence(watch::Receiver<Option<Instant>>);

impl Fence {
    /// When a write that is begun now must have come to its end: others may lead soon after. `None`: the lease is
    /// not held, and nothing may be written.
    pub fn deadline(&self) -> Option<Instant> {
        last_write(*self.0.borrow(), Instant::now())
    }
}

/// When a write that is begun now must be over, where the lease is held `until` then.
fn last_write(until: Option<Instant>, now: Instant) -> Option<Instant> {
    until
        .filter(|until| now < *until)
        .map(|until| until + (DURATION - HELD) - PERIOD / 2)
}

/// A candidate for the lease.
pub struct Candidate {
    leases: Api<Lease>,
    name: String,
    identity: String,
    until: watch::Sender<Option<Instant>>,
    seen: Option<Seen>,
}

/// Somebody's renewal, and when we saw it first.
#[derive(Clone, Debug, PartialEq)]
struct Seen {
    holder: String,
    renewed: Option<MicroTime>,
    at: Instant,
}

/// What to do about the lease that is there.
#[derive(Debug, PartialEq)]
enum Move {
    /// It is another's; wait.
    Wait,
    /// It is ours already.
    Renew,
    /// It is nobody's, or its holder has not renewed it for as long as it said.
    Take,
}

impl Candidate {
    /// A candidate that calls itself `identity`, and the fence that opens while it leads.
    pub fn new(client: Client, namespace: &str, name: &str, identity: &str) -> (Candidate, Fence) {
        let (until, receiver) = watch::channel(None);
        let candidate = Candidate {
            leases: Api::namespaced(client, namespace),
            name: name.to_owned(),
            identity: identity.to_owned(),
            until,
            seen: None,
        };
        (candidate, Fence(receiver))
    }

    /// Returns once this process leads.
    pub async fn acquire(&mut self) {
        loop {
            if self.step().await {
                return;
            }
            sleep(PERIOD).await;
        }
    }

    /// Renews the lease; returns when it is lost, which ends the process's time as leader for good.
    pub async fn keep(&mut self) {
        loop {
            sleep(PERIOD).await;
            self.step().await;
            let held = self.until.borrow().is_some_and(|until| Instant::now() < until);
            if !held {
                self.until.send_replace(None);
                return;
            }
        }
    }

    /// Gives the lease back, so that another leads at once. No write may follow.
    pub async fn release(&mut self) {
        if self.until.send_replace(None).is_none() {
            return;
        }
        let given_back = async {
            let Some(mut lease) = self.leases.get_opt(&self.name).await? else {
                return Ok(());
            };
            let spec = lease.spec.get_or_insert_default();
            if spec.holder_identity.as_deref() != Some(&self.identity) {
                return Ok(());
            }
            spec.holder_identity = None;
            spec.lease_duration_seconds = Some(1);
            self.leases
                .replace(&self.name, &PostParams::default(), &lease)
                .await
                .map(drop)
        };
        match timeout(Duration::from_secs(5), given_back).await {
            Ok(Ok(())) => tracing::info!(lease = self.name, "the lease was given back"),
            Ok(Err(error)) => {
                let error: kube::Error = error;
                tracing::warn!(lease = self.name, %error, "the lease could not be given back; it runs out by itself");
            }
            Err(_) => tracing::warn!(lease = self.name, "the lease could not be given back in time"),
        }
    }

    /// One look at the lease; whether it is held afterwards.
    async fn step(&mut self) -> bool {
        let begun = Instant::now();
        match timeout(PERIOD * 2, self.attempt()).await {
            Ok(Ok(true)) => {
                self.until.send_replace(Some(begun + HELD));
                true
            }
            Ok(Ok(false)) => {
                self.until.send_replace(None);
                false
            }
            Ok(Err(error)) => {
                tracing::warn!(lease = self.name, %error, "the lease could not be looked at");
                false
            }
            Err(_) => {
                tracing::warn!(lease = self.name, "the API server does not answer for the lease");
                false
            }
        }
    }

    async fn attempt(&mut self) -> Result<bool, kube::Error> {
        let now = MicroTime(Timestamp::now());
        let Some(mut lease) = self.leases.get_opt(&self.name).await? else {
            let lease = Lease {
                metadata: ObjectMeta {
                    name: Some(self.name.clone()),
                    ..ObjectMeta::default()
                },
                spec: Some(self.claim(None, now)),
            };
            return won(self.leases.create(&PostParams::default(), &lease).await);
        };
        let there = lease.spec.take().unwrap_or_default();
        self.seen = Some(watched(self.seen.take(), &there, Instant::now()));
        let chosen = choose(&there, self.seen.as_ref(), &self.identity, Instant::now());
        if chosen == Move::Wait {
            return Ok(false);
        }
        // With the resource version that was read: of two who take it one succeeds.
        let before = (chosen == Move::Renew).then_some(&there);
        lease.spec = Some(LeaseSpec {
            lease_transitions: Some(there.lease_transitions.unwrap_or(0) + i32::from(chosen == Move::Take)),
            ..self.claim(before, now)
        });
        won(self
            .leases
            .replace(&self.name, &PostParams::default(), &lease)
            .await)
    }

    fn claim(&self, before: Option<&LeaseSpec>, now: MicroTime) -> LeaseSpec {
        LeaseSpec {
            acquire_time: before
                .and_then(|spec| spec.acquire_time.clone())
                .or(Some(now.clone())),
            holder_identity: Some(self.identity.clone()),
            lease_duration_seconds: i32::try_from(DURATION.as_secs()).ok(),
            lease_transitions: Some(0),
            renew_time: Some(now),
            ..LeaseSpec::default()
        }
    }
}

fn won<T>(written: Result<T, kube::Error>) -> Result<bool, kube::Error> {
    match written {
        Ok(_) => Ok(true),
        Err(kube::Error::Api(status)) if status.code == 409 => Ok(false),
        Err(error) => Err(error),
    }
}

/// What was seen, with the time at which it was seen *first*.
fn watched(before: Option<Seen>, there: &LeaseSpec, now: Instant) -> Seen {
    let holder = there.holder_identity.clone().unwrap_or_default();
    match before {
        Some(seen) if seen.holder == holder && seen.renewed == there.renew_time => seen,
        _ => Seen {
            holder,
            renewed: there.renew_time.clone(),
            at: now,
        },
    }
}

fn choose(there: &LeaseSpec, seen: Option<&Seen>, identity: &str, now: Instant) -> Move {
    match there.holder_identity.as_deref() {
        None | Some("") => Move::Take,
        Some(holder) if holder == identity => Move::Renew,
        Some(_) => {
            let wait = there
                .lease_duration_seconds
                .and_then(|seconds| u64::try_from(seconds).ok())
                .map_or(DURATION, Duration::from_secs);
            match seen {
                Some(seen) if now >= seen.at + wait => Move::Take,
                _ => Move::Wait,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn held_by(holder: &str, renewed: i64) -> LeaseSpec {
        LeaseSpec {
            holder_identity: Some(holder.into()),
            lease_duration_seconds: Some(15),
            renew_time: Some(MicroTime(Timestamp::from_second(renewed).unwrap())),
            ..LeaseSpec::default()
        }
    }

    #[test]
    fn a_lease_is_taken_only_when_its_holder_was_silent_for_as_long_as_it_said() {
        let start = Instant::now();
        let lease = held_by("other", 100);
        let seen = watched(None, &lease, start);
        let at = |seconds| start + Duration::from_secs(seconds);
        assert_eq!(choose(&lease, Some(&seen), "me", at(14)), Move::Wait);
        assert_eq!(choose(&lease, Some(&seen), "me", at(15)), Move::Take);
        // The same renewal seen again does not extend it, another one does; whatever its clock says.
        let again = watched(Some(seen.clone()), &lease, at(10));
        assert_eq!(again, seen);
        let renewed = watched(Some(again), &held_by("other", 90), at(10));
        assert_eq!(
            choose(&held_by("other", 90), Some(&renewed), "me", at(15)),
            Move::Wait
        );
    }

    #[test]
    fn what_is_nobodys_or_ours_is_taken_at_once() {
        let now = Instant::now();
        assert_eq!(choose(&LeaseSpec::default(), None, "me", now), Move::Take);
        assert_eq!(choose(&held_by("", 1), None, "me", now), Move::Take);
        assert_eq!(choose(&held_by("me", 1), None, "me", now), Move::Renew);
    }

    #[test]
    fn the_fence_closes_by_itself_and_before_another_may_lead() {
        let now = Instant::now();
        let until = now + HELD;
        assert!(last_write(Some(until), now).is_some());
        assert_eq!(last_write(Some(until), until), None);
        assert_eq!(last_write(None, now), None);
        // Reckoned from before the renewal was sent, so from before anybody saw it: what was begun in the last
        // moment is over when others take the lease.
        let last = last_write(Some(until), until - Duration::from_millis(1));
        assert!(last.is_some_and(|last| last < now + DURATION));
    }
}
