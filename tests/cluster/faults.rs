//! Workers killed under load: every stream ends complete and equal to the undisturbed one, and the cluster heals.

use baton_tests::cluster::{signal, wait_for};
use baton_tests::{Client, Cluster, Fleet, Shape, Streamed};
use serde_json::{Value, json};

use crate::serving::{CHAT, chat, long_prompt};

/// Attempts that ended without their request, by the gateway's count.
const FAILED: &str = "baton_gateway_attempts_failed_total";

/// Long enough that a kill lands in the middle; sampled, with log-probabilities and two choices.
fn request(number: usize, tokens: u32) -> Value {
    let mut body = chat(&long_prompt(number), tokens);
    for (key, value) in
        [("temperature", json!(0.8)), ("seed", json!(number)), ("n", json!(2)), ("logprobs", json!(true))]
    {
        body[key] = value;
    }
    body
}

async fn replacement(cluster: &Cluster, role: &str, killed: i32) {
    wait_for("a replacement of the killed process", || async {
        let processes = cluster.processes();
        let role = processes.iter().any(|p| p.role == role && p.pid != killed && p.pid > 0);
        role.then_some(())
    })
    .await;
}

#[tokio::test]
async fn a_decode_worker_killed_mid_stream_changes_no_byte() {
    for flags in [&["--decode", "2"][..], &[]] {
        let cluster = Cluster::up(flags).await;
        let undisturbed = cluster.client.stream(CHAT, &request(1, 1200)).await.joined();
        assert_eq!(undisturbed.error, None);
        for kill_after in [1, 200, 700] {
            let failed = cluster.counter(FAILED).await;
            let workers = cluster.processes();
            let mut events = cluster.client.open(CHAT, &request(1, 1200)).await;
            events.until_text(kill_after).await;
            for worker in workers.iter().filter(|p| p.role == "decode") {
                signal(worker.pid, libc::SIGKILL);
            }
            let disturbed = events.finish().await.joined();
            assert!(cluster.counter(FAILED).await > failed, "no kill met the stream; it says nothing");
            assert_eq!(disturbed, undisturbed, "{flags:?}, killed after {kill_after} bytes");
            for worker in workers.iter().filter(|p| p.role == "decode") {
                replacement(&cluster, "decode", worker.pid).await;
            }
        }
        cluster.quiet().await;
    }
}

#[tokio::test]
async fn a_prefill_worker_killed_mid_request_changes_no_byte() {
    const ROUNDS: usize = 40;
    let cluster = Cluster::up(&[]).await;
    let other = Cluster::up(&[]).await;
    let mut met = false;
    for round in 0..ROUNDS {
        // Prompts differ from one another, so that none is answered from the prefix cache of decode.
        let numbers = 100 + 8 * round..108 + 8 * round;
        let undisturbed = all(&cluster.client, numbers.clone(), 60).await;
        let worker = other.process("prefill");
        let client = other.client.clone();
        let running = tokio::spawn(async move { all(&client, numbers, 60).await });
        wait_for("requests to be under way", || async {
            (other.counter("baton_gateway_requests_running").await >= 1.0).then_some(())
        })
        .await;
        signal(worker.pid, libc::SIGKILL);
        assert_eq!(running.await.expect("the streams end"), undisturbed);
        replacement(&other, "prefill", worker.pid).await;
        met |= other.counter(FAILED).await > 0.0;
        if met && round >= 2 {
            break;
        }
    }
    assert!(met, "no kill met a request; it says nothing");
    other.quiet().await;
}

/// Goal: a prefill and a decode worker that die at one moment change no byte of the streams that run. Method: eight streams over
/// two of each, whose first two are killed together once every stream has said something.
#[tokio::test]
async fn a_prefill_and_a_decode_worker_killed_at_once_change_no_byte() {
    const ROUNDS: usize = 20;
    const STREAMS: usize = 8;
    let cluster = Cluster::up(&["--prefill", "2", "--decode", "2"]).await;
    let mut met = 0;
    for round in 0..ROUNDS {
        let numbers = 500 + STREAMS * round..500 + STREAMS * (round + 1);
        let undisturbed = all(&cluster.client, numbers.clone(), 200).await;
        let failed = cluster.counter(FAILED).await;
        let workers: Vec<_> = cluster.processes().into_iter().filter(|p| p.id.ends_with("-0")).collect();
        let workers: Vec<_> = workers.into_iter().filter(|p| p.role == "prefill" || p.role == "decode").collect();
        let opening = |number: usize| {
            let client = cluster.client.clone();
            tokio::spawn(async move {
                let mut events = client.open(CHAT, &request(number, 200)).await;
                events.until_text(1).await;
                events
            })
        };
        let mut streams = Vec::new();
        for opening in numbers.map(opening).collect::<Vec<_>>() {
            streams.push(opening.await.expect("it opens"));
        }
        workers.iter().for_each(|worker| signal(worker.pid, libc::SIGKILL));
        let ends: Vec<_> = streams.into_iter().map(|stream| tokio::spawn(stream.finish())).collect();
        for (end, undisturbed) in ends.into_iter().zip(&undisturbed) {
            assert_eq!(end.await.expect("a stream ends").joined(), *undisturbed, "round {round}");
        }
        met += usize::from(cluster.counter(FAILED).await > failed);
        if met == 2 {
            break;
        }
        for worker in &workers {
            replacement(&cluster, &worker.role, worker.pid).await;
        }
        wait_for("all workers to be back", || async {
            let status = cluster.status();
            let live = status["workers"].as_array()?.iter().filter(|w| w["live"] == true).count();
            (live == 4).then_some(())
        })
        .await;
    }
    assert_eq!(met, 2, "kills hardly met a stream; it says nothing");
    cluster.quiet().await;
}

#[tokio::test]
async fn without_any_prefill_worker_decode_prefills() {
    let cluster = Cluster::up(&["--prefill", "0"]).await;
    assert_eq!(cluster.client.stream(CHAT, &request(3, 30)).await.error, None);
}

/// Goal: where no decode worker is left, whoever asks hears so soon and by a code, and is served again once there is one.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_any_decode_worker_the_answer_comes_soon() {
    // It takes less than a second; a machine that is busy may take longer.
    const SOON: std::time::Duration = std::time::Duration::from_secs(3);
    let mut fleet = Fleet::start(&Shape::default()).await;
    let client = fleet.client(0);
    let undisturbed = client.stream(CHAT, &request(7, 20)).await.joined();
    fleet.kill("decode-0").await;
    let asked = tokio::time::Instant::now();
    let reply = client.post(CHAT, &request(7, 20)).await;
    let took = asked.elapsed();
    println!("told {} ms after the last decode worker was killed", took.as_millis());
    assert!(took < SOON, "{took:?}");
    assert_eq!((reply.status, reply.json()["error"]["code"].as_str()), (503, Some("service_unavailable")));
    assert!(reply.headers.contains_key("retry-after"), "{:?}", reply.headers);
    fleet.restart("decode-0").await;
    fleet.whole().await;
    assert_eq!(client.stream(CHAT, &request(7, 20)).await.joined(), undisturbed);
}

#[tokio::test]
async fn a_gateway_and_a_coordinator_killed_come_back() {
    let cluster = Cluster::up(&[]).await;
    for role in ["gateway", "coordinator"] {
        let process = cluster.process(role);
        signal(process.pid, libc::SIGKILL);
        wait_for("the cluster to answer again", || async {
            let reply = cluster.client.try_get("/health").await.ok()?;
            let whole = cluster.processes().iter().any(|p| p.role == role && p.pid != process.pid);
            (reply.status == 200 && whole).then_some(())
        })
        .await;
        let after = cluster.client.stream(CHAT, &request(4, 20)).await;
        assert_eq!(after.error, None, "after the {role}'s death");
    }
}

async fn all(client: &Client, numbers: std::ops::Range<usize>, tokens: u32) -> Vec<Streamed> {
    let streams: Vec<_> = numbers
        .map(|i| {
            let client = client.clone();
            tokio::spawn(async move { client.stream(CHAT, &request(i, tokens)).await.joined() })
        })
        .collect();
    let mut answers = Vec::new();
    for stream in streams {
        answers.push(stream.await.expect("a stream ends"));
    }
    answers
}

#[tokio::test]
async fn coordinators_killed_mid_stream_touch_no_stream() {
    let cluster = Cluster::up(&["--coordinators", "3"]).await;
    let undisturbed = cluster.client.stream(CHAT, &request(5, 1200)).await.joined();
    let mut events = cluster.client.open(CHAT, &request(5, 1200)).await;
    events.until_text(1).await;
    let leader = cluster.status()["leader"].to_string();
    let nodes = cluster.processes();
    let leads = |id: &str| id.ends_with(&format!("-{leader}"));
    let node = nodes.iter().find(|p| p.role == "coordinator" && leads(&p.id)).expect("a leader among the coordinators");
    signal(node.pid, libc::SIGKILL);
    assert_eq!(events.finish().await.joined(), undisturbed);
    let after = cluster.client.stream(CHAT, &request(5, 1200)).await.joined();
    assert_eq!(after, undisturbed, "a new request after the leader's death");
}
