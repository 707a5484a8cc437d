//! When which save begins.
//!
//! A guest stays paused from its own save until the host has rebooted, so that the best order is that in
//! which all saves end at the same time: the largest begins first, and a smaller one when no more is left of
//! those before it than it has itself. They share the disk's throughput.

use understudy_api::node_update::SessionState;

use super::record::Session;

/// The sessions whose saves begin now, by index. `is_urgent`: the host goes down by itself, so that all begin
/// at once.
pub fn due(sessions: &[Session], is_urgent: bool) -> Vec<usize> {
    let mut waiting: Vec<usize> = (0..sessions.len())
        .filter(|index| sessions[*index].state == SessionState::Waiting && !sessions[*index].given_up)
        .collect();
    waiting.sort_by_key(|index| (std::cmp::Reverse(sessions[*index].expected_bytes), *index));
    let mut left = sessions
        .iter()
        .filter(|session| session.state == SessionState::Saving && !session.given_up)
        .map(left)
        .max();
    let mut due = Vec::new();
    for index in waiting {
        let expected = sessions[index].expected_bytes;
        if !is_urgent && left.is_some_and(|left| left > expected) {
            break;
        }
        left = left.max(Some(expected));
        due.push(index);
    }
    due
}

/// Bytes that a save under way has left.
fn left(session: &Session) -> u64 {
    if session.live.written_bytes == 0 && session.live.remaining_bytes == 0 {
        return session.expected_bytes;
    }
    session.live.remaining_bytes.min(session.expected_bytes)
}

#[cfg(test)]
mod tests {
    use super::super::effects::FoundGuest;
    use super::*;

    fn sessions(expected: &[u64]) -> Vec<Session> {
        expected
            .iter()
            .map(|bytes| {
                Session::new(FoundGuest {
                    guest: "default/a".to_owned(),
                    uid: bytes.to_string(),
                    incarnation: 1,
                    checkpoint: uuid::Uuid::nil(),
                    priority: 0,
                    memory_bytes: *bytes,
                    expected_bytes: *bytes,
                    problem: None,
                })
            })
            .collect()
    }

    fn begin(sessions: &mut [Session], due: &[usize]) {
        for index in due {
            sessions[*index].state = SessionState::Saving;
        }
    }

    #[test]
    fn the_largest_begins_first_and_smaller_ones_when_as_much_is_left_of_it() {
        let mut sessions = sessions(&[100, 1000, 400]);
        let first = due(&sessions, false);
        assert_eq!(first, [1]);
        begin(&mut sessions, &first);
        sessions[1].live.written_bytes = 500;
        sessions[1].live.remaining_bytes = 500;
        assert_eq!(due(&sessions, false), [0usize; 0]);
        sessions[1].live.remaining_bytes = 400;
        assert_eq!(due(&sessions, false), [2]);
        begin(&mut sessions, &[2]);
        sessions[1].live.remaining_bytes = 90;
        assert_eq!(due(&sessions, false), [0usize; 0]);
        sessions[2].live.written_bytes = 310;
        sessions[2].live.remaining_bytes = 90;
        assert_eq!(due(&sessions, false), [0]);
    }

    #[test]
    fn guests_of_one_size_begin_together_and_whatever_is_left_begins_at_last() {
        let mut sessions = sessions(&[300, 300, 10]);
        let first = due(&sessions, false);
        assert_eq!(first, [0, 1]);
        begin(&mut sessions, &first);
        for session in &mut sessions[..2] {
            session.state = SessionState::Saved;
        }
        assert_eq!(due(&sessions, false), [2]);
    }

    #[test]
    fn when_the_host_is_in_a_hurry_all_begin_at_once_but_those_given_up() {
        let mut sessions = sessions(&[100, 1000, 400]);
        sessions[2].given_up = true;
        assert_eq!(due(&sessions, true), [1, 0]);
    }
}
