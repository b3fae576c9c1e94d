//! Who was not given a transfer's ticket cannot open it, write it or end it: its link is closed, and that is counted.

use baton_core::Aborted;
use baton_kvtransfer::wire::{Body, FEATURE_RESEND, FEATURE_TICKETS, Summary, Tag};
use baton_kvtransfer::{Dropped, Grant, TransferError};

use crate::net::Loopback;
use crate::raw::{Frame, Raw};
use crate::world::{LAYOUT, World, completes, ids, pairs, send_all, until};

const KNOWS: u16 = FEATURE_RESEND | FEATURE_TICKETS;

async fn ticketed(required: bool) -> World {
    let world = World::new(8).await;
    world.receiver.issue_tickets([42; 32], required);
    world
}

/// Over every link.
#[tokio::test]
async fn a_sender_with_its_ticket_is_served() {
    completes(&ticketed(true).await, 8).await;
    let local = ticketed(true).await;
    local.links.add_local(&local.receiver);
    completes(&local, 8).await;
    let shared = World::shared(LAYOUT, 8).await;
    shared.receiver.issue_tickets([42; 32], true);
    completes(&shared, 8).await;
}

#[tokio::test]
async fn tickets_differ_by_everything_that_a_grant_names() {
    let world = ticketed(true).await;
    let open = |request, epoch, from| {
        let deadline = std::time::Duration::from_secs(60);
        let (request, epoch) = (baton_core::RequestId(request), baton_core::Epoch(epoch));
        world.receiver.open(request, epoch, ids(from..from + 2), deadline, ()).0.ticket
    };
    let mut tickets = vec![open(1, 1, 0), open(1, 1, 0), open(2, 1, 0), open(1, 2, 0), open(1, 1, 2)];
    tickets.sort_unstable();
    tickets.dedup();
    assert_eq!(tickets.len(), 5);
    // Another life of the receiver has another secret.
    let other = World::new(8).await;
    other.receiver.issue_tickets([43; 32], true);
    assert_ne!(other.grant_first(4).0.ticket, ticketed(true).await.grant_first(4).0.ticket);
}

/// Says something that only the grant's sender may say, while the transfer is `open` for that sender or not yet; the link
/// is closed, the transfer goes on.
async fn is_forged(open: bool, forge: impl AsyncFnOnce(&World, &Grant, &mut Raw)) {
    let world = ticketed(false).await;
    let (grant, incoming) = world.grant_first(4);
    let mut outgoing = None;
    if open {
        outgoing = Some(world.links.open(grant.clone()).await.unwrap());
    }
    let mut thief = Raw::greeted_with(&Loopback, &grant.address, KNOWS).await;
    forge(&world, &grant, &mut thief).await;
    assert!(thief.hear().await.is_none(), "the link is closed without a word");
    until(|| world.counters().dropped(Dropped::Forged) == 1).await;
    assert_eq!(world.counters().extents, 0);
    let outgoing = match outgoing {
        Some(outgoing) => outgoing,
        None => world.links.open(grant).await.unwrap(),
    };
    send_all(outgoing, &pairs(&ids(0..4))).await.unwrap();
    incoming.wait().await.unwrap();
    assert!(world.equal((0..4).map(|i| (i, i))));
}

#[tokio::test]
async fn an_open_without_a_valid_ticket_closes_the_link() {
    for open in [false, true] {
        is_forged(open, async |_, grant, thief| thief.ask(grant, None).await).await;
        is_forged(open, async |_, grant, thief| thief.ask(grant, Some(0)).await).await;
        is_forged(open, async |_, grant, thief| thief.ask(grant, Some(grant.ticket ^ 2)).await).await;
        is_forged(open, async |world, grant, thief| {
            let (other, _incoming) = world.grant_first(4);
            thief.ask(grant, Some(other.ticket)).await;
        })
        .await;
    }
}

#[tokio::test]
async fn a_frame_of_somebody_elses_transfer_closes_the_link() {
    for open in [false, true] {
        is_forged(open, async |world, grant, thief| {
            thief.data(Frame::new(&world.source, grant, 0, &pairs(&ids(0..4)))).await;
        })
        .await;
        is_forged(open, async |_, grant, thief| {
            thief.say(grant.tag(), Body::Commit(Summary::default())).await;
        })
        .await;
        is_forged(open, async |_, grant, thief| {
            thief.say(grant.tag(), Body::Abort { reason: Aborted::Cancelled, quiesced: true }).await;
        })
        .await;
    }
}

/// A late frame of a transfer that is over harms nobody and is no forgery; nor is an attempt that is over.
#[tokio::test]
async fn what_is_over_is_not_forged() {
    let world = ticketed(true).await;
    let (grant, incoming) = world.grant_first(4);
    drop(incoming);
    let mut raw = Raw::greeted_with(&Loopback, &grant.address, KNOWS).await;
    raw.data(Frame::new(&world.source, &grant, 0, &pairs(&ids(0..4)))).await;
    raw.ask(&grant, Some(grant.ticket)).await;
    assert!(matches!(raw.hear().await.unwrap().body, Body::Refused(_)));
    raw.say(Tag::default(), Body::Ping).await;
    completes(&world, 8).await;
    assert_eq!((world.counters().dropped(Dropped::Forged), world.counters().links), (0, 2));
}

/// A sender of the first release knows no tickets: it is served, unless they are required; then the greeting says so.
#[tokio::test]
async fn the_first_release_is_served_unless_tickets_are_required() {
    let world = ticketed(false).await;
    let (grant, incoming) = world.grant_first(4);
    let mut raw = Raw::greeted(&Loopback, &grant.address).await;
    assert_eq!(raw.open(&grant).await, Body::Opened);
    drop((raw, incoming));

    let world = ticketed(true).await;
    let (grant, _incoming) = world.grant_first(4);
    let mut raw = Raw::connect(&Loopback, &grant.address).await;
    let text = baton_kvtransfer::wire::compatibility(&LAYOUT, crate::world::MODEL);
    raw.say(Tag::default(), Body::Hello { text, features: FEATURE_RESEND }).await;
    let Body::Mismatch(theirs) = raw.hear().await.unwrap().body else { panic!("greeted") };
    assert!(theirs.contains("with tickets"), "{theirs}");
    assert_eq!(world.counters().mismatched, 1);

    // A sender that lost the ticket on the way.
    let lost = Grant { ticket: 0, ..grant };
    assert!(matches!(world.links.open(lost).await.err(), Some(TransferError::Lost { .. })));
    assert_eq!(world.counters().dropped(Dropped::Forged), 1);
}
