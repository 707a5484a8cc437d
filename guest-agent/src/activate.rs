//! Activation: a clone becomes the guest (DESIGN §5, step 7e and f).

use std::time::{Duration, Instant};

use understudy_channel::Activated;

use crate::bus::{BusError, Value};
use crate::role::{self, Role};
use crate::sys::packet;
use crate::systemd::{Systemd, Verb, micros};
use crate::{info, warning};

/// How long units may take to start before the answer is given without them; their jobs go on.
const START: Duration = Duration::from_secs(90);

/// Announces the addresses, takes off the role of a clone, and starts what was held at boot and what was
/// stopped for the import.
pub fn activate(role: &Role, stopped: &[String]) -> Result<Activated, String> {
    let begin = Instant::now();
    // First, for it shortens the interruption: frames that others send go where this address was last seen.
    match packet::announce() {
        Ok(count) => info!("{count} addresses announced after {} us", micros(begin.elapsed())),
        Err(error) => warning!("addresses could not be announced: {error}"),
    }
    role::mark_active().map_err(|error| format!("{} could not be made: {error}", role::ACTIVE))?;
    let mut systemd = Systemd::connect().map_err(|error| error.to_string())?;
    let mut units = stopped.to_vec();
    for unit in role.held_units() {
        match was_held(&mut systemd, &unit) {
            Ok(true) => units.push(unit),
            Ok(false) => {}
            Err(error) => warning!("whether {unit} was held is not known: {error}"),
        }
    }
    units.sort();
    units.dedup();
    let results = systemd
        .run_jobs(Verb::Start, &units, START)
        .map_err(|error| error.to_string())?;
    let mut activated = Activated::default();
    for job in results {
        if job.result == "done" {
            activated.started.push((job.unit, job.took_us));
        } else {
            activated.failed.push((job.unit, job.result));
        }
    }
    info!(
        "active after {} us: {} units started",
        micros(begin.elapsed()),
        activated.started.len()
    );
    Ok(activated)
}

/// Whether this boot tried to start the unit and its condition held it back: then it belongs to what runs on
/// this guest. One that nobody wanted stays as it is.
fn was_held(systemd: &mut Systemd, unit: &str) -> Result<bool, BusError> {
    let path = systemd.load(unit)?;
    if systemd.unit_property(&path, "LoadState")?.as_str() != Some("loaded")
        || systemd.unit_property(&path, "ActiveState")?.as_str() != Some("inactive")
    {
        return Ok(false);
    }
    let tried = systemd.unit_property(&path, "ConditionTimestampMonotonic")?;
    let met = systemd.unit_property(&path, "ConditionResult")?;
    let number = |value: &Value| value.as_int().unwrap_or(0);
    Ok(number(&tried) > 0 && number(&met) == 0)
}
