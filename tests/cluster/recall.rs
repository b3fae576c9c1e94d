//! The model that ships proves the handoff: it answers questions about facts that stand hundreds of tokens back, in
//! blocks that another process computed. (That the answers are wrong when one of those blocks is lost is shown in
//! decode-worker/tests.)

use baton_tests::Cluster;
use serde_json::{Value, json};

use crate::serving::CHAT;

const QUESTIONS: &str = include_str!("../../models/baton-3m/recall.jsonl");

#[tokio::test]
async fn nineteen_of_twenty_recall_questions_are_answered_right() {
    let cluster = Cluster::up(&[]).await;
    let questions: Vec<Value> =
        QUESTIONS.lines().map(|line| serde_json::from_str(line).expect("recall.jsonl holds JSON lines")).collect();
    assert!(questions.len() >= 40, "only {} questions", questions.len());
    let mut right = 0;
    for question in &questions {
        assert!(question["distance_tokens"].as_u64().is_some_and(|d| d >= 512), "a fact stands too near");
        let body = json!({
            "model": "baton-3m", "messages": question["messages"], "temperature": 0, "max_tokens": 16,
        });
        let answer = cluster.client.stream(CHAT, &body).await;
        let wanted = question["answer"].as_str().expect("an answer is text");
        right += usize::from(answer.text[0].trim().starts_with(wanted));
    }
    let workers = cluster.status()["workers"].as_array().cloned().unwrap_or_default();
    let prefill = workers.iter().find(|w| w["role"] == "prefill").expect("a prefill worker");
    assert!(prefill["steps"].as_u64() >= Some(questions.len() as u64), "not every prompt was handed over: {prefill}");
    println!("{right} of {} recall questions answered right", questions.len());
    assert!(right * 100 >= questions.len() * 95, "only {right} of {} right", questions.len());
}
