//! What the agent asks of systemd's manager, in its words.

use std::path::Path;
use std::time::{Duration, Instant};

use crate::bus::{Arg, Bus, BusError, Value};

/// Where PID 1 listens for root.
pub const PRIVATE_SOCKET: &str = "/run/systemd/private";

const MANAGER: &str = "/org/freedesktop/systemd1";
const MANAGER_INTERFACE: &str = "org.freedesktop.systemd1.Manager";
const PROPERTIES: &str = "org.freedesktop.DBus.Properties";
const UNIT_INTERFACE: &str = "org.freedesktop.systemd1.Unit";
const SERVICE_INTERFACE: &str = "org.freedesktop.systemd1.Service";
/// systemd itself answers at once; a busy or emulated guest may take its time.
const CALL: Duration = Duration::from_secs(20);

/// A loaded unit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unit {
    /// Name.
    pub name: String,
    /// `active`, `inactive`, `failed`, …
    pub active: String,
    /// `running`, `exited`, `dead`, …
    pub sub: String,
    /// Object path.
    pub path: String,
}

/// Outcome of one job.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct JobResult {
    /// Unit.
    pub unit: String,
    /// `done`, `failed`, `timeout`, …; or why it was not even queued.
    pub result: String,
    /// From queueing to the end of the job, in microseconds.
    pub took_us: u64,
}

/// What is done to units.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verb {
    /// Start.
    Start,
    /// Stop.
    Stop,
}

/// A connection to the manager.
#[derive(Debug)]
pub struct Systemd {
    bus: Bus,
}

impl Systemd {
    /// Connects to PID 1.
    pub fn connect() -> Result<Self, BusError> {
        Bus::connect(Path::new(PRIVATE_SOCKET)).map(|bus| Self { bus })
    }

    /// `systemctl is-system-running`.
    pub fn state(&mut self) -> Result<String, BusError> {
        let value = self.property(MANAGER, MANAGER_INTERFACE, "SystemState")?;
        value
            .as_str()
            .map(str::to_owned)
            .ok_or(BusError::Malformed("SystemState"))
    }

    /// Waits until the manager reports something or `timeout` passed.
    pub fn wait_for_signal(&mut self, timeout: Duration) -> Result<(), BusError> {
        self.bus.signal(Instant::now() + timeout).map(|_| ())
    }

    /// Asks for signals. Connections to the private socket get them anyway in current versions.
    pub fn subscribe(&mut self) -> Result<(), BusError> {
        self.bus
            .call(MANAGER, MANAGER_INTERFACE, "Subscribe", &[], CALL)
            .map(|_| ())
    }

    /// Loaded units in any of these states; all of them where none is given.
    pub fn units(&mut self, states: &[&str]) -> Result<Vec<Unit>, BusError> {
        self.list("ListUnitsFiltered", states)
    }

    /// These units, in whatever state they are; those that are not loaded are, where they exist. Far cheaper
    /// than [`Systemd::units`], which asks and tells of hundreds.
    pub fn units_by_names(&mut self, names: &[&str]) -> Result<Vec<Unit>, BusError> {
        self.list("ListUnitsByNames", names)
    }

    fn list(&mut self, member: &'static str, of: &[&str]) -> Result<Vec<Unit>, BusError> {
        let args = [Arg::Strs(of)];
        let answer = self.bus.call(MANAGER, MANAGER_INTERFACE, member, &args, CALL)?;
        let list = answer.first().ok_or(BusError::Malformed(member))?;
        let text = |unit: &Value, at: usize| {
            unit.items()
                .get(at)
                .and_then(Value::as_str)
                .unwrap_or_default()
                .to_owned()
        };
        Ok(list
            .items()
            .iter()
            .map(|u| Unit {
                name: text(u, 0),
                active: text(u, 3),
                sub: text(u, 4),
                path: text(u, 6),
            })
            .collect())
    }

    /// Object path of a unit, loading it if need be.
    pub fn load(&mut self, unit: &str) -> Result<String, BusError> {
        let answer = self
            .bus
            .call(MANAGER, MANAGER_INTERFACE, "LoadUnit", &[Arg::Str(unit)], CALL)?;
        answer
            .first()
            .and_then(Value::as_str)
            .map(str::to_owned)
            .ok_or(BusError::Malformed("LoadUnit"))
    }

    /// A property of a unit.
    pub fn unit_property(&mut self, path: &str, name: &str) -> Result<Value, BusError> {
        self.property(path, UNIT_INTERFACE, name)
    }

    /// A property of a service.
    pub fn service_property(&mut self, path: &str, name: &str) -> Result<Value, BusError> {
        self.property(path, SERVICE_INTERFACE, name)
    }

    fn property(&mut self, path: &str, interface: &str, name: &str) -> Result<Value, BusError> {
        let args = [Arg::Str(interface), Arg::Str(name)];
        let mut answer = self.bus.call(path, PROPERTIES, "Get", &args, CALL)?;
        if answer.is_empty() {
            Err(BusError::Malformed("property"))
        } else {
            Ok(answer.remove(0))
        }
    }

    /// Reads all unit files again.
    pub fn reload(&mut self) -> Result<(), BusError> {
        self.bus
            .call(MANAGER, MANAGER_INTERFACE, "Reload", &[], Duration::from_secs(90))
            .map(|_| ())
    }

    /// Starts or stops units, all at once, and waits for their jobs until `timeout`. A unit whose job was
    /// not over by then is reported as `timeout`; its job goes on.
    pub fn run_jobs(
        &mut self,
        verb: Verb,
        units: &[String],
        timeout: Duration,
    ) -> Result<Vec<JobResult>, BusError> {
        let member = match verb {
            Verb::Start => "StartUnit",
            Verb::Stop => "StopUnit",
        };
        if units.is_empty() {
            return Ok(Vec::new());
        }
        self.subscribe()?;
        let begin = Instant::now();
        let mut results = Vec::new();
        let mut waiting: Vec<(String, String, Instant)> = Vec::new();
        for unit in units {
            let queued = Instant::now();
            let args = [Arg::Str(unit), Arg::Str("replace")];
            match self.bus.call(MANAGER, MANAGER_INTERFACE, member, &args, CALL) {
                Ok(answer) => {
                    let job = answer
                        .first()
                        .and_then(Value::as_str)
                        .unwrap_or_default()
                        .to_owned();
                    waiting.push((job, unit.clone(), queued));
                }
                Err(BusError::Refused { message, .. }) => {
                    results.push(JobResult {
                        unit: unit.clone(),
                        result: message,
                        took_us: 0,
                    });
                }
                Err(error) => return Err(error),
            }
        }
        while !waiting.is_empty() {
            let Some(signal) = self.bus.signal(begin + timeout)? else {
                break;
            };
            if signal.member != "JobRemoved" {
                continue;
            }
            // JobRemoved(u id, o job, s unit, s result)
            let job = signal.body.get(1).and_then(Value::as_str).unwrap_or_default();
            let result = signal.body.get(3).and_then(Value::as_str).unwrap_or_default();
            waiting.retain(|(path, unit, queued)| {
                if path == job {
                    results.push(JobResult {
                        unit: unit.clone(),
                        result: result.to_owned(),
                        took_us: micros(queued.elapsed()),
                    });
                }
                path != job
            });
        }
        for (_, unit, queued) in waiting {
            let took_us = micros(queued.elapsed());
            results.push(JobResult {
                unit,
                result: "timeout".to_owned(),
                took_us,
            });
        }
        Ok(results)
    }
}

/// A duration in whole microseconds.
pub fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}
