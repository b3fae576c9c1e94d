//! The same request gives the same bytes: alone or in a crowd, through any shape of cluster, prefix hit or miss.

use baton_tests::{Client, Cluster, Streamed};
use serde_json::{Value, json};

use crate::serving::{CHAT, chat, long_prompt};

/// Greedy, sampled, and sampled with everything that looks back at the tokens so far; log-probabilities included.
fn requests() -> Vec<Value> {
    let mut greedy = chat(&long_prompt(1), 40);
    greedy["logprobs"] = true.into();
    greedy["top_logprobs"] = 3.into();
    let mut sampled = chat(&long_prompt(2), 40);
    for (key, value) in [("temperature", json!(0.9)), ("top_p", json!(0.95)), ("top_k", json!(50)), ("seed", json!(7))]
    {
        sampled[key] = value;
    }
    sampled["logprobs"] = true.into();
    let mut penalized = sampled.clone();
    penalized["n"] = 3.into();
    penalized["presence_penalty"] = json!(0.4);
    penalized["frequency_penalty"] = json!(0.3);
    penalized["repetition_penalty"] = json!(1.1);
    penalized["logit_bias"] = json!({"40": 1.5, "41": -2.0});
    vec![greedy, sampled, penalized]
}

/// What the requests give: log-probabilities joined, so that the events' borders do not count.
pub(crate) async fn answers(client: &Client) -> Vec<Streamed> {
    let mut answers = Vec::new();
    for request in requests() {
        answers.push(client.stream(CHAT, &request).await.joined());
    }
    answers
}

#[tokio::test]
async fn every_shape_of_cluster_gives_the_same_bytes() {
    let reference = answers(&Cluster::up(&[]).await.client).await;
    assert!(reference.iter().all(|r| r.error.is_none() && r.finish.iter().all(Option::is_some)), "{reference:?}");
    for flags in [
        &["--prefill", "2", "--decode", "2"][..],
        &["--prefill", "0"],
        &["--batch-tokens", "64", "--draft-tokens", "4"],
        &["--coordinators", "3"],
    ] {
        let cluster = Cluster::up(flags).await;
        assert_eq!(answers(&cluster.client).await, reference, "{flags:?}");
        assert_eq!(answers(&cluster.client).await, reference, "{flags:?}, prefix hit");
    }
}

#[tokio::test]
async fn a_crowd_changes_nothing() {
    let cluster = Cluster::up(&[]).await;
    let alone = answers(&cluster.client).await;
    let crowd: Vec<_> = (10..41)
        .map(|i| {
            let client = cluster.client.clone();
            tokio::spawn(async move { client.stream(CHAT, &chat(&long_prompt(i), 120)).await })
        })
        .collect();
    assert_eq!(answers(&cluster.client).await, alone);
    for other in crowd {
        assert_eq!(other.await.expect("a stream ends").error, None);
    }
}
