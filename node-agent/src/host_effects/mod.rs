//! The host engine's world: VMMs, credential providers, systemd and logind, files.

mod command;
mod errors;
mod operations;
mod resuming;
mod saving;

use std::sync::Arc;
use std::time::Duration;

use understudy_api::Guest;
use understudy_api::NodeUpdatePhase;
use understudy_api::conditions::reasons;
use understudy_api::host_update::RebootMethod;
use understudy_api::rollout;

use crate::host;
use crate::host_update::effects::{
    CheckpointFacts, CommandEnd, HostFacts, HostIntent, Preflight, Resumption, SaveProgress, Settling,
};
use crate::host_update::quiesce::{InFlight, Rules};
use crate::host_update::{EffectError, Effected, Effects, ErrorKind, Session, Update};
use crate::moment::Moment;
use crate::node::Node;
use crate::store::{Key, Object};

pub use command::{Commands, Keeping};
pub use resuming::is_unwanted;

/// The longest wait at once, so that what changes without a bell is seen.
const LOOK: Duration = Duration::from_millis(200);

/// The world of one update.
pub struct HostWorld {
    node: Arc<Node>,
    /// When this agent was started.
    agent_started: Moment,
    /// Name of the NodeUpdate.
    name: String,
    /// How far the update was when it was seen last.
    phase: NodeUpdatePhase,
}

impl HostWorld {
    /// The world of an update, for an agent that was started then.
    pub fn new(node: Arc<Node>, agent_started: Moment, update: &Update) -> HostWorld {
        HostWorld {
            node,
            agent_started,
            name: update.name.clone(),
            phase: update.phase(),
        }
    }

    /// The guest of a session; `None` where it was deleted, or another one has its name.
    fn guest(&self, session: &Session) -> Effected<Option<Guest>> {
        let Some((namespace, name)) = session.guest.split_once('/') else {
            return Ok(None);
        };
        let guest = self
            .node
            .objects
            .guest(&Key::new(namespace, name))
            .map_err(|error| EffectError::new(ErrorKind::Retry, error.to_string()))?;
        Ok(guest.filter(|guest| guest.uid() == session.uid))
    }

    fn keeping(&self) -> Keeping<'_> {
        Keeping {
            systemd: self.node.launcher.has_systemd(),
            run_dir: &self.node.config.run_dir,
        }
    }

    fn stops(&self) -> bool {
        let waits = matches!(self.node.work.intent(), HostIntent::GoesDown { .. })
            && self.phase != NodeUpdatePhase::Rebooting
            && !self.phase.is_terminal();
        self.node.is_stopping() && !waits
    }

    fn abort(&self) -> Option<String> {
        let objects = &self.node.objects;
        if let Ok(Some(node_update)) = objects.node_update(&self.name) {
            if node_update.is_deleting() {
                return Some("the NodeUpdate was deleted".to_owned());
            }
            let reference = node_update.spec.host_update.as_ref()?;
            let host_update = objects.host_update(&reference.name).ok()??;
            if host_update.uid() != reference.uid {
                return None;
            }
            if host_update.is_deleting() {
                return Some("the HostUpdate was deleted".to_owned());
            }
            if rollout::aborted(&host_update).is_some() {
                return Some("the HostUpdate was aborted".to_owned());
            }
        }
        None
    }
}

impl Effects for HostWorld {
    fn now(&mut self) -> Moment {
        host::moment()
    }

    fn wait(&mut self, until: Moment) {
        let (intent, abort) = (self.node.work.intent(), self.abort());
        let mut seen = 0;
        loop {
            let left = until.boot_us - host::moment().boot_us;
            let Ok(left) = u64::try_from(left) else { return };
            let changed = self.node.work.intent() != intent || self.abort() != abort;
            if left == 0 || self.stops() || changed {
                return;
            }
            seen = self.node.work.wait(seen, Duration::from_micros(left).min(LOOK));
        }
    }

    fn abort_requested(&mut self, update: &Update) -> Option<String> {
        self.phase = update.phase();
        self.abort()
    }

    fn host_intent(&mut self) -> HostIntent {
        self.node.work.intent()
    }

    fn must_stop(&mut self) -> bool {
        self.stops()
    }

    fn inspect_host(&mut self) -> Effected<HostFacts> {
        let now = host::moment();
        Ok(HostFacts {
            boot_id: self.node.sessions.boot_id().to_owned(),
            kernel_release: host::kernel_release(),
            booted_at: now.unix_us - now.boot_us,
            agent_started_at: self.agent_started.unix_us,
        })
    }

    fn run_command(&mut self, update: &Update) -> Effected<Option<CommandEnd>> {
        self.node
            .commands
            .run(&self.keeping(), &update.uid, &update.plan.command)
            .map_err(|error| {
                EffectError::new(ErrorKind::Retry, format!("running update.command: {error}"))
                    .because(reasons::UPDATE_COMMAND_FAILED)
            })
    }

    fn end_command(&mut self, update: &Update) -> Effected<()> {
        self.node
            .commands
            .end(&self.keeping(), &update.uid)
            .map_err(|error| EffectError::new(ErrorKind::Retry, format!("ending update.command: {error}")))
    }

    fn quiesce_operations(&mut self, update: &Update, rules: &Rules) -> Effected<Vec<InFlight>> {
        self.do_quiesce(update, rules)
    }

    fn release_operations(&mut self, _update: &Update) -> Effected<()> {
        self.do_release();
        Ok(())
    }

    fn preflight(&mut self, update: &Update) -> Effected<Preflight> {
        self.do_preflight(update)
    }

    fn register_key(&mut self, update: &Update, session: &Session) -> Effected<()> {
        self.do_register_key(update, session)
    }

    fn save(&mut self, update: &Update, session: &Session, lease_ms: u64) -> Effected<SaveProgress> {
        self.do_save(update, session, lease_ms)
    }

    fn pause_for_save(&mut self, _update: &Update, session: &Session) -> Effected<SaveProgress> {
        self.do_pause_for_save(session)
    }

    fn keep_saved(&mut self, _update: &Update, session: &Session, lease_ms: u64) -> Effected<SaveProgress> {
        self.do_keep_saved(session, lease_ms)
    }

    fn cancel_save(&mut self, _update: &Update, session: &Session) -> Effected<()> {
        self.do_cancel_save(session)
    }

    fn acknowledge(&mut self, update: &Update) -> Effected<()> {
        if let HostIntent::GoesDown { reason, .. } = self.node.work.intent() {
            tracing::info!(
                update = update.name,
                reason,
                "every session is saved: the host may go down"
            );
            if let Some(power) = self.node.work.power() {
                power.let_go();
            }
        }
        Ok(())
    }

    fn request_reboot(&mut self, update: &Update) -> Effected<()> {
        let refused =
            |message: String| EffectError::new(ErrorKind::Refused, message).because(reasons::REBOOT_FAILED);
        tracing::info!(
            update = update.name,
            "asking for the host's reboot, for every session is saved"
        );
        match update.plan.reboot {
            RebootMethod::Command => {
                if let Some(power) = self.node.work.power() {
                    power.let_go();
                }
                command::reboot(&update.plan.reboot_command).map_err(refused)
            }
            RebootMethod::Systemd => {
                let asked = self.node.work.power().map(crate::power::Power::reboot);
                match asked {
                    Some(Ok(())) => Ok(()),
                    // Without logind systemd itself is asked.
                    other => command::reboot(&["systemctl", "reboot"].map(str::to_owned)).map_err(|error| {
                        let logind = match other {
                            Some(Err(logind)) => format!("{logind}; "),
                            _ => String::new(),
                        };
                        refused(format!("{logind}{error}"))
                    }),
                }
            }
        }
    }

    fn call_off_reboot(&mut self, _update: &Update) -> Effected<()> {
        let power = self.node.work.power();
        let goes_down = matches!(self.node.work.intent(), HostIntent::GoesDown { .. })
            || power.and_then(crate::power::Power::is_going_down) == Some(true);
        if goes_down {
            let message = "the host is going down: that cannot be called off";
            return Err(EffectError::new(ErrorKind::Refused, message));
        }
        if let Some(power) = power {
            power.hold();
        }
        Ok(())
    }

    fn inspect_checkpoint(&mut self, _update: &Update, session: &Session) -> Effected<CheckpointFacts> {
        self.do_inspect_checkpoint(session)
    }

    fn obtain_key(&mut self, _update: &Update, session: &Session) -> Effected<()> {
        self.do_obtain_key(session)
    }

    fn resume(&mut self, _update: &Update, session: &Session) -> Effected<Resumption> {
        self.do_resume(session)
    }

    fn look_after(&mut self, _update: &Update, session: &Session) -> Effected<Settling> {
        self.do_look_after(session)
    }

    fn destroy(&mut self, _update: &Update, session: &Session) -> Effected<()> {
        self.node
            .sessions
            .destroy(&session.uid, session.checkpoint)
            .map_err(|error| EffectError::new(ErrorKind::Retry, error.to_string()))
    }
}
