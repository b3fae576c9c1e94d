//! `baton bench engine`: prefill and decode in this process.
#[derive(clap::Args, Debug)]
pub(crate) struct EngineFlags {}
pub(crate) fn run(_: EngineFlags) -> Result<(), crate::exit::Failure> { Ok(()) }
