//! Which local object follows from what the API server has. Pure, and by level: what matters is what is
//! there on both sides now, so that events that come twice, late or not at all, and an agent that dies
//! between any two writes, end in the same local objects.
//!
//! Nothing here destroys: a guest or an operation ends by a deletion time and by nothing else. Of an object that
//! is absent only a record that is over is forgotten.

use jiff::Timestamp;

use super::kinds::Mirrored;

/// Annotation of a local object that began on this node: UID of the API object in which it is reported. The
/// API server has had it, so that its absence means something.
pub const REPORTED_IN: &str = "understudy.dev/reported-in";

/// What is known beside the two objects.
#[derive(Clone, Debug)]
pub struct Facts<'a> {
    /// UID of this Node.
    pub node_uid: &'a str,
    /// Whether a complete list was seen, so that absence is known.
    pub is_complete: bool,
    /// Whether a driver runs, or a record waits for one, for the local object's UID.
    pub is_driven: bool,
    /// Whether the remote object is of a guest that was deleted and has left nothing here.
    pub is_released: bool,
    /// Now.
    pub now: Timestamp,
}

/// What becomes of the local object.
#[derive(Clone, Debug, PartialEq)]
pub enum Step<O> {
    /// Nothing.
    Keep,
    /// Nothing, and somebody should know: it is not assigned to this node, and goes on.
    Orphan,
    /// It is this from now on.
    Write(Box<O>),
    /// Its record goes.
    Forget,
}

/// Decides over one name.
pub fn step<O: Mirrored>(local: Option<&O>, remote: Option<&O>, facts: &Facts<'_>) -> Step<O> {
    // Of a node that had our name before, or of one that has it now: not ours to run.
    let remote = remote.filter(|remote| remote.is_of_node(facts.node_uid));
    match (local, remote) {
        (None, None) => Step::Keep,
        (None, Some(remote)) => take(remote, facts),
        (Some(local), None) => absent(local, facts),
        (Some(local), Some(remote)) if local.is_local() && remote.is_local() => {
            write_if_new(local, noted(local, remote))
        }
        (Some(local), Some(remote)) if local.uid() == remote.uid() => {
            write_if_new(local, merged(local, remote))
        }
        (Some(local), Some(remote)) => replaced(local, remote, facts),
    }
}

fn write_if_new<O: Mirrored>(local: &O, wanted: O) -> Step<O> {
    match *local == wanted {
        true => Step::Keep,
        false => Step::Write(Box::new(wanted)),
    }
}

/// One that is new here. Its status is the API server's: what has come to its end elsewhere, or before our state
/// was lost, never runs again.
fn take<O: Mirrored>(remote: &O, facts: &Facts<'_>) -> Step<O> {
    let has_ended = facts.is_released || (remote.meta().deletion_timestamp.is_some() && remote.is_over());
    // What begins on a node is here before it is anywhere else; without it there is nothing to run.
    if has_ended || remote.is_local() {
        return Step::Keep;
    }
    let mut taken = remote.clone();
    keep_metadata(&mut taken, remote);
    if taken.is_begun() && !taken.is_over() {
        taken.fail_as_lost(facts.now);
    }
    Step::Write(Box::new(taken))
}

/// The same object: spec, metadata and assignment are the API server's, the rest of the status is ours.
fn merged<O: Mirrored>(local: &O, remote: &O) -> O {
    let mut merged = local.clone();
    keep_metadata(&mut merged, remote);
    // A deletion is never taken back; `understudy-node delete` may have asked for it here.
    if merged.meta().deletion_timestamp.is_none() {
        merged.meta_mut().deletion_timestamp = local.meta().deletion_timestamp.clone();
    }
    merged.take_spec(remote);
    merged.take_assignment(remote);
    merged
}

/// Of the metadata only what we use: the rest (versions, managed fields) changes with every write of a status.
fn keep_metadata<O: Mirrored>(object: &mut O, remote: &O) {
    let there = remote.meta();
    let kept = understudy_api::ObjectMeta {
        name: there.name.clone(),
        namespace: there.namespace.clone(),
        uid: there.uid.clone(),
        generation: there.generation,
        creation_timestamp: there.creation_timestamp.clone(),
        deletion_timestamp: there.deletion_timestamp.clone(),
        labels: there.labels.clone(),
        annotations: there.annotations.clone(),
        ..Default::default()
    };
    *object.meta_mut() = kept;
}

/// A local object with the UID of where it is reported, and with what the operator and users ask of it there.
fn noted<O: Mirrored>(local: &O, remote: &O) -> O {
    let mut noted = local.clone();
    let meta = noted.meta_mut();
    meta.annotations
        .get_or_insert_default()
        .insert(REPORTED_IN.to_owned(), remote.uid());
    if meta.deletion_timestamp.is_none() {
        meta.deletion_timestamp = remote.meta().deletion_timestamp.clone();
    }
    noted.take_assignment(remote);
    noted
}

fn absent<O: Mirrored>(local: &O, facts: &Facts<'_>) -> Step<O> {
    if !facts.is_complete {
        return Step::Keep;
    }
    let was_there = !local.is_local()
        || local
            .meta()
            .annotations
            .as_ref()
            .is_some_and(|annotations| annotations.contains_key(REPORTED_IN));
    match () {
        // The operator has not made its object yet.
        () if !was_there => Step::Keep,
        () if local.is_over() && !facts.is_driven => Step::Forget,
        // It is on its way out.
        () if local.is_deleting() || local.is_over() => Step::Keep,
        () => Step::Orphan,
    }
}

/// Another object has the name: the one that we have was deleted, and we were not asked. It ends as any that is
/// deleted; only then comes the other.
fn replaced<O: Mirrored>(local: &O, remote: &O, facts: &Facts<'_>) -> Step<O> {
    if local.is_over() && !facts.is_driven {
        return match take(remote, facts) {
            Step::Keep => Step::Forget,
            taken => taken,
        };
    }
    if local.is_deleting() {
        return Step::Keep;
    }
    let mut displaced = local.clone();
    displaced.meta_mut().deletion_timestamp = Some(understudy_api::Time(facts.now));
    displaced.displace();
    Step::Write(Box::new(displaced))
}

#[cfg(test)]
#[path = "mirror_test.rs"]
mod tests;
