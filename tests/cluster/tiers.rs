//! Blocks that leave a worker's cache come back from its lower tiers, across restarts, and never with a wrong byte.

use baton_tests::cluster::Scratch;
use baton_tests::{Fleet, Shape};
use serde_json::Value;

use crate::serving::{CHAT, chat};

/// Prompts of some twenty blocks each, in a cache of 64 blocks: none is left of the first when the last has been answered.
const PROMPTS: usize = 8;

fn prompt(number: usize) -> Value {
    let line = |i: usize| format!("{number} times {i} and the {i}th of them went up to the mountain. ");
    chat(&(0..6).map(line).collect::<String>(), 6)
}

/// What each prompt is answered, and how many of their tokens were cached.
async fn ask(fleet: &Fleet) -> (Vec<String>, u64) {
    let (mut texts, mut cached) = (Vec::new(), 0);
    for number in 0..PROMPTS {
        let reply = fleet.client(0).post(CHAT, &prompt(number)).await.json();
        texts.push(reply["choices"][0]["message"]["content"].as_str().expect("an answer").to_string());
        cached += reply["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap_or(0);
    }
    (texts, cached)
}

async fn hits(fleet: &Fleet, tier: &str) -> f64 {
    fleet.metric("decode-0", "baton_worker_tier_hits_total", &format!("tier=\"{tier}\"")).await
}

async fn faults(fleet: &Fleet, reason: &str) -> f64 {
    fleet.metric("decode-0", "baton_worker_tier_faults_total", &format!("reason=\"{reason}\"")).await
}

fn shape(flags: &[&str]) -> Shape {
    let own = ["--kv-blocks", "64"].iter().chain(flags).map(ToString::to_string);
    Shape { prefill: 0, worker_flags: own.collect(), ..Shape::default() }
}

/// Goal: the same bytes with and without tiers, with hits from each of them, after a crash, and from a disk that somebody
/// has damaged or cut. Method: more prompts than the cache holds, asked in turn, so that each has left it when it comes again.
#[tokio::test]
async fn evicted_blocks_come_back_after_a_crash_and_never_wrong() {
    let (expected, _) = ask(&Fleet::start(&shape(&[])).await).await;
    let folder = Scratch::new("kv");
    let path = folder.path().display().to_string();
    let mut fleet = Fleet::start(&shape(&["--kv-disk", &path, "--kv-disk-bytes", "33554432"])).await;
    assert_eq!(ask(&fleet).await.0, expected, "nothing is below yet");
    let (texts, cached) = ask(&fleet).await;
    assert_eq!(texts, expected, "out of the disk");
    assert!(cached > 0 && hits(&fleet, "disk").await > 0.0, "{cached} cached");

    fleet.kill("decode-0").await;
    fleet.restart("decode-0").await;
    fleet.whole().await;
    assert_eq!(ask(&fleet).await.0, expected, "after a crash");
    assert!(hits(&fleet, "disk").await > 0.0);

    let file = folder.path().join("blocks.kv");
    let damage = |change: &dyn Fn(&mut Vec<u8>)| {
        let mut bytes = std::fs::read(&file).expect("the tier's file");
        change(&mut bytes);
        std::fs::write(&file, bytes).expect("writable");
    };
    fleet.kill("decode-0").await;
    // Nearer together than the smallest block.
    damage(&|bytes| bytes[4096..].iter_mut().skip(100).step_by(1000).for_each(|byte| *byte ^= 4));
    fleet.restart("decode-0").await;
    fleet.whole().await;
    assert_eq!(ask(&fleet).await.0, expected, "a damaged disk");
    assert!(faults(&fleet, "damaged").await > 0.0);

    fleet.kill("decode-0").await;
    damage(&|bytes| bytes.truncate(bytes.len() - 1));
    fleet.restart("decode-0").await;
    fleet.whole().await;
    assert!(faults(&fleet, "truncated").await > 0.0);
    assert_eq!(ask(&fleet).await.0, expected, "a disk cut short");
}

/// The host tier, with both roles and a handoff between them.
#[tokio::test]
async fn a_host_tier_changes_no_byte_of_a_handoff() {
    let (expected, _) = ask(&Fleet::start(&shape(&[])).await).await;
    let fleet = Fleet::start(&Shape { prefill: 1, ..shape(&["--kv-host-bytes", "33554432"]) }).await;
    for _ in 0..2 {
        assert_eq!(ask(&fleet).await.0, expected);
    }
    assert!(hits(&fleet, "host").await > 0.0);
}
