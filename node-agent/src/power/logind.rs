//! logind's D-Bus interface (org.freedesktop.login1(5)), as far as it is needed.

use std::os::fd::OwnedFd;
use std::time::Duration;

use zbus::blocking::Connection;
use zbus::blocking::connection::Builder;
use zbus::zvariant::{OwnedFd as SentFd, OwnedValue};

use super::{PowerError, Shutdown};

/// How long a call may take.
const ANSWER: Duration = Duration::from_secs(20);

#[zbus::proxy(
    interface = "org.freedesktop.login1.Manager",
    default_service = "org.freedesktop.login1",
    default_path = "/org/freedesktop/login1",
    gen_async = false,
    blocking_name = "Manager"
)]
trait ManagerInterface {
    fn inhibit(&self, what: &str, who: &str, why: &str, mode: &str) -> zbus::Result<SentFd>;
    fn reboot(&self, interactive: bool) -> zbus::Result<()>;

    #[zbus(property, name = "InhibitDelayMaxUSec")]
    fn inhibit_delay_max(&self) -> zbus::Result<u64>;
    // Signals of properties that logind does not send would leave a cached value stale.
    #[zbus(property(emits_changed_signal = "false"))]
    fn preparing_for_shutdown(&self) -> zbus::Result<bool>;

    #[zbus(signal)]
    fn prepare_for_shutdown(&self, start: bool) -> zbus::Result<()>;
    #[zbus(signal)]
    fn prepare_for_shutdown_with_metadata(
        &self,
        start: bool,
        metadata: std::collections::HashMap<String, OwnedValue>,
    ) -> zbus::Result<()>;
}

/// A connection to logind.
#[derive(Clone, Debug)]
pub struct Logind {
    connection: Connection,
    manager: Manager<'static>,
}

fn failed(action: &'static str) -> impl Fn(zbus::Error) -> PowerError {
    move |source| PowerError::Logind {
        action,
        source: Box::new(source),
    }
}

impl Logind {
    /// Connects to the system bus, or the bus at `address`.
    pub fn connect(address: Option<&str>) -> Result<Logind, PowerError> {
        let builder = match address {
            Some(address) => Builder::address(address),
            None => Builder::system(),
        };
        let connection = builder
            .and_then(|builder| builder.method_timeout(ANSWER).build())
            .map_err(failed("connecting to the bus"))?;
        let manager = Manager::builder(&connection)
            .cache_properties(zbus::proxy::CacheProperties::No)
            .build()
            .map_err(failed("making a proxy"))?;
        Ok(Logind { connection, manager })
    }

    /// Takes a delay inhibitor against shutdown: held until the descriptor is closed.
    pub fn inhibit(&self) -> Result<OwnedFd, PowerError> {
        self.manager
            .inhibit(
                "shutdown",
                "Understudy",
                "sessions of guests are saved before the host goes down",
                "delay",
            )
            .map(OwnedFd::from)
            .map_err(failed("taking a delay inhibitor"))
    }

    /// How long logind waits for inhibitors.
    pub fn delay(&self) -> Result<Duration, PowerError> {
        self.manager
            .inhibit_delay_max()
            .map(Duration::from_micros)
            .map_err(failed("reading InhibitDelayMaxUSec"))
    }

    /// Whether the host has begun to go down.
    pub fn is_going_down(&self) -> Result<bool, PowerError> {
        self.manager
            .preparing_for_shutdown()
            .map_err(failed("reading PreparingForShutdown"))
    }

    /// Asks for a reboot, as `systemctl reboot` does. Inhibitors of others are waited for.
    pub fn reboot(&self) -> Result<(), PowerError> {
        self.manager.reboot(false).map_err(failed("asking for a reboot"))
    }

    /// Calls `heard` for each signal: `Some` when the host begins to go down, `None` when that was called
    /// off. Returns when the bus is gone.
    ///
    /// logind sends two signals for one event, the one with metadata (systemd 255) after the other: what is
    /// heard of the second one is more.
    pub fn listen(&self, mut heard: impl FnMut(Option<Shutdown>)) -> Result<(), PowerError> {
        let rule = zbus::MatchRule::builder()
            .msg_type(zbus::message::Type::Signal)
            .interface("org.freedesktop.login1.Manager")
            .and_then(|rule| rule.path("/org/freedesktop/login1"))
            .map_err(failed("making a match rule"))?
            .build();
        let signals = zbus::blocking::MessageIterator::for_match_rule(rule, &self.connection, None)
            .map_err(failed("listening to signals"))?;
        // What was begun before we listened was not heard.
        if self.is_going_down()? {
            heard(Some(Shutdown::Unknown));
        }
        for message in signals {
            let message = message.map_err(failed("listening to signals"))?;
            if let Some(signal) = PrepareForShutdownWithMetadata::from_message(message.clone()) {
                let Ok(arguments) = signal.args() else { continue };
                let how = match arguments
                    .metadata()
                    .get("type")
                    .map(|value| value.downcast_ref::<&str>())
                {
                    Some(Ok("reboot" | "kexec" | "soft-reboot")) => Shutdown::Reboot,
                    Some(Ok("power-off" | "poweroff" | "halt")) => Shutdown::PowerOff,
                    _ => Shutdown::Unknown,
                };
                heard(arguments.start().then_some(how));
            } else if let Some(signal) = PrepareForShutdown::from_message(message)
                && let Ok(arguments) = signal.args()
            {
                heard(arguments.start().then_some(Shutdown::Unknown));
            }
        }
        Ok(())
    }

    /// Ends [`Logind::listen`].
    pub fn close(self) {
        if let Err(error) = self.connection.close() {
            tracing::debug!(%error, "closing the bus");
        }
    }
}
