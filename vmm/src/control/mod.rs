//! The control API: HTTP/1.1 with JSON bodies on a Unix socket.

pub mod http;
pub mod routes;
pub mod server;
