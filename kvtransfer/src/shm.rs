//! The link between processes of one host. The protocol is the same and runs over a Unix socket; the bytes do not. The
//! sender passes its arena as a descriptor that cannot write, the receiver maps it, and a DATA frame by reference rings
//! for extents that the receiver copies out itself: one copy, past the caches, hashed as it goes. A sender with its blocks on a
//! GPU passes that memory along, and the receiver's GPU copies out of it, where both can.
//!
//! Because only its owner ever writes an arena, a sender that is stopped, late or mad cannot spoil a receiver's block:
//! no write is in flight that an abort would have to wait for. What it can do is overwrite its own blocks while they
//! are fetched; their checksums then differ.
#![allow(unsafe_code)]

use std::io;
use std::mem::{size_of, zeroed};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener as StdListener, UnixStream as StdStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use baton_core::limits::{HANDOFF_BACKOFF_MS, HANDOFF_CONNECT_MS, HANDOFF_LINKS_MAX};
use baton_core::{Arena, BlockLayout};
use tokio::io::Interest;
use tokio::net::{UnixListener, UnixStream};
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::{sleep, timeout};

use crate::link::Brought;
use crate::receiver::{Shared, serve};

/// Names to try before giving up; others of the host may have taken some.
const NAMES_MAX: u64 = 16;

/// Where a receiver waits for senders of its host: a socket without a file, which nobody has to clean up. Dropping it
/// ends its links.
pub(crate) struct Porch {
    name: String,
    accepting: JoinHandle<()>,
}

impl Porch {
    pub(crate) fn open(shared: &Arc<Shared>) -> io::Result<Porch> {
        let (name, listener) = bind()?;
        listener.set_nonblocking(true)?;
        let accepting = tokio::spawn(accept(shared.clone(), UnixListener::from_std(listener)?));
        Ok(Porch { name, accepting })
    }

    pub(crate) fn name(&self) -> &str {
        &self.name
    }
}

impl Drop for Porch {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

fn bind() -> io::Result<(String, StdListener)> {
    static OPENED: AtomicU64 = AtomicU64::new(0);
    let mut last = io::Error::from(io::ErrorKind::AddrInUse);
    for _ in 0..NAMES_MAX {
        let name = format!("baton-kv-{}-{}", std::process::id(), OPENED.fetch_add(1, Relaxed));
        match StdListener::bind_addr(&SocketAddr::from_abstract_name(&name)?) {
            Ok(listener) => return Ok((name, listener)),
            Err(error) => last = error,
        }
    }
    Err(last)
}

async fn accept(shared: Arc<Shared>, listener: UnixListener) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) if connections.len() < HANDOFF_LINKS_MAX => {
                    connections.spawn(welcome(shared.clone(), stream));
                }
                Ok(_) => tracing::warn!("more than {HANDOFF_LINKS_MAX} links: connection refused"),
                Err(error) => {
                    tracing::warn!(%error, "accept from this host");
                    sleep(Duration::from_millis(HANDOFF_BACKOFF_MS)).await;
                }
            },
            Some(_) = connections.join_next() => {}
        }
    }
}

/// A sender that brings its arena first.
async fn welcome(shared: Arc<Shared>, stream: UnixStream) {
    let patience = Duration::from_millis(HANDOFF_CONNECT_MS);
    let mapped = async {
        same_user(&stream)?;
        let (descriptor, on_device, units) = stream_receive(&stream).await?;
        let arena = Arc::new(mapped(descriptor, shared.layout(), units.max(1))?);
        let device = on_device.and_then(|descriptor| {
            let mapped = shared.map_device(descriptor, arena.bytes());
            mapped.inspect_err(|error| tracing::warn!(%error, "a sender's GPU memory cannot be mapped")).ok()
        });
        Ok::<_, io::Error>(Brought { arena, device })
    };
    match timeout(patience, mapped).await {
        Ok(Ok(brought)) => serve(shared, Box::new(stream), Some(brought)).await,
        Ok(Err(error)) => tracing::warn!(%error, "a sender's arena cannot be mapped"),
        Err(_) => tracing::debug!("no arena from a sender within {HANDOFF_CONNECT_MS} ms"),
    }
}

/// A sender's arena, each of whose blocks is so many of ours.
fn mapped(descriptor: OwnedFd, layout: BlockLayout, units: u8) -> io::Result<Arena> {
    let whole = BlockLayout { block_tokens: layout.block_tokens * u32::from(units), ..layout };
    let arena = Arena::map(descriptor, whole)?;
    match units {
        1 => Ok(arena),
        _ => Arc::new(arena).in_units(layout.block_tokens).ok_or_else(|| io::ErrorKind::InvalidData.into()),
    }
}

/// Connects to the receiver that goes by `name` on this host, and gives it `arena` to read, and its blocks `on_device` if the
/// receiver has said that it takes them.
pub(crate) async fn connect(name: &str, arena: &Arena, on_device: Option<&OwnedFd>) -> io::Result<UnixStream> {
    let descriptor = arena.descriptor().ok_or_else(|| io::Error::other("the arena is not shared memory"))??;
    let stream = StdStream::connect_addr(&SocketAddr::from_abstract_name(name)?)?;
    stream.set_nonblocking(true)?;
    let stream = UnixStream::from_std(stream)?;
    same_user(&stream)?;
    let raw: Vec<RawFd> = [Some(&descriptor), on_device].into_iter().flatten().map(AsRawFd::as_raw_fd).collect();
    let units = u8::try_from(arena.units()).map_err(|_| io::Error::other("blocks of too many units"))?;
    let sent = stream.async_io(Interest::WRITABLE, || send(stream.as_raw_fd(), &raw, units));
    let late = |_| io::Error::new(io::ErrorKind::TimedOut, "the receiver does not take the arena");
    timeout(Duration::from_millis(HANDOFF_CONNECT_MS), sent).await.map_err(late)??;
    Ok(stream)
}

/// Names of such sockets have no owner and no rights: whoever is there must be ours.
fn same_user(stream: &UnixStream) -> io::Result<()> {
    // SAFETY: no arguments, cannot fail.
    let ours = unsafe { libc::geteuid() };
    match stream.peer_cred()?.uid() {
        theirs if theirs == ours => Ok(()),
        theirs => {
            Err(io::Error::new(io::ErrorKind::PermissionDenied, format!("the peer is user {theirs}, not {ours}")))
        }
    }
}

async fn stream_receive(stream: &UnixStream) -> io::Result<(OwnedFd, Option<OwnedFd>, u8)> {
    stream.async_io(Interest::READABLE, || receive(stream.as_raw_fd())).await
}

/// Room for the ancillary data of two descriptors, aligned as its header wants it.
#[repr(C, align(8))]
struct Ancillary([u8; 64]);

/// Sends one byte, how many of the link's blocks are one of the arena's, with one or two descriptors.
fn send(socket: RawFd, descriptors: &[RawFd], units: u8) -> io::Result<()> {
    let mut byte = [units];
    let mut part = libc::iovec { iov_base: byte.as_mut_ptr().cast(), iov_len: 1 };
    let mut ancillary = Ancillary([0; 64]);
    let bytes = size_of_val(descriptors) as u32;
    // SAFETY: the header points at locals that outlive the call; the descriptors' data fit in `Ancillary` (asserted).
    unsafe {
        let mut header: libc::msghdr = zeroed();
        (header.msg_iov, header.msg_iovlen) = (&mut part, 1);
        header.msg_control = ancillary.0.as_mut_ptr().cast();
        header.msg_controllen = libc::CMSG_SPACE(bytes) as _;
        assert!(header.msg_controllen as usize <= size_of::<Ancillary>());
        let control = libc::CMSG_FIRSTHDR(&header);
        ((*control).cmsg_level, (*control).cmsg_type) = (libc::SOL_SOCKET, libc::SCM_RIGHTS);
        (*control).cmsg_len = libc::CMSG_LEN(bytes) as _;
        for (i, descriptor) in descriptors.iter().enumerate() {
            libc::CMSG_DATA(control).cast::<RawFd>().add(i).write_unaligned(*descriptor);
        }
        match libc::sendmsg(socket, &header, libc::MSG_NOSIGNAL) {
            1 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

/// Receives one byte, 0 of an earlier release, and the one or two descriptors that come with it.
fn receive(socket: RawFd) -> io::Result<(OwnedFd, Option<OwnedFd>, u8)> {
    let mut byte = [0u8];
    let mut part = libc::iovec { iov_base: byte.as_mut_ptr().cast(), iov_len: 1 };
    let mut ancillary = Ancillary([0; 64]);
    // SAFETY: the header points at locals that outlive the call; the kernel writes at most `msg_controllen` bytes, and
    // every descriptor it names is new and ours.
    unsafe {
        let mut header: libc::msghdr = zeroed();
        (header.msg_iov, header.msg_iovlen) = (&mut part, 1);
        header.msg_control = ancillary.0.as_mut_ptr().cast();
        header.msg_controllen = libc::CMSG_SPACE(2 * size_of::<RawFd>() as u32) as _;
        match libc::recvmsg(socket, &mut header, libc::MSG_CMSG_CLOEXEC) {
            1 => {}
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            _ => return Err(io::Error::last_os_error()),
        }
        let control = libc::CMSG_FIRSTHDR(&header);
        let rights =
            !control.is_null() && ((*control).cmsg_level, (*control).cmsg_type) == (libc::SOL_SOCKET, libc::SCM_RIGHTS);
        let bytes = if rights { (*control).cmsg_len as usize - libc::CMSG_LEN(0) as usize } else { 0 };
        let taken = |i: usize| OwnedFd::from_raw_fd(libc::CMSG_DATA(control).cast::<RawFd>().add(i).read_unaligned());
        match bytes / size_of::<RawFd>() {
            1 => Ok((taken(0), None, byte[0])),
            2 => Ok((taken(0), Some(taken(1)), byte[0])),
            _ => Err(io::Error::new(io::ErrorKind::InvalidData, "no descriptor came with the first byte")),
        }
    }
}
