//! `baton sim`: the production code of a whole cluster in one process, on a simulated network and disk, under faults that
//! follow from a seed.

use std::io::{Read, Write};
use std::ops::Range;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::str::FromStr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Mutex, PoisonError};

use anyhow::Context;
use baton_core::planted::Bug;
use baton_sim::{Plan, Profile, Report, Violation, planted as hunting, scenario};
use clap::{Args, Subcommand};
use tokio::time::{Duration, Instant};

use crate::allocator;
use crate::bench::figure::{self, Figure};
use crate::exit::Failure;
use crate::out::say;
use crate::surroundings;

/// What to do with simulated clusters.
#[derive(Debug, Subcommand)]
pub(crate) enum Sim {
    /// Run clusters under faults and check what must hold
    Faults(FaultsFlags),
    /// Check that a seed gives the same run in two processes
    Meta(MetaFlags),
    /// Make a failing plan smaller, to the faults that matter
    Shrink(ShrinkFlags),
    /// Print a run as a timeline
    Show(ShowFlags),
    /// Find each bug on purpose (only in a build with the feature `planted`)
    Planted(PlantedFlags),
    /// Run the kept plans; in a build with the feature `planted`, each once more with the bug that makes it fail
    Scenarios(ScenariosFlags),
}

/// Which run.
#[derive(Args, Debug)]
struct RunFlags {
    /// Everything of a run follows from it: hosts, requests, faults
    #[arg(long, value_name = "N", required_unless_present = "plan")]
    seed: Option<u64>,
    /// Which faults are drawn: swarm, calm, network, crash, disk, operator, members, handoff
    #[arg(long, value_name = "NAME", default_value = "swarm")]
    profile: String,
    /// Run a saved plan instead
    #[arg(long, value_name = "FILE", conflicts_with = "seed")]
    plan: Option<PathBuf>,
    #[command(flatten)]
    bug: BugFlag,
}

/// A bug on purpose.
#[derive(Args, Clone, Debug)]
struct BugFlag {
    /// With this bug on purpose (only in a build with the feature `planted`)
    #[arg(long, value_name = "NAME")]
    bug: Option<String>,
}

impl BugFlag {
    /// Puts it into this process.
    fn plant(&self) -> Result<(), Failure> {
        self.bug.iter().try_for_each(|name| hunting::plant(name)).map_err(Failure::refused)
    }

    /// The flag that names it again.
    fn again(&self) -> String {
        self.bug.as_ref().map_or_else(String::new, |name| format!(" --bug {name}"))
    }
}

/// Run seeds; a failing one is printed with the command that repeats it.
#[derive(Args, Debug)]
#[command(
    after_help = "Exit codes:\n  0  everything held\n  1  something did not\n  2  bad flags or an unreadable plan"
)]
pub(crate) struct FaultsFlags {
    /// One seed
    #[arg(long, value_name = "N", conflicts_with_all = ["seeds", "plan"], required_unless_present_any = ["seeds", "plan"])]
    seed: Option<u64>,
    /// Seeds from A up to, not including, B
    #[arg(long, value_name = "A..B", conflicts_with = "plan")]
    seeds: Option<Seeds>,
    /// Which faults are drawn: swarm, calm, network, crash, disk, operator, members, handoff
    #[arg(long, value_name = "NAME", default_value = "swarm")]
    profile: String,
    /// Run a saved plan; - reads it from the standard input
    #[arg(long, value_name = "FILE")]
    plan: Option<PathBuf>,
    /// Save the plan of the seed
    #[arg(long, value_name = "FILE", conflicts_with_all = ["seeds", "plan"])]
    save: Option<PathBuf>,
    /// Begin no further seed after so many minutes
    #[arg(long, value_name = "M")]
    minutes: Option<u64>,
    /// Runs at a time [default: all cores]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=256))]
    threads: Option<u32>,
    /// Print each run's report as one JSON object
    #[arg(long)]
    reports: bool,
    #[command(flatten)]
    bug: BugFlag,
    /// Print figures as JSON, an object a line
    #[arg(long)]
    json: bool,
}

/// Run each seed in two processes and compare all that hosts did and sent, to the microsecond.
#[derive(Args, Debug)]
pub(crate) struct MetaFlags {
    /// One seed
    #[arg(long, value_name = "N", conflicts_with = "seeds", required_unless_present = "seeds")]
    seed: Option<u64>,
    /// Seeds from A up to, not including, B
    #[arg(long, value_name = "A..B")]
    seeds: Option<Seeds>,
    /// Which faults are drawn
    #[arg(long, value_name = "NAME", default_value = "swarm")]
    profile: String,
    /// Print figures as JSON, an object a line
    #[arg(long)]
    json: bool,
}

/// Leave faults out, and shorten them, while the same invariant fails.
#[derive(Args, Debug)]
pub(crate) struct ShrinkFlags {
    #[command(flatten)]
    run: RunFlags,
    /// Save the smaller plan
    #[arg(long, value_name = "FILE")]
    save: Option<PathBuf>,
}

/// Print what happened in a run: requests, assignments and their epochs, blocks on their way, lives of hosts, leaders, faults.
#[derive(Args, Debug)]
pub(crate) struct ShowFlags {
    #[command(flatten)]
    run: RunFlags,
    /// Write an HTML page of it
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
    /// Show what the network did, too
    #[arg(long)]
    network: bool,
}

/// Run seeds with one bug on purpose at a time until it is found.
#[derive(Args, Debug)]
pub(crate) struct PlantedFlags {
    /// Which faults are drawn [default: for each bug the profile most likely to bring it out]
    #[arg(long, value_name = "NAME")]
    profile: Option<String>,
    /// Seeds to try for each bug
    #[arg(long, value_name = "N", default_value_t = 500)]
    seeds: u64,
    /// Only bugs whose name contains this
    #[arg(long, value_name = "TEXT", default_value = "")]
    only: String,
    /// Print figures as JSON, an object a line
    #[arg(long)]
    json: bool,
}

/// Run the failures that are kept by name: each must hold, and fail with its bug on purpose.
#[derive(Args, Debug)]
pub(crate) struct ScenariosFlags {
    /// Only those whose name contains this
    #[arg(long, value_name = "TEXT", default_value = "")]
    only: String,
    /// Print figures as JSON, an object a line
    #[arg(long)]
    json: bool,
}

/// A range of seeds that is not empty.
#[derive(Clone, Debug)]
struct Seeds(Range<u64>);

impl FromStr for Seeds {
    type Err = String;

    fn from_str(text: &str) -> Result<Seeds, String> {
        let (from, to) = text.split_once("..").ok_or("a range of seeds is A..B")?;
        let number = |text: &str| text.parse::<u64>().map_err(|_| format!("{text:?} is not a seed"));
        let range = number(from)?..number(to)?;
        match range.is_empty() {
            true => Err(format!("{text} holds no seed: B is not above A")),
            false => Ok(Seeds(range)),
        }
    }
}

pub(crate) fn run(sim: Sim) -> Result<(), Failure> {
    allocator::expect_many_small_pieces();
    match sim {
        Sim::Faults(flags) => faults(flags),
        Sim::Meta(flags) => meta(flags),
        Sim::Shrink(flags) => shrink(flags),
        Sim::Show(flags) => show(flags),
        Sim::Planted(flags) => planted(flags),
        Sim::Scenarios(flags) => scenarios(flags),
    }
}

fn profile(name: &str) -> Result<Profile, Failure> {
    Profile::named(name).map_err(Failure::refused)
}

fn read(path: &PathBuf) -> Result<Plan, Failure> {
    let text = match path.as_os_str() == "-" {
        true => std::io::read_to_string(std::io::stdin()),
        false => std::fs::read_to_string(path),
    };
    let text = text.with_context(|| format!("read {}", path.display()));
    Plan::read(&text.map_err(Failure::refused)?).map_err(Failure::refused)
}

fn save(path: &PathBuf, plan: &Plan) -> Result<(), Failure> {
    let written = std::fs::write(path, plan.text()).with_context(|| format!("write {}", path.display()));
    written.map_err(Failure::refused)
}

impl RunFlags {
    fn plan(&self) -> Result<Plan, Failure> {
        match (&self.plan, self.seed) {
            (Some(path), _) => read(path),
            (None, Some(seed)) => Ok(Plan::draw(seed, &profile(&self.profile)?)),
            (None, None) => Err(Failure::refuse("name a seed with --seed, or a plan with --plan")),
        }
    }

    /// The flags that name this run again.
    fn again(&self) -> String {
        match (&self.plan, self.seed) {
            (None, Some(seed)) => format!("--seed {seed} --profile {}{}", self.profile, self.bug.again()),
            (plan, _) => format!("--plan {}{}", plan.clone().unwrap_or_default().display(), self.bug.again()),
        }
    }
}

/// One seed or a range.
fn range(seed: Option<u64>, seeds: Option<Seeds>) -> Range<u64> {
    match (seed, seeds) {
        (_, Some(Seeds(range))) => range,
        (seed, None) => seed.map_or(0..0, |seed| seed..seed.saturating_add(1)),
    }
}

fn faults(flags: FaultsFlags) -> Result<(), Failure> {
    let (profile, since) = (profile(&flags.profile)?, Instant::now());
    flags.bug.plant()?;
    if let Some(path) = &flags.plan {
        let report = baton_sim::run(&read(path)?);
        tell(&flags, &report, &format!("--plan {}", path.display()));
        return end(&flags, 1, u64::from(report.violation.is_some()), since);
    }
    if let Some(seed) = flags.seed {
        let plan = Plan::draw(seed, &profile);
        flags.save.iter().try_for_each(|path| save(path, &plan))?;
        let report = baton_sim::run(&plan);
        tell(&flags, &report, &format!("--seed {seed} --profile {}", profile.name));
        return end(&flags, 1, u64::from(report.violation.is_some()), since);
    }
    let seeds = range(flags.seed, flags.seeds.clone());
    let next = AtomicU64::new(seeds.start);
    let (ran, failed, printing) = (AtomicU64::new(0), AtomicU64::new(0), Mutex::new(()));
    let until = flags.minutes.map(|minutes| since + Duration::from_secs(60 * minutes));
    let threads = flags.threads.map_or_else(surroundings::cores, |threads| threads as usize);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= seeds.end || until.is_some_and(|until| Instant::now() >= until) {
                        return;
                    }
                    let result = apart(&Plan::draw(seed, &profile), &flags.bug);
                    let fails = result.as_ref().map_or(true, |report| report.violation.is_some());
                    ran.fetch_add(1, Ordering::Relaxed);
                    failed.fetch_add(u64::from(fails), Ordering::Relaxed);
                    let _one_at_a_time = printing.lock();
                    match result {
                        Ok(report) => tell(&flags, &report, &format!("--seed {seed} --profile {}", profile.name)),
                        Err(error) => eprintln!("seed {seed}: {error}"),
                    }
                }
            });
        }
    });
    end(&flags, ran.into_inner(), failed.into_inner(), since)
}

/// A run takes less than a second of its core. One that takes so long goes round in a circle.
const STUCK: Duration = Duration::from_secs(180);

/// Runs a plan in a process of its own: what one run leaves behind in its process must not reach the next.
fn apart(plan: &Plan, bug: &BugFlag) -> Result<Report, Failure> {
    let binary = std::env::current_exe().context("find this binary")?;
    let mut child = Command::new(binary)
        .args(["--log", "off", "sim", "faults", "--reports", "--plan", "-"])
        .args(bug.bug.iter().flat_map(|name| ["--bug", name]))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .context("run this binary")?;
    let mut stdin = child.stdin.take().context("the run's standard input")?;
    stdin.write_all(plan.text().as_bytes()).context("hand the plan over")?;
    drop(stdin);
    let mut stdout = child.stdout.take().context("the run's standard output")?;
    let (done, over) = mpsc::sync_channel::<()>(1);
    let (child, mut text) = (Mutex::new(child), Vec::new());
    let watched = &child;
    let (read, stuck) = std::thread::scope(|scope| {
        let watch = scope.spawn(move || {
            let stuck = over.recv_timeout(STUCK) == Err(RecvTimeoutError::Timeout);
            if stuck {
                let _ = watched.lock().unwrap_or_else(PoisonError::into_inner).kill();
            }
            stuck
        });
        let read = stdout.read_to_end(&mut text);
        drop(done);
        (read, watch.join().unwrap_or(false))
    });
    child.into_inner().unwrap_or_else(PoisonError::into_inner).wait().context("wait for the run")?;
    if stuck {
        return Ok(Report::stuck(plan, STUCK));
    }
    read.context("read the run's report")?;
    serde_json::from_slice(&text).context("the run ended without a report").map_err(Failure::from)
}

/// Prints what a run's report says: all of it if asked for, else what failed.
fn tell(flags: &FaultsFlags, report: &Report, again: &str) {
    let again = format!("{again}{}", flags.bug.again());
    if flags.reports {
        say!("{}\n", serde_json::to_string(report).expect("a report is plain data"));
    } else if report.violation.is_some() {
        eprint!("{}", baton_sim::show::summary(report));
        eprintln!(
            "repeat: baton sim faults {again}\nshrink: baton sim shrink {again}\nread:   baton sim show {again}\n"
        );
    } else if flags.seed.is_some() && !flags.json {
        say!("{}", baton_sim::show::summary(report));
    }
}

fn end(flags: &FaultsFlags, ran: u64, failed: u64, since: Instant) -> Result<(), Failure> {
    let seconds = since.elapsed().as_secs_f64();
    if flags.json {
        figure::print(&[
            Figure::new("sim_seeds", ran as f64, "seeds"),
            Figure { ok: failed == 0, target: Some(0.0), ..Figure::new("sim_seeds_failed", failed as f64, "seeds") },
            Figure::new("sim_seeds_per_s", ran as f64 / seconds, "seeds/s"),
        ]);
    } else if !flags.reports {
        say!("{ran} seeds in {seconds:.1} s, {failed} failed\n");
    }
    match failed {
        0 => Ok(()),
        _ => Err(anyhow::anyhow!("{failed} of {ran} seeds failed").into()),
    }
}

fn meta(flags: MetaFlags) -> Result<(), Failure> {
    profile(&flags.profile)?;
    let seeds = range(flags.seed, flags.seeds.clone());
    let [first, second] = [reports(&flags, &seeds)?, reports(&flags, &seeds)?];
    let (first, second) = (sorted(&first), sorted(&second));
    if first.len() as u64 != seeds.end - seeds.start || first.len() != second.len() {
        return Err(anyhow::anyhow!("a process ended early: {} and {} reports", first.len(), second.len()).into());
    }
    let differ: Vec<&String> = first.iter().zip(&second).filter(|(a, b)| a != b).map(|(a, _)| a).collect();
    for report in &differ {
        eprintln!("not the same in another process: {report}");
    }
    let same = (first.len() - differ.len()) as f64;
    match flags.json {
        true => figure::print(&[Figure::at_least("sim_seeds_that_repeat", same, "seeds", first.len() as f64)]),
        false => say!("{same} of {} seeds are the same run in two processes\n", first.len()),
    }
    match differ.is_empty() {
        true => Ok(()),
        false => Err(anyhow::anyhow!("{} seeds do not repeat", differ.len()).into()),
    }
}

/// The reports of a process of its own.
fn reports(flags: &MetaFlags, seeds: &Range<u64>) -> Result<String, Failure> {
    let binary = std::env::current_exe().context("find this binary")?;
    let seeds = format!("{}..{}", seeds.start, seeds.end);
    let args = ["sim", "faults", "--reports", "--seeds", &seeds, "--profile", &flags.profile];
    let output = Command::new(binary).args(args).stderr(Stdio::null()).output().context("run this binary")?;
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Lines in an order that does not depend on which thread was done first.
fn sorted(reports: &str) -> Vec<String> {
    let mut lines: Vec<String> = reports.lines().map(str::to_string).collect();
    lines.sort();
    lines
}

fn shrink(flags: ShrinkFlags) -> Result<(), Failure> {
    let (plan, since) = (flags.run.plan()?, Instant::now());
    flags.run.bug.plant()?;
    let Some(shrunk) = baton_sim::shrink::shrink(&plan, |plan| apart(plan, &flags.run.bug))? else {
        return Err(Failure::refuse(format!("{} does not fail: nothing to make smaller", flags.run.again())));
    };
    let (before, after) = (plan.faults.len(), shrunk.plan.faults.len());
    if let Some(path) = &flags.save {
        save(path, &shrunk.plan)?;
    }
    say!("{before} faults became {after} in {} runs, {:.1} s\n", shrunk.runs, since.elapsed().as_secs_f64());
    say!("{}", baton_sim::show::summary(&shrunk.report));
    say!("{}\n", shrunk.plan.text());
    if let Some(path) = &flags.save {
        let again = format!("--plan {}{}", path.display(), flags.run.bug.again());
        say!("repeat: baton sim faults {again}\nread:   baton sim show {again}\n");
    }
    Ok(())
}

fn show(flags: ShowFlags) -> Result<(), Failure> {
    flags.run.bug.plant()?;
    let detail = if flags.network { baton_sim::Detail::Network } else { baton_sim::Detail::Story };
    let report = baton_sim::run_with(&flags.run.plan()?, detail);
    say!("{}", baton_sim::show::text(&report));
    if let Some(path) = &flags.html {
        std::fs::write(path, baton_sim::show::html(&report)).with_context(|| format!("write {}", path.display()))?;
        say!("written to {}\n", path.display());
    }
    match report.violation {
        None => Ok(()),
        Some(violation) => Err(anyhow::anyhow!("{} does not hold", violation.invariant).into()),
    }
}

fn planted(flags: PlantedFlags) -> Result<(), Failure> {
    flags.profile.as_ref().map_or(Ok(()), |name| profile(name).map(drop))?;
    hunting::possible().map_err(Failure::refused)?;
    let mut counts = Vec::new();
    let mut missed = 0;
    for bug in Bug::ALL.iter().filter(|bug| format!("{bug:?}").contains(&flags.only)) {
        let profile = profile(flags.profile.as_deref().unwrap_or_else(|| hunting::profile_of(*bug)))?;
        let flag = BugFlag { bug: Some(format!("{bug:?}")) };
        let hunt = hunting::hunt(&profile, flags.seeds, |plan| apart(plan, &flag))?;
        missed += usize::from(hunt.found.is_none());
        counts.push(hunt.seeds);
        match (flags.json, hunt.found) {
            (true, found) => {
                let name = format!("sim_planted_{bug:?}");
                let figure = Figure { ok: found.is_some(), ..Figure::new(name, hunt.seeds as f64, "seeds") };
                figure::print(&[Figure { target: Some(flags.seeds as f64), ..figure }]);
            }
            (false, Some((seed, Violation { invariant, what, .. }))) => {
                say!("{:<18} {:<8} seed {seed:<4} {invariant}: {what}\n", format!("{bug:?}"), profile.name);
            }
            (false, None) => {
                say!("{:<18} {:<8} not found in {} seeds\n", format!("{bug:?}"), profile.name, hunt.seeds);
            }
        }
    }
    counts.sort_unstable();
    match (counts.get(counts.len() / 2), flags.json) {
        (None, _) => return Err(Failure::refuse(format!("no planted bug has {:?} in its name", flags.only))),
        (Some(median), true) => figure::print(&[Figure::new("sim_planted_median", *median as f64, "seeds")]),
        (Some(median), false) => say!("{} bugs, {missed} not found, median {median} seeds\n", counts.len()),
    }
    match missed {
        0 => Ok(()),
        _ => Err(anyhow::anyhow!("{missed} planted bugs were not found").into()),
    }
}

fn scenarios(flags: ScenariosFlags) -> Result<(), Failure> {
    let with_bugs = hunting::possible().is_ok();
    let (mut ran, mut wrong) = (0, 0);
    for scenario in scenario::ALL.iter().filter(|scenario| scenario.name.contains(&flags.only)) {
        let plan = scenario.plan();
        let mut verdicts = vec![("holds", apart(&plan, &BugFlag { bug: None })?.violation.is_none())];
        if let Some(bug) = scenario.bug.filter(|_| with_bugs) {
            let bug = BugFlag { bug: Some(format!("{bug:?}")) };
            verdicts.push(("fails with its bug", apart(&plan, &bug)?.violation.is_some()));
        }
        ran += 1;
        wrong += u32::from(verdicts.iter().any(|(_, so)| !so));
        if !flags.json {
            let verdicts: Vec<String> =
                verdicts.iter().map(|(what, so)| format!("{what}: {}", if *so { "yes" } else { "NO" })).collect();
            say!("{:<45} {} ({})\n", scenario.name, verdicts.join(", "), scenario.about);
        }
    }
    if flags.json {
        figure::print(&[
            Figure::new("sim_scenarios", f64::from(ran), "scenarios"),
            Figure {
                ok: wrong == 0,
                target: Some(0.0),
                ..Figure::new("sim_scenarios_wrong", f64::from(wrong), "scenarios")
            },
        ]);
    }
    match (ran, wrong) {
        (0, _) => Err(Failure::refuse(format!("no kept run has {:?} in its name", flags.only))),
        (_, 0) => Ok(()),
        _ => Err(anyhow::anyhow!("{wrong} of {ran} kept runs are not as they should be").into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_of_seeds_holds_one_at_least() {
        let check = |text: &str, expected: Result<Range<u64>, &str>| match (text.parse::<Seeds>(), expected) {
            (Ok(Seeds(range)), Ok(expected)) => assert_eq!(range, expected),
            (Err(error), Err(expected)) => assert!(error.contains(expected), "{error}"),
            (result, _) => panic!("{text}: {result:?}"),
        };
        check("3..7", Ok(3..7));
        check("3..3", Err("holds no seed"));
        check("7..3", Err("holds no seed"));
        check("3-7", Err("A..B"));
        check("a..3", Err("not a seed"));
    }
}
