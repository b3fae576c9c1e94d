//! Caches in 8 bits through whole clusters: the same bytes in any arrangement and out of any tier, half the bytes of bf16 on the
//! way, and workers whose dtypes differ do without one another and say why.

use baton_tests::cluster::{Scratch, baton, wait_for};
use baton_tests::{Cluster, Fleet, Shape};

use crate::same_bytes::answers;
use crate::serving::{CHAT, chat};

const PROMPTS: usize = 6;

/// What prompts of some twenty blocks are answered: more than a cache of 64 blocks holds.
async fn ask(fleet: &Fleet) -> Vec<String> {
    let mut texts = Vec::new();
    for number in 0..PROMPTS {
        let line = |i: usize| format!("{number} times {i} and the {i}th of them came out of the valley. ");
        let prompt = chat(&(0..6).map(line).collect::<String>(), 6);
        let reply = fleet.client(0).post(CHAT, &prompt).await.json();
        texts.push(reply["choices"][0]["message"]["content"].as_str().expect("an answer").to_string());
    }
    texts
}

/// Bytes of a handoff that came in, on average.
async fn bytes_each(fleet: &Fleet) -> f64 {
    let metric = |name, label| fleet.metric("decode-0", name, label);
    wait_for("a handoff in the metrics", || async {
        let done = metric("baton_worker_transfers_total", "outcome=\"completed\"").await;
        (done > 0.0).then_some(metric("baton_worker_transfer_bytes_total", "").await / done)
    })
    .await
}

fn flags(text: &str) -> Vec<String> {
    text.split_whitespace().map(str::to_string).collect()
}

/// Goal: a prefill and a decode worker with a cache in 8 bits answer as one worker alone does, whatever the ranks of either,
/// with a prefix that is there or not.
#[tokio::test]
async fn eight_bits_give_the_same_bytes_in_any_arrangement() {
    for dtype in ["int8", "fp8"] {
        let reference = answers(&Cluster::up(&["--kv-dtype", dtype, "--prefill", "0"]).await.client).await;
        assert!(reference.iter().all(|r| r.error.is_none() && r.finish.iter().all(Option::is_some)), "{reference:?}");
        for flags in [&[][..], &["--prefill-tp", "2", "--batch-tokens", "64", "--draft-tokens", "4"]] {
            let cluster = Cluster::up(&[&["--kv-dtype", dtype], flags].concat()).await;
            assert_eq!(answers(&cluster.client).await, reference, "{dtype} {flags:?}");
            assert_eq!(answers(&cluster.client).await, reference, "{dtype} {flags:?}, prefix hit");
        }
    }
}

/// Goal: over every link blocks in 8 bits arrive as they left, a little more than half the bytes of bf16, and lower tiers give
/// them back. Method: a cache of 64 blocks, so that each prompt has left it when it comes again.
#[tokio::test]
async fn blocks_in_eight_bits_move_as_they_are() {
    let mut bytes = Vec::new();
    for dtype in ["bf16", "int8"] {
        let mut expected = None;
        for link in ["best", "tcp"] {
            let folder = Scratch::new("kv-dtype");
            let worker_flags = flags(&format!("--kv-dtype {dtype} --kv-blocks 64 --kv-link {link}"));
            let tier = ["--kv-disk".to_string(), folder.path().join("prefill").display().to_string()];
            let prefill_flags = Some([worker_flags.clone(), tier.to_vec()].concat());
            let fleet = Fleet::start(&Shape { worker_flags, prefill_flags, ..Shape::default() }).await;
            let texts = ask(&fleet).await;
            assert_eq!(&texts, expected.get_or_insert_with(|| texts.clone()), "{dtype} {link}");
            assert_eq!(ask(&fleet).await, texts, "{dtype} {link}, out of the tier");
            if link == "tcp" {
                bytes.push(bytes_each(&fleet).await);
            }
        }
    }
    assert!(bytes[1] < 0.6 * bytes[0], "{bytes:?}");
}

/// Goal: workers of different dtypes serve, hand nothing to one another, and the decision says what did not fit.
#[tokio::test]
async fn dtypes_that_differ_do_not_pair() {
    let shape = Shape {
        worker_flags: flags("--kv-dtype int8"),
        prefill_flags: Some(flags("--kv-dtype bf16")),
        ..Shape::default()
    };
    let fleet = Fleet::start(&shape).await;
    let line = |i: usize| format!("{i} of them went over the river and {i} stayed. ");
    let reply = fleet.client(0).post(CHAT, &chat(&(0..12).map(line).collect::<String>(), 4)).await.json();
    let id = reply["id"].as_str().expect("an answer").to_string();
    assert_eq!(fleet.metric("prefill-0", "baton_worker_link_transfers_total", "").await, 0.0);
    let explained = fleet.done(&["explain", &id]).await;
    for word in
        ["no prefill worker that can pair is free (prefill-0 is full:", ":bf16 and this is full:", ":int8+bf16)"]
    {
        assert!(explained.contains(word), "{word} is not in {explained}");
    }
}

/// Goal: what a device cannot do is refused before anything starts, and what is unknown as well.
#[test]
fn what_a_device_cannot_keep_is_refused() {
    let refused = |flags: &[&str], reasons: &[&str]| {
        let output = baton(&[&["bench", "engine"], flags].concat());
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{said}");
        assert!(reasons.iter().all(|reason| said.contains(reason)), "{said}");
    };
    refused(&["--device", "cuda", "--kv-dtype", "int8"], &["cuda:0 keeps keys and values in bf16", "--device cpu"]);
    refused(&["--kv-dtype", "int4"], &["int4", "bf16, f32, int8, fp8"]);
}
