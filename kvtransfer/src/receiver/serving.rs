//! Connections to a receiver: accepted, greeted, and read until they fail.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use baton_core::limits::{HANDOFF_ACK_BYTES, HANDOFF_BACKOFF_MS, HANDOFF_CONNECT_MS, HANDOFF_LINKS_MAX};
use baton_core::{Listener, Stream};
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use super::Shared;
use super::flight::Landings;
use super::lanes::{Lanes, Offered};
use crate::counters::Dropped;
use crate::frames::{Frames, ReadError};
use crate::link::{Brought, Link};
use crate::outbox::{Outbox, PLACES, write_all};
use crate::wire::{
    BadFrame, Body, FEATURE_DEVICE, FEATURE_HEADS, FEATURE_LANES, FEATURE_RESEND, FEATURE_SHARED, FEATURE_TICKETS,
    FEATURE_UCX, FEATURE_UNITS, Kind, LinkKey, Message, ON_DEVICE, Tag,
};

/// DATA frames by reference that are taken before they are acknowledged, when more are waiting.
const UNACKNOWLEDGED_MAX: u32 = 8;

/// Accepts connections until the receiver closes, and then ends them. Aborting it aborts them.
pub(super) async fn accept(shared: Arc<Shared>, mut listener: Box<dyn Listener>) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok(stream) if connections.len() < HANDOFF_LINKS_MAX => {
                    connections.spawn(admit(shared.clone(), stream));
                }
                Ok(_) => tracing::warn!("more than {HANDOFF_LINKS_MAX} links: connection refused"),
                Err(error) => {
                    tracing::warn!(%error, "accept on the handoff address");
                    sleep(Duration::from_millis(HANDOFF_BACKOFF_MS)).await;
                }
            },
            Some(_) = connections.join_next() => {}
            () = shared.closing.notified() => return connections.shutdown().await,
        }
    }
}

/// A connection over the network, under TLS where this receiver has a certificate.
async fn admit(shared: Arc<Shared>, stream: Stream) {
    let Some(tls) = &shared.ways.tls else { return serve(shared, stream, None).await };
    match timeout(Duration::from_millis(HANDOFF_CONNECT_MS), tls.accept(stream)).await {
        Ok(Ok(stream)) => serve(shared, stream, None).await,
        Ok(Err((reason, error))) => {
            if let Some(reason) = reason {
                shared.counts.distrust(reason);
            }
            tracing::warn!(%error, "no TLS with a sender: it needs a certificate of this worker's authority");
        }
        Err(_) => tracing::debug!("no TLS with a sender within {HANDOFF_CONNECT_MS} ms"),
    }
}

/// One connection, from its greeting to its end. `brought` is the sender's memory where it came along.
pub(crate) async fn serve(shared: Arc<Shared>, stream: Stream, brought: Option<Brought>) {
    let (read, mut write) = tokio::io::split(stream);
    let (mut frames, outbox) = (Frames::new(read), Arc::new(Outbox::new(PLACES)));
    // Over the network: whether there is a device; over the host's socket: whether it reads the sender's.
    let device = match &brought {
        None => shared.arena.device().is_some(),
        Some(brought) => brought.device.is_some(),
    };
    let greeting = greet(&shared, &mut frames, &mut write, &outbox, brought.is_none(), device);
    let (features, standing) = match timeout(Duration::from_millis(HANDOFF_CONNECT_MS), greeting).await {
        Ok(Ok(Some(greeted))) => greeted,
        _ => return,
    };
    frames.widen(shared.layout().slice_bytes());
    let (source, device) = brought.map_or((None, None), |brought| (Some(brought.arena), brought.device));
    let (id, lane) = match &standing {
        Standing::Alone => (shared.join(|_| outbox.clone()), None),
        Standing::First(offered) => {
            shared.join_as(offered.lanes.link, outbox.clone());
            (offered.lanes.link, Some((&*offered.lanes, 0)))
        }
        Standing::Further(lanes, lane) => (lanes.link, Some((&**lanes, *lane))),
    };
    let link = Link { id, features, source, device };
    let cause = tokio::select! {
        cause = read_all(&shared, &link, lane, &outbox, &mut frames) => cause,
        cause = outbox.write(&mut write) => cause.into(),
        cause = outbox.closed() => cause.into(),
    };
    tracing::debug!(%cause, "link closed");
    match standing {
        // The first one ends with it, and tells the transfers.
        Standing::Further(lanes, _) => lanes.close(),
        first => {
            drop(first);
            shared.leave(id);
        }
    }
}

/// What a connection is to its link.
enum Standing {
    /// All of it.
    Alone,
    /// The first; others may join.
    First(Offered),
    /// One of those, and which.
    Further(Arc<Lanes>, usize),
}

/// Compares the two ends' texts before anything else is looked at, and returns what both can do, and what the connection is to its
/// link. None: the texts do not fit, and the sender knows.
async fn greet<R, W>(
    shared: &Arc<Shared>,
    frames: &mut Frames<R>,
    to: &mut W,
    outbox: &Arc<Outbox>,
    offers: bool,
    device: bool,
) -> Result<Option<(u16, Standing)>, ReadError>
where
    R: AsyncRead + Unpin,
    W: AsyncWrite + Unpin,
{
    let text = shared.compatibility.clone();
    let tickets = shared.tickets.get();
    let is_required = tickets.is_some_and(|tickets| tickets.required);
    let needed = if shared.is_part { FEATURE_HEADS } else { 0 } | if is_required { FEATURE_TICKETS } else { 0 };
    let fits = |features: u16| features & needed == needed;
    let theirs = match frames.message().await {
        Ok(Message { body: Body::Hello { text: theirs, features }, tag }) => {
            (theirs == text && fits(features)).then_some((features, tag))
        }
        Err(ReadError::Frame(BadFrame::Version { .. })) => None,
        Ok(message) => return Err(BadFrame::Shape(message.body.kind()).into()),
        Err(error) => return Err(error),
    };
    let say = async |to: &mut W, body: Body| -> io::Result<()> {
        write_all(to, &Message { tag: Tag::default(), body }.encode()).await
    };
    let Some((theirs, joins)) = theirs else {
        let text = if shared.is_part { format!("{text}, some heads") } else { text };
        let text = if is_required { format!("{text}, with tickets") } else { text };
        say(to, Body::Mismatch(text)).await?;
        to.flush().await?;
        shared.counts.mismatched.add(1);
        to.shutdown().await?;
        return Ok(None);
    };
    let standing = match LinkKey::of(joins) {
        _ if theirs & FEATURE_LANES == 0 => Standing::Alone,
        (_, 0) => Standing::First(shared.offer_lanes()),
        (key, lane) => {
            let joined = shared.join_lane(key, lane, outbox).map(|lanes| Standing::Further(lanes, lane as usize));
            joined.ok_or_else(|| io::Error::other("no link to join"))?
        }
    };
    // A socket of this host is made when the first sender could use it.
    let offer = if offers && theirs & FEATURE_SHARED != 0 { shared.offer() } else { None };
    let harbour = if theirs & FEATURE_UCX != 0 { shared.harbour() } else { None };
    let can = |able: bool, feature| if able { feature } else { 0 };
    let features = FEATURE_RESEND
        | FEATURE_HEADS
        | can(tickets.is_some(), FEATURE_TICKETS)
        | can(offer.is_some(), FEATURE_SHARED)
        | can(device && (offer.is_some() || !offers), FEATURE_DEVICE)
        | can(harbour.is_some(), FEATURE_UCX)
        | FEATURE_LANES
        | FEATURE_UNITS;
    let tag = match &standing {
        Standing::Alone => Tag::default(),
        Standing::First(offered) => {
            offered.lanes.add(0, outbox);
            offered.key.tag(0)
        }
        Standing::Further(..) => joins,
    };
    write_all(to, &Message { tag, body: Body::Hello { text, features } }.encode()).await?;
    if let Some(name) = offer {
        say(to, Body::Offer(name)).await?;
    }
    if let Some(ports) = harbour {
        say(to, Body::Offer(ports)).await?;
    }
    to.flush().await?;
    Ok(Some((features & theirs, standing)))
}

/// Takes frames until the link fails.
async fn read_all<R: AsyncRead + Unpin>(
    shared: &Arc<Shared>,
    link: &Link,
    lane: Option<(&Lanes, usize)>,
    outbox: &Outbox,
    frames: &mut Frames<R>,
) -> ReadError {
    let (mut taken, mut acknowledged, mut frames_taken) = (0, 0, 0);
    let mut landings = Landings::default();
    // Whether something was taken out of the sender's arena since the last acknowledgement.
    let mut is_awaited = false;
    loop {
        // A sender of references waits for the copies, not for a socket's buffer: it hears of them as soon as none waits.
        let due = match link.source {
            Some(_) if is_awaited => taken > acknowledged && (!frames.has_more() || frames_taken >= UNACKNOWLEDGED_MAX),
            // Out of a device nobody waits for them.
            _ => taken - acknowledged >= HANDOFF_ACK_BYTES as u64,
        };
        if due {
            (acknowledged, frames_taken, is_awaited) = (taken, 0, false);
            outbox.ack(taken);
            tokio::task::yield_now().await;
        }
        let header = match frames.header().await {
            Ok(header) => header,
            Err(error) => return error,
        };
        if header.kind == Kind::Commit && landings.all_have_landed().await.is_err() {
            return io::Error::other("the device does not answer").into();
        }
        if header.kind != Kind::Data {
            let message = match frames.take(header.length as usize).await {
                Ok(payload) => Message::decode(&header, payload),
                Err(error) => return error,
            };
            let heard = match (message, lane) {
                (Ok(Message { body: Body::Barrier(awaited), .. }), Some((lanes, 0))) => lanes.reached(&awaited).await,
                // All but DATA goes over the first one.
                (Ok(Message { body, .. }), Some((_, 1..))) if body != Body::Ping => Err(BadFrame::Shape(body.kind())),
                (message, _) => message.and_then(|message| shared.hear(link, message)),
            };
            match heard {
                Ok(()) => continue,
                Err(error) => return error.into(),
            }
        }
        if header.sequence > taken {
            return BadFrame::Gap { expected: taken, found: header.sequence }.into();
        }
        let replayed = header.sequence < taken;
        let read = match replayed {
            true => frames.skip(header.length as usize).await.map(|()| None),
            false => shared.data(link, &header, frames).await,
        };
        match read {
            Ok(Some(flight)) => landings.follow(flight).await,
            Ok(None) => {}
            Err(error) => return error,
        }
        if replayed {
            shared.counts.drop(Dropped::Replayed);
            continue;
        }
        taken += header.length as u64;
        if let Some((lanes, number)) = lane {
            lanes.took(number, taken);
        }
        frames_taken += 1;
        is_awaited |= header.flags & ON_DEVICE == 0;
    }
}
