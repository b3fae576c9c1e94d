//! Pools that grow, shrink and turn while streams run: no stream notices, and the cluster is as it was asked to be.

use std::process::Output;

use baton_tests::cluster::baton;
use baton_tests::{Client, Cluster, Fleet, Shape, Streamed};
use serde_json::json;

use crate::serving::{CHAT, chat, long_prompt};

async fn stream(client: &Client, number: usize) -> Streamed {
    let mut body = chat(&long_prompt(number), 200);
    for (key, value) in [("temperature", json!(0.8)), ("seed", json!(number)), ("n", json!(2))] {
        body[key] = value;
    }
    client.stream(CHAT, &body).await.joined()
}

/// Runs a command on the cluster beside the streams of this test.
async fn command(cluster: &Cluster, arguments: &[&str]) -> Output {
    let mut line: Vec<String> = arguments.iter().map(|argument| argument.to_string()).collect();
    line.extend(["--data".to_string(), cluster.data().display().to_string()]);
    let run = move || baton(&line.iter().map(String::as_str).collect::<Vec<_>>());
    tokio::task::spawn_blocking(run).await.expect("the command runs")
}

async fn done(cluster: &Cluster, arguments: &[&str]) -> String {
    let output = command(cluster, arguments).await;
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// (role, id) of all workers, by id.
fn workers(cluster: &Cluster) -> Vec<(String, String)> {
    let all = cluster.processes().into_iter().filter(|p| p.role == "prefill" || p.role == "decode");
    let mut all: Vec<_> = all.map(|p| (p.role, p.id)).collect();
    all.sort_by(|a, b| a.1.cmp(&b.1));
    all
}

#[tokio::test]
async fn workers_come_go_and_turn_and_no_byte_changes() {
    let cluster = Cluster::up(&[]).await;
    let mut undisturbed = Vec::new();
    for number in 300..304 {
        undisturbed.push(stream(&cluster.client, number).await);
    }
    assert!(undisturbed.iter().all(|streamed| streamed.error.is_none()), "{undisturbed:?}");
    let (stop, stopped) = tokio::sync::watch::channel(false);
    let running: Vec<_> = (300..304)
        .map(|number| {
            let (client, stopped) = (cluster.client.clone(), stopped.clone());
            tokio::spawn(async move {
                let mut streams = vec![stream(&client, number).await];
                while !*stopped.borrow() {
                    streams.push(stream(&client, number).await);
                }
                streams
            })
        })
        .collect();

    assert_eq!(done(&cluster, &["scale", "--prefill", "2", "--decode", "2"]).await.trim(), "2 prefill, 2 decode");
    let turned = cluster.processes().into_iter().find(|p| p.id == "prefill-1").expect("a second prefill worker");
    done(&cluster, &["role", "prefill-1", "decode"]).await;
    let after = cluster.processes().into_iter().find(|p| p.id == "prefill-1").expect("the same worker");
    assert_eq!((after.pid, after.role.as_str()), (turned.pid, "decode"));
    done(&cluster, &["drain", "decode-0"]).await;
    let rows =
        |all: &[(&str, &str)]| all.iter().map(|(role, id)| (role.to_string(), id.to_string())).collect::<Vec<_>>();
    assert_eq!(workers(&cluster), rows(&[("decode", "decode-1"), ("prefill", "prefill-0"), ("decode", "prefill-1")]));
    done(&cluster, &["scale", "--decode", "1"]).await;
    assert_eq!(workers(&cluster).len(), 2);

    stop.send_replace(true);
    for (number, running) in running.into_iter().enumerate() {
        for streamed in running.await.expect("the streams end") {
            assert_eq!(streamed, undisturbed[number]);
        }
    }
    cluster.quiet().await;
}

#[tokio::test]
async fn what_cannot_be_done_is_said() {
    let cluster = Cluster::up(&[]).await;
    for (arguments, code, words) in [
        (&["drain", "decode-7"][..], 2, "there are: decode-0, prefill-0"),
        (&["role", "gateway-0", "decode"], 2, "no live worker"),
        (&["scale", "--decode", "0"], 2, "1..=64"),
    ] {
        let output = command(&cluster, arguments).await;
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(
            output.status.code() == Some(code) && said.contains(words),
            "{arguments:?}: {:?} {said}",
            output.status
        );
    }
    assert_eq!(done(&cluster, &["role", "decode-0", "decode"]).await.trim(), "decode-0 serves as decode already");
}

/// Goal: the last prefill worker dies, and what runs and what is asked next has the same bytes. Method: kill -9 while prompts
/// are handed off, and more of them at once.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_last_prefill_worker_dies_and_no_byte_changes() {
    let mut fleet = Fleet::start(&Shape { prefill: 1, ..Shape::default() }).await;
    let ask = |client: Client, salt: usize| async move {
        let mut body = chat(&long_prompt(310), 60);
        for (key, value) in [("temperature", json!(0.8)), ("seed", json!(310)), ("cache_salt", json!(salt.to_string()))]
        {
            body[key] = value;
        }
        client.stream(CHAT, &body).await.joined()
    };
    let expected = ask(fleet.client(0), 0).await;
    assert!(expected.done && expected.error.is_none(), "{expected:?}");
    let remote =
        async |fleet: &Fleet| fleet.metric("coordinator-1", "baton_coordinator_assignments_total", "remote").await;
    let before = remote(&fleet).await;
    assert!(before > 0.0, "its prompt was prefilled elsewhere");
    let running: Vec<_> = (1..5).map(|salt| tokio::spawn(ask(fleet.client(0), salt))).collect();
    fleet.kill("prefill-0").await;
    for salt in 5..8 {
        assert_eq!(ask(fleet.client(0), salt).await, expected, "asked after the death");
    }
    for running in running {
        assert_eq!(running.await.expect("the stream ends"), expected, "running at the death");
    }
    fleet.quiet().await;
}
