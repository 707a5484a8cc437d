//! Activation: a clone becomes the guest (DESIGN §5, step 7e and f).

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use understudy_channel::Activated;

use crate::bus::{BusError, Value};
use crate::log::Laps;
use crate::role::{self, Role};
use crate::sys::{netlink, packet};
use crate::systemd::{Systemd, Unit, Verb, micros};
use crate::{info, warning};

/// How long units may take to start before the answer is given without them; their jobs go on.
const START: Duration = Duration::from_secs(90);

/// Most bytes that are read of the programs of held units.
const MAX_READ_AHEAD: u64 = 256 << 20;

/// How long the upkeep waits for what clients wait for to be started.
const UPKEEP_WAITS: Duration = Duration::from_secs(10);
/// How much longer it waits: many services count as started long before they answer.
const HEAD_START: Duration = Duration::from_secs(2);

/// What is known before the cutover of what it will start.
#[derive(Debug, Default)]
pub struct Prepared {
    /// Units that the operation holds, and that this boot would have started.
    held: Vec<String>,
    /// A fresh connection: to make one takes its time on a busy guest.
    systemd: Option<Systemd>,
}

impl Prepared {
    /// Connects anew, after a round that may have been the last one. An older connection may be full of signals
    /// that nobody read.
    pub fn connect(&mut self) {
        self.systemd = Systemd::connect().ok();
    }
}

/// Finds out which units will be started, and reads their programs, so that they come from memory when clients
/// wait for them.
pub fn prepare(role: &Role) -> Result<Prepared, BusError> {
    let begin = Instant::now();
    let mut systemd = Systemd::connect()?;
    let held = held_by_name(&mut systemd, &role.hold)?;
    let mut left = MAX_READ_AHEAD;
    for unit in &held {
        for program in programs(&mut systemd, unit)? {
            read_ahead(&program, &mut left);
        }
    }
    info!(
        "{} units will be started, {} MiB of programs read after {} us",
        held.len(),
        (MAX_READ_AHEAD - left) >> 20,
        micros(begin.elapsed())
    );
    Ok(Prepared {
        held: names(held),
        systemd: None,
    })
}

/// Takes off the role of a clone, starts what was held at boot and what was stopped for the import, and meets
/// the true neighbours. What was not `prepared` is looked up.
pub fn activate(role: &Role, stopped: &[String], prepared: Option<Prepared>) -> Result<Activated, String> {
    let begin = Instant::now();
    role::mark_active().map_err(|error| format!("{} could not be made: {error}", role::ACTIVE))?;
    // What the operation names and what was stopped comes first and by itself: it is what clients wait for. The
    // many units that are held by default are upkeep, and would take the processor from it.
    let (mut activated, upkeep) = thread::scope(|scope| {
        scope.spawn(meet_neighbours);
        let (first, served) = mpsc::channel::<()>();
        let upkeep = scope.spawn(move || {
            // Ends at once when the sender is dropped.
            let _ = served.recv_timeout(UPKEEP_WAITS);
            thread::sleep(HEAD_START);
            let defaults: Vec<String> = role::HELD_BY_DEFAULT
                .iter()
                .map(|u| (*u).to_owned())
                .filter(|u| !role.hold.contains(u) && !stopped.contains(u))
                .collect();
            start(&defaults, None, |systemd| {
                let held = find_held(systemd, &defaults, |systemd, _| systemd.units(&["inactive"]))?;
                Ok(names(held))
            })
        });
        let named: Vec<String> = role.hold.iter().chain(stopped).cloned().collect();
        let (held, connection) = prepared.map_or((None, None), |it| (Some(it.held), it.systemd));
        let activated = start(&named, connection, |systemd| {
            let mut units = stopped.to_vec();
            let held = match &held {
                Some(held) => held.clone(),
                None => names(held_by_name(systemd, &role.hold)?),
            };
            units.extend(held.into_iter().filter(|unit| !stopped.contains(unit)));
            Ok(units)
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

/// Starts the units that `find` names; where that fails, none of `wanted` was started.
fn start(
    wanted: &[String],
    connection: Option<Systemd>,
    find: impl Fn(&mut Systemd) -> Result<Vec<String>, BusError>,
) -> Activated {
    if wanted.is_empty() {
        return Activated::default();
    }
    let tried = |mut systemd: Systemd| -> Result<Activated, BusError> {
        let mut laps = Laps::begin();
        let mut activated = Activated::default();
        let units = find(&mut systemd)?;
        laps.lap("found");
        for job in systemd.run_jobs(Verb::Start, &units, START)? {
            if job.result == "done" {
                activated.started.push((job.unit, job.took_us));
            } else {
                activated.failed.push((job.unit, job.result));
            }
        }
        laps.lap("started");
        info!("{} units started ({laps})", activated.started.len());
        Ok(activated)
    };
    // A connection that was kept may be broken by now; what was started already is started.
    let first = connection.map(tried).and_then(Result::ok);
    let result = first.map_or_else(|| Systemd::connect().and_then(tried), Ok);
    result.unwrap_or_else(|error| {
        let reason = error.to_string();
        Activated {
            started: Vec::new(),
            failed: wanted.iter().map(|unit| (unit.clone(), reason.clone())).collect(),
        }
    })
}

/// Those of the named units that this boot held back.
fn held_by_name(systemd: &mut Systemd, wanted: &[String]) -> Result<Vec<Unit>, BusError> {
    find_held(systemd, wanted, |systemd, names| systemd.units_by_names(names))
}

fn names(units: Vec<Unit>) -> Vec<String> {
    units.into_iter().map(|unit| unit.name).collect()
}

/// Those of the units `wanted` that this boot held back; `list` finds the units among which they are.
fn find_held(
    systemd: &mut Systemd,
    wanted: &[String],
    list: impl FnOnce(&mut Systemd, &[&str]) -> Result<Vec<Unit>, BusError>,
) -> Result<Vec<Unit>, BusError> {
    let mut held = Vec::new();
    if wanted.is_empty() {
        return Ok(held);
    }
    let names: Vec<&str> = wanted.iter().map(String::as_str).collect();
    for unit in list(systemd, &names)? {
        if unit.active == "inactive" && wanted.contains(&unit.name) && was_held(systemd, &unit)? {
            held.push(unit);
        }
    }
    Ok(held)
}

/// Whether this boot tried to start the unit and its condition held it back: then it belongs to what runs on
/// this guest. One that nobody wanted stays as it is.
fn was_held(systemd: &mut Systemd, unit: &Unit) -> Result<bool, BusError> {
    let tried = systemd.unit_property(&unit.path, "ConditionTimestampMonotonic")?;
    let met = systemd.unit_property(&unit.path, "ConditionResult")?;
    let number = |value: &Value| value.as_int().unwrap_or(0);
    Ok(number(&tried) > 0 && number(&met) == 0)
}

/// The programs that a service runs at its start; none of another kind of unit.
fn programs(systemd: &mut Systemd, unit: &Unit) -> Result<Vec<PathBuf>, BusError> {
    let mut programs = Vec::new();
    if !unit.name.ends_with(".service") {
        return Ok(programs);
    }
    for property in ["ExecStartPre", "ExecStart", "ExecStartPost"] {
        // a(sasbttttuii): the program's path comes first.
        for command in systemd.service_property(&unit.path, property)?.items() {
            if let Some(path) = command.items().first().and_then(Value::as_str) {
                programs.push(PathBuf::from(path));
            }
        }
    }
    Ok(programs)
}

/// Reads a file, so that it is in the page cache. What cannot be read is none of our business.
fn read_ahead(path: &Path, left: &mut u64) {
    let Ok(file) = File::open(path) else { return };
    if let Ok(read) = io::copy(&mut file.take(*left), &mut io::sink()) {
        *left -= read;
    }
}
