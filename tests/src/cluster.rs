//! One `baton up` with its children, in a data directory of its own, on a port of its own.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use serde_json::Value;

use crate::Client;

/// Longest wait for any condition; far above what is ever needed, so that only a hang meets it.
pub const PATIENCE: Duration = Duration::from_secs(60);
const POLL: Duration = Duration::from_millis(10);

/// One row of `baton status --json`.
#[derive(Clone, Debug, PartialEq)]
pub struct Process {
    pub role: String,
    pub id: String,
    pub pid: i32,
    pub address: String,
}

/// The binary under test: beside the test, or beside the test's `deps` folder.
///
/// # Panics
/// If it has not been built.
pub fn binary() -> PathBuf {
    let test = std::env::current_exe().expect("a test knows its own path");
    let folders = test.ancestors().skip(1).take(2).map(|folder| folder.join("baton"));
    let path = folders.clone().find(|path| path.exists()).or(folders.last()).expect("tests run from target/<profile>");
    assert!(path.exists(), "{} is missing: run `cargo build --release` first", path.display());
    path
}

/// A directory that is removed with its owner.
pub struct Scratch(PathBuf);

impl Scratch {
    pub fn new(name: &str) -> Scratch {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("baton-{name}-{}-{count}", std::process::id()));
        std::fs::create_dir_all(&path).expect("the temporary directory is writable");
        Scratch(path)
    }

    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// A port that is free and that neither the operating system hands to an outgoing connection nor `baton up` chooses:
/// one below both ranges, and for each process of the tests other ones.
///
/// # Panics
/// If there is none.
pub fn free_port() -> u16 {
    const PORTS: std::ops::Range<u32> = 2_000..12_000;
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let mut candidates = (0..PORTS.len() as u32).map(|_| {
        let nth = std::process::id().wrapping_mul(97).wrapping_add(COUNT.fetch_add(1, Ordering::Relaxed));
        (PORTS.start + nth % PORTS.len() as u32) as u16
    });
    candidates.find(|port| std::net::TcpListener::bind(("127.0.0.1", *port)).is_ok()).expect("loopback has a free port")
}

/// Polls until `check` gives something.
///
/// # Panics
/// After `PATIENCE`, naming what was waited for.
pub async fn wait_for<T, F>(what: &str, mut check: impl FnMut() -> F) -> T
where
    F: Future<Output = Option<T>>,
{
    let started = tokio::time::Instant::now();
    loop {
        if let Some(value) = check().await {
            return value;
        }
        assert!(started.elapsed() < PATIENCE, "waited {PATIENCE:?} for {what}");
        tokio::time::sleep(POLL).await;
    }
}

/// A running cluster.
pub struct Cluster {
    up: Child,
    data: Scratch,
    pub client: Client,
}

impl Cluster {
    /// Starts `baton up` with further flags on a port of its choice and waits until it serves.
    pub async fn up(flags: &[&str]) -> Cluster {
        let data = Scratch::new("up");
        let mut up = Command::new(binary())
            .args(["up", "--port", "0", "--data"])
            .arg(data.path())
            .args(flags)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(if std::env::var_os("BATON_TEST_LOG").is_some() { Stdio::inherit() } else { Stdio::null() })
            .spawn()
            .expect("baton starts");
        let client = wait_for("the cluster to be healthy", || {
            let ended = up.try_wait().expect("the child can be asked");
            assert!(ended.is_none(), "baton up ended early: {ended:?}");
            let address = url(data.path());
            async move {
                let client = Client::new(address?);
                client.try_get("/health").await.ok().filter(|reply| reply.status == 200).map(|_| client)
            }
        })
        .await;
        Cluster { up, data, client }
    }

    pub fn data(&self) -> &Path {
        self.data.path()
    }

    pub fn pid(&self) -> i32 {
        self.up.id() as i32
    }

    /// What `baton status --json` prints.
    pub fn status(&self) -> Value {
        let output = baton(&["status", "--json", "--data", &self.data().display().to_string()]);
        let text = String::from_utf8_lossy(&output.stdout);
        serde_json::from_str(&text)
            .unwrap_or_else(|e| panic!("{e} in status {text:?}, stderr {:?}", String::from_utf8_lossy(&output.stderr)))
    }

    pub fn processes(&self) -> Vec<Process> {
        let text = |value: &Value| value.as_str().unwrap_or_default().to_string();
        let row = |p: &Value| Process {
            role: text(&p["role"]),
            id: text(&p["id"]),
            pid: p["pid"].as_i64().unwrap_or(0) as i32,
            address: text(&p["address"]),
        };
        self.status()["processes"].as_array().into_iter().flatten().map(row).collect()
    }

    /// Sum of a counter of the gateway over all its labels.
    pub async fn counter(&self, name: &str) -> f64 {
        let body = self.client.get("/metrics").await.body;
        let text = String::from_utf8_lossy(&body).into_owned();
        let lines = text.lines().filter(|l| l.starts_with(&format!("{name}{{")) || l.starts_with(&format!("{name} ")));
        lines.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum()
    }

    /// The first process of a role.
    ///
    /// # Panics
    /// If there is none.
    pub fn process(&self, role: &str) -> Process {
        let all = self.processes();
        all.iter().find(|p| p.role == role).cloned().unwrap_or_else(|| panic!("no {role} among {all:?}"))
    }

    /// Waits until no worker holds a block: nothing used, nothing in flight.
    pub async fn quiet(&self) {
        wait_for("every block to be given back", || async {
            let status = self.status();
            let workers = status["workers"].as_array()?.clone();
            let held = |w: &Value| w["blocks_used"].as_u64().zip(w["blocks_in_flight"].as_u64()).map(|(a, b)| a + b);
            let quiet = !workers.is_empty() && workers.iter().all(|w| held(w) == Some(0));
            quiet.then_some(())
        })
        .await
    }

    /// Ends the cluster as Ctrl-C does and gives its exit status back.
    pub async fn interrupt(mut self) -> std::process::ExitStatus {
        signal(self.pid(), libc::SIGINT);
        wait_for("baton up to end", || {
            let ended = self.up.try_wait().expect("the child can be asked");
            async move { ended }
        })
        .await
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        // SIGTERM lets it end its children; they also die with it should it not.
        signal(self.pid(), libc::SIGTERM);
        let _ = self.up.wait();
    }
}

/// Where the cluster of this data directory serves, once it has said so.
fn url(data: &Path) -> Option<String> {
    let file: Value = serde_json::from_slice(&std::fs::read(data.join("cluster.json")).ok()?).ok()?;
    file["url"].as_str()?.strip_prefix("http://").map(str::to_string)
}

/// One role process of its own, killed with its owner.
pub struct RoleProcess(Child);

impl RoleProcess {
    pub fn start(arguments: &[&str]) -> RoleProcess {
        let mut command = Command::new(binary());
        command.args(arguments).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        RoleProcess(command.spawn().expect("baton starts"))
    }
}

impl Drop for RoleProcess {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Runs the binary to its end.
pub fn baton(arguments: &[&str]) -> Output {
    Command::new(binary()).args(arguments).stdin(Stdio::null()).output().expect("baton starts")
}

/// Sends a signal to one process of this test's making.
pub fn signal(pid: i32, signal: i32) {
    assert!(pid > 1, "pid {pid} is no process of ours");
    // SAFETY: kill has no memory effects.
    unsafe { libc::kill(pid, signal) };
}

/// Whether a process exists and is not a zombie.
pub fn alive(pid: i32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit(')').next().is_some_and(|rest| !rest.is_empty() && !rest.trim_start().starts_with(['Z', 'X']))
}
