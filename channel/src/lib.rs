//! Messages between node agent and guest agent.
