//! Where randomness comes from: the operating system, once per process, unless `--seed` fixes it.

use baton_core::Rng;

/// The seed to use; the operating system's entropy when none was asked for.
pub(crate) fn seed(asked: Option<u64>) -> anyhow::Result<u64> {
    match asked {
        Some(seed) => Ok(seed),
        None => Ok(u64::from_le_bytes(drawn()?)),
    }
}

/// An API key's name (4 bytes) and secret (32 bytes).
pub(crate) fn secret() -> anyhow::Result<[u8; 36]> {
    drawn()
}

#[allow(clippy::disallowed_methods)] // The one place that draws from the operating system.
fn drawn<const BYTES: usize>() -> anyhow::Result<[u8; BYTES]> {
    let mut bytes = [0; BYTES];
    getrandom::fill(&mut bytes).map_err(|e| anyhow::anyhow!("the operating system gives no random numbers: {e}"))?;
    Ok(bytes)
}

/// A generator from that seed, which is logged so that a run can be repeated.
pub(crate) fn rng(asked: Option<u64>) -> anyhow::Result<Rng> {
    let seed = seed(asked)?;
    tracing::info!(seed, "random seed");
    Ok(Rng::new(seed))
}
