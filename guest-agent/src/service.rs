//! The service: listens for sessions and keeps what outlives them.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use understudy_channel::{
    Activated, Hello, Notice, Purpose, Refusal, VERSION_MAX, VERSION_MIN, Welcome, read_message, write_frame,
};

use crate::activate::{self, Prepared};
use crate::control::ControlSessions;
use crate::describe;
use crate::export::{Capture, ExportError};
use crate::freeze::Filesystems;
use crate::import::{self, Importer};
use crate::local::RebootRequests;
use crate::role::Role;
use crate::sys::process;
use crate::sys::vsock::{Listener, Stream};
use crate::systemd::Systemd;
use crate::userland::Userland;
use crate::{control, info, local, log, warning};

/// Sessions at a time; the host needs a control session and one transfer, and both once more while it
/// reconnects.
const MAX_SESSIONS: usize = 16;
/// Small, because all of it is locked in memory.
const STACK: usize = 512 * 1024;
/// How long the host may pause within a transfer.
const TRANSFER_TIMEOUT: Duration = Duration::from_secs(120);
/// Exists in the run-time directory while changes are captured: an agent that is started anew sees that it
/// lost them.
const CAPTURE_MARKER: &str = "capture";
/// How long a peer may take to say what its session is for.
const HELLO_TIMEOUT: Duration = Duration::from_secs(30);

/// How the service is run.
#[derive(Clone, Debug)]
pub struct Config {
    /// Listen on this unix socket instead of vsock (tests).
    pub listen: Option<PathBuf>,
    /// vsock port.
    pub port: u32,
    /// Directory of run-time state and of the local socket.
    pub run_dir: PathBuf,
    /// Role of this boot.
    pub role: Role,
}

/// Why the service could not run.
#[derive(Debug, thiserror::Error)]
pub enum ServiceError {
    /// The host could not reach us.
    #[error("listening on {place} failed: {source}")]
    Listen {
        /// Where.
        place: String,
        /// Why.
        source: io::Error,
    },
    /// The run-time directory could not be used.
    #[error("run-time directory {path}: {source}")]
    RunDir {
        /// Directory.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// What outlives a session.
#[derive(Debug)]
pub struct Agent {
    /// How the service is run.
    pub config: Config,
    /// The host's control session.
    pub sessions: ControlSessions,
    /// Requests of this guest's users.
    pub reboots: RebootRequests,
    /// Freezing of file systems.
    pub filesystems: Filesystems,
    /// Freezing of user land.
    pub userland: Userland,
    capture: Mutex<Option<Arc<Capture>>>,
    /// The importing side, on a clone.
    importer: Mutex<Option<Arc<Importer>>>,
    prepared: Mutex<Option<Prepared>>,
    activated: Mutex<Option<Activated>>,
    open: AtomicUsize,
}

impl Agent {
    /// An agent with nothing under way.
    pub fn new(config: Config, importer: Option<Importer>) -> Arc<Self> {
        Arc::new(Self {
            config,
            sessions: ControlSessions::default(),
            reboots: RebootRequests::default(),
            filesystems: Filesystems::default(),
            userland: Userland::default(),
            capture: Mutex::new(None),
            importer: Mutex::new(importer.map(Arc::new)),
            prepared: Mutex::new(None),
            activated: Mutex::new(None),
            open: AtomicUsize::new(0),
        })
    }

    /// Begins to capture for an operation (patent US10606632B2, step 2). When this returns, every later
    /// change is seen.
    pub fn confirm(self: &Arc<Self>, operation: &str) -> Result<(), String> {
        if self.config.role.is_waiting_clone() {
            return Err("this is a clone that has not taken over yet: it cannot be cloned itself".to_owned());
        }
        let mut capture = lock(&self.capture);
        match capture.as_ref() {
            Some(running) if running.operation == operation => return Ok(()),
            Some(running) => {
                return Err(format!(
                    "changes are being captured for {} already; end that first",
                    running.operation
                ));
            }
            None => {}
        }
        let marker = self.config.run_dir.join(CAPTURE_MARKER);
        if let Some(reason) = self.lost_capture() {
            return Err(format!("{reason}; end that capture first"));
        }
        std::fs::write(&marker, operation)
            .map_err(|e| format!("{} could not be written: {e}", marker.display()))?;
        let begun = Capture::begin(operation, None).map_err(|e| {
            // Without a capture there is nothing to be lost.
            let _ = std::fs::remove_file(&marker);
            e.to_string()
        })?;
        let weak = Arc::downgrade(self);
        begun.filter.on_lost(move |reason| {
            if let Some(agent) = weak.upgrade() {
                agent.sessions.notify(&Notice::CaptureLost {
                    reason: reason.to_owned(),
                });
            }
        });
        info!("capturing for {operation}");
        *capture = Some(Arc::new(begun));
        Ok(())
    }

    /// Ends capturing; idempotent.
    pub fn end_capture(&self, operation: &str) {
        let mut capture = lock(&self.capture);
        if let Some(ended) = capture.take_if(|c| c.operation == operation) {
            ended.filter.end();
            info!("capture for {operation} ended");
        }
        if capture.is_none() {
            // Often it was never there.
            let _ = std::fs::remove_file(self.config.run_dir.join(CAPTURE_MARKER));
        }
    }

    /// Why a capture that had begun is no more: the agent was started anew in between.
    pub fn lost_capture(&self) -> Option<String> {
        if self.capturing().is_some() {
            return None;
        }
        let operation = std::fs::read_to_string(self.config.run_dir.join(CAPTURE_MARKER)).ok()?;
        Some(format!(
            "the guest agent was restarted while it captured changes for {operation}"
        ))
    }

    /// Makes a clone the guest; idempotent.
    pub fn activate(&self, operation: &str) -> Result<Activated, String> {
        let mut activated = lock(&self.activated);
        if let Some(done) = activated.as_ref() {
            return Ok(done.clone());
        }
        if !self.config.role.clone {
            return Err("this is not a clone: there is nothing to activate".to_owned());
        }
        let importer = lock(&self.importer).clone();
        let stopped = importer.map(|i| i.stopped_units(operation)).unwrap_or_default();
        let prepared = lock(&self.prepared).take();
        let done = activate::activate(&self.config.role, &stopped, prepared)?;
        // What changes from now on is nobody's conflict: watching it would only gather memory.
        if let Some(importer) = lock(&self.importer).take() {
            importer.end();
        }
        *activated = Some(done.clone());
        Ok(done)
    }

    fn capturing(&self) -> Option<String> {
        // Not waiting for the lock: Confirm holds it while everything is written out.
        match self.capture.try_lock() {
            Ok(capture) => capture.as_ref().map(|c| c.operation.clone()),
            Err(_) => None,
        }
    }

    /// State of the guest.
    pub fn describe(&self) -> understudy_channel::Description {
        describe::describe(&self.config.role, self.capturing())
    }
}

/// Locks, also after a panic elsewhere: each critical section leaves its data whole.
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Starts a named thread whose failure to start is told, not fatal.
pub fn spawn(name: &str, work: impl FnOnce() + Send + 'static) {
    let spawned = thread::Builder::new()
        .name(name.to_owned())
        .stack_size(STACK)
        .spawn(work);
    if let Err(error) = spawned {
        warning!("thread {name} could not be started: {error}");
    }
}

/// Runs the service; returns only when it cannot listen.
pub fn run(config: Config) -> Result<(), ServiceError> {
    log::use_kernel_ring();
    if let Err(error) = process::lock_memory() {
        warning!("memory could not be locked: {error}; a freeze may take longer");
    }
    let run_dir = config.run_dir.clone();
    std::fs::create_dir_all(&run_dir).map_err(|source| ServiceError::RunDir {
        path: run_dir.clone(),
        source,
    })?;
    // Before anything else: on a clone, what this boot changes itself is to be told from the guest's changes.
    let importer = importer(&config);
    let listener = listen(&config)?;
    let agent = Agent::new(config, importer);
    let local_path = run_dir.join(local::SOCKET);
    let local_listener = Listener::unix(&local_path).map_err(|source| ServiceError::Listen {
        place: local_path.display().to_string(),
        source,
    })?;
    {
        let agent = Arc::clone(&agent);
        spawn("local", move || local::serve(&agent, &local_listener));
    }
    {
        let agent = Arc::clone(&agent);
        spawn("boot", move || watch_boot(&agent));
    }
    if let Err(error) = process::notify_ready() {
        warning!("systemd could not be told that the agent is ready: {error}");
    }
    let role = if agent.config.role.is_waiting_clone() {
        "clone"
    } else {
        "guest"
    };
    info!(
        "version {} ready, this boot is a {role}",
        env!("CARGO_PKG_VERSION")
    );
    loop {
        match listener.accept() {
            Ok(stream) => accept(&agent, stream),
            Err(error) => {
                warning!("a session could not be accepted: {error}");
                // Descriptors or memory are short: trying again at once would only burn the CPU.
                thread::sleep(Duration::from_millis(200));
            }
        }
    }
}

fn listen(config: &Config) -> Result<Listener, ServiceError> {
    if let Some(path) = &config.listen {
        return Listener::unix(path).map_err(|source| ServiceError::Listen {
            place: path.display().to_string(),
            source,
        });
    }
    load_transport();
    Listener::vsock(config.port).map_err(|source| ServiceError::Listen {
        place: format!("vsock port {}", config.port),
        source,
    })
}

/// Loads the virtio transport of vsock where it is a module that nothing has loaded yet.
fn load_transport() {
    if Path::new("/sys/module/vmw_vsock_virtio_transport").exists() {
        return;
    }
    for modprobe in ["/sbin/modprobe", "/usr/sbin/modprobe"] {
        match std::process::Command::new(modprobe)
            .args(["-q", "vmw_vsock_virtio_transport"])
            .status()
        {
            Ok(status) if status.success() => return,
            Ok(status) => warning!("modprobe vmw_vsock_virtio_transport: {status}"),
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => warning!("{modprobe}: {error}"),
        }
        return;
    }
}

fn accept(agent: &Arc<Agent>, stream: Stream) {
    if agent.open.fetch_add(1, Ordering::SeqCst) >= MAX_SESSIONS {
        agent.open.fetch_sub(1, Ordering::SeqCst);
        warning!("a session was refused: {MAX_SESSIONS} are open");
        return;
    }
    let agent = Arc::clone(agent);
    spawn("session", move || {
        if let Err(error) = session(&agent, stream) {
            info!("session ended: {error}");
        }
        agent.open.fetch_sub(1, Ordering::SeqCst);
    });
}

/// Serves one session to its end.
pub fn session(agent: &Arc<Agent>, mut stream: Stream) -> Result<(), understudy_channel::FrameError> {
    stream.set_read_timeout(Some(HELLO_TIMEOUT))?;
    let hello: Hello = read_message(&mut stream)?;
    let version = VERSION_MAX.min(hello.version_max);
    if version < VERSION_MIN || version < hello.version_min {
        let reason = format!(
            "the host speaks versions {} to {}, this guest agent ({}) {VERSION_MIN} to {VERSION_MAX}: \
             update the older of them",
            hello.version_min,
            hello.version_max,
            env!("CARGO_PKG_VERSION"),
        );
        return write_frame(&mut stream, &Welcome::Refused(Refusal { reason }));
    }
    let welcome = Welcome::Accepted {
        version,
        agent: env!("CARGO_PKG_VERSION").to_owned(),
    };
    match hello.purpose {
        Purpose::Control => {
            write_frame(&mut stream, &welcome)?;
            stream.set_read_timeout(None)?;
            control::serve(agent, stream)
        }
        Purpose::Export(request) => {
            let capture = lock(&agent.capture)
                .clone()
                .filter(|c| c.operation == request.operation);
            let Some(capture) = capture else {
                let reason = agent.lost_capture().unwrap_or_else(|| {
                    format!(
                        "no changes are being captured for {}; confirm it first",
                        request.operation
                    )
                });
                return write_frame(&mut stream, &Welcome::Refused(Refusal { reason }));
            };
            write_frame(&mut stream, &welcome)?;
            match capture.export(&request, &mut stream) {
                Ok(_) => {}
                Err(ExportError::Frame(error)) => return Err(error),
                Err(error) => warning!("{error}"),
            }
            Ok(())
        }
        Purpose::Import(request) => {
            let importer = lock(&agent.importer)
                .clone()
                .filter(|_| agent.config.role.is_waiting_clone());
            let Some(importer) = importer else {
                let reason = "this is not a clone that waits for its cutover: nothing is imported".to_owned();
                return write_frame(&mut stream, &Welcome::Refused(Refusal { reason }));
            };
            write_frame(&mut stream, &welcome)?;
            stream.set_read_timeout(Some(TRANSFER_TIMEOUT))?;
            let imported = importer.import(&request, &mut stream)?;
            write_frame(&mut stream, &imported)?;
            if let Some(prepared) = lock(&agent.prepared).as_mut() {
                prepared.connect();
            }
            Ok(())
        }
    }
}

/// The importing side where this boot is a clone. Without it the agent still serves: the host learns from the
/// refusal of the import what is wrong.
fn importer(config: &Config) -> Option<Importer> {
    if !config.role.is_waiting_clone() {
        return None;
    }
    let state_dir = PathBuf::from("/var/lib/understudy");
    match Importer::new(None, config.run_dir.clone(), state_dir, import::boot_time()) {
        Ok(importer) => Some(importer),
        Err(error) => {
            warning!("this clone cannot import: {error}");
            None
        }
    }
}

/// Waits for the end of the boot and gives notice of it (patent US10606632B2, step 4).
fn watch_boot(agent: &Arc<Agent>) {
    loop {
        match wait_for_boot() {
            Ok(()) => break,
            Err(error) => {
                // systemd re-executes or is not up yet: its socket comes back.
                info!("the state of the boot is not known yet: {error}");
                thread::sleep(Duration::from_secs(2));
            }
        }
    }
    let description = agent.describe();
    info!(
        "boot complete after {} ms: {}",
        description.uptime_us / 1000,
        description.system_state
    );
    agent.sessions.boot_complete();
    agent
        .sessions
        .notify(&Notice::BootComplete(Box::new(description)));
    if agent.config.role.is_waiting_clone() {
        match activate::prepare(&agent.config.role) {
            Ok(prepared) => *lock(&agent.prepared) = Some(prepared),
            Err(error) => info!("what the cutover starts is looked up in it: {error}"),
        }
    }
}

fn wait_for_boot() -> Result<(), crate::bus::BusError> {
    let mut systemd = Systemd::connect()?;
    systemd.subscribe()?;
    // Signals wake us; the state is what counts. It is asked for now and then as well, because a signal sent
    // before we subscribed is not seen.
    while !describe::is_boot_complete(&systemd.state()?) {
        systemd.wait_for_signal(Duration::from_secs(3))?;
    }
    Ok(())
}
