//! Many assignments on one stream, and those that wait for room.

use std::collections::BTreeSet;
use std::time::Duration;

use baton_proto::v1;
use tokio_stream::wrappers::ReceiverStream;

use crate::group::{Client, Directory, config, request, start};
use crate::wait_for;

struct Conversation {
    say: tokio::sync::mpsc::Sender<v1::AssignBatch>,
    replies: tonic::Streaming<v1::AssignedBatch>,
}

impl Conversation {
    async fn open(client: &mut Client) -> Conversation {
        let (say, said) = tokio::sync::mpsc::channel(16);
        let replies = client.assignments(ReceiverStream::new(said)).await;
        Conversation { say, replies }
    }

    async fn ask(&self, requests: Vec<v1::AssignRequest>) {
        self.say.send(v1::AssignBatch { requests, ..Default::default() }).await.unwrap();
    }

    async fn hear(&mut self, count: usize) -> Vec<v1::Assigned> {
        let mut heard = Vec::new();
        while heard.len() < count {
            heard.extend(self.replies.message().await.unwrap().expect("an open stream").replies);
        }
        heard
    }
}

fn refused(reply: &v1::Assigned) -> Option<&v1::Refusal> {
    match reply.reply.as_ref().unwrap().outcome.as_ref().unwrap() {
        v1::assign_reply::Outcome::Refused(refused) => Some(refused),
        v1::assign_reply::Outcome::Assignment(_) => None,
    }
}

/// A worker with one sequence that is taken, and `waiting` more than it.
fn busy(waiting: u32) -> v1::Load {
    v1::Load {
        blocks_total: 1000,
        blocks_free: 900,
        sequences_running: 1,
        sequences_max: 1,
        sequences_waiting: waiting,
        ..Default::default()
    }
}

/// Goal: each request on a stream is answered once, a bad one by itself. Method: a thousand in four messages.
#[tokio::test]
async fn a_stream_answers_each_request_once() {
    let directory = Directory::new();
    let running = start(config(1, directory.path(), &[])).await;
    let mut client = Client::new(&running.address());
    client.register("decode-0", "k").await.unwrap();
    let mut conversation = Conversation::open(&mut client).await;
    for batch in 0..4 {
        // One block each, as many as the worker has.
        let small = |id| v1::AssignRequest { prompt_tokens: 1, tokens_max: 1, ..request(id, 1) };
        conversation.ask((batch * 250..batch * 250 + 250).map(small).collect()).await;
    }
    conversation.ask(vec![v1::AssignRequest { request: "no id".into(), ..request(0, 1) }]).await;
    let heard = conversation.hear(1001).await;
    let assigned: BTreeSet<_> = heard.iter().filter(|r| refused(r).is_none()).map(|r| r.request.clone()).collect();
    assert_eq!((heard.len(), assigned.len()), (1001, 1000));
    let bad = heard.iter().find_map(|reply| Some((reply.request.clone(), refused(reply)?.reason.clone())));
    assert_eq!(bad, Some(("no id".into(), "incompatible".into())));
    assert_eq!(client.view().await.unwrap().requests_open, 1000);
    conversation.ask(vec![request(7, 1)]).await;
    assert_eq!(refused(&conversation.hear(1).await[0]), None, "repeated");
    assert_eq!(client.view().await.unwrap().requests_open, 1000);
    drop(conversation.say);
    assert!(conversation.replies.message().await.unwrap().is_none(), "ends when all is said");
    running.stop().await;
}

/// Goal: a request that finds no room waits, is assigned when there is room, and is refused when its time is up; what a
/// broken stream left waiting is gone.
#[tokio::test]
async fn requests_wait_for_room_and_no_longer_than_they_may() {
    let directory = Directory::new();
    let running = start(config(1, directory.path(), &[])).await;
    let mut client = Client::new(&running.address());
    let life = client.register("decode-0", "k").await.unwrap();
    client.beat_with("decode-0", life, 1, busy(9)).await.unwrap();
    let mut conversation = Conversation::open(&mut client).await;
    conversation.ask(vec![request(1, 1), v1::AssignRequest { deadline_ms: 150, ..request(2, 1) }]).await;
    let late = conversation.hear(1).await.remove(0);
    assert_eq!((late.request.ends_with('2'), refused(&late).unwrap().reason.as_str()), (true, "overloaded"));
    assert!(refused(&late).unwrap().retry_after_ms > 0);
    assert_eq!(client.view().await.unwrap().requests_queued, 1);
    client.beat_with("decode-0", life, 2, busy(0)).await.unwrap();
    assert_eq!(refused(&conversation.hear(1).await[0]), None);

    client.beat_with("decode-0", life, 3, busy(9)).await.unwrap();
    conversation.ask(vec![request(3, 1), request(4, 1)]).await;
    let queued = |count: u64| {
        let client = client.clone();
        wait_for("the queue's length", move || {
            let mut client = client.clone();
            async move { (client.view().await?.requests_queued == count).then_some(()) }
        })
    };
    queued(2).await;
    client.clone().finish(3, 0).await.unwrap();
    assert_eq!(refused(&conversation.hear(1).await[0]).unwrap().reason, "stale", "cancelled while it waited");
    drop(conversation);
    queued(0).await;
    running.stop().await;
}

/// Goal: a request that has been accepted is not refused for want of room, however long the queue.
#[tokio::test]
async fn an_accepted_request_does_not_queue_again() {
    let directory = Directory::new();
    let running = start(config(1, directory.path(), &[])).await;
    let mut client = Client::new(&running.address());
    let life = client.register("decode-0", "k").await.unwrap();
    let first = client.assign(request(1, 1)).await.unwrap();
    client.beat_with("decode-0", life, 1, busy(9)).await.unwrap();
    let mut waiting = client.clone();
    let waiting = tokio::spawn(async move { waiting.assign(request(2, 1)).await });
    wait_for("one waits", || {
        let mut client = client.clone();
        async move { (client.view().await?.requests_queued == 1).then_some(()) }
    })
    .await;
    let next = baton_proto::v1::AssignRequest { previous_epoch: first.epoch, ..request(1, 2) };
    let again = tokio::time::timeout(Duration::from_millis(500), client.assign(next)).await;
    assert!(again.expect("at once").is_ok());
    waiting.abort();
    running.stop().await;
}

/// Goal: why a stream breaks is told after the answers that were ready, not swallowed. Method: a message of bad questions,
/// each answered at once, and one that is too long behind it.
#[tokio::test]
async fn why_a_stream_breaks_is_told_after_what_was_ready() {
    let directory = Directory::new();
    let running = start(config(1, directory.path(), &[])).await;
    let mut client = Client::new(&running.address());
    let (say, said) = tokio::sync::mpsc::channel(16);
    for count in [512, 5_000] {
        let requests = vec![v1::AssignRequest::default(); count];
        say.send(v1::AssignBatch { requests, ..Default::default() }).await.unwrap();
    }
    let mut replies = client.assignments(ReceiverStream::new(said)).await;
    let mut answered = 0;
    let broken = loop {
        match replies.message().await {
            Ok(Some(batch)) => answered += batch.replies.len(),
            Ok(None) => panic!("it ended without a word after {answered} answers"),
            Err(status) => break status,
        }
    };
    assert_eq!((answered, broken.code()), (512, tonic::Code::InvalidArgument), "{broken}");
    drop(say);
    running.stop().await;
}
