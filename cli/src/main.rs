//! The binary `baton`. The only reader of flags and environment, the only one that installs signal handlers, logs and
//! the metrics recorder, and the only one that ends the process.
#![deny(clippy::print_stdout, reason = "standard output may be closed: out::say")]

mod access;
mod admin;
mod allocator;
mod args;
mod bench;
mod chat;
mod device;
mod doctor;
mod event;
mod exit;
mod explain;
mod http;
mod log;
mod model;
mod order;
mod out;
mod process;
mod role;
mod scale;
mod seed;
mod setting;
mod sim;
mod status;
mod surroundings;
mod table;
mod up;

use std::process::ExitCode;

use clap::Parser;

use crate::args::{Arguments, Command};
use crate::exit::Failure;

fn main() -> ExitCode {
    match run(Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            eprintln!("baton: {failure}");
            ExitCode::from(failure.code)
        }
    }
}

fn run(Arguments { log, command }: Arguments) -> Result<(), Failure> {
    log.install(if command.is_role() { log::ROLE } else { log::QUIET }).map_err(Failure::refused)?;
    match command {
        Command::Up(flags) => up::run(flags, &log),
        Command::Status(flags) => status::run(flags),
        Command::Scale(flags) => scale::run(flags),
        Command::Drain(flags) => order::drain(flags),
        Command::Role(flags) => order::change(flags),
        Command::Explain(flags) => explain::run(flags),
        Command::Tenant(command) => access::run_tenant(command),
        Command::Key(command) => access::run_key(command),
        Command::Setting(command) => setting::run(command),
        Command::Chat(flags) => chat::run(flags),
        Command::Bench(bench) => bench::run(bench),
        Command::Sim(command) => sim::run(command),
        Command::Doctor(flags) => doctor::run(flags),
        Command::Coordinator(flags) => role::coordinator::run(flags),
        Command::PrefillWorker(flags) => role::worker::run(flags, baton_core::Role::Prefill),
        Command::DecodeWorker(flags) => role::worker::run(flags, baton_core::Role::Decode),
        Command::Gateway(flags) => role::gateway::run(flags),
        Command::Rank(flags) => role::rank::run(flags),
    }
}
