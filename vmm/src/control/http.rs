//! As much of HTTP/1.1 as the control API needs: bounded requests with `Content-Length`, keep-alive.

use std::io::{self, Read, Write};

/// Largest request line with headers.
const MAX_HEAD: usize = 8 << 10;
/// Largest body.
pub const MAX_BODY: usize = 64 << 10;
const MAX_HEADERS: usize = 64;

/// A request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// Method.
    pub method: String,
    /// Path, without query.
    pub path: String,
    /// Body.
    pub body: Vec<u8>,
    /// Whether the connection goes on after the answer.
    pub keep_alive: bool,
}

/// Why a request could not be read.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// The peer has hung up between requests.
    #[error("closed")]
    Closed,
    /// The request is not acceptable; the peer is told so and the connection ends.
    #[error("{0}")]
    Bad(String),
    /// The connection failed or fell silent.
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// A connection with what was read of it beyond the last request.
pub struct Connection<S> {
    stream: S,
    buffer: Vec<u8>,
}

impl<S: Read + Write> Connection<S> {
    /// A connection on `stream`, whose time-outs bound every wait.
    pub fn new(stream: S) -> Connection<S> {
        Connection {
            stream,
            buffer: Vec::new(),
        }
    }

    /// Reads the next request.
    pub fn read(&mut self) -> Result<Request, ReadError> {
        let (mut request, head, length) = loop {
            if let Some(parsed) = parse_head(&self.buffer)? {
                break parsed;
            }
            if self.buffer.len() >= MAX_HEAD {
                return Err(ReadError::Bad(format!(
                    "request line and headers are longer than {MAX_HEAD} bytes"
                )));
            }
            let started = !self.buffer.is_empty();
            if !self.fill()? {
                return Err(match started {
                    true => ReadError::Bad("the request ends within its headers".to_owned()),
                    false => ReadError::Closed,
                });
            }
        };
        if length > MAX_BODY {
            return Err(ReadError::Bad(format!(
                "the body has {length} bytes where {MAX_BODY} are allowed"
            )));
        }
        while self.buffer.len() < head + length {
            if !self.fill()? {
                return Err(ReadError::Bad("the request ends within its body".to_owned()));
            }
        }
        request.body = self.buffer[head..head + length].to_vec();
        self.buffer.drain(..head + length);
        Ok(request)
    }

    /// Writes an answer with a JSON body.
    pub fn answer(&mut self, status: u16, body: &[u8], keep_alive: bool) -> io::Result<()> {
        let reason = match status {
            200 => "OK",
            400 => "Bad Request",
            404 => "Not Found",
            405 => "Method Not Allowed",
            409 => "Conflict",
            503 => "Service Unavailable",
            _ => "Internal Server Error",
        };
        let connection = if keep_alive { "keep-alive" } else { "close" };
        let mut answer = format!(
            "HTTP/1.1 {status} {reason}\r\nContent-Type: application/json\r\nContent-Length: {}\r\nConnection: {connection}\r\n\r\n",
            body.len()
        )
        .into_bytes();
        answer.extend_from_slice(body);
        self.stream.write_all(&answer)
    }

    fn fill(&mut self) -> io::Result<bool> {
        let mut chunk = [0u8; 4096];
        let read = self.stream.read(&mut chunk)?;
        self.buffer.extend_from_slice(&chunk[..read]);
        Ok(read > 0)
    }
}

/// The request without its body, the length of its head, and that of its body.
fn parse_head(buffer: &[u8]) -> Result<Option<(Request, usize, usize)>, ReadError> {
    let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
    let mut parsed = httparse::Request::new(&mut headers);
    let head = match parsed.parse(buffer) {
        Ok(httparse::Status::Complete(head)) => head,
        Ok(httparse::Status::Partial) => return Ok(None),
        Err(error) => return Err(ReadError::Bad(format!("not an HTTP/1.1 request: {error}"))),
    };
    let (Some(method), Some(target)) = (parsed.method, parsed.path) else {
        return Err(ReadError::Bad("the request has no method or path".to_owned()));
    };
    let mut length = None;
    let mut keep_alive = parsed.version == Some(1);
    for header in parsed.headers.iter() {
        let text = std::str::from_utf8(header.value).unwrap_or("").trim();
        if header.name.eq_ignore_ascii_case("content-length") {
            let value = text
                .parse::<usize>()
                .map_err(|_| ReadError::Bad(format!("Content-Length {text:?} is not a number")))?;
            if length.replace(value).is_some_and(|first| first != value) {
                return Err(ReadError::Bad("two Content-Length headers disagree".to_owned()));
            }
        } else if header.name.eq_ignore_ascii_case("transfer-encoding") {
            return Err(ReadError::Bad(
                "Transfer-Encoding is not supported; send Content-Length".to_owned(),
            ));
        } else if header.name.eq_ignore_ascii_case("connection") {
            keep_alive = match text.to_ascii_lowercase().as_str() {
                "close" => false,
                "keep-alive" => true,
                _ => keep_alive,
            };
        }
    }
    let path = target.split('?').next().unwrap_or_default().to_owned();
    let request = Request {
        method: method.to_owned(),
        path,
        body: Vec::new(),
        keep_alive,
    };
    Ok(Some((request, head, length.unwrap_or(0))))
}

#[cfg(test)]
mod tests {
    use std::io::Cursor;

    use proptest::prelude::*;

    use super::*;

    struct Duplex(Cursor<Vec<u8>>, Vec<u8>);
    impl Read for Duplex {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            // Small pieces, as a slow client sends them.
            let length = buffer.len().min(7);
            self.0.read(&mut buffer[..length])
        }
    }
    impl Write for Duplex {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.1.extend_from_slice(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn connection(bytes: &[u8]) -> Connection<Duplex> {
        Connection::new(Duplex(Cursor::new(bytes.to_vec()), Vec::new()))
    }

    #[test]
    fn two_requests_on_one_connection_are_read_apart() {
        let mut connection = connection(
            b"PUT /v1/hold HTTP/1.1\r\nContent-Length: 2\r\n\r\n{}GET /v1/vm?x=1 HTTP/1.1\r\nConnection: close\r\n\r\n",
        );
        let first = connection.read().unwrap();
        assert_eq!(
            (first.method.as_str(), first.body.as_slice()),
            ("PUT", &b"{}"[..])
        );
        assert!(first.keep_alive);
        let second = connection.read().unwrap();
        assert_eq!((second.path.as_str(), second.keep_alive), ("/v1/vm", false));
        assert!(matches!(connection.read(), Err(ReadError::Closed)));
    }

    #[test]
    fn oversized_truncated_and_malformed_requests_are_refused() {
        let long = format!("GET / HTTP/1.1\r\nX: {}\r\n\r\n", "a".repeat(MAX_HEAD));
        let body = format!("PUT / HTTP/1.1\r\nContent-Length: {}\r\n\r\n", MAX_BODY + 1);
        for bad in [
            long.as_bytes(),
            body.as_bytes(),
            b"PUT / HTTP/1.1\r\nContent-Length: 5\r\n\r\n{}",
            b"PUT / HTTP/1.1\r\nContent-Length: x\r\n\r\n",
            b"PUT / HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n{}",
            b"PUT / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n",
            b"\x16\x03\x01\x02\x00\x01",
            b"GET / HT",
        ] {
            let result = connection(bad).read();
            assert!(matches!(result, Err(ReadError::Bad(_))), "{bad:?}: {result:?}");
        }
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_parser_panic(bytes in proptest::collection::vec(any::<u8>(), 0..2000)) {
            let _ = connection(&bytes).read();
        }
    }
}
