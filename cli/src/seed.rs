//! Where randomness comes from: the operating system, once per process, unless `--seed` fixes it.

use baton_core::Rng;

/// The seed to use; the operating system's entropy when none was asked for.
#[allow(clippy::disallowed_methods)] // The one place that draws the seed.
pub(crate) fn seed(asked: Option<u64>) -> anyhow::Result<u64> {
    if let Some(seed) = asked {
        return Ok(seed);
    }
    let mut bytes = [0; 8];
    getrandom::fill(&mut bytes).map_err(|e| anyhow::anyhow!("the operating system gives no random numbers: {e}"))?;
    Ok(u64::from_le_bytes(bytes))
}

/// A generator from that seed, which is logged so that a run can be repeated.
pub(crate) fn rng(asked: Option<u64>) -> anyhow::Result<Rng> {
    let seed = seed(asked)?;
    tracing::info!(seed, "random seed");
    Ok(Rng::new(seed))
}
