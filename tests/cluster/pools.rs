//! Pools that grow, shrink and turn while streams run: no stream notices, and the cluster is as it was asked to be.

use std::process::Output;

use baton_tests::cluster::baton;
use baton_tests::{Client, Cluster, Streamed};
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
