//! A host by hand, for development: sends requests of a control session to an agent that listens on a unix
//! socket (`run --listen SOCKET`) and prints the answers; moves rounds between an agent and a file.
//!
//! `ctl SOCKET describe|confirm|end|freeze-fs|thaw-fs|freeze|thaw|remains|activate|watch …`, several at a time;
//! `ctl SOCKET export FILE APPLIED`, `ctl SOCKET import FILE`.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::io::Write;
use std::os::unix::net::UnixStream;

use understudy_channel::{
    Export, Hello, Import, Imported, OnConflict, Purpose, Reply, Request, Transfer, VERSION_MAX, VERSION_MIN,
    Welcome, read_frame, write_frame,
};

const OPERATION: &str = "by-hand";

fn open(socket: &str, purpose: Purpose) -> UnixStream {
    let mut stream = UnixStream::connect(socket).expect("connect");
    let hello = Hello {
        version_min: VERSION_MIN,
        version_max: VERSION_MAX,
        purpose,
    };
    write_frame(&mut stream, &hello).unwrap();
    match read_frame(&mut stream).unwrap() {
        Welcome::Accepted { .. } => stream,
        Welcome::Refused(refusal) => panic!("refused: {}", refusal.reason),
    }
}

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    let (socket, words) = (&arguments[1], &arguments[2..]);
    match words[0].as_str() {
        "export" => {
            let applied = words[2].parse().unwrap();
            let export = Export {
                operation: OPERATION.into(),
                applied,
                last: false,
                count_only: false,
            };
            let mut stream = open(socket, Purpose::Export(export));
            let mut file = std::io::BufWriter::new(std::fs::File::create(&words[1]).unwrap());
            loop {
                let transfer: Transfer = read_frame(&mut stream).unwrap();
                write_frame(&mut file, &transfer).unwrap();
                match transfer {
                    Transfer::RoundEnd(end) => return println!("{end:?}"),
                    Transfer::Failed(refusal) => panic!("{}", refusal.reason),
                    Transfer::Entry(entry) if words.get(3).is_some() => {
                        println!("{}", String::from_utf8_lossy(&entry.path));
                    }
                    _ => {}
                }
            }
        }
        "import" => {
            let import = Import {
                operation: OPERATION.into(),
                on_conflict: OnConflict::PreferGuest,
            };
            let mut stream = open(socket, Purpose::Import(import));
            stream.write_all(&std::fs::read(&words[1]).unwrap()).unwrap();
            println!("{:#?}", read_frame::<Imported>(&mut stream).unwrap());
        }
        _ => {
            let mut stream = open(socket, Purpose::Control);
            for word in words {
                let operation = OPERATION.to_owned();
                let request = match word.as_str() {
                    "describe" => Request::Describe,
                    "confirm" => Request::Confirm {
                        operation,
                        hold: Vec::new(),
                    },
                    "end" => Request::EndCapture { operation },
                    "freeze-fs" => Request::FreezeFilesystems { watchdog_ms: 2000 },
                    "thaw-fs" => Request::ThawFilesystems,
                    "freeze" => Request::FreezeUserland {
                        watchdog_ms: 3000,
                        stop: Vec::new(),
                    },
                    "thaw" => Request::ThawUserland,
                    "remains" => Request::Remains,
                    "activate" => Request::Activate { operation },
                    "wait" => {
                        std::thread::sleep(std::time::Duration::from_secs(4));
                        continue;
                    }
                    "watch" => loop {
                        println!("{:?}", read_frame::<Reply>(&mut stream).unwrap());
                    },
                    other => panic!("unknown: {other}"),
                };
                let begin = std::time::Instant::now();
                write_frame(&mut stream, &request).unwrap();
                loop {
                    let reply: Reply = read_frame(&mut stream).unwrap();
                    println!("{word}: {:?} {reply:?}", begin.elapsed());
                    if !matches!(reply, Reply::Notice(_)) {
                        break;
                    }
                }
            }
        }
    }
}
