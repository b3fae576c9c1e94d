//! A process of the release before: the production code behind a relay that speaks gRPC on both sides, and leaves out of
//! every message what that release did not know, in what the process says and in what it hears. Calls that it did not know
//! are answered as a server without them does.

use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use baton_core::net::Stream;
use bytes::{Buf, BufMut, Bytes, BytesMut};
use http_body_util::Either;
use hyper::body::{Body, Frame, Incoming};
use hyper::client::conn::http2 as client;
use hyper::server::conn::http2 as server;
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};

/// As every connection between processes has it.
const KEEP_ALIVE: Duration = Duration::from_millis(500);
/// Bytes between the process and its relay.
const KEPT_MAX: usize = 1 << 16;
/// Flag and length before every message.
const HEAD: usize = 5;

/// The way to a field: the numbers of those that it lies in, and its own.
type Way = &'static [u32];

/// A call, and what was added to its messages since.
struct Call {
    path: &'static str,
    asked: &'static [Way],
    answered: &'static [Way],
}

/// Since membership and storage of coordinators: names of clusters and gateways in commands, words of access, receivers of
/// blocks, holders of blocks, tickets, and steps of retries.
const ADDED: &[Call] = &[
    Call { path: "/baton.v1.Coordinator/Register", asked: &[&[3, 8]], answered: &[&[2, 5]] },
    Call {
        path: "/baton.v1.Coordinator/Heartbeat",
        asked: &[&[4, 17], &[5, 8], &[6], &[7]],
        answered: &[&[1, 8], &[1, 9], &[2, 5]],
    },
    Call { path: "/baton.v1.Coordinator/Leave", asked: &[&[3]], answered: &[] },
    Call { path: "/baton.v1.Coordinator/Assign", asked: &[&[21]], answered: &[&[1, 8], &[1, 9], &[2, 5]] },
    Call {
        path: "/baton.v1.Coordinator/Assignments",
        asked: &[&[1, 21], &[2]],
        answered: &[&[1, 3, 1, 8], &[1, 3, 1, 9], &[1, 3, 2, 5]],
    },
    Call { path: "/baton.v1.Coordinator/Locate", asked: &[&[4], &[5]], answered: &[&[1, 8], &[1, 9], &[2, 5]] },
    Call { path: "/baton.v1.Coordinator/WatchAccess", asked: &[&[1], &[2]], answered: &[&[4], &[5]] },
    Call { path: "/baton.v1.Coordinator/Finish", asked: &[&[2], &[3]], answered: &[&[2, 5]] },
    Call { path: "/baton.v1.Coordinator/Watch", asked: &[&[1], &[2]], answered: &[&[5, 1, 8], &[5, 4, 17]] },
    Call {
        path: "/baton.v1.Prefill/Prefill",
        asked: &[&[1, 8], &[1, 9], &[4, 9], &[4, 10]],
        answered: &[&[2, 5], &[3, 5]],
    },
    Call {
        path: "/baton.v1.Decode/Generate",
        asked: &[&[1, 2, 8], &[1, 2, 9]],
        answered: &[&[1, 5, 5], &[1, 8, 1, 8], &[1, 8, 1, 9]],
    },
];
/// Calls that there were not.
const UNKNOWN: [&str; 2] = ["/baton.v1.Worker/Lend", "/baton.v1.Coordinator/Heartbeats"];

/// The process's end of a connection that it has made.
pub(crate) fn connected(outside: Stream) -> Stream {
    let (process, inside) = tokio::io::duplex(KEPT_MAX);
    tokio::spawn(relay(Box::new(inside), outside));
    Box::new(process)
}

/// The process's end of a connection that was made to it.
pub(crate) fn accepted(outside: Stream) -> Stream {
    let (process, inside) = tokio::io::duplex(KEPT_MAX);
    tokio::spawn(relay(outside, Box::new(inside)));
    Box::new(process)
}

/// Passes the calls that come from the one side on to the other, until either has gone.
async fn relay(from: Stream, to: Stream) {
    let mut asking = client::Builder::new(TokioExecutor::new());
    asking.timer(TokioTimer::new()).keep_alive_interval(KEEP_ALIVE).keep_alive_timeout(KEEP_ALIVE);
    asking.keep_alive_while_idle(true);
    let Ok((ask, connection)) = asking.handshake(TokioIo::new(to)).await else { return };
    let service = service_fn(move |request: Request<Incoming>| pass(request, ask.clone()));
    let mut answering = server::Builder::new(TokioExecutor::new());
    answering.timer(TokioTimer::new()).keep_alive_interval(KEEP_ALIVE).keep_alive_timeout(2 * KEEP_ALIVE);
    answering.auto_date_header(false);
    tokio::select! {
        biased;
        _ = connection => {}
        _ = answering.serve_connection(TokioIo::new(from), service) => {}
    }
}

type Asking = client::SendRequest<Without>;
type Answer = Response<Either<Without, http_body_util::Empty<Bytes>>>;

async fn pass(request: Request<Incoming>, mut ask: Asking) -> Result<Answer, hyper::Error> {
    let path = request.uri().path().to_string();
    if UNKNOWN.contains(&&*path) {
        return Ok(unimplemented().map(Either::Right));
    }
    let (asked, answered) = match ADDED.iter().find(|call| call.path == path) {
        Some(call) => (call.asked, call.answered),
        None => (&[][..], &[][..]),
    };
    let answer = ask.send_request(request.map(|body| Without::new(body, asked))).await?;
    Ok(answer.map(|body| Either::Left(Without::new(body, answered))))
}

fn unimplemented<B: Default>() -> Response<B> {
    let answer = Response::builder().header("content-type", "application/grpc").header("grpc-status", "12");
    answer.body(B::default()).expect("a well-formed answer")
}

/// A call's messages without what was added.
struct Without {
    body: Incoming,
    added: &'static [Way],
    /// What is not a whole message yet.
    unread: BytesMut,
}

impl Without {
    fn new(body: Incoming, added: &'static [Way]) -> Without {
        Without { body, added, unread: BytesMut::new() }
    }

    /// The messages that are whole.
    fn whole(&mut self) -> Bytes {
        let mut out = BytesMut::new();
        while let Some(message) = self.next() {
            let kept = leave_out(&message, self.added);
            out.put_u8(0);
            out.put_u32(kept.len() as u32);
            out.put_slice(&kept);
        }
        out.freeze()
    }

    fn next(&mut self) -> Option<Bytes> {
        let head: [u8; HEAD] = *self.unread.first_chunk()?;
        let length = u32::from_be_bytes([head[1], head[2], head[3], head[4]]) as usize;
        if self.unread.len() < HEAD + length {
            return None;
        }
        self.unread.advance(HEAD);
        Some(self.unread.split_to(length).freeze())
    }
}

impl Body for Without {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        loop {
            let frame = match std::task::ready!(Pin::new(&mut self.body).poll_frame(cx)) {
                Some(Ok(frame)) => frame,
                end => return Poll::Ready(end),
            };
            let data = match frame.into_data() {
                Ok(data) => data,
                Err(other) => return Poll::Ready(Some(Ok(other))),
            };
            self.unread.extend_from_slice(&data);
            let whole = self.whole();
            if !whole.is_empty() {
                return Poll::Ready(Some(Ok(Frame::data(whole))));
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }
}

/// A message without those fields.
fn leave_out(message: &[u8], added: &[Way]) -> Vec<u8> {
    let mut out = Vec::with_capacity(message.len());
    let mut rest = message;
    while !rest.is_empty() {
        let Some(field) = Field::read(rest) else {
            // Nobody sends such a thing.
            out.extend_from_slice(rest);
            break;
        };
        let (whole, after) = rest.split_at(field.end);
        rest = after;
        if added.iter().any(|way| *way == [field.number]) {
            continue;
        }
        let deeper: Vec<Way> = added.iter().filter(|way| way[0] == field.number).map(|way| &way[1..]).collect();
        if deeper.is_empty() || !field.is_message {
            out.extend_from_slice(whole);
            continue;
        }
        let kept = leave_out(&whole[field.start..], &deeper);
        put_varint(&mut out, u64::from(field.number) << 3 | 2);
        put_varint(&mut out, kept.len() as u64);
        out.extend_from_slice(&kept);
    }
    out
}

/// One field of a message: where its content starts and ends.
struct Field {
    number: u32,
    is_message: bool,
    start: usize,
    end: usize,
}

impl Field {
    fn read(bytes: &[u8]) -> Option<Field> {
        let (key, mut at) = varint(bytes)?;
        let (number, wire) = (u32::try_from(key >> 3).ok()?, key & 7);
        let length = match wire {
            0 => varint(&bytes[at..])?.1,
            1 => 8,
            2 => {
                let (length, took) = varint(&bytes[at..])?;
                at += took;
                usize::try_from(length).ok()?
            }
            5 => 4,
            _ => return None,
        };
        let end = at.checked_add(length).filter(|end| *end <= bytes.len())?;
        Some(Field { number, is_message: wire == 2, start: at, end })
    }
}

/// A number, and how many bytes it takes.
fn varint(bytes: &[u8]) -> Option<(u64, usize)> {
    let mut value = 0;
    for (at, byte) in bytes.iter().take(10).enumerate() {
        value |= u64::from(byte & 0x7f).checked_shl(7 * at as u32)?;
        if byte & 0x80 == 0 {
            return Some((value, at + 1));
        }
    }
    None
}

fn put_varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

#[cfg(test)]
mod tests {
    use baton_proto::v1;
    use prost::Message;

    use super::*;

    /// Goal: a message loses the fields of its ways and nothing else. Method: one with fields of every depth that a way has,
    /// written and read by the generated code.
    #[test]
    fn a_message_loses_what_was_added_and_nothing_else() {
        let call = |path: &str| ADDED.iter().find(|call| call.path.ends_with(path)).unwrap();
        let place = v1::Place { worker: "d".into(), incarnation: 7, address: "d:1".into() };
        let holder = Some(v1::Holder { place: Some(place.clone()), blocks: 3, moves: true });
        let before = v1::Assignment { request: "r".into(), epoch: 300, decode: Some(place), ..Default::default() };
        let now = v1::Assignment { holder, cluster: "c".into(), ..before.clone() };
        let batch = |assignment: &v1::Assignment| {
            let outcome = Some(v1::assign_reply::Outcome::Assignment(assignment.clone()));
            let reply = Some(v1::AssignReply { outcome });
            v1::AssignedBatch { replies: vec![v1::Assigned { request: "r".into(), attempt: 2, reply }] }
        };
        let kept = leave_out(&batch(&now).encode_to_vec(), call("/Assignments").answered);
        assert_eq!(kept, batch(&before).encode_to_vec());
        let locate = |cluster: &str, key: &str| v1::LocateRequest {
            request: "r".into(),
            tenant: "t".into(),
            cluster: cluster.into(),
            key: key.into(),
            ..Default::default()
        };
        assert_eq!(leave_out(&locate("c", "k").encode_to_vec(), call("/Locate").asked), locate("", "").encode_to_vec());
        assert_eq!(leave_out(&[0xff, 0xff], call("/Locate").asked), [0xff, 0xff], "not a message");
    }
}
