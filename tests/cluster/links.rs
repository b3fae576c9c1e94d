//! Links that workers choose: handoffs over UCX and under TLS bring the same bytes, and workers that do not trust one another do without.

use std::path::Path;

use baton_tests::cluster::{Scratch, baton, wait_for};
use baton_tests::{Fleet, Shape};
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair, date_time_ymd};

use crate::serving::{CHAT, chat};

const PROMPTS: usize = 3;

/// What prompts of some twenty blocks are answered.
async fn ask(fleet: &Fleet) -> Vec<String> {
    let mut texts = Vec::new();
    for number in 0..PROMPTS {
        let line = |i: usize| format!("{number} times {i} and the {i}th of them went down to the river. ");
        let prompt = chat(&(0..6).map(line).collect::<String>(), 6);
        let reply = fleet.client(0).post(CHAT, &prompt).await.json();
        texts.push(reply["choices"][0]["message"]["content"].as_str().expect("an answer").to_string());
    }
    texts
}

fn shape(flags: &[String]) -> Shape {
    Shape { worker_flags: flags.to_vec(), ..Shape::default() }
}

fn flags(text: &str) -> Vec<String> {
    text.split_whitespace().map(str::to_string).collect()
}

async fn handoffs(fleet: &Fleet, link: &str) -> f64 {
    fleet.metric("prefill-0", "baton_worker_link_transfers_total", &format!("link=\"{link}\"")).await
}

/// Signs workers' certificates, as files.
struct Authority<'a> {
    issuer: Issuer<'static, KeyPair>,
    folder: &'a Path,
    name: &'a str,
}

impl<'a> Authority<'a> {
    fn new(folder: &'a Path, name: &'a str) -> Authority<'a> {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().expect("a key");
        let certificate = params.self_signed(&key).expect("a certificate");
        std::fs::write(folder.join(format!("{name}.pem")), certificate.pem()).expect("written");
        Authority { issuer: Issuer::new(params, key), folder, name }
    }

    /// The flags of a worker of this host with a certificate that is valid until the year.
    fn worker(&self, until: i32) -> Vec<String> {
        let mut params = CertificateParams::new(["127.0.0.1".to_string()]).expect("a host");
        params.not_after = date_time_ymd(until, 1, 1);
        let key = KeyPair::generate().expect("a key");
        let certificate = params.signed_by(&key, &self.issuer).expect("a certificate");
        let path = |what: &str| self.folder.join(format!("{}-{until}.{what}", self.name));
        std::fs::write(path("pem"), certificate.pem()).expect("written");
        std::fs::write(path("key"), key.serialize_pem()).expect("written");
        let ca = self.folder.join(format!("{}.pem", self.name));
        let (certificate, key) = (path("pem"), path("key"));
        flags(&format!(
            "--kv-link tcp --kv-tls-ca {} --kv-tls-cert {} --kv-tls-key {}",
            ca.display(),
            certificate.display(),
            key.display()
        ))
    }
}

/// Goal: the bytes of an answer do not depend on the link. Method: the same prompts over shared memory, over UCX where the
/// library is, and over tcp with and without TLS; metrics and status name the link.
#[tokio::test]
async fn every_link_brings_the_same_bytes() {
    let folder = Scratch::new("tls");
    let authority = Authority::new(folder.path(), "ours");
    let best = Fleet::start(&shape(&[])).await;
    let expected = ask(&best).await;
    assert!(handoffs(&best, "shm").await > 0.0);
    drop(best);
    let doctor = String::from_utf8_lossy(&baton(&["doctor"]).stdout).into_owned();
    let ucx = doctor.lines().find_map(|line| line.strip_prefix("ucx")).expect("a line on UCX").trim().to_string();
    let mut links = vec![("tcp", flags("--kv-link tcp")), ("tls", authority.worker(4000))];
    match ucx.starts_with("UCX") {
        true => links.push(("ucx", flags("--kv-link ucx"))),
        false => println!("UCX is skipped: {ucx}"),
    }
    for (link, flags) in links {
        let fleet = Fleet::start(&shape(&flags)).await;
        assert_eq!(ask(&fleet).await, expected, "{link}");
        assert!(handoffs(&fleet, link).await > 0.0, "{link}");
        wait_for("the link in the status", || async {
            let status = fleet.status().await?;
            let prefill = status["workers"].as_array()?.iter().find(|worker| worker["id"] == "prefill-0")?;
            prefill["links"].as_str()?.contains(&format!("up: {link} 1")).then_some(())
        })
        .await;
    }
}

/// Goal: workers whose blocks have different sizes pair, hand off, and answer the same bytes. Method: the same prompts with blocks of 16
/// and of 32 tokens, in both directions, over shared memory and over tcp.
#[tokio::test]
async fn blocks_of_other_sizes_bring_the_same_bytes() {
    let alike = Fleet::start(&shape(&[])).await;
    let expected = ask(&alike).await;
    drop(alike);
    for (prefill, decode, link) in [("16", "32", "shm"), ("32", "16", "tcp")] {
        let way = if link == "tcp" { "--kv-link tcp " } else { "" };
        let of = |tokens: &str| flags(&format!("{way}--kv-block-tokens {tokens}"));
        let shape = Shape { worker_flags: of(decode), prefill_flags: Some(of(prefill)), ..Shape::default() };
        let fleet = Fleet::start(&shape).await;
        assert_eq!(ask(&fleet).await, expected, "{prefill} to {decode}");
        assert!(handoffs(&fleet, link).await >= PROMPTS as f64, "{prefill} to {decode} over {link}");
    }
}

/// Goal: a worker whose certificate is no good, or that has none, moves no block, costs no answer, and shows why. Method: the
/// decode worker has a good certificate, the prefill worker each time another one.
#[tokio::test]
async fn who_is_not_trusted_hands_nothing_off() {
    let folder = Scratch::new("tls");
    let (ours, theirs) = (Authority::new(folder.path(), "ours"), Authority::new(folder.path(), "theirs"));
    let cases = [
        (theirs.worker(4000), "sender", "unknown_authority"),
        (ours.worker(2001), "receiver", "expired"),
        (flags("--kv-link tcp"), "receiver", "no_tls"),
    ];
    for (prefill, end, reason) in cases {
        let shape = Shape { worker_flags: ours.worker(4000), prefill_flags: Some(prefill), ..Shape::default() };
        let fleet = Fleet::start(&shape).await;
        assert!(ask(&fleet).await.iter().all(|text| !text.is_empty()), "{reason}");
        let id = if end == "sender" { "prefill-0" } else { "decode-0" };
        let labels = format!("end=\"{end}\",reason=\"{reason}\"");
        wait_for("the reason in the metrics", || async {
            (fleet.metric(id, "baton_worker_link_untrusted_total", &labels).await > 0.0).then_some(())
        })
        .await;
        assert_eq!(handoffs(&fleet, "tls").await + handoffs(&fleet, "tcp").await, 0.0, "{reason}");
    }
}
