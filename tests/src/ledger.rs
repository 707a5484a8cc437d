//! The ledger: lines that are acknowledged once they are on disk.
//!
//! It stands for any program that promises durability. One line a request over TCP; the answer `ok N`
//! (N: the line's number) comes only after an `fsync` that covers the line. One `fsync` serves all who
//! wait for it. `count` answers the number of lines, `dump` all of them and then the connection ends.

use std::fs::{File, OpenOptions};
use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

/// Longest line that is taken, newline included.
const MAX_LINE: u64 = 4096;

/// A ledger file and who waits for it.
pub struct Ledger {
    file: File,
    state: Mutex<State>,
    synced: Condvar,
}

struct State {
    /// Bytes in the file.
    length: u64,
    /// Lines written.
    written: u64,
    /// Lines known to be on disk.
    durable: u64,
    /// Somebody is in `fsync`.
    syncing: bool,
    /// An `fsync` has failed: what the page cache holds can no longer be trusted.
    failed: bool,
}

impl Ledger {
    /// Opens or creates the file. A last line without newline was never acknowledged (it was torn by
    /// a crash) and is cut off.
    pub fn open(path: &Path) -> io::Result<Self> {
        let is_new = !path.exists();
        let mut file = OpenOptions::new()
            .read(true)
            .append(true)
            .create(true)
            .open(path)?;
        let mut content = Vec::new();
        file.seek(SeekFrom::Start(0))?;
        file.read_to_end(&mut content)?;
        let whole = content
            .iter()
            .rposition(|byte| *byte == b'\n')
            .map_or(0, |at| at + 1);
        if whole < content.len() {
            file.set_len(whole as u64)?;
        }
        file.sync_all()?;
        if let Some(parent) = path
            .parent()
            .filter(|parent| is_new && !parent.as_os_str().is_empty())
        {
            File::open(parent)?.sync_all()?;
        }
        let lines = content[..whole].iter().filter(|byte| **byte == b'\n').count() as u64;
        let state = State {
            length: whole as u64,
            written: lines,
            durable: lines,
            syncing: false,
            failed: false,
        };
        Ok(Self {
            file,
            state: Mutex::new(state),
            synced: Condvar::new(),
        })
    }

    /// Appends whole lines and returns the number of the last one once all of them are on disk.
    pub fn append(&self, text: &str) -> io::Result<u64> {
        let mut state = self.lock();
        if let Err(error) = (&self.file).write_all(text.as_bytes()) {
            // Half a line must not become the beginning of the next one.
            self.file.set_len(state.length)?;
            return Err(error);
        }
        state.length += text.len() as u64;
        state.written += text.matches('\n').count() as u64;
        let mine = state.written;
        while state.durable < mine {
            if state.failed {
                return Err(io::Error::other("the ledger's file could not be synced"));
            }
            if state.syncing {
                state = self.synced.wait(state).unwrap_or_else(PoisonError::into_inner);
                continue;
            }
            let covered = state.written;
            state.syncing = true;
            drop(state);
            let result = self.file.sync_data();
            state = self.lock();
            state.syncing = false;
            match result {
                Ok(()) => state.durable = covered,
                Err(_) => state.failed = true,
            }
            self.synced.notify_all();
        }
        Ok(mine)
    }

    /// Lines on disk.
    pub fn count(&self) -> u64 {
        self.lock().durable
    }

    /// Serves connections, a thread each, as long as the listener lives.
    pub fn serve(self, path: &Path, listener: &TcpListener) -> io::Result<()> {
        let ledger = Arc::new(self);
        let path: Arc<Path> = path.into();
        loop {
            let (stream, _) = listener.accept()?;
            let (ledger, path) = (ledger.clone(), path.clone());
            // A client that goes away in the middle is its own affair.
            std::thread::spawn(move || ledger.talk(&path, &stream));
        }
    }

    fn talk(&self, path: &Path, stream: &TcpStream) -> io::Result<()> {
        stream.set_nodelay(true)?;
        let mut reader = BufReader::new(stream);
        let mut lines = String::new();
        loop {
            lines.clear();
            // All that have come together are made durable together.
            while lines.is_empty() || reader.buffer().contains(&b'\n') {
                let start = lines.len();
                if reader.by_ref().take(MAX_LINE).read_line(&mut lines)? == 0 {
                    return Ok(());
                }
                if !lines.ends_with('\n') {
                    return (&*stream).write_all(b"error line is too long or not ended\n");
                }
                let question = ["count\n", "dump\n"].contains(&&lines[start..]);
                if !question {
                    continue;
                }
                let question = lines.split_off(start);
                self.take(&mut lines, stream)?;
                if question == "dump\n" {
                    io::copy(&mut File::open(path)?, &mut &*stream)?;
                    return Ok(());
                }
                (&*stream).write_all(format!("{}\n", self.count()).as_bytes())?;
            }
            self.take(&mut lines, stream)?;
        }
    }

    /// Appends the lines, answers each of them, and clears them.
    fn take(&self, lines: &mut String, mut stream: &TcpStream) -> io::Result<()> {
        let count = lines.matches('\n').count() as u64;
        if count == 0 {
            return Ok(());
        }
        let answer: String = match self.append(lines) {
            Ok(last) => (last - count + 1..=last)
                .map(|number| format!("ok {number}\n"))
                .collect(),
            Err(error) => format!("error {error}\n").repeat(count as usize),
        };
        lines.clear();
        stream.write_all(answer.as_bytes())
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // State is a few numbers that are never half written.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ask(address: std::net::SocketAddr, text: &str) -> String {
        let mut stream = TcpStream::connect(address).unwrap();
        stream.write_all(text.as_bytes()).unwrap();
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer
    }

    #[test]
    fn lines_are_acknowledged_counted_and_found_after_a_restart() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ledger.txt");
        let start = || {
            let listener = TcpListener::bind("127.0.0.1:0").unwrap();
            let address = listener.local_addr().unwrap();
            let (ledger, path) = (Ledger::open(&path).unwrap(), path.clone());
            std::thread::spawn(move || ledger.serve(&path, &listener));
            address
        };
        let first = start();
        assert_eq!(ask(first, "a 1\na 2\n"), "ok 1\nok 2\n");
        let clients: Vec<_> = (0..8)
            .map(|n| std::thread::spawn(move || ask(first, &format!("b {n}\n"))))
            .collect();
        for client in clients {
            assert!(client.join().unwrap().starts_with("ok "));
        }
        assert_eq!(ask(first, "count\n"), "10\n");
        let second = start();
        assert_eq!(ask(second, "count\n"), "10\n");
        let mut lines: Vec<String> = ask(second, "dump\n").lines().map(str::to_owned).collect();
        lines.sort();
        assert_eq!(
            (lines.len(), lines[0].as_str(), lines[9].as_str()),
            (10, "a 1", "b 7")
        );
    }

    #[test]
    fn a_torn_last_line_is_cut_off_and_an_endless_one_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ledger.txt");
        std::fs::write(&path, "a 1\na 2\na 3 torn").unwrap();
        let ledger = Ledger::open(&path).unwrap();
        assert_eq!(ledger.append("a 3\n").unwrap(), 3);
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "a 1\na 2\na 3\n");
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        std::thread::spawn(move || ledger.serve(&path, &listener));
        assert!(ask(address, &"x".repeat(MAX_LINE as usize)).starts_with("error "));
        assert_eq!(ask(address, "count\n"), "3\n");
    }
}
