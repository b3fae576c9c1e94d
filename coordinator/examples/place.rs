//! What one placement costs: `cargo run --release -p baton-coordinator --example place`. 32 prefill and 32 decode
//! workers with an index of 200,000 blocks; prompts of 1,024 tokens (64 blocks), half of which some worker holds.

use baton_coordinator::placement::{BrokenPairs, Candidate, Load, Policy, Pools, PrefixIndex, Question, place};
use baton_coordinator::state::Model;
use baton_core::{BlockHash, Incarnation, Lane, NumericsClass, Rng, Role, WorkerId};
use tokio::time::Instant;

const WORKERS: u32 = 64;
const ROUNDS: u32 = 20_000;

fn main() {
    let model = Model {
        name: "m".into(),
        card_hash: "c".into(),
        numerics: NumericsClass("n".into()),
        block_tokens: 16,
        positions_max: 1 << 17,
        layout: "l".into(),
        blocks_total: 8192,
        block_bytes: 1 << 20,
        ..Model::default()
    };
    let mut rng = Rng::new(1);
    let ids: Vec<WorkerId> = (0..WORKERS).map(|nth| WorkerId(format!("worker-{nth:02}").into())).collect();
    let prompts: Vec<Vec<BlockHash>> = (0..3_000)
        .map(|nth| BlockHash::chain("", &(nth * 2_000..nth * 2_000 + 1_024).collect::<Vec<u32>>(), 16))
        .collect();
    let mut index = PrefixIndex::new(200_000);
    for (nth, prompt) in (0..).zip(&prompts) {
        let half = if nth % 2 == 0 { 0 } else { prompt.len() };
        index.add(1 + nth % WORKERS, prompt[..half].to_vec());
        index.add(1 + (nth * 7) % WORKERS, prompt[..half].to_vec());
    }
    let loads: Vec<Load> = (0..WORKERS).map(|_| load(&mut rng)).collect();
    let (policy, broken) = (Policy::default(), BrokenPairs::from([(1, 40), (2, 41)]));
    let question = Question {
        model: "m",
        lane: Lane::Interactive,
        prompt_tokens: 1_024,
        tokens_max: 256,
        choices: 1,
        full_prefill: false,
        exclude: &[],
        exclude_pairs: &[],
        numerics: None,
    };
    let (mut looked, mut placed) = (0, 0);
    for prompt in prompts.iter().cycle().take(ROUNDS as usize) {
        let since = Instant::now();
        let hits = index.hits(prompt);
        looked += since.elapsed().as_nanos();
        let since = Instant::now();
        let candidate = |(nth, (worker, load)): (usize, (_, &Load))| Candidate {
            worker,
            index: nth as u32 + 1,
            incarnation: Incarnation(1),
            role: if nth % 2 == 0 { Role::Prefill } else { Role::Decode },
            model: &model,
            address: "10.0.0.1:7000",
            pid: nth as u32,
            load: *load,
            hits: hits.get(&(nth as u32 + 1)).copied().unwrap_or(0),
            suspect: false,
            stuck: false,
            unproven: false,
        };
        let candidates = ids.iter().zip(&loads).enumerate().map(candidate).collect();
        let decision = place(&question, &Pools { candidates, lost: vec![], broken: &broken }, &policy);
        placed += since.elapsed().as_nanos();
        assert!(decision.is_ok());
    }
    let us = |nanos: u128| nanos as f64 / f64::from(ROUNDS) / 1e3;
    println!(
        "{} blocks in the index; prefix look-up {:.2} us, placement {:.2} us",
        index.len(),
        us(looked),
        us(placed)
    );
}

fn load(rng: &mut Rng) -> Load {
    Load {
        blocks_available: 4_000 + rng.below(4_000),
        running: rng.below(64),
        waiting: rng.below(4),
        tokens_waiting: rng.below(8_000),
        prefill_rate: 20_000 + rng.below(20_000),
        step_us: 10_000 + rng.below(20_000),
        age_ms: rng.below(250),
        ..Load::default()
    }
}
