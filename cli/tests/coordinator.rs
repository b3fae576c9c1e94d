//! `baton coordinator` and its group commands as processes: what they print and how they end.

use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

/// A directory that goes when the test ends.
struct Directory(PathBuf);

impl Directory {
    fn new(name: &str) -> Directory {
        let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("{name}-{}", std::process::id()));
        drop(std::fs::remove_dir_all(&path));
        std::fs::create_dir_all(&path).unwrap();
        Directory(path)
    }

    fn join(&self, name: &str) -> String {
        self.0.join(name).display().to_string()
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        drop(std::fs::remove_dir_all(&self.0));
    }
}

/// A coordinator that serves; killed when the test is done with it.
struct Node {
    child: Child,
    address: String,
    id: String,
}

impl Node {
    fn start(arguments: &[&str]) -> Node {
        // Another one for each: what a process draws from its seed is the name that it joins under.
        static SEED: AtomicU32 = AtomicU32::new(7);
        let seed = SEED.fetch_add(1, Ordering::Relaxed).to_string();
        let mut child = Command::new(env!("CARGO_BIN_EXE_baton"))
            .arg("coordinator")
            .args(arguments)
            .args(["--events", "--seed", &seed, "--listen", "127.0.0.1:0"])
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let ready = lines.next().expect("it serves").unwrap();
        let ready: serde_json::Value = serde_json::from_str(&ready).unwrap();
        assert_eq!(ready["event"], "ready", "{ready}");
        Node { child, address: ready["address"].as_str().unwrap().into(), id: ready["id"].as_str().unwrap().into() }
    }

    /// Waits for its end and returns the exit code and what it said on stderr.
    fn ended(mut self) -> (Option<i32>, String) {
        let mut said = String::new();
        self.child.stderr.take().unwrap().read_to_string(&mut said).unwrap();
        (self.child.wait().unwrap().code(), said)
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

fn baton(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_baton")).arg("coordinator").args(arguments).output().unwrap()
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Polls until it is so; what never comes is a failure.
#[allow(clippy::disallowed_methods)] // Between two looks at another process.
fn wait_for(mut check: impl FnMut() -> bool) {
    for _ in 0..4_000 {
        if check() {
            return;
        }
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    panic!("it does not come within 20 s");
}

/// Goal: a coordinator whose log is damaged in its middle ends with code 78 and names file and offset.
#[test]
fn a_damaged_log_ends_the_process_with_its_place() {
    let directory = Directory::new("damaged");
    let data = directory.join("data");
    let node = Node::start(&["--data", &data]);
    let log = std::fs::read_dir(&data).unwrap().map(|entry| entry.unwrap().path());
    let log = log.filter(|path| path.extension().is_some_and(|extension| extension == "log")).min().unwrap();
    // Damage in the very last frame would be a torn tail: several have to be there.
    wait_for(|| std::fs::metadata(&log).unwrap().len() > 200);
    drop(node);
    let mut bytes = std::fs::read(&log).unwrap();
    bytes[60] ^= 4;
    std::fs::write(&log, bytes).unwrap();
    let output = baton(&["--data", &data, "--listen", "127.0.0.1:0"]);
    assert_eq!(output.status.code(), Some(78), "{}", said(&output));
    assert!(said(&output).contains(&log.display().to_string()), "{}", said(&output));
    assert!(said(&output).contains("is damaged at byte "), "{}", said(&output));
}

/// Goal: a node joins and leaves by commands alone; the one that left says so and ends well; the last one stays.
#[test]
fn a_node_joins_and_leaves_by_commands() {
    let directory = Directory::new("joins");
    let first = Node::start(&["--data", &directory.join("first")]);
    let second = Node::start(&["join", "--via", &first.address, "--data", &directory.join("second")]);
    assert_eq!((first.id.as_str(), second.id.as_str()), ("coordinator-1", "coordinator-2"));
    let left = baton(&["leave", "2", "--coordinator", &second.address]);
    assert!(left.status.success(), "{}", said(&left));
    let (code, said_by_second) = second.ended();
    assert_eq!(code, Some(0), "{said_by_second}");
    assert!(said_by_second.contains("node 2 was removed from its group"), "{said_by_second}");
    let last = baton(&["leave", "1", "--coordinator", &first.address]);
    assert_eq!(last.status.code(), Some(2), "{}", said(&last));
    assert!(said(&last).contains("node 1 is the last one"), "{}", said(&last));
    let again = baton(&["--node", "3", "--data", &directory.join("third"), "--listen", "127.0.0.1:0"]);
    assert_eq!(again.status.code(), Some(2), "{}", said(&again));
    assert!(said(&again).contains("baton coordinator join"), "{}", said(&again));
}

/// Asks the coordinators until one says who leads.
fn leader(nodes: &[&Node]) -> u64 {
    let mut led = None;
    wait_for(|| {
        led = nodes.iter().find_map(|node| status(node)["leader"].as_u64());
        led.is_some()
    });
    led.expect("somebody leads")
}

/// Has leadership handed over, as soon as the node votes.
fn hand_over(to: &str, known: &[&str]) {
    wait_for(|| baton(&[&["transfer-leader", to][..], known].concat()).status.success());
}

fn status(node: &Node) -> serde_json::Value {
    let mut command = Command::new(env!("CARGO_BIN_EXE_baton"));
    let output = command.args(["status", "--json", "--coordinator", &node.address]).output().unwrap();
    serde_json::from_slice(&output.stdout).unwrap_or_default()
}

/// Goal: leadership is handed to the node that is named, and a node whose disk is lost is replaced under a new number, by
/// commands alone. Method: three processes, one of which dies with its directory.
#[test]
fn leadership_is_handed_over_and_a_lost_node_replaced_by_commands() {
    let directory = Directory::new("replace");
    let first = Node::start(&["--data", &directory.join("first")]);
    let second = Node::start(&["join", "--via", &first.address, "--data", &directory.join("second")]);
    let third = Node::start(&["join", "--via", &first.address, "--data", &directory.join("third")]);
    let known = ["--coordinator", &first.address, "--coordinator", &second.address, "--coordinator", &third.address];
    for wanted in ["2", "1"] {
        hand_over(wanted, &known);
        wait_for(|| leader(&[&first, &second, &third]).to_string() == wanted);
    }
    let strange = baton(&[&["transfer-leader", "9"][..], &known].concat());
    assert!(!strange.status.success(), "there is no node 9");

    drop(third);
    std::fs::remove_dir_all(directory.join("third")).unwrap();
    let fourth = Node::start(&["replace", "3", "--via", &first.address, "--data", &directory.join("fourth")]);
    assert_eq!(fourth.id, "coordinator-4", "a number is never used again");
    let nodes = |status: serde_json::Value| -> Vec<String> {
        let rows = status["processes"].as_array().cloned().unwrap_or_default();
        let nodes = rows.iter().filter(|row| row["role"] == "coordinator").filter_map(|row| row["id"].as_str());
        nodes.map(str::to_string).collect()
    };
    let wanted = ["coordinator-1", "coordinator-2", "coordinator-4"];
    wait_for(|| nodes(status(&first)) == wanted);
    // The new node votes: with it and one of the old ones there is a majority.
    drop(second);
    hand_over("4", &["--coordinator", &first.address, "--coordinator", &fourth.address]);
    wait_for(|| leader(&[&fourth, &first]) == 4);
}
