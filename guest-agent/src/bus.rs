//! D-Bus to systemd's private socket (`/run/systemd/private`): PID 1 answers even while every other program
//! is frozen, and no bus daemon stands between. Only what the manager's interface needs is spoken: strings,
//! object paths and arrays of them go out; any type that systemd answers with is read.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

/// Largest message that is accepted, in bytes: a list of all units of a large system is about a megabyte.
const MAX_MESSAGE: usize = 16 * 1024 * 1024;

/// Why systemd could not be asked.
#[derive(Debug, thiserror::Error)]
pub enum BusError {
    /// The private socket could not be used.
    #[error("systemd's private socket {path}: {source}")]
    Connect {
        /// The socket.
        path: String,
        /// Why.
        source: io::Error,
    },
    /// The connection failed, or no answer came in time.
    #[error("the connection to systemd failed: {0}")]
    Io(#[from] io::Error),
    /// systemd answered with an error.
    #[error("systemd: {message} ({name})")]
    Refused {
        /// D-Bus error name.
        name: String,
        /// systemd's words.
        message: String,
    },
    /// The answer is not what D-Bus or systemd's interface promise.
    #[error("systemd's answer could not be understood: {0}")]
    Malformed(&'static str),
}

/// An outgoing argument.
#[derive(Clone, Copy, Debug)]
pub enum Arg<'a> {
    /// `s`
    Str(&'a str),
    /// `as`
    Strs(&'a [&'a str]),
}

/// An incoming value.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    /// Any integer or boolean.
    Int(i128),
    /// A double.
    Double(f64),
    /// String, object path or signature.
    Str(String),
    /// Array, structure or dictionary entry.
    List(Vec<Value>),
    /// Variant.
    Variant(Box<Value>),
}

impl Value {
    /// The string in it.
    pub fn as_str(&self) -> Option<&str> {
        match self {
            Self::Str(text) => Some(text),
            Self::Variant(inner) => inner.as_str(),
            _ => None,
        }
    }

    /// The integer in it.
    pub fn as_int(&self) -> Option<i128> {
        match self {
            Self::Int(number) => Some(*number),
            Self::Variant(inner) => inner.as_int(),
            _ => None,
        }
    }

    /// What is in the array or structure; nothing where it is none.
    pub fn items(&self) -> &[Value] {
        match self {
            Self::List(items) => items,
            Self::Variant(inner) => inner.items(),
            _ => &[],
        }
    }
}

/// A received message.
#[derive(Clone, Debug, PartialEq)]
pub struct Message {
    kind: u8,
    reply_to: Option<u32>,
    /// Member, for signals.
    pub member: String,
    error: Option<String>,
    /// Arguments.
    pub body: Vec<Value>,
}

const METHOD_RETURN: u8 = 2;
const ERROR: u8 = 3;
const SIGNAL: u8 = 4;

/// A connection to systemd.
#[derive(Debug)]
pub struct Bus {
    stream: UnixStream,
    serial: u32,
    /// Signals that came while an answer was awaited.
    signals: Vec<Message>,
}

impl Bus {
    /// Connects and authenticates as the calling user, who must be root.
    pub fn connect(path: &Path) -> Result<Self, BusError> {
        let stream = UnixStream::connect(path).map_err(|source| BusError::Connect {
            path: path.display().to_string(),
            source,
        })?;
        stream.set_read_timeout(Some(Duration::from_secs(5)))?;
        stream.set_write_timeout(Some(Duration::from_secs(5)))?;
        let mut bus = Self {
            stream,
            serial: 0,
            signals: Vec::new(),
        };
        let uid = rustix::process::getuid().as_raw().to_string();
        let hex: String = uid.bytes().map(|b| format!("{b:02x}")).collect();
        // BEGIN goes along and not after the answer: systemd would read it together with the first message,
        // and then wait for more before it looks at that.
        bus.stream
            .write_all(format!("\0AUTH EXTERNAL {hex}\r\nBEGIN\r\n").as_bytes())?;
        let mut line = Vec::new();
        while !line.ends_with(b"\r\n") {
            let mut byte = [0u8];
            bus.stream.read_exact(&mut byte)?;
            line.push(byte[0]);
            if line.len() > 512 {
                return Err(BusError::Malformed("authentication"));
            }
        }
        if !line.starts_with(b"OK ") {
            return Err(BusError::Malformed("authentication was refused"));
        }
        Ok(bus)
    }

    /// Calls a method and waits for its answer until `timeout`.
    pub fn call(
        &mut self,
        path: &str,
        interface: &str,
        member: &str,
        args: &[Arg<'_>],
        timeout: Duration,
    ) -> Result<Vec<Value>, BusError> {
        self.serial += 1;
        let serial = self.serial;
        let message = encode_call(serial, path, interface, member, args);
        self.stream.write_all(&message)?;
        let deadline = Instant::now() + timeout;
        loop {
            let message = self
                .receive(deadline)?
                .ok_or_else(|| io::Error::from(io::ErrorKind::TimedOut))?;
            match message.kind {
                METHOD_RETURN if message.reply_to == Some(serial) => return Ok(message.body),
                ERROR if message.reply_to == Some(serial) => {
                    let text = message
                        .body
                        .first()
                        .and_then(Value::as_str)
                        .unwrap_or_default()
                        .to_owned();
                    return Err(BusError::Refused {
                        name: message.error.unwrap_or_default(),
                        message: text,
                    });
                }
                SIGNAL => self.signals.push(message),
                _ => {}
            }
        }
    }

    /// The next signal; `None` when none came until the deadline.
    pub fn signal(&mut self, deadline: Instant) -> Result<Option<Message>, BusError> {
        if !self.signals.is_empty() {
            return Ok(Some(self.signals.remove(0)));
        }
        loop {
            match self.receive(deadline)? {
                None => return Ok(None),
                Some(message) if message.kind == SIGNAL => return Ok(Some(message)),
                Some(_) => {}
            }
        }
    }

    fn receive(&mut self, deadline: Instant) -> Result<Option<Message>, BusError> {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(None);
        }
        // Waiting is for the first byte only: a message that has begun must come to its end, or the stream
        // would lose its step.
        self.stream.set_read_timeout(Some(left))?;
        let mut head = [0u8; 16];
        match self.stream.read(&mut head[..1]) {
            Ok(0) => return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into()),
            Ok(_) => {}
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {
                return Ok(None);
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => return self.receive(deadline),
            Err(error) => return Err(error.into()),
        }
        self.stream.set_read_timeout(Some(Duration::from_secs(5)))?;
        self.stream.read_exact(&mut head[1..])?;
        if head[0] != b'l' {
            return Err(BusError::Malformed("byte order"));
        }
        let body_length = le_u32(&head, 4) as usize;
        let fields_length = le_u32(&head, 12) as usize;
        let rest = fields_length.next_multiple_of(8).saturating_add(body_length);
        if rest > MAX_MESSAGE {
            return Err(BusError::Malformed("message too large"));
        }
        let mut message = head.to_vec();
        message.resize(16 + rest, 0);
        self.stream.read_exact(&mut message[16..])?;
        decode(&message).map(Some)
    }
}

fn le_u32(bytes: &[u8], at: usize) -> u32 {
    bytes
        .get(at..at + 4)
        .and_then(|b| b.try_into().ok())
        .map_or(0, u32::from_le_bytes)
}

fn pad(buffer: &mut Vec<u8>, alignment: usize) {
    buffer.resize(buffer.len().next_multiple_of(alignment), 0);
}

fn put_str(buffer: &mut Vec<u8>, text: &str) {
    pad(buffer, 4);
    buffer.extend_from_slice(&(text.len() as u32).to_le_bytes());
    buffer.extend_from_slice(text.as_bytes());
    buffer.push(0);
}

fn put_field(buffer: &mut Vec<u8>, code: u8, signature: &str, text: &str) {
    pad(buffer, 8);
    buffer.extend_from_slice(&[code, signature.len() as u8]);
    buffer.extend_from_slice(signature.as_bytes());
    buffer.push(0);
    if signature == "g" {
        buffer.push(text.len() as u8);
        buffer.extend_from_slice(text.as_bytes());
        buffer.push(0);
    } else {
        put_str(buffer, text);
    }
}

fn encode_call(serial: u32, path: &str, interface: &str, member: &str, args: &[Arg<'_>]) -> Vec<u8> {
    let mut body = Vec::new();
    let mut signature = String::new();
    for arg in args {
        match arg {
            Arg::Str(text) => {
                signature.push('s');
                put_str(&mut body, text);
            }
            Arg::Strs(items) => {
                signature.push_str("as");
                pad(&mut body, 4);
                let at = body.len();
                body.extend_from_slice(&[0; 4]);
                for item in *items {
                    put_str(&mut body, item);
                }
                let length = (body.len() - at - 4) as u32;
                body[at..at + 4].copy_from_slice(&length.to_le_bytes());
            }
        }
    }
    // Little-endian, method call, no flags, protocol version 1.
    let mut message = vec![b'l', 1, 0, 1];
    message.extend_from_slice(&(body.len() as u32).to_le_bytes());
    message.extend_from_slice(&serial.to_le_bytes());
    message.extend_from_slice(&[0; 4]);
    put_field(&mut message, 1, "o", path);
    put_field(&mut message, 2, "s", interface);
    put_field(&mut message, 3, "s", member);
    put_field(&mut message, 6, "s", "org.freedesktop.systemd1");
    if !signature.is_empty() {
        put_field(&mut message, 8, "g", &signature);
    }
    let fields = (message.len() - 16) as u32;
    message[12..16].copy_from_slice(&fields.to_le_bytes());
    pad(&mut message, 8);
    message.extend_from_slice(&body);
    message
}

fn decode(message: &[u8]) -> Result<Message, BusError> {
    let fields_end = 16 + le_u32(message, 12) as usize;
    let mut result = Message {
        kind: *message.get(1).ok_or(BusError::Malformed("empty"))?,
        reply_to: None,
        member: String::new(),
        error: None,
        body: Vec::new(),
    };
    let mut signature = String::new();
    let mut reader = Reader {
        bytes: message,
        at: 16,
    };
    while reader.at < fields_end {
        reader.align(8)?;
        let code = reader.take(1)?[0];
        let value = reader.value(b"v", 0)?.0;
        match (code, value) {
            (3, Value::Variant(v)) => result.member = v.as_str().unwrap_or_default().to_owned(),
            (4, Value::Variant(v)) => result.error = v.as_str().map(str::to_owned),
            (5, Value::Variant(v)) => result.reply_to = v.as_int().and_then(|n| u32::try_from(n).ok()),
            (8, Value::Variant(v)) => signature = v.as_str().unwrap_or_default().to_owned(),
            _ => {}
        }
    }
    reader.at = fields_end.next_multiple_of(8);
    // Alignment in the body counts from its own start, which is a multiple of 8.
    let mut rest = signature.as_bytes();
    while !rest.is_empty() {
        let (value, after) = reader.value(rest, 0)?;
        result.body.push(value);
        rest = after;
    }
    Ok(result)
}

struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    fn take(&mut self, count: usize) -> Result<&'a [u8], BusError> {
        let end = self.at.checked_add(count).ok_or(BusError::Malformed("length"))?;
        let slice = self
            .bytes
            .get(self.at..end)
            .ok_or(BusError::Malformed("message ends early"))?;
        self.at = end;
        Ok(slice)
    }

    fn align(&mut self, alignment: usize) -> Result<(), BusError> {
        let to = self.at.next_multiple_of(alignment);
        self.take(to - self.at).map(|_| ())
    }

    fn u32(&mut self) -> Result<u32, BusError> {
        self.align(4)?;
        Ok(le_u32(self.take(4)?, 0))
    }

    fn text(&mut self, length: usize) -> Result<Value, BusError> {
        let bytes = self.take(length)?;
        self.take(1)?;
        Ok(Value::Str(String::from_utf8_lossy(bytes).into_owned()))
    }

    /// Reads one complete type; returns it with the rest of the signature.
    fn value<'s>(&mut self, signature: &'s [u8], depth: u8) -> Result<(Value, &'s [u8]), BusError> {
        if depth > 32 {
            return Err(BusError::Malformed("nested too deep"));
        }
        let (&kind, rest) = signature.split_first().ok_or(BusError::Malformed("signature"))?;
        let value = match kind {
            b'y' => Value::Int(self.take(1)?[0].into()),
            b'n' | b'q' => {
                self.align(2)?;
                let b = self.take(2)?;
                let raw = u16::from_le_bytes([b[0], b[1]]);
                Value::Int(if kind == b'n' {
                    (raw as i16).into()
                } else {
                    raw.into()
                })
            }
            b'b' | b'u' | b'h' => Value::Int(self.u32()?.into()),
            b'i' => Value::Int((self.u32()? as i32).into()),
            b'x' | b't' | b'd' => {
                self.align(8)?;
                let (low, high) = (self.u32()?, self.u32()?);
                let raw = u64::from(high) << 32 | u64::from(low);
                match kind {
                    b'x' => Value::Int((raw as i64).into()),
                    b't' => Value::Int(raw.into()),
                    _ => Value::Double(f64::from_bits(raw)),
                }
            }
            b's' | b'o' => {
                let length = self.u32()? as usize;
                self.text(length)?
            }
            b'g' => {
                let length = self.take(1)?[0] as usize;
                self.text(length)?
            }
            b'v' => {
                let length = self.take(1)?[0] as usize;
                let inner = self.take(length)?;
                self.take(1)?;
                let (value, rest) = self.value(inner, depth + 1)?;
                if !rest.is_empty() {
                    return Err(BusError::Malformed("variant of several types"));
                }
                Value::Variant(Box::new(value))
            }
            b'a' => {
                let length = self.u32()? as usize;
                let element = complete_type(rest)?;
                self.align(if matches!(element[0], b'x' | b't' | b'd' | b'(' | b'{') {
                    8
                } else {
                    1
                })?;
                let end = self.at.saturating_add(length);
                let mut items = Vec::new();
                while self.at < end {
                    items.push(self.value(element, depth + 1)?.0);
                }
                return Ok((Value::List(items), &rest[element.len()..]));
            }
            b'(' | b'{' => {
                self.align(8)?;
                let close = if kind == b'(' { b')' } else { b'}' };
                let mut items = Vec::new();
                let mut inner = rest;
                while inner.first() != Some(&close) {
                    let (item, after) = self.value(inner, depth + 1)?;
                    items.push(item);
                    inner = after;
                }
                return Ok((Value::List(items), &inner[1..]));
            }
            _ => return Err(BusError::Malformed("type")),
        };
        Ok((value, rest))
    }
}

/// The first complete type of a signature.
fn complete_type(signature: &[u8]) -> Result<&[u8], BusError> {
    let mut depth = 0usize;
    for (at, &byte) in signature.iter().enumerate() {
        match byte {
            b'(' | b'{' => depth += 1,
            b')' | b'}' => depth = depth.checked_sub(1).ok_or(BusError::Malformed("signature"))?,
            b'a' => continue,
            _ => {}
        }
        if depth == 0 {
            return Ok(&signature[..=at]);
        }
    }
    Err(BusError::Malformed("signature"))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Turns a method call of ours into a signal, which decoding accepts alike.
    fn round(args: &[Arg<'_>]) -> Message {
        decode(&encode_call(
            7,
            "/org/freedesktop/systemd1",
            "a.b",
            "Member",
            args,
        ))
        .unwrap()
    }

    #[test]
    fn strings_and_lists_of_strings_arrive_as_they_were_sent() {
        let message = round(&[
            Arg::Str("a.service"),
            Arg::Strs(&["x", "", "yz"]),
            Arg::Str("replace"),
        ]);
        assert_eq!(message.member, "Member");
        assert_eq!(message.body[0].as_str(), Some("a.service"));
        let list: Vec<_> = message.body[1].items().iter().filter_map(Value::as_str).collect();
        assert_eq!(list, ["x", "", "yz"]);
        assert_eq!(message.body[2].as_str(), Some("replace"));
    }

    #[test]
    fn nested_types_are_read_with_their_alignment() {
        // a(sb) with one element, then t.
        let mut reader = Reader {
            bytes: &[0; 0],
            at: 0,
        };
        let mut bytes = Vec::new();
        bytes.extend_from_slice(&12u32.to_le_bytes());
        pad(&mut bytes, 8);
        put_str(&mut bytes, "ab");
        pad(&mut bytes, 4);
        bytes.extend_from_slice(&1u32.to_le_bytes());
        pad(&mut bytes, 8);
        bytes.extend_from_slice(&9u64.to_le_bytes());
        reader.bytes = &bytes;
        let (value, rest) = reader.value(b"a(sb)t", 0).unwrap();
        assert_eq!(value.items()[0].items(), [Value::Str("ab".into()), Value::Int(1)]);
        assert_eq!(reader.value(rest, 0).unwrap().0, Value::Int(9));
    }

    proptest::proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(proptest::num::u8::ANY, 0..200)) {
            let _ = decode(&bytes);
        }

        #[test]
        fn a_bit_flip_never_panics(at in 0usize..150, bit in 0u8..8) {
            let mut bytes = encode_call(7, "/o", "a.b", "M", &[Arg::Str("x"), Arg::Strs(&["y", "z"])]);
            if let Some(byte) = bytes.get_mut(at) {
                *byte ^= 1 << bit;
            }
            let _ = decode(&bytes);
        }
    }
}
