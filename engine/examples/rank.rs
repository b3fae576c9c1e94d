//! One rank of a tensor-parallel group as a process of its own, for the tests of such groups; `baton rank` is the one of workers.
//!
//! usage: rank MODEL RANK RANKS MEMORY THREADS PROFILE

use std::error::Error;
use std::path::Path;

use baton_engine::RankOptions;
use baton_engine::ranks::process::serve;
use baton_kernels::Profile;

fn main() -> Result<(), Box<dyn Error>> {
    let given: Vec<String> = std::env::args().skip(1).collect();
    let [model, rank, ranks, memory, threads, profile] = &given[..] else {
        return Err("usage: rank MODEL RANK RANKS MEMORY THREADS PROFILE".into());
    };
    let profile = [Profile::F32Acc, Profile::Bf16Dp].into_iter().find(|known| known.as_str() == profile);
    let options = RankOptions {
        rank: rank.parse()?,
        ranks: ranks.parse()?,
        memory: memory.into(),
        threads: threads.parse()?,
        profile: profile.ok_or("no such profile")?,
        quantize: None,
        kept: None,
    };
    Ok(serve(Path::new(model), &options, std::io::stdin().lock(), std::io::stdout())?)
}
