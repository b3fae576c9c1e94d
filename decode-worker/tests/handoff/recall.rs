//! The model that ships answers questions about facts that stand hundreds of tokens back, in blocks that another
//! worker computed; and it answers wrongly when the one block that holds the fact is lost.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use baton_engine::testing::{ZeroBlock, request};
use baton_engine::{EngineConfig, LoadOptions};
use baton_worker::{LoadedModel, card};
use serde_json::Value;
use tokenizers::Tokenizer;

use crate::cluster::{Cluster, SIZES};
use crate::gateway::{Gateway, Order};

const QUESTIONS: &str = include_str!("../../../models/baton-3m/recall.jsonl");
/// Enough that one wrong answer in twenty is a whole one.
const ASKED: usize = 20;

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/baton-3m")
}

fn model() -> LoadedModel {
    let loaded = baton_engine::load(&folder(), LoadOptions::default(), &mut |_| {}).unwrap();
    let card = card::read(&folder(), &loaded.spec).unwrap();
    LoadedModel { spec: loaded.spec, backend: Box::new(loaded.model), card }
}

/// A question as the chat template writes it, the block that holds the fact's words, and the answer.
struct Question {
    prompt: Vec<u32>,
    fact_block: usize,
    answer: String,
}

fn questions(tokenizer: &Tokenizer) -> Vec<Question> {
    let parse = |line: &str| {
        let question: Value = serde_json::from_str(line).unwrap();
        let content = question["messages"][0]["content"].as_str().unwrap();
        let (before, after) = ("<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n");
        let encoding = tokenizer.encode(format!("{before}{content}{after}"), false).unwrap();
        // The fact is a sentence; what is asked for are its last words.
        let fact_end = before.len() + question["fact_char_range"][1].as_u64().unwrap() as usize - 2;
        let token = encoding.get_offsets().iter().position(|range| range.1 >= fact_end).unwrap();
        Question {
            prompt: encoding.get_ids().to_vec(),
            fact_block: token / 16,
            answer: question["answer"].as_str().unwrap().to_string(),
        }
    };
    QUESTIONS.lines().take(ASKED).map(parse).collect()
}

/// How many questions a 1P1D cluster answers right. `lost` is told the block to lose before each question.
async fn right(model: impl Fn() -> LoadedModel, lost: &AtomicUsize) -> usize {
    let tokenizer = Tokenizer::from_file(folder().join("tokenizer.json")).unwrap();
    let sizes = EngineConfig { blocks: 512, batch_tokens_max: 256, ..SIZES };
    let cluster = Cluster::of(1, 1, sizes, model).await;
    let mut gateway = Gateway::connect(&cluster, &cluster.decodes[0]).await;
    let mut right = 0;
    for (id, question) in questions(&tokenizer).into_iter().enumerate() {
        lost.store(question.fact_block, Ordering::Relaxed);
        let request = request(id as u128 + 1, &question.prompt, 16);
        let told = gateway.run(&Order::new(request, &cluster.decodes[0], Some(&cluster.prefills[0]))).await;
        assert!(!told.admitted.as_ref().unwrap().local_prefill);
        let text = tokenizer.decode(&told.ids()[&0], true).unwrap();
        right += usize::from(text.trim().starts_with(&question.answer));
    }
    cluster.is_clean().await;
    right
}

fn passes(right: usize) -> bool {
    right * 100 >= ASKED * 95
}

#[tokio::test]
async fn facts_are_recalled_unless_their_block_is_lost() {
    let lost = Arc::new(AtomicUsize::new(0));
    let whole = right(model, &lost).await;
    assert!(passes(whole), "{whole} of {ASKED} answered right");
    let spoiled = || {
        let model = model();
        LoadedModel { backend: Box::new(ZeroBlock { backend: model.backend, block: lost.clone() }), ..model }
    };
    let without = right(spoiled, &lost).await;
    println!("{whole} of {ASKED} answered right, {without} without the fact's block");
    assert!(!passes(without), "{without} of {ASKED} answered right without the fact's block");
}
