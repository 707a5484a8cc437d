//! Sleeps until it is asked to end: the program of the bed's Pods, and of the container that holds a Pod's namespaces.
#![forbid(unsafe_code)]

use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

fn main() -> std::io::Result<()> {
    // As a container's first process it gets no signal that it does not ask for.
    let mut signals = Signals::new([SIGTERM, SIGINT])?;
    println!("sleeping");
    signals.forever().next();
    println!("asked to end");
    Ok(())
}
