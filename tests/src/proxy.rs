//! A TCP proxy that a test drives: it stands between two processes of ours and delays, stalls, swallows, cuts, resets or
//! damages what passes. It knows bytes only, so that it fits every protocol.
//!
//! ```text
//! client ──Up──► proxy ──Up──► target          a fault holds for one way, for the connections there are and those to come
//!        ◄─Down─       ◄─Down─
//! ```

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{ReadHalf, WriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio::time::Instant;

/// Bytes read at once, and how many such pieces one way of a connection may hold back.
const PIECE: usize = 16 << 10;
const PIECES: usize = 256;
/// No flip is asked for.
const NEVER: u64 = u64::MAX;

/// A direction through the proxy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// From whoever connected to the target.
    Up,
    /// From the target back.
    Down,
}

/// What happens to bytes on one way.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Fault {
    #[default]
    Pass,
    /// Each byte comes so much later; order and rate stay.
    Delay(Duration),
    /// Nothing passes, neither bytes nor the end; all of it follows once the fault is taken away. A one-way cut as TCP
    /// sees it.
    Stall,
    /// Bytes and the end vanish, as if the other machine had lost its power. A connection that lost bytes so is reset once
    /// the fault is taken away.
    Swallow,
}

#[derive(Clone, Copy, Debug, Default)]
struct Plan {
    ways: [Fault; 2],
    /// Faults meet only connections that this process has made.
    only: Option<i32>,
    /// Connections of earlier generations are reset.
    generation: u64,
    /// New connections are reset at once.
    refuse: bool,
}

/// Counts over all connections, by way.
#[derive(Debug, Default)]
struct Counts {
    bytes: [AtomicU64; 2],
    /// Position, counted as `bytes` counts, of the byte to damage next.
    flip_at: [AtomicU64; 2],
    flipped: AtomicU64,
    connections: AtomicU64,
}

/// One proxied address. Dropping it closes every connection.
pub struct Proxy {
    address: String,
    plan: watch::Sender<Plan>,
    counts: Arc<Counts>,
    accepting: JoinHandle<()>,
}

impl Proxy {
    /// Listens on a free port of loopback.
    pub async fn to(target: impl Into<String>) -> io::Result<Proxy> {
        Proxy::between("127.0.0.1:0", target).await
    }

    /// Listens on `address`; connects to `target` anew for each connection.
    pub async fn between(address: &str, target: impl Into<String>) -> io::Result<Proxy> {
        let listener = TcpListener::bind(address).await?;
        let address = listener.local_addr()?.to_string();
        let plan = watch::Sender::new(Plan::default());
        let counts = Arc::new(Counts::default());
        counts.flip_at.iter().for_each(|at| at.store(NEVER, Ordering::Relaxed));
        let accepting = tokio::spawn(accept(listener, target.into(), plan.subscribe(), counts.clone()));
        Ok(Proxy { address, plan, counts, accepting })
    }

    /// `host:port` to connect to.
    pub fn address(&self) -> &str {
        &self.address
    }

    pub fn set(&self, way: Way, fault: Fault) {
        self.plan.send_modify(|plan| plan.ways[way as usize] = fault);
    }

    pub fn set_both(&self, fault: Fault) {
        self.plan.send_modify(|plan| plan.ways = [fault; 2]);
    }

    /// Faults meet only connections made by this process from now on: one pair is cut, and no other.
    pub fn only_from(&self, pid: i32) {
        self.plan.send_modify(|plan| plan.only = Some(pid));
    }

    /// Ends every connection with RST.
    pub fn reset(&self) {
        self.plan.send_modify(|plan| plan.generation += 1);
    }

    /// Resets what there is and whatever comes, as a closed port would.
    pub fn refuse(&self) {
        self.plan.send_modify(|plan| (plan.refuse, plan.generation) = (true, plan.generation + 1));
    }

    /// Takes every fault away.
    pub fn heal(&self) {
        self.plan.send_modify(|plan| *plan = Plan { generation: plan.generation, ..Plan::default() });
    }

    /// Flips a bit of the byte that comes `offset` bytes after those that have passed on this way.
    pub fn flip(&self, way: Way, offset: u64) {
        let at = self.counts.bytes[way as usize].load(Ordering::Relaxed) + offset;
        self.counts.flip_at[way as usize].store(at, Ordering::Relaxed);
    }

    /// Bits flipped so far.
    pub fn flipped(&self) -> u64 {
        self.counts.flipped.load(Ordering::Relaxed)
    }

    /// Bytes that have come on this way so far.
    pub fn bytes(&self, way: Way) -> u64 {
        self.counts.bytes[way as usize].load(Ordering::Relaxed)
    }

    /// Connections accepted so far.
    pub fn connections(&self) -> u64 {
        self.counts.connections.load(Ordering::Relaxed)
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

impl Counts {
    /// Counts a piece and damages it if the byte asked for is in it.
    fn pass(&self, way: Way, piece: &mut [u8]) {
        let start = self.bytes[way as usize].fetch_add(piece.len() as u64, Ordering::Relaxed);
        let at = self.flip_at[way as usize].load(Ordering::Relaxed);
        if (start..start + piece.len() as u64).contains(&at) {
            piece[(at - start) as usize] ^= 1;
            self.flip_at[way as usize].store(NEVER, Ordering::Relaxed);
            self.flipped.fetch_add(1, Ordering::Relaxed);
        }
    }
}

async fn accept(listener: TcpListener, target: String, plan: watch::Receiver<Plan>, counts: Arc<Counts>) {
    let mut connections = tokio::task::JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => {
                let Ok((client, _)) = accepted else { return };
                counts.connections.fetch_add(1, Ordering::Relaxed);
                let connection = Connection { plan: plan.clone(), counts: counts.clone(), ends: ends(&client), inode: OnceLock::new() };
                connections.spawn(connection.serve(client, target.clone()));
            }
            Some(_) = connections.join_next() => {}
        }
    }
}

/// How often the kernel's table is read for one connection: a read of it may miss a line while other sockets come and go.
const LOOKS: usize = 20;

/// Both ends of a connection as `/proc/net/tcp` writes them, the client's first. The client's port alone may also be that of an
/// earlier connection to elsewhere.
fn ends(client: &TcpStream) -> Option<[String; 2]> {
    Some([proc_address(client.peer_addr().ok()?)?, proc_address(client.local_addr().ok()?)?])
}

/// The client's socket, if it is on this machine: its number in `/proc/net/tcp`.
fn inode([peer, own]: &[String; 2]) -> Option<u64> {
    let look = || {
        let table = std::fs::read_to_string("/proc/net/tcp").ok()?;
        let mut lines = table.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
        let line = lines.find(|cells| cells.get(1) == Some(&peer.as_str()) && cells.get(2) == Some(&own.as_str()))?;
        line.get(9)?.parse().ok()
    };
    (0..LOOKS).find_map(|_| look())
}

/// An address as `/proc/net/tcp` writes it.
fn proc_address(address: SocketAddr) -> Option<String> {
    let IpAddr::V4(host) = address.ip() else { return None };
    Some(format!("{:08X}:{:04X}", u32::from_le_bytes(host.octets()), address.port()))
}

fn holds(pid: i32, inode: u64) -> bool {
    let name = format!("socket:[{inode}]");
    let files = std::fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
    files.filter_map(|file| std::fs::read_link(file.path()).ok()).any(|link| link.as_os_str() == name.as_str())
}

struct Connection {
    plan: watch::Receiver<Plan>,
    counts: Arc<Counts>,
    /// See `ends`.
    ends: Option<[String; 2]>,
    /// Of the client's socket, once somebody asks whose it is: the kernel's table is long where many connections come and go, and
    /// nobody is accepted while it is read.
    inode: OnceLock<Option<u64>>,
}

/// A connection to be ended with RST.
struct Reset;

impl Connection {
    async fn serve(self, mut client: TcpStream, target: String) {
        let generation = self.plan.borrow().generation;
        if self.plan.borrow().refuse {
            drop(client.set_zero_linger());
            return;
        }
        let Ok(mut server) = TcpStream::connect(&target).await else {
            drop(client.set_zero_linger());
            return;
        };
        drop((client.set_nodelay(true), server.set_nodelay(true)));
        let ended = {
            let (client_read, client_write) = client.split();
            let (server_read, server_write) = server.split();
            let both = async {
                tokio::try_join!(
                    self.pass(Way::Up, client_read, server_write),
                    self.pass(Way::Down, server_read, client_write)
                )
            };
            let mut plan = self.plan.clone();
            tokio::select! {
                ended = both => ended.map(|_| ()),
                _ = plan.wait_for(|plan| plan.generation != generation) => Err(Reset),
            }
        };
        if let Err(Reset) = ended {
            drop((client.set_zero_linger(), server.set_zero_linger()));
        }
    }

    /// The fault of a way, as far as it meets this connection.
    fn fault(&self, plan: &Plan, way: Way) -> Fault {
        let inode = || *self.inode.get_or_init(|| self.ends.as_ref().and_then(inode));
        let meets = |pid: i32| inode().is_some_and(|inode| holds(pid, inode));
        if plan.ways[way as usize] == Fault::Pass || plan.only.is_some_and(|pid| !meets(pid)) {
            return Fault::Pass;
        }
        plan.ways[way as usize]
    }

    async fn pass(&self, way: Way, from: ReadHalf<'_>, to: WriteHalf<'_>) -> Result<(), Reset> {
        let (queue, queued) = mpsc::channel(PIECES);
        tokio::try_join!(self.read(way, from, queue), self.write(way, to, queued)).map(|_| ())
    }

    async fn read(
        &self,
        way: Way,
        mut from: ReadHalf<'_>,
        queue: mpsc::Sender<(Instant, Vec<u8>)>,
    ) -> Result<(), Reset> {
        let plan = self.plan.clone();
        loop {
            let mut piece = vec![0; PIECE];
            let count = from.read(&mut piece).await.map_err(|_| Reset)?;
            piece.truncate(count);
            self.counts.pass(way, &mut piece);
            let current = *plan.borrow();
            let delay = match self.fault(&current, way) {
                Fault::Delay(delay) => delay,
                _ => Duration::ZERO,
            };
            // An empty piece is the end.
            let sent = queue.send((Instant::now() + delay, piece)).await;
            if count == 0 || sent.is_err() {
                return Ok(());
            }
        }
    }

    async fn write(
        &self,
        way: Way,
        mut to: WriteHalf<'_>,
        mut queued: mpsc::Receiver<(Instant, Vec<u8>)>,
    ) -> Result<(), Reset> {
        let mut plan = self.plan.clone();
        while let Some((due, piece)) = queued.recv().await {
            tokio::time::sleep_until(due).await;
            loop {
                let current = *plan.borrow_and_update();
                match self.fault(&current, way) {
                    Fault::Stall => drop(plan.changed().await),
                    Fault::Swallow => return self.swallow(way, plan, queued).await,
                    Fault::Pass | Fault::Delay(_) => break,
                }
            }
            let written = match piece.is_empty() {
                true => to.shutdown().await,
                false => to.write_all(&piece).await,
            };
            written.map_err(|_| Reset)?;
        }
        Ok(())
    }

    /// Takes everything and passes nothing on, until the fault is taken away and the connection must end.
    async fn swallow(
        &self,
        way: Way,
        mut plan: watch::Receiver<Plan>,
        mut queued: mpsc::Receiver<(Instant, Vec<u8>)>,
    ) -> Result<(), Reset> {
        loop {
            let current = *plan.borrow_and_update();
            if self.fault(&current, way) != Fault::Swallow {
                return Err(Reset);
            }
            tokio::select! {
                changed = plan.changed() => changed.map_err(|_| Reset)?,
                Some(_) = queued.recv() => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Longest wait for something that must come, and the wait after which nothing is taken to come.
    const SOON: Duration = Duration::from_secs(20);
    const NOTHING: Duration = Duration::from_millis(50);

    /// A client and the server it has reached through a proxy.
    async fn pair() -> (Proxy, TcpListener, TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("loopback");
        let proxy = Proxy::to(listener.local_addr().expect("bound").to_string()).await.expect("a proxy");
        let (client, server) = connect(&proxy, &listener).await;
        (proxy, listener, client, server)
    }

    async fn connect(proxy: &Proxy, listener: &TcpListener) -> (TcpStream, TcpStream) {
        let client = TcpStream::connect(proxy.address()).await.expect("the proxy accepts");
        (client, listener.accept().await.expect("the proxy connects").0)
    }

    async fn hear(stream: &mut TcpStream, count: usize) -> Vec<u8> {
        let mut heard = vec![0; count];
        let read = tokio::time::timeout(SOON, stream.read_exact(&mut heard)).await;
        read.expect("bytes come").expect("the connection holds");
        heard
    }

    /// Err: nothing came; Ok(Ok(0)): the end; Ok(Err): reset.
    async fn next(stream: &mut TcpStream, wait: Duration) -> Result<io::Result<usize>, tokio::time::error::Elapsed> {
        tokio::time::timeout(wait, stream.read(&mut [0; 1])).await
    }

    #[tokio::test]
    async fn bytes_and_ends_pass_both_ways() {
        let (proxy, _listener, mut client, mut server) = pair().await;
        let sent: Vec<u8> = (0..200_000u32).map(|i| i as u8).collect();
        let (written, heard) = tokio::join!(client.write_all(&sent), hear(&mut server, sent.len()));
        written.expect("written");
        assert_eq!(heard, sent);
        server.write_all(b"back").await.expect("written");
        assert_eq!(hear(&mut client, 4).await, b"back");
        assert_eq!((proxy.bytes(Way::Up), proxy.bytes(Way::Down), proxy.connections()), (200_000, 4, 1));
        client.shutdown().await.expect("closed");
        assert_eq!(next(&mut server, SOON).await.expect("the end comes").expect("as an end"), 0);
        server.write_all(b"more").await.expect("the other way is open still");
        assert_eq!(hear(&mut client, 4).await, b"more");
    }

    #[tokio::test]
    async fn a_delay_shifts_and_keeps_order() {
        let (proxy, _listener, mut client, mut server) = pair().await;
        let delay = Duration::from_millis(80);
        proxy.set(Way::Up, Fault::Delay(delay));
        let started = Instant::now();
        for byte in 0..20u8 {
            client.write_all(&[byte]).await.expect("written");
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        assert_eq!(hear(&mut server, 20).await, (0..20).collect::<Vec<_>>());
        assert!(started.elapsed() >= delay);
        assert!(started.elapsed() < 20 * delay, "bytes wait beside one another, not one after another");
    }

    #[tokio::test]
    async fn a_stall_cuts_one_way_and_gives_everything_after() {
        let (proxy, _listener, mut client, mut server) = pair().await;
        proxy.set(Way::Down, Fault::Stall);
        client.write_all(b"up").await.expect("written");
        assert_eq!(hear(&mut server, 2).await, b"up", "the other way is open");
        server.write_all(b"down").await.expect("written");
        server.shutdown().await.expect("closed");
        assert!(next(&mut client, NOTHING).await.is_err());
        proxy.heal();
        assert_eq!(hear(&mut client, 4).await, b"down");
        assert_eq!(next(&mut client, SOON).await.expect("the end comes").expect("as an end"), 0);
    }

    #[tokio::test]
    async fn half_open_says_nothing_and_never_recovers() {
        let (proxy, listener, mut client, mut server) = pair().await;
        proxy.set_both(Fault::Swallow);
        let lost = vec![7; 4 << 20];
        tokio::time::timeout(SOON, client.write_all(&lost))
            .await
            .expect("the sender notices nothing")
            .expect("written");
        drop(server.shutdown().await);
        assert!(next(&mut client, NOTHING).await.is_err(), "not even the end comes");
        proxy.heal();
        assert!(!matches!(next(&mut client, SOON).await, Ok(Ok(1)) | Err(_)), "what lost bytes is ended");
        let (mut client, mut server) = connect(&proxy, &listener).await;
        client.write_all(b"new").await.expect("written");
        assert_eq!(hear(&mut server, 3).await, b"new");
    }

    #[tokio::test]
    async fn a_reset_is_seen_at_both_ends_and_refusal_lasts() {
        let (proxy, listener, mut client, mut server) = pair().await;
        proxy.reset();
        for end in [&mut client, &mut server] {
            let error = next(end, SOON).await.expect("it ends").expect_err("and not in order");
            assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
        }
        let (mut client, _server) = connect(&proxy, &listener).await;
        assert!(next(&mut client, NOTHING).await.is_err(), "a connection made later stays");
        proxy.refuse();
        assert!(next(&mut client, SOON).await.expect("it ends").is_err());
        let mut refused = TcpStream::connect(proxy.address()).await.expect("the port is open");
        assert!(!matches!(next(&mut refused, SOON).await, Ok(Ok(1)) | Err(_)));
    }

    #[tokio::test]
    async fn one_bit_is_flipped_where_asked() {
        let (proxy, _listener, mut client, mut server) = pair().await;
        client.write_all(&[0; 10]).await.expect("written");
        hear(&mut server, 10).await;
        proxy.flip(Way::Up, 5);
        client.write_all(&[0; 10]).await.expect("written");
        assert_eq!(hear(&mut server, 10).await, [0, 0, 0, 0, 0, 1, 0, 0, 0, 0]);
        client.write_all(&[0; 10]).await.expect("written");
        assert_eq!(hear(&mut server, 10).await, [0; 10], "once only");
        assert_eq!(proxy.flipped(), 1);
    }

    #[tokio::test]
    async fn a_fault_can_be_for_one_process_only() {
        let (proxy, _listener, mut client, mut server) = pair().await;
        // Process 1 has made no connection to us; we have.
        proxy.only_from(1);
        proxy.set_both(Fault::Stall);
        client.write_all(b"a").await.expect("written");
        assert_eq!(hear(&mut server, 1).await, b"a");
        proxy.only_from(std::process::id() as i32);
        client.write_all(b"b").await.expect("written");
        assert!(next(&mut server, NOTHING).await.is_err());
        proxy.heal();
        assert_eq!(hear(&mut server, 1).await, b"b");
    }

    /// A process is found by its connection even where the same local port has another connection to elsewhere.
    #[tokio::test]
    async fn a_connection_is_told_from_another_of_the_same_port() {
        let (proxy, listener, _client, _server) = pair().await;
        let elsewhere = TcpListener::bind("127.0.0.1:0").await.expect("loopback");
        let port = tokio::net::TcpSocket::new_v4().expect("a socket");
        port.set_reuseaddr(true).expect("set");
        port.bind("127.0.0.1:0".parse().expect("an address")).expect("bound");
        let again = tokio::net::TcpSocket::new_v4().expect("a socket");
        again.set_reuseaddr(true).expect("set");
        again.bind(port.local_addr().expect("bound")).expect("bound twice");
        let _first = port.connect(elsewhere.local_addr().expect("bound")).await.expect("connected");
        drop(elsewhere.accept().await.expect("accepted"));
        let mut client = again.connect(proxy.address().parse().expect("an address")).await.expect("connected");
        let (mut server, _) = listener.accept().await.expect("the proxy connects");
        proxy.only_from(std::process::id() as i32);
        proxy.set_both(Fault::Stall);
        client.write_all(b"b").await.expect("written");
        assert!(next(&mut server, NOTHING).await.is_err(), "the fault meets this process");
    }
}
