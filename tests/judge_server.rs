//! A server of the tests' own, which keeps connections, counts, and misbehaves as it is told; judges are asked here, and
//! `sampling_server` samples on it.

use std::ffi::OsString;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use candor::client::Patience;
use candor::judge::Panel;
use candor::judge::options::JudgeOptions;
use candor_environments::{Judge, Judgment};
use serde_json::{Value, json};

/// What a server does with a request.
#[derive(Clone, Debug)]
pub struct Answer {
    pub status: u16,
    pub headers: Vec<(&'static str, String)>,
    pub body: Vec<u8>,
    pub delay: Duration,
    /// Bytes of the body that are sent before the connection is cut; `None`: all, and it is kept.
    pub cut: Option<usize>,
}

/// A reply of the protocol's form.
pub fn says(text: &str) -> Answer {
    let body = json!({
        "choices": [{"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 1000, "completion_tokens": 2},
    });
    Answer { status: 200, headers: vec![], body: body.to_string().into_bytes(), delay: Duration::ZERO, cut: None }
}

pub fn refuses(status: u16, body: &str) -> Answer {
    Answer { status, body: body.as_bytes().to_vec(), ..says("") }
}

/// A request as it arrived.
#[derive(Clone, Debug)]
pub struct Asked {
    pub path: String,
    pub authorization: Option<String>,
    pub body: Value,
    pub at: Instant,
}

impl Asked {
    pub fn prompt(&self) -> &str {
        self.body["messages"][0]["content"].as_str().unwrap()
    }
}

#[derive(Default)]
pub struct Seen {
    pub connections: AtomicUsize,
    pub in_flight: AtomicUsize,
    pub most_in_flight: AtomicUsize,
    pub asked: Mutex<Vec<Asked>>,
}

pub struct Server {
    pub address: String,
    pub seen: Arc<Seen>,
}

type Behavior = dyn Fn(usize, &Asked) -> Answer + Send + Sync;

impl Server {
    /// `answer` is given the request's number, from 0.
    pub fn new(answer: impl Fn(usize, &Asked) -> Answer + Send + Sync + 'static) -> Server {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = format!("http://{}/v1", listener.local_addr().unwrap());
        let (seen, answer): (Arc<Seen>, Arc<Behavior>) = (Arc::default(), Arc::new(answer));
        let all = seen.clone();
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (seen, answer) = (all.clone(), answer.clone());
                seen.connections.fetch_add(1, Ordering::SeqCst);
                thread::spawn(move || serve(&stream, &seen, &*answer));
            }
        });
        Server { address, seen }
    }

    pub fn asked(&self) -> Vec<Asked> {
        self.seen.asked.lock().unwrap().clone()
    }

    /// A judge that asks this server, with a cache in `folder` and with short waits.
    pub fn panel(&self, folder: &std::path::Path, more: &str) -> Panel {
        self.patient_panel(folder, more, short())
    }

    pub fn patient_panel(&self, folder: &std::path::Path, more: &str, patience: Patience) -> Panel {
        let address = &self.address;
        let cache = folder.join("verdicts.jsonl").display().to_string();
        let table = format!("kind = \"openai\"\nbase_url = \"{address}\"\nmodel = \"m\"\ncache = \"{cache}\"\n{more}");
        let options = JudgeOptions::of(&table.parse().unwrap()).unwrap();
        Panel::of(&options, "", patience, &variable, &|_| {}).unwrap_or_else(|error| panic!("{error:#}"))
    }
}

/// The environment of the tests: a key, and nothing else.
pub fn variable(name: &str) -> Option<OsString> {
    (name == "CANDOR_TEST_JUDGE_KEY").then(|| "sk-of-the-test\n".into())
}

/// Waits that no test has to wait for.
pub fn short() -> Patience {
    let backoff = Duration::from_millis(2);
    let (cool_down, give_up) = (Duration::from_millis(40), Duration::from_millis(400));
    Patience { backoff, tries: 5, broken_after: 20, cool_down, give_up }
}

pub fn judged(panel: &Panel, answer: &str) -> Judgment {
    panel.judge("Who?", &["Paris".to_string()], answer)
}

/// One connection, request after request.
fn serve(stream: &TcpStream, seen: &Seen, answer: &Behavior) {
    let mut reader = BufReader::new(stream);
    while let Some(asked) = request(&mut reader) {
        let now = seen.in_flight.fetch_add(1, Ordering::SeqCst) + 1;
        seen.most_in_flight.fetch_max(now, Ordering::SeqCst);
        let number = {
            let mut all = seen.asked.lock().unwrap();
            all.push(asked.clone());
            all.len() - 1
        };
        let Answer { status, headers, body, delay, cut } = answer(number, &asked);
        thread::sleep(delay);
        let mut head = format!("HTTP/1.1 {status} X\r\nContent-Length: {}\r\n", body.len());
        headers.iter().for_each(|(name, value)| head += &format!("{name}: {value}\r\n"));
        let sent = [head.as_bytes(), b"\r\n", &body[..cut.unwrap_or(body.len())]].concat();
        seen.in_flight.fetch_sub(1, Ordering::SeqCst);
        if (&mut &*stream).write_all(&sent).is_err() || cut.is_some() {
            stream.shutdown(std::net::Shutdown::Both).ok();
            return;
        }
    }
}

fn request(reader: &mut impl BufRead) -> Option<Asked> {
    let mut head = Vec::new();
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line).ok()? == 0 {
            return None;
        }
        if line.trim().is_empty() {
            break;
        }
        head.push(line.trim().to_string());
    }
    let header = |name: &str| {
        let line = head.iter().find(|line| line.to_lowercase().starts_with(&format!("{name}:")))?;
        Some(line[name.len() + 1..].trim().to_string())
    };
    let mut body = vec![0; header("content-length").map_or(Some(0), |length| length.parse().ok())?];
    reader.read_exact(&mut body).ok()?;
    Some(Asked {
        path: head.first()?.split(' ').nth(1)?.to_string(),
        authorization: header("authorization"),
        body: serde_json::from_slice(&body).unwrap_or(Value::Null),
        at: Instant::now(),
    })
}
