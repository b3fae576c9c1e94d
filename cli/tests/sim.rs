//! The simulator as a person uses it: the same seed is the same run in two processes, seeds hold, bad input is refused.

use std::process::{Command, Output};

fn sim(args: &[&str]) -> Output {
    let command = Command::new(env!("CARGO_BIN_EXE_baton")).args(["--log", "off", "sim"]).args(args).output();
    command.expect("the binary runs")
}

fn holds(args: &[&str]) {
    let output = sim(args);
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{args:?}: {text}{}", String::from_utf8_lossy(&output.stdout));
}

/// Goal: nothing below means anything unless a seed repeats. Method: two processes, all that hosts did, to the microsecond.
#[test]
fn a_seed_is_the_same_run_in_two_processes() {
    holds(&["meta", "--seeds", "0..8"]);
    holds(&["meta", "--seeds", "8..12", "--profile", "members"]);
}

#[test]
fn clusters_without_faults_hold() {
    holds(&["faults", "--seeds", "0..20", "--profile", "calm"]);
}

#[test]
fn clusters_under_faults_hold() {
    holds(&["faults", "--seeds", "0..200"]);
}

#[test]
fn groups_of_coordinators_that_change_hold() {
    holds(&["faults", "--seeds", "0..40", "--profile", "members"]);
}

/// Each of these plans once failed, here or elsewhere, over what its name says, and holds.
#[test]
fn kept_runs_hold() {
    holds(&["scenarios"]);
}

#[test]
fn bad_input_is_refused_with_what_is_wrong() {
    let check = |args: &[&str], expected: &str| {
        let output = sim(args);
        let text = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.code() == Some(2) && text.contains(expected), "{args:?}: {:?} {text}", output.status);
    };
    check(&["faults", "--seed", "1", "--profile", "wild"], "no profile is named \"wild\"");
    check(&["faults", "--seeds", "5..5"], "holds no seed");
    check(&["faults", "--plan", "/nonexistent"], "/nonexistent");
    check(&["shrink", "--seed", "1", "--profile", "calm"], "nothing to make smaller");
    check(&["planted"], "--features planted");
    check(&["faults", "--seed", "1", "--bug", "SkipChecksum"], "--features planted");
    check(&["scenarios", "--only", "of_no_such_name"], "no kept run");
}
