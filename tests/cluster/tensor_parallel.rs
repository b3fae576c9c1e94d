//! Workers whose model is shared by tensor-parallel ranks: the bytes of workers without, whatever the ranks of prefill and
//! decode, and with workers killed meanwhile; numbers of ranks that a model does not allow are refused.

use baton_tests::Cluster;
use baton_tests::cluster::{Scratch, baton, signal, wait_for};

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

#[test]
fn ranks_that_do_not_divide_the_model_are_refused() {
    let data = Scratch::new("ranks");
    let output = baton(&["up", "--port", "0", "--tp", "3", "--data", &data.path().display().to_string()]);
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{said}");
    assert!(said.contains("3 tensor-parallel ranks cannot share this model") && said.contains("--tp"), "{said}");
}
