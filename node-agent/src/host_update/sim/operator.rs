//! The operator as credential provider: elsewhere, so that neither the end of the host nor that of the agent takes
//! anything from it; asked by a key in `/run`, and answering when it has time.

use understudy_api::node_update::NodeUpdateStatus;

use super::super::effects::{EffectError, Effected, ErrorKind};
use super::super::status;
use super::agent::moment;
use super::mutations::Mutation;
use super::world::*;

/// What it has of the update.
#[derive(Default)]
pub struct Operator {
    /// Whether it is the provider.
    pub is_provider: bool,
    /// Who asks: a boot, by a key.
    request: Option<(u32, u64)>,
    answers_at: i64,
    /// To whom the credential was released.
    pub releases: Vec<(u32, u64)>,
    is_destroyed: bool,
}

impl World {
    /// Asks for the credential; `Ok` where it was released to this boot and key.
    pub fn ask_operator(&mut self) -> Effected<()> {
        let is_forgotten = self.is(Mutation::RequestKeyIsForgotten);
        let agent = self.agent_started_at;
        let key = match self.request_key {
            Some((key, of)) if of == agent || !is_forgotten => key,
            _ => {
                self.keys += 1;
                self.request_key = Some((self.keys, agent));
                self.keys
            }
        };
        let (request, now) = ((self.boot, key), self.now);
        if self.operator.request != Some(request) {
            self.operator.request = Some(request);
            self.operator.answers_at = now + self.rng.range(10 * MS, 3 * SECOND);
        }
        if self.provider_silent || now < self.operator.answers_at {
            let message = "the operator has not answered yet";
            return Err(EffectError::new(ErrorKind::Awaited, message));
        }
        let operator = &mut self.operator;
        let refused = |message| Err(EffectError::new(ErrorKind::Refused, message));
        match operator.releases.iter().find(|(boot, _)| *boot == request.0) {
            _ if operator.is_destroyed => return refused("the credential was destroyed"),
            Some(there) if *there != request => return refused("it was released to another key"),
            Some(_) => {}
            None => operator.releases.push(request),
        }
        if self.is(Mutation::CredentialIsDestroyedAtRelease) {
            self.operator.is_destroyed = true;
        }
        Ok(())
    }

    /// What is told of the update decides whether the credential is needed.
    pub fn let_operator_look(&mut self) {
        if !self.operator.is_provider || self.operator.is_destroyed || self.provider_silent {
            return;
        }
        let update = self.shared.update.borrow().clone();
        let Some(update) = update else { return };
        let mut told = NodeUpdateStatus::default();
        status::update(&mut told, &update, 1, moment(self.now, self.booted_at));
        if told.needs_keys() {
            return;
        }
        for session in &update.sessions {
            let guest = self.guests.iter().find(|guest| guest.uid == session.uid);
            let good = guest.and_then(Guest::good_checkpoint);
            assert!(
                good.is_none_or(|(id, _)| id != session.checkpoint),
                "the credential is destroyed, and the session of {} needs it",
                session.guest
            );
        }
        self.operator.is_destroyed = true;
    }
}
