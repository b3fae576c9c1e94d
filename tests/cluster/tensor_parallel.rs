//! Workers whose model is shared by tensor-parallel ranks: the bytes of workers without, whatever the ranks of prefill and
//! decode, and with workers killed meanwhile; numbers of ranks that a model does not allow are refused.

use baton_tests::Cluster;
use baton_tests::cluster::{Process, Scratch, alive, baton, signal, wait_for};
use tokio::time::Instant;

use crate::same_bytes::answers;
use crate::serving::{CHAT, chat, long_prompt};

#[tokio::test]
async fn ranks_of_prefill_and_decode_change_no_byte() {
    let reference = answers(&Cluster::up(&[]).await.client).await;
    assert!(reference.iter().all(|r| r.error.is_none() && r.finish.iter().all(Option::is_some)), "{reference:?}");
    for (prefill, decode) in [("1", "2"), ("2", "1"), ("2", "2"), ("4", "2")] {
        let cluster = Cluster::up(&["--prefill-tp", prefill, "--decode-tp", decode]).await;
        assert_eq!(answers(&cluster.client).await, reference, "{prefill} ranks of prefill, {decode} of decode");
    }
}

/// A worker whose ranks are killed in the middle of streams is fenced and replaced as a whole; no byte changes.
#[tokio::test]
async fn killed_groups_change_no_byte() {
    let cluster = Cluster::up(&["--tp", "2"]).await;
    let mut request = chat(&long_prompt(5), 900);
    request["temperature"] = 0.8.into();
    request["seed"] = 11.into();
    request["logprobs"] = true.into();
    let undisturbed = Cluster::up(&[]).await.client.stream(CHAT, &request).await.joined();
    assert_eq!(undisturbed.error, None);
    for role in ["decode", "prefill", "decode"] {
        let worker = cluster.process(role);
        let mut events = cluster.client.open(CHAT, &request).await;
        events.until_text(100).await;
        signal(worker.pid, libc::SIGKILL);
        assert_eq!(events.finish().await.joined(), undisturbed, "killed {role}");
        wait_for("the group to be there again", || async {
            let again = cluster.processes().iter().any(|p| p.role == role && p.pid != worker.pid && p.pid > 0);
            again.then_some(())
        })
        .await;
    }
    cluster.quiet().await;
}

/// Ranks that are processes of their own say the bytes of a worker without any, and `baton status` names each of them.
#[tokio::test]
async fn ranks_as_processes_change_no_byte() {
    let reference = answers(&Cluster::up(&[]).await.client).await;
    for (prefill, decode) in [("1", "2"), ("4", "1"), ("2", "4")] {
        let flags = ["--ranks", "processes", "--prefill-tp", prefill, "--decode-tp", decode];
        let cluster = Cluster::up(&flags).await;
        let expected = |role: &str, ranks: &str| {
            let further = 1..ranks.parse().expect("a number");
            further.map(|rank: usize| format!("{role}-0/rank-{rank}")).collect::<Vec<_>>()
        };
        let expected = [expected("prefill", prefill), expected("decode", decode)].concat();
        // The gateway may know the workers before `up` has heard of their processes.
        wait_for(&format!("the ranks {expected:?}"), || async {
            let named: Vec<_> = ranks(&cluster).into_iter().map(|rank| rank.id).collect();
            (named == expected).then_some(())
        })
        .await;
        assert_eq!(answers(&cluster.client).await, reference, "{prefill} processes of prefill, {decode} of decode");
    }
}

/// A rank's process that is killed, in the middle of streams or while nothing is computed, takes its worker along: that is
/// fenced and replaced as a whole, none of its processes stays, and no byte changes.
#[tokio::test]
async fn a_killed_rank_takes_its_group_along() {
    let cluster = Cluster::up(&["--prefill-tp", "2", "--decode-tp", "4", "--ranks", "processes"]).await;
    let mut request = chat(&long_prompt(6), 600);
    request["temperature"] = 0.8.into();
    request["seed"] = 12.into();
    request["logprobs"] = true.into();
    let undisturbed = Cluster::up(&[]).await.client.stream(CHAT, &request).await.joined();
    assert_eq!(undisturbed.error, None);
    let cases = [("decode-0", 1, true), ("decode-0", 3, true), ("prefill-0", 1, true), ("decode-0", 2, false)];
    for (worker, rank, streaming) in cases {
        let group: Vec<_> = ranks(&cluster).into_iter().filter(|rank| rank.id.starts_with(worker)).collect();
        let killed = group.iter().find(|process| process.id.ends_with(&format!("rank-{rank}"))).expect("a rank");
        let before = life(&cluster, worker).expect("the worker serves");
        let began = match streaming {
            true => {
                let mut events = cluster.client.open(CHAT, &request).await;
                events.until_text(100).await;
                signal(killed.pid, libc::SIGKILL);
                let began = Instant::now();
                assert_eq!(events.finish().await.joined(), undisturbed, "killed {}", killed.id);
                began
            }
            false => {
                signal(killed.pid, libc::SIGKILL);
                Instant::now()
            }
        };
        wait_for("the group to be there again", || async {
            let again = life(&cluster, worker).is_some_and(|life| life > before);
            (again && ranks(&cluster).len() == 4 && group.iter().all(|rank| !alive(rank.pid))).then_some(())
        })
        .await;
        println!("killed {}: its group serves again within {} ms", killed.id, began.elapsed().as_millis());
    }
    assert_eq!(cluster.client.stream(CHAT, &request).await.joined(), undisturbed);
    cluster.quiet().await;
}

/// Processes of ranks, by name.
fn ranks(cluster: &Cluster) -> Vec<Process> {
    cluster.processes().into_iter().filter(|process| process.role == "rank" && process.pid > 0).collect()
}

/// The incarnation of a worker that is live.
fn life(cluster: &Cluster, worker: &str) -> Option<u64> {
    let status = cluster.status();
    let found = status["workers"].as_array()?.iter().find(|row| row["id"] == worker && row["live"] == true)?;
    found["incarnation"].as_u64()
}

#[test]
fn ranks_that_do_not_divide_the_model_are_refused() {
    let data = Scratch::new("ranks");
    let output = baton(&["up", "--port", "0", "--tp", "3", "--data", &data.path().display().to_string()]);
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{said}");
    assert!(said.contains("3 tensor-parallel ranks cannot share this model") && said.contains("--tp"), "{said}");
}
