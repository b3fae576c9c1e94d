//! The link over UCX: a byte stream between two hosts, by whatever transport the library finds best (RDMA, shared memory,
//! tcp). The protocol above it is the one of every link, with all its checks: frames are read and written as on tcp.
//!
//! The library is spoken to by one thread, which every link of the process shares; it sleeps while nothing is to be done. Ends
//! of streams and that thread meet in `Pipe`.
#![allow(unsafe_code)]

use std::cell::RefCell;
use std::collections::{BTreeMap, VecDeque};
use std::ffi::{c_int, c_void};
use std::io;
use std::mem::zeroed;
use std::net::SocketAddr;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::pin::Pin;
use std::ptr::{null, null_mut};
use std::sync::mpsc;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::task::{Context, Poll, Waker};

use baton_core::limits::HANDOFF_LINKS_MAX;
use baton_ucx_sys::{self as sys, Begun, Handle, Status, Ucp};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::{mpsc as queue, oneshot};
use tokio::task::{JoinHandle, JoinSet};

use crate::receiver::{Shared, serve};

/// What one call sends or receives at most.
const PIECE_BYTES: usize = 256 << 10;
/// Received bytes that nobody has read yet, beyond which no more are asked for.
const UNREAD_BYTES: usize = 512 << 10;
/// Bytes handed to the library and not yet taken by it, beyond which writers wait.
const UNSENT_BYTES: usize = 1 << 20;
/// The thread looks after the library so often even if nothing calls it: not every transport announces all its work.
const SLEEP_MS: c_int = 50;
/// Where the kernel lists RDMA devices.
const RDMA_DEVICES: &str = "/sys/class/infiniband";

/// Whether a link over UCX can be better than one over tcp here: there is a device that tcp does not use.
pub(crate) fn is_better() -> bool {
    std::fs::read_dir(RDMA_DEVICES).is_ok_and(|mut devices| devices.next().is_some())
}

/// What UCX can do for this process, in words; the error says why nothing.
pub fn describe() -> Result<String, String> {
    let version = Ucp::load()?.version();
    Ok(match is_better() {
        true => format!("UCX {version} with RDMA devices"),
        false => format!("UCX {version}, no RDMA device: tcp is as good"),
    })
}

/// Where a receiver waits for senders that come over UCX. Dropping it ends its links.
pub(crate) struct Harbour {
    port: u16,
    accepting: JoinHandle<()>,
}

impl Harbour {
    pub(crate) async fn open(shared: &Arc<Shared>) -> io::Result<Harbour> {
        let address: SocketAddr = shared.address.parse().map_err(io::Error::other)?;
        let (port, arrivals) = listen(SocketAddr::new(address.ip(), 0)).await?;
        Ok(Harbour { port, accepting: tokio::spawn(accept(shared.clone(), arrivals)) })
    }

    pub(crate) fn port(&self) -> u16 {
        self.port
    }
}

impl Drop for Harbour {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

async fn accept(shared: Arc<Shared>, mut arrivals: Arrivals) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            arrived = arrivals.streams.recv() => match arrived {
                Some(stream) if connections.len() < HANDOFF_LINKS_MAX => {
                    connections.spawn(serve(shared.clone(), Box::new(stream), None));
                }
                Some(_) => tracing::warn!("more than {HANDOFF_LINKS_MAX} links: connection refused"),
                None => return,
            },
            Some(_) = connections.join_next() => {}
        }
    }
}

/// Connects to a harbour.
pub(crate) async fn connect(address: SocketAddr) -> io::Result<UcxStream> {
    let (tell, told) = oneshot::channel();
    started().await?.order(Order::Connect { address, tell });
    told.await.map_err(|_| gone())?
}

async fn listen(address: SocketAddr) -> io::Result<(u16, Arrivals)> {
    let (tell, told) = oneshot::channel();
    started().await?.order(Order::Listen { address, tell });
    told.await.map_err(|_| gone())?
}

fn gone() -> io::Error {
    io::Error::other("the thread that speaks to UCX has ended")
}

/// Streams that come to one listener, which ends with it.
struct Arrivals {
    streams: queue::Receiver<UcxStream>,
    listener: u64,
}

impl Drop for Arrivals {
    fn drop(&mut self) {
        if let Ok(engine) = engine() {
            engine.order(Order::Unlisten { listener: self.listener });
        }
    }
}

/// One end of a connection.
pub(crate) struct UcxStream {
    id: u64,
    pipe: Arc<Mutex<Pipe>>,
}

/// Between an end and the thread.
#[derive(Default)]
struct Pipe {
    received: VecDeque<Vec<u8>>,
    /// Bytes of the first of `received` that have been read.
    read: usize,
    /// Bytes of `received` that have not.
    unread: usize,
    /// The thread has asked the library for more.
    asked: bool,
    unsent: usize,
    ended: Option<String>,
    reader: Option<Waker>,
    writer: Option<Waker>,
}

impl Pipe {
    fn end(&mut self, cause: String) {
        self.ended.get_or_insert(cause);
        self.reader.take().into_iter().chain(self.writer.take()).for_each(Waker::wake);
    }
}

impl UcxStream {
    /// What the library sends over, in its words, once something has been sent.
    pub(crate) fn lanes(&self) -> impl Future<Output = io::Result<String>> + use<> {
        let id = self.id;
        async move {
            let (tell, told) = oneshot::channel();
            engine()?.order(Order::Lanes { id, tell });
            told.await.map_err(|_| gone())?
        }
    }
}

/// Whether one of the lanes goes over RDMA: a transport of InfiniBand, RoCE or EFA.
pub(crate) fn is_rdma(lanes: &str) -> bool {
    const TRANSPORTS: [&str; 5] = ["rc_", "dc_", "ud_", "srd", "gga_"];
    lanes.split(' ').any(|lane| TRANSPORTS.iter().any(|transport| lane.starts_with(transport)))
}

/// The lanes' transports and devices out of what the library prints of an endpoint: lines like
/// `lane[0]:  2:tcp/eth0.0 md[1] -> …`, or with newer ones `lane[0]: 2:tcp/eth0.0 md[1]`.
fn lanes_of(printed: &str) -> String {
    let of_line = |line: &str| {
        let (_, lane) = line.split_once("lane[")?.1.split_once("]:")?;
        let (_, lane) = lane.split_whitespace().next()?.split_once(':')?;
        Some(lane.to_string())
    };
    printed.lines().filter_map(of_line).collect::<Vec<_>>().join(" ")
}

impl AsyncRead for UcxStream {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let mut pipe = lock(&self.pipe);
        if pipe.unread == 0 {
            if let Some(cause) = &pipe.ended {
                return Poll::Ready(Err(io::Error::new(io::ErrorKind::ConnectionReset, cause.clone())));
            }
            pipe.reader = Some(cx.waker().clone());
            return Poll::Pending;
        }
        while buffer.remaining() > 0 && pipe.unread > 0 {
            let Pipe { received, read, unread, .. } = &mut *pipe;
            let Some(first) = received.front() else { break };
            let count = buffer.remaining().min(first.len() - *read);
            buffer.put_slice(&first[*read..*read + count]);
            (*read, *unread) = (*read + count, *unread - count);
            if *read == first.len() {
                received.pop_front();
                *read = 0;
            }
        }
        if pipe.unread < UNREAD_BYTES && !pipe.asked && pipe.ended.is_none() {
            pipe.asked = true;
            drop(pipe);
            engine()?.order(Order::Ask { id: self.id });
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for UcxStream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.poll_write_vectored(cx, &[io::IoSlice::new(bytes)])
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        pieces: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let mut pipe = lock(&self.pipe);
        if let Some(cause) = &pipe.ended {
            return Poll::Ready(Err(io::Error::new(io::ErrorKind::BrokenPipe, cause.clone())));
        }
        if pipe.unsent >= UNSENT_BYTES {
            pipe.writer = Some(cx.waker().clone());
            return Poll::Pending;
        }
        let mut bytes = Vec::with_capacity(pieces.iter().map(|piece| piece.len()).sum::<usize>().min(PIECE_BYTES));
        for piece in pieces {
            bytes.extend_from_slice(&piece[..piece.len().min(PIECE_BYTES - bytes.len())]);
        }
        let count = bytes.len();
        if count == 0 {
            return Poll::Ready(Ok(0));
        }
        pipe.unsent += count;
        drop(pipe);
        engine()?.order(Order::Send { id: self.id, bytes });
        Poll::Ready(Ok(count))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

impl Drop for UcxStream {
    fn drop(&mut self) {
        if let Ok(engine) = engine() {
            engine.order(Order::Close { id: self.id });
        }
    }
}

enum Order {
    Connect { address: SocketAddr, tell: oneshot::Sender<io::Result<UcxStream>> },
    Listen { address: SocketAddr, tell: oneshot::Sender<io::Result<(u16, Arrivals)>> },
    Unlisten { listener: u64 },
    Send { id: u64, bytes: Vec<u8> },
    Ask { id: u64 },
    Close { id: u64 },
    Lanes { id: u64, tell: oneshot::Sender<io::Result<String>> },
}

/// The way to the thread.
struct Engine {
    orders: Mutex<mpsc::Sender<Order>>,
    bell: OwnedFd,
}

impl Engine {
    fn order(&self, order: Order) {
        if lock(&self.orders).send(order).is_ok() {
            let one = 1u64;
            // SAFETY: eight bytes to an eventfd of ours.
            unsafe { libc::write(self.bell.as_raw_fd(), (&raw const one).cast(), 8) };
        }
    }
}

fn engine() -> io::Result<&'static Engine> {
    static ENGINE: OnceLock<Result<Engine, String>> = OnceLock::new();
    ENGINE.get_or_init(start).as_ref().map_err(|why| io::Error::new(io::ErrorKind::Unsupported, why.clone()))
}

/// The library takes its time to look at what the machine has; no task waits behind that.
async fn started() -> io::Result<&'static Engine> {
    tokio::task::spawn_blocking(engine).await.map_err(io::Error::other)?
}

/// Bounded by what its senders may have in it: a stream's `UNSENT_BYTES` in orders of one byte at least, and a few of others.
#[allow(clippy::disallowed_methods)] // A bound of its own would stop the thread, which drops streams, on itself.
fn ordering() -> (mpsc::Sender<Order>, mpsc::Receiver<Order>) {
    mpsc::channel()
}

fn start() -> Result<Engine, String> {
    let ucp = Ucp::load()?;
    // SAFETY: a new descriptor, nobody else's.
    let bell = unsafe {
        match libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) {
            -1 => return Err(format!("eventfd: {}", io::Error::last_os_error())),
            descriptor => OwnedFd::from_raw_fd(descriptor),
        }
    };
    let heard = bell.try_clone().map_err(|error| error.to_string())?;
    let (orders, ordered) = ordering();
    let (tell, told) = mpsc::sync_channel(1);
    let run = move || match Pump::new(ucp) {
        Ok(worker) => {
            let _ = tell.send(Ok(()));
            worker.run(&ordered, &heard);
        }
        Err(why) => drop(tell.send(Err(why))),
    };
    std::thread::Builder::new().name("baton-ucx".into()).spawn(run).map_err(|error| error.to_string())?;
    told.recv().map_err(|error| error.to_string())??;
    Ok(Engine { orders: Mutex::new(orders), bell })
}

/// An operation that the library has begun.
struct Operation {
    id: u64,
    kind: Operating,
    buffer: Vec<u8>,
    length: usize,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Operating {
    Sending,
    Receiving,
    Closing,
}

/// What the library has called back about, on its thread.
enum Happened {
    Finished(Box<Operation>, Status),
    Failed(u64, Status),
    /// Somebody connects to a listener.
    Arrived(u64, Handle),
}

thread_local! {
    static HAPPENED: RefCell<Vec<Happened>> = const { RefCell::new(Vec::new()) };
}

fn happened(what: Happened) {
    HAPPENED.with_borrow_mut(|all| all.push(what));
}

unsafe extern "C" fn on_sent(request: *mut c_void, status: Status, operation: *mut c_void) {
    // SAFETY: `Pump::begin` leaked it, for this one call; the request is ours to free.
    unsafe {
        happened(Happened::Finished(Box::from_raw(operation.cast()), status));
        if let Ok(ucp) = Ucp::load() {
            (ucp.request_free)(request);
        }
    }
}

unsafe extern "C" fn on_received(request: *mut c_void, status: Status, length: usize, operation: *mut c_void) {
    // SAFETY: as above.
    unsafe {
        (*operation.cast::<Operation>()).length = length;
        on_sent(request, status, operation);
    }
}

unsafe extern "C" fn on_failed(id: *mut c_void, _: Handle, status: Status) {
    happened(Happened::Failed(id as u64, status));
}

unsafe extern "C" fn on_arrived(request: Handle, listener: *mut c_void) {
    happened(Happened::Arrived(listener as u64, request));
}

/// The thread's side of a connection.
struct Line {
    endpoint: Handle,
    pipe: Arc<Mutex<Pipe>>,
    receiving: bool,
    closing: bool,
}

struct Listening {
    handle: Handle,
    streams: queue::Sender<UcxStream>,
}

struct Pump {
    ucp: &'static Ucp,
    handle: Handle,
    /// Readable when there is something to do.
    events: c_int,
    lines: BTreeMap<u64, Line>,
    listeners: BTreeMap<u64, Listening>,
    numbered: u64,
}

impl Pump {
    fn new(ucp: &'static Ucp) -> Result<Pump, String> {
        let failed = |call: &str, status| format!("{call}: {}", ucp.describe(status));
        let (mut library, mut handle, mut events) = (null_mut(), null_mut(), -1);
        // SAFETY: zero is a valid value of every field; what the masks name is set; handles are used on this thread alone.
        unsafe {
            let mut config = null_mut();
            let status = (ucp.config_read)(null(), null(), &mut config);
            if status != sys::OK {
                return Err(failed("ucp_config_read", status));
            }
            let mut params: sys::Params = zeroed();
            (params.field_mask, params.features) = (sys::PARAM_FEATURES, sys::FEATURE_STREAM | sys::FEATURE_WAKEUP);
            let status = (ucp.init)(sys::API.0, sys::API.1, &params, config, &mut library);
            (ucp.config_release)(config);
            if status != sys::OK {
                return Err(failed("ucp_init", status));
            }
            let mut params: sys::WorkerParams = zeroed();
            (params.field_mask, params.thread_mode) = (sys::WORKER_PARAM_THREAD_MODE, sys::THREAD_MODE_SINGLE);
            let status = (ucp.worker_create)(library, &params, &mut handle);
            if status != sys::OK {
                (ucp.cleanup)(library);
                return Err(failed("ucp_worker_create", status));
            }
            let status = (ucp.worker_get_efd)(handle, &mut events);
            if status != sys::OK {
                return Err(failed("ucp_worker_get_efd", status));
            }
        }
        let (lines, listeners) = Default::default();
        Ok(Pump { ucp, handle, events, lines, listeners, numbered: 0 })
    }

    /// For the life of the process.
    fn run(mut self, orders: &mpsc::Receiver<Order>, bell: &OwnedFd) {
        loop {
            let mut busy = false;
            while let Ok(order) = orders.try_recv() {
                busy = true;
                self.carry_out(order);
            }
            // SAFETY: this thread's worker.
            busy |= unsafe { (self.ucp.worker_progress)(self.handle) } != 0;
            for what in HAPPENED.take() {
                busy = true;
                self.take(what);
            }
            // SAFETY: this thread's worker.
            if !busy && unsafe { (self.ucp.worker_arm)(self.handle) } == sys::OK {
                self.sleep(bell);
            }
        }
    }

    /// Until there is an order or an event of the library.
    fn sleep(&self, bell: &OwnedFd) {
        let waits = |fd| libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
        let mut both = [waits(self.events), waits(bell.as_raw_fd())];
        let mut count = 0u64;
        // SAFETY: two descriptors that are open, and eight bytes to read into.
        unsafe {
            libc::poll(both.as_mut_ptr(), 2, SLEEP_MS);
            libc::read(bell.as_raw_fd(), (&raw mut count).cast(), 8);
        }
    }

    fn carry_out(&mut self, order: Order) {
        match order {
            Order::Connect { address, tell } => {
                let to = Address::new(address);
                // A caller who has gone drops the stream, which closes it.
                let _ = tell.send(self.endpoint(|params| {
                    params.field_mask |= sys::EP_PARAM_FLAGS | sys::EP_PARAM_SOCK_ADDR;
                    (params.flags, params.sockaddr) = (sys::EP_CLIENT_SERVER, to.lent());
                }));
            }
            Order::Listen { address, tell } => drop(tell.send(self.listen(address))),
            Order::Lanes { id, tell } => drop(tell.send(self.lanes(id))),
            Order::Unlisten { listener } => {
                if let Some(listening) = self.listeners.remove(&listener) {
                    // SAFETY: created in `listen`, destroyed once.
                    unsafe { (self.ucp.listener_destroy)(listening.handle) };
                }
            }
            Order::Send { id, bytes } => self.begin(id, Operating::Sending, bytes),
            Order::Ask { id } => self.ask(id),
            Order::Close { id } => self.close(id, 0),
        }
    }

    fn take(&mut self, what: Happened) {
        match what {
            Happened::Finished(operation, status) => self.finished(*operation, status),
            Happened::Failed(id, status) => {
                self.end(id, self.ucp.describe(status));
                self.close(id, sys::EP_CLOSE_FORCE);
            }
            Happened::Arrived(listener, request) => {
                let Some(streams) = self.listeners.get(&listener).map(|listening| listening.streams.clone()) else {
                    return;
                };
                let stream = self.endpoint(|params| {
                    params.field_mask |= sys::EP_PARAM_CONN_REQUEST;
                    params.conn_request = request;
                });
                // One that nobody takes is dropped, which closes it.
                match stream {
                    Ok(stream) => drop(streams.try_send(stream)),
                    Err(error) => tracing::warn!(%error, "a sender over UCX"),
                }
            }
        }
    }

    fn listen(&mut self, address: SocketAddr) -> io::Result<(u16, Arrivals)> {
        self.numbered += 1;
        let (listener, mut handle) = (self.numbered, null_mut());
        let to = Address::new(address);
        // SAFETY: zero is a valid value of every field; the address outlives the call; the answer is an address of the family
        // that was asked for, and the port stands at the same place in both families.
        let port = unsafe {
            let mut params: sys::ListenerParams = zeroed();
            params.field_mask = sys::LISTENER_PARAM_SOCK_ADDR | sys::LISTENER_PARAM_CONN_HANDLER;
            params.sockaddr = to.lent();
            let arrived: sys::Connecting = on_arrived;
            params.conn_handler = sys::Handler { call: arrived as *const c_void, argument: listener as *mut c_void };
            self.check("ucp_listener_create", (self.ucp.listener_create)(self.handle, &params, &mut handle))?;
            let mut attr: sys::ListenerAttr = zeroed();
            attr.field_mask = sys::LISTENER_ATTR_SOCKADDR;
            self.check("ucp_listener_query", (self.ucp.listener_query)(handle, &mut attr))?;
            u16::from_be((*(&raw const attr.sockaddr).cast::<libc::sockaddr_in>()).sin_port)
        };
        let (tell, streams) = queue::channel(HANDOFF_LINKS_MAX);
        self.listeners.insert(listener, Listening { handle, streams: tell });
        Ok((port, Arrivals { streams, listener }))
    }

    fn endpoint(&mut self, set: impl FnOnce(&mut sys::EpParams)) -> io::Result<UcxStream> {
        self.numbered += 1;
        let (id, mut endpoint) = (self.numbered, null_mut());
        // SAFETY: zero is a valid value of every field; what `set` lends outlives the call.
        unsafe {
            let mut params: sys::EpParams = zeroed();
            params.field_mask = sys::EP_PARAM_ERR_HANDLING_MODE | sys::EP_PARAM_ERR_HANDLER;
            params.err_mode = sys::ERR_HANDLING_MODE_PEER;
            let failed: sys::Failed = on_failed;
            params.err_handler = sys::Handler { call: failed as *const c_void, argument: id as *mut c_void };
            set(&mut params);
            self.check("ucp_ep_create", (self.ucp.ep_create)(self.handle, &params, &mut endpoint))?;
        }
        let pipe = Arc::new(Mutex::new(Pipe { asked: true, ..Pipe::default() }));
        self.lines.insert(id, Line { endpoint, pipe: pipe.clone(), receiving: false, closing: false });
        self.ask(id);
        Ok(UcxStream { id, pipe })
    }

    /// What an endpoint goes over.
    fn lanes(&self, id: u64) -> io::Result<String> {
        let line = self.lines.get(&id).filter(|line| !line.closing).ok_or_else(gone)?;
        let (mut text, mut length) = (null_mut(), 0);
        // SAFETY: a stream of libc in memory, which is closed before its text is read and freed once.
        let printed = unsafe {
            let file = libc::open_memstream(&mut text, &mut length);
            if file.is_null() {
                return Err(io::Error::last_os_error());
            }
            (self.ucp.ep_print_info)(line.endpoint, file.cast());
            libc::fclose(file);
            let printed = std::slice::from_raw_parts(text.cast::<u8>(), length);
            let printed = String::from_utf8_lossy(printed).into_owned();
            libc::free(text.cast());
            printed
        };
        Ok(lanes_of(&printed))
    }

    /// Asks the library for what comes next.
    fn ask(&mut self, id: u64) {
        if let Some(line) = self.lines.get_mut(&id).filter(|line| !line.receiving && !line.closing) {
            line.receiving = true;
            self.begin(id, Operating::Receiving, vec![0; PIECE_BYTES]);
        }
    }

    fn close(&mut self, id: u64, flags: u32) {
        if let Some(line) = self.lines.get_mut(&id).filter(|line| !line.closing) {
            line.closing = true;
            self.begin_with(id, Operating::Closing, Vec::new(), flags);
        }
    }

    fn begin(&mut self, id: u64, kind: Operating, buffer: Vec<u8>) {
        if self.lines.get(&id).is_some_and(|line| !line.closing) {
            self.begin_with(id, kind, buffer, 0);
        }
    }

    fn begin_with(&mut self, id: u64, kind: Operating, buffer: Vec<u8>, flags: u32) {
        let Some(line) = self.lines.get(&id) else { return };
        let operation = Box::into_raw(Box::new(Operation { id, kind, buffer, length: 0 }));
        let (sent, received): (sys::Sent, sys::Received) = (on_sent, on_received);
        // SAFETY: the operation and its buffer live until the callback has them, or come back below when there is none; the
        // endpoint is closed last.
        let begun = unsafe {
            let mut param: sys::RequestParam = zeroed();
            param.op_attr_mask = sys::OP_CALLBACK | sys::OP_USER_DATA | sys::OP_FLAGS;
            (param.flags, param.user_data) = (flags, operation.cast());
            param.callback = match kind {
                Operating::Receiving => received as *const c_void,
                Operating::Sending | Operating::Closing => sent as *const c_void,
            };
            let (bytes, count) = ((*operation).buffer.as_mut_ptr(), (*operation).buffer.len());
            Begun::of(match kind {
                Operating::Sending => (self.ucp.stream_send)(line.endpoint, bytes.cast(), count, &param),
                Operating::Receiving => {
                    let length = &raw mut (*operation).length;
                    (self.ucp.stream_recv)(line.endpoint, bytes.cast(), count, length, &param)
                }
                Operating::Closing => (self.ucp.ep_close)(line.endpoint, &param),
            })
        };
        let status = match begun {
            Begun::Pending => return,
            Begun::Done => sys::OK,
            Begun::Failed(status) => status,
        };
        // SAFETY: no callback comes, so it is still ours.
        happened(Happened::Finished(unsafe { Box::from_raw(operation) }, status));
    }

    fn finished(&mut self, operation: Operation, status: Status) {
        let Operation { id, kind, mut buffer, length } = operation;
        if kind == Operating::Closing {
            self.end(id, "closed".into());
            self.lines.remove(&id);
            return;
        }
        if status != sys::OK {
            return self.end(id, self.ucp.describe(status));
        }
        let Some(line) = self.lines.get_mut(&id) else { return };
        let mut pipe = lock(&line.pipe);
        if kind == Operating::Sending {
            pipe.unsent -= buffer.len();
            if pipe.unsent < UNSENT_BYTES {
                pipe.writer.take().into_iter().for_each(Waker::wake);
            }
            return;
        }
        line.receiving = false;
        buffer.truncate(length);
        buffer.shrink_to_fit(); // Short messages must not keep long buffers.
        pipe.unread += length;
        pipe.received.push_back(buffer);
        pipe.asked = pipe.unread < UNREAD_BYTES;
        pipe.reader.take().into_iter().for_each(Waker::wake);
        let more = pipe.asked;
        drop(pipe);
        if more {
            self.ask(id);
        }
    }

    fn end(&self, id: u64, cause: String) {
        if let Some(line) = self.lines.get(&id) {
            lock(&line.pipe).end(cause);
        }
    }

    fn check(&self, call: &str, status: Status) -> io::Result<()> {
        if status == sys::OK { Ok(()) } else { Err(io::Error::other(format!("{call}: {}", self.ucp.describe(status)))) }
    }
}

/// A socket's address as C has it.
enum Address {
    V4(libc::sockaddr_in),
    V6(libc::sockaddr_in6),
}

impl Address {
    fn new(address: SocketAddr) -> Address {
        match address {
            SocketAddr::V4(v4) => Address::V4(libc::sockaddr_in {
                sin_family: libc::AF_INET as _,
                sin_port: v4.port().to_be(),
                sin_addr: libc::in_addr { s_addr: u32::from_ne_bytes(v4.ip().octets()) },
                sin_zero: [0; 8],
            }),
            SocketAddr::V6(v6) => Address::V6(libc::sockaddr_in6 {
                sin6_family: libc::AF_INET6 as _,
                sin6_port: v6.port().to_be(),
                sin6_flowinfo: v6.flowinfo(),
                sin6_addr: libc::in6_addr { s6_addr: v6.ip().octets() },
                sin6_scope_id: v6.scope_id(),
            }),
        }
    }

    fn lent(&self) -> sys::SockAddr {
        let (address, bytes): (*const libc::sockaddr, usize) = match self {
            Address::V4(v4) => ((&raw const *v4).cast(), size_of_val(v4)),
            Address::V6(v6) => ((&raw const *v6).cast(), size_of_val(v6)),
        };
        sys::SockAddr { address, length: bytes as libc::socklen_t }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lanes_are_read_out_of_what_is_printed() {
        let cases = [
            (
                "#               peer: h\n#                 lane[0]:  0:tcp/lo.0 md[0]      -> md[0]/tcp/sysdev[255] am\n",
                "tcp/lo.0",
                false,
            ),
            (
                "# lane[0]: 5:rc_mlx5/mlx5_0:1.0 md[3] -> a\n# lane[1]: 2:cma/memory.0 md[1]\n",
                "rc_mlx5/mlx5_0:1.0 cma/memory.0",
                true,
            ),
            ("# lane[1]: <none>\n# lane[", "", false),
        ];
        for (printed, lanes, rdma) in cases {
            assert_eq!((&*lanes_of(printed), is_rdma(&lanes_of(printed))), (lanes, rdma), "{printed}");
        }
    }
}
