//! `baton explain`: why a request went where it went, asked with the id its client saw.

use std::process::Output;

use baton_tests::Cluster;
use baton_tests::cluster::{baton, wait_for};
use serde_json::Value;

use crate::serving::{CHAT, chat, long_prompt};

fn explain(cluster: &Cluster, arguments: &[&str]) -> Output {
    let data = cluster.data().display().to_string();
    baton(&[&["explain"], arguments, &["--data", &data]].concat())
}

fn said(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Goal: the id of an answer leads to its assignment with every candidate's cost, for a person and for a program.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_request_is_explained_by_the_id_of_its_answer() {
    let cluster = Cluster::up(&[]).await;
    // A cluster is healthy as soon as it can decode.
    wait_for("the prefill worker to be live", || async {
        let status = cluster.status();
        let live = |row: &Value| row["role"] == "prefill" && row["live"] == true;
        status["workers"].as_array()?.iter().any(live).then_some(())
    })
    .await;
    let reply = cluster.client.post(CHAT, &chat(&long_prompt(1), 4)).await.json();
    let id = reply["id"].as_str().expect("an id").to_string();
    let explained: Value = wait_for("the request to have ended", || async {
        let output = explain(&cluster, &[&id, "--json"]);
        assert!(output.status.success(), "{}", said(&output.stderr));
        let explained: Value = serde_json::from_slice(&output.stdout).expect("one JSON object");
        (explained["state"] == "ended").then_some(explained)
    })
    .await;
    assert!(id.ends_with(explained["request"].as_str().expect("an id")), "{explained}");
    let decision = &explained["decisions"][0];
    assert_eq!((decision["outcome"].as_str(), decision["attempt"].as_u64()), (Some("assigned"), Some(1)));
    let lines = decision["lines"].to_string();
    assert!(lines.contains("decode decode-0 costs") && lines.contains("prefill prefill-0 costs"), "{lines}");

    let table = explain(&cluster, &[&id]);
    let text = said(&table.stdout);
    for word in ["ended", "ATTEMPT", "assigned", "decode decode-0 costs"] {
        assert!(table.status.success() && text.contains(word), "{word} is not in {text}");
    }
}

/// Goal: an id that is none, and one that nobody asked with, are told apart and end with code 2.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ids_that_lead_nowhere_are_refused() {
    let cluster = Cluster::up(&[]).await;
    let strange = format!("{:032x}", 7);
    for (id, words) in [("chatcmpl-xyz", "32 hexadecimal digits"), (strange.as_str(), "knows no request")] {
        let output = explain(&cluster, &[id]);
        let text = said(&output.stderr);
        assert!(output.status.code() == Some(2) && text.contains(words), "{id}: {:?} {text}", output.status);
    }
}
