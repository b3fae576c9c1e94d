//! Groups whose ranks are processes: the bits of threads, also handed over and in company; one that is killed ends its group at
//! once, whether it computes or not, and none stays.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::mpsc::sync_channel;
use std::time::Duration;

use baton_engine::testing::{TinyModel, step, work};
use baton_engine::{
    Backend, Cache, Engine, EngineConfig, LoadError, LoadOptions, Loaded, RankOptions, load, load_apart,
};

use crate::common::{CONFIG, dir, prompt};
use crate::tensor_parallel::{ROOMY, answers, said};

/// The program of `examples/rank.rs`, which cargo builds with the tests.
fn program() -> PathBuf {
    let test = std::env::current_exe().expect("a test knows its own path");
    let folder = test.parent().and_then(Path::parent).expect("tests run from target/<profile>/deps");
    let program = folder.join("examples").join("rank");
    assert!(program.exists(), "{} is missing: `cargo test` builds it", program.display());
    program
}

fn apart(model: &Path, ranks: usize) -> Result<Loaded, LoadError> {
    let command = |options: &RankOptions| {
        let RankOptions { rank, ranks, threads, profile, ref memory, .. } = *options;
        let mut command = Command::new(program());
        command.arg(model).args([rank, ranks].map(|n| n.to_string())).arg(memory);
        command.args([threads.to_string(), profile.to_string()]);
        command
    };
    let options = LoadOptions { ranks, threads: ranks, ..LoadOptions::default() };
    load_apart(model, options, None, &command, &mut |_| {})
}

fn written(name: &str, model: &TinyModel) -> PathBuf {
    let dir = dir(&format!("apart-{name}"));
    model.write(&dir, 7).expect("write a model");
    dir
}

fn engine(loaded: &Loaded, config: EngineConfig) -> Engine {
    let arena = loaded.model.arena(loaded.spec.layout, config.blocks).expect("shared memory");
    Engine::over(Cache::of(arena), loaded.spec.clone(), config)
}

fn is_alive(pid: u32) -> bool {
    Path::new(&format!("/proc/{pid}")).exists()
}

#[test]
fn processes_give_the_bits_of_one() {
    for (index, model) in TinyModel::families().iter().enumerate() {
        let path = written(&format!("bits-{index}"), model);
        let mut whole = load(&path, LoadOptions::default(), &mut |_| {}).expect("load");
        let expected = said(&mut whole, ROOMY);
        for ranks in [1, 2, 4] {
            let Ok(mut group) = apart(&path, ranks) else {
                // As with threads: not every model can be cut so.
                assert!(load(&path, LoadOptions { ranks, ..LoadOptions::default() }, &mut |_| {}).is_err());
                continue;
            };
            assert_eq!(group.model.pids().len(), ranks - 1);
            assert_eq!(group.spec, whole.spec);
            for config in [ROOMY, EngineConfig { blocks: 16, batch_tokens_max: 13, ..CONFIG }] {
                let mut engine = engine(&group, config);
                let Loaded { model, spec } = &mut group;
                assert!(answers(&mut engine, model, spec) == expected, "{ranks} ranks, {config:?}");
            }
        }
    }
}

/// Killed in the middle of its work or while nobody computes: whoever has the group is told at once, the step under way
/// panics instead of waiting, and the other processes end with the group.
#[cfg(target_os = "linux")]
#[test]
fn a_killed_process_ends_its_group() {
    let path = written("killed", &TinyModel::llama());
    for (ranks, killed, steps) in [(2, 0, 3), (4, 2, 3), (4, 0, 0)] {
        let mut group = apart(&path, ranks).expect("load");
        let pids = group.model.pids().to_vec();
        let (told, hears) = sync_channel(8);
        group.model.on_broken(Box::new(move || told.try_send(()).unwrap_or_default()));
        let mut engine = engine(&group, ROOMY);
        let Loaded { model, spec } = &mut group;
        let mut asked = baton_engine::testing::request(1, &prompt(1, 20, spec.vocab), 12);
        asked.ignore_eos = true;
        engine.admit(work(&asked)).expect("room");
        let mut events = Vec::new();
        (0..steps).for_each(|_| assert!(step(&mut engine, model, &mut events)));
        let status = Command::new("kill").args(["-9", &pids[killed].to_string()]).status().expect("kill");
        assert!(status.success());
        hears.recv_timeout(Duration::from_secs(30)).expect("told of it");
        let next = catch_unwind(AssertUnwindSafe(|| step(&mut engine, model, &mut events)));
        assert!(next.is_err(), "no step without all ranks");
        drop(group);
        while pids.iter().any(|pid| is_alive(*pid)) {
            std::thread::yield_now();
        }
    }
}

#[test]
fn a_rank_that_cannot_begin_says_why() {
    let path = written("refused", &TinyModel::llama());
    let command = |_: &RankOptions| Command::new("false");
    let options = LoadOptions { ranks: 2, ..LoadOptions::default() };
    let error = load_apart(&path, options, None, &command, &mut |_| {}).err().expect("refused").to_string();
    assert!(error.contains("rank 1") && error.contains("ended while it loaded"), "{error}");
    let command = |options: &RankOptions| {
        let mut command = Command::new(program());
        command.arg("/nowhere").args(["1", "2"]).arg(&options.memory).args(["1", "f32acc"]);
        command
    };
    let error = load_apart(&path, options, None, &command, &mut |_| {}).err().expect("refused").to_string();
    assert!(error.contains("rank 1") && error.contains("/nowhere"), "{error}");
    let error = apart(&path, 3).err().expect("refused").to_string();
    assert!(error.contains("1, 2, 4 and 8 are possible"), "{error}");
}
