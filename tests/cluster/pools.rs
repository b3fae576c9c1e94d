//! Pools that change while streams run: workers added, drained and turned to the other role. No byte changes.

use baton_tests::cluster::{baton, wait_for};
use baton_tests::{Client, Cluster, Streamed};

use crate::serving::{CHAT, chat, long_prompt};

/// Long enough that a change lands in the middle.
const TOKENS: u32 = 900;

async fn streams(client: &Client) -> Vec<Streamed> {
    let running: Vec<_> = (50..54)
        .map(|i| {
            let client = client.clone();
            tokio::spawn(async move { client.stream(CHAT, &chat(&long_prompt(i), TOKENS)).await.joined() })
        })
        .collect();
    let mut streamed = Vec::new();
    for stream in running {
        streamed.push(stream.await.expect("a stream ends"));
    }
    streamed
}

/// Runs a command on the cluster while the streams run; it must succeed.
async fn change(cluster: &Cluster, arguments: &[&str]) -> Vec<Streamed> {
    let running = tokio::spawn({
        let client = cluster.client.clone();
        async move { streams(&client).await }
    });
    wait_for("the streams to run", || async {
        let status = cluster.status();
        let running = |w: &serde_json::Value| w["role"] == "decode" && w["sequences_running"].as_u64() > Some(0);
        status["workers"].as_array()?.iter().any(running).then_some(())
    })
    .await;
    let data = cluster.data().display().to_string();
    let line: Vec<String> = arguments.iter().map(|a| a.to_string()).chain(["--data".into(), data]).collect();
    let output = tokio::task::spawn_blocking(move || baton(&line.iter().map(String::as_str).collect::<Vec<_>>())).await;
    let output = output.expect("the command runs");
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    running.await.expect("the streams end")
}

/// Ids of live workers of a role.
fn live(cluster: &Cluster, role: &str) -> Vec<String> {
    let status = cluster.status();
    let workers = status["workers"].as_array().cloned().unwrap_or_default();
    let mut ids: Vec<String> = workers
        .iter()
        .filter(|w| w["role"] == role && w["live"] == true && w["draining"] == false)
        .filter_map(|w| w["id"].as_str().map(str::to_string))
        .collect();
    ids.sort();
    ids
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pools_grow_shrink_and_turn_while_streams_run() {
    let cluster = Cluster::up(&[]).await;
    let undisturbed = streams(&cluster.client).await;
    assert!(undisturbed.iter().all(|s| s.done && s.error.is_none()), "{undisturbed:?}");

    assert_eq!(change(&cluster, &["scale", "--prefill", "2", "--decode", "2"]).await, undisturbed, "grown");
    assert_eq!((live(&cluster, "prefill").len(), live(&cluster, "decode").len()), (2, 2));

    let turned = live(&cluster, "prefill").pop().expect("two of them");
    assert_eq!(change(&cluster, &["role", &turned, "decode"]).await, undisturbed, "turned");
    wait_for("the worker to serve in its new role", || async {
        live(&cluster, "decode").contains(&turned).then_some(())
    })
    .await;

    let drained = live(&cluster, "decode").remove(0);
    assert_eq!(change(&cluster, &["drain", &drained]).await, undisturbed, "drained");
    wait_for("the drained worker to be gone", || async {
        let gone = !live(&cluster, "decode").contains(&drained)
            && cluster.processes().iter().all(|p| p.id != drained || p.pid == 0);
        gone.then_some(())
    })
    .await;

    assert_eq!(change(&cluster, &["scale", "--prefill", "1", "--decode", "1"]).await, undisturbed, "shrunk");
    assert_eq!((live(&cluster, "prefill").len(), live(&cluster, "decode").len()), (1, 1));
    cluster.quiet().await;
}
