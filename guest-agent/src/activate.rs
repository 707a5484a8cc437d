//! Activation: a clone becomes the guest (DESIGN §5, step 7e and f).

use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use understudy_channel::Activated;

use crate::bus::{BusError, Value};
use crate::role::{self, Role};
use crate::sys::{netlink, packet};
use crate::systemd::{Systemd, Unit, Verb, micros};
use crate::{info, warning};

/// How long units may take to start before the answer is given without them; their jobs go on.
const START: Duration = Duration::from_secs(90);

/// How long the upkeep waits for what clients wait for.
const UPKEEP_WAITS: Duration = Duration::from_secs(10);

/// Meets the true neighbours, takes off the role of a clone, and starts what was held at boot and what was
/// stopped for the import.
pub fn activate(role: &Role, stopped: &[String]) -> Result<Activated, String> {
    let begin = Instant::now();
    // First, for it shortens the interruption.
    meet_neighbours();
    role::mark_active().map_err(|error| format!("{} could not be made: {error}", role::ACTIVE))?;
    // What the operation names and what was stopped comes first and by itself: it is what clients wait for. The
    // many units that are held by default are upkeep, and would take the processor from it.
    let (mut activated, upkeep) = thread::scope(|scope| {
        let (first, served) = mpsc::channel::<()>();
        let upkeep = scope.spawn(move || {
            // Ends at once when the sender is dropped.
            let _ = served.recv_timeout(UPKEEP_WAITS);
            let defaults = role::HELD_BY_DEFAULT.iter().map(|u| (*u).to_owned());
            start(
                defaults
                    .filter(|u| !role.hold.contains(u) && !stopped.contains(u))
                    .collect(),
                &[],
                |systemd, _| systemd.units(&["inactive"]),
            )
        });
        let activated = start(role.hold.clone(), stopped, |systemd, held| {
            systemd.units_by_names(&held.iter().map(String::as_str).collect::<Vec<_>>())
        });
        drop(first);
        (activated, upkeep.join())
    });
    match upkeep {
        Ok(upkeep) => {
            activated.started.extend(upkeep.started);
            activated.failed.extend(upkeep.failed);
        }
        Err(_) => warning!("units that are held by default may not have been started"),
    }
    info!(
        "active after {} us: {} units started",
        micros(begin.elapsed()),
        activated.started.len()
    );
    Ok(activated)
}

/// Forgets the neighbours that were learned, and announces the addresses to the true ones.
///
/// While the clone was isolated the host answered for everybody, with an address that leads nowhere: what is
/// sent there now is lost until the kernel doubts the entry. And frames that others send go where our address
/// was last seen.
pub fn meet_neighbours() {
    let begin = Instant::now();
    match netlink::forget_neighbours() {
        Ok(count) => info!(
            "{count} neighbours forgotten after {} us",
            micros(begin.elapsed())
        ),
        Err(error) => warning!("neighbours of the time of isolation could not be forgotten: {error}"),
    }
    match packet::announce() {
        Ok(count) => info!("{count} addresses announced after {} us", micros(begin.elapsed())),
        Err(error) => warning!("addresses could not be announced: {error}"),
    }
}

/// Starts those of `held` that this boot held back, and all of `stopped`; `list` finds the units among which
/// those of `held` are.
fn start(
    held: Vec<String>,
    stopped: &[String],
    list: impl Fn(&mut Systemd, &[String]) -> Result<Vec<Unit>, BusError>,
) -> Activated {
    let tried = || -> Result<Activated, BusError> {
        let mut systemd = Systemd::connect()?;
        let mut units = stopped.to_vec();
        let known = match held.is_empty() {
            true => Vec::new(),
            false => list(&mut systemd, &held)?,
        };
        for unit in known
            .iter()
            .filter(|u| u.active == "inactive" && held.contains(&u.name) && !stopped.contains(&u.name))
        {
            if was_held(&mut systemd, unit)? {
                units.push(unit.name.clone());
            }
        }
        let mut activated = Activated::default();
        for job in systemd.run_jobs(Verb::Start, &units, START)? {
            if job.result == "done" {
                activated.started.push((job.unit, job.took_us));
            } else {
                activated.failed.push((job.unit, job.result));
            }
        }
        Ok(activated)
    };
    tried().unwrap_or_else(|error| {
        let reason = error.to_string();
        let failed = held
            .iter()
            .chain(stopped)
            .map(|u| (u.clone(), reason.clone()))
            .collect();
        Activated {
            started: Vec::new(),
            failed,
        }
    })
}

/// Whether this boot tried to start the unit and its condition held it back: then it belongs to what runs on
/// this guest. One that nobody wanted stays as it is.
fn was_held(systemd: &mut Systemd, unit: &Unit) -> Result<bool, BusError> {
    let tried = systemd.unit_property(&unit.path, "ConditionTimestampMonotonic")?;
    let met = systemd.unit_property(&unit.path, "ConditionResult")?;
    let number = |value: &Value| value.as_int().unwrap_or(0);
    Ok(number(&tried) > 0 && number(&met) == 0)
}
