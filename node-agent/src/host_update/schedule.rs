//! When which save begins.
//!
//! A guest that is ready to be paused runs on until all are, so that it matters little which save ends first;
//! but few at a time share the disk and the processors, so that each has little to write a second time. The
//! largest begin first, and the small ones fill the end.

use understudy_api::node_update::SessionState;

use super::record::Session;

/// Most saves at a time that have not come near their pause yet.
const AT_A_TIME: usize = 4;

/// The sessions whose saves begin now, by index. `is_urgent`: the host goes down by itself, so that all begin
/// at once.
pub fn due(sessions: &[Session], is_urgent: bool) -> Vec<usize> {
    let mut waiting: Vec<usize> = (0..sessions.len())
        .filter(|index| sessions[*index].state == SessionState::Waiting && !sessions[*index].given_up)
        .collect();
    waiting.sort_by_key(|index| (std::cmp::Reverse(sessions[*index].expected_bytes), *index));
    let under_way = sessions
        .iter()
        .filter(|session| {
            session.state == SessionState::Saving && !session.given_up && !session.live.is_ready
        })
        .count();
    if !is_urgent {
        waiting.truncate(AT_A_TIME.saturating_sub(under_way));
    }
    waiting
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

    #[test]
    fn the_largest_begin_first_and_a_further_one_when_another_is_ready() {
        let mut sessions = sessions(&[10, 1000, 400, 20, 500, 30]);
        let first = due(&sessions, false);
        assert_eq!(first, [1, 4, 2, 5]);
        for index in first {
            sessions[index].state = SessionState::Saving;
        }
        assert_eq!(due(&sessions, false), [0usize; 0]);
        sessions[4].live.is_ready = true;
        assert_eq!(due(&sessions, false), [3]);
        sessions[3].state = SessionState::Saved;
        sessions[2].given_up = true;
        assert_eq!(due(&sessions, false), [0]);
    }

    #[test]
    fn when_the_host_is_in_a_hurry_all_begin_at_once_but_those_given_up() {
        let mut sessions = sessions(&[1, 2, 3, 4, 5, 6]);
        sessions[2].given_up = true;
        assert_eq!(due(&sessions, true), [5, 4, 3, 1, 0]);
    }
}
