//! Rules of the house that a machine can check: arrows between crates, what each crate must never hold, words that the
//! glossary leaves out, and the size of files. A new arrow is a design change: it edits ARROWS in a commit of its own.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

/// Who may import whom. Assembly (cli, sim, tests) may know everything and is imported by nobody.
const ARROWS: &[(&str, &[&str])] = &[
    ("core", &[]),
    ("proto", &["core"]),
    ("kernels", &["core"]),
    ("ucx-sys", &[]),
    ("kvtransfer", &["core", "ucx-sys"]),
    ("engine", &["core", "kernels"]),
    ("coordinator", &["core", "proto"]),
    ("gateway", &["core", "proto"]),
    ("worker", &["core", "proto", "engine", "kvtransfer"]),
    ("prefill-worker", &["core", "proto", "engine", "kvtransfer", "worker"]),
    ("decode-worker", &["core", "proto", "engine", "kvtransfer", "worker"]),
];
const ASSEMBLY: &[&str] = &["cli", "sim", "tests"];

/// Packages a crate must never depend on.
const NEVER: &[(&str, &[&str])] = &[
    ("core", &["tonic", "openraft", "axum", "cudarc"]),
    ("kernels", &["tokio", "tonic", "prost"]),
    ("engine", &["tokio", "tonic", "hyper", "axum", "cudarc"]),
    ("kvtransfer", &["openraft", "tonic", "safetensors"]),
    ("gateway", &["openraft", "cudarc"]),
];

/// Words of the field that the glossary replaces; no type, module or file is named by one.
const BANNED: &[&str] =
    &["session", "job", "context", "instance", "manager", "info", "util", "utils", "page", "slot", "router", "helper"];

/// Names that belong to somebody else's trait.
const FOREIGN: &[&str] = &["ConnectInfo"];

/// A file longer than this has grown a tail and is more than one thing.
const LINES_MAX: usize = 1200;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("tests/ has a parent").to_path_buf()
}

/// The names under every `[…dependencies]` table of a crate.
fn dependencies(folder: &str, tables: &[&str]) -> BTreeSet<String> {
    let text = fs::read_to_string(root().join(folder).join("Cargo.toml")).expect("a crate has a Cargo.toml");
    let manifest: toml::Table = text.parse().expect("Cargo.toml parses");
    let names = |table: &&str| manifest.get(*table).and_then(|t| t.as_table()).cloned().unwrap_or_default();
    tables.iter().flat_map(|table| names(table).into_iter().map(|(name, _)| name)).collect()
}

fn rust_files(folder: &Path, found: &mut Vec<PathBuf>) {
    let mut entries: Vec<_> = fs::read_dir(folder).into_iter().flatten().flatten().map(|e| e.path()).collect();
    entries.sort();
    for path in entries {
        if path.is_dir() {
            rust_files(&path, found);
        } else if path.extension().is_some_and(|e| e == "rs") {
            found.push(path);
        }
    }
}

/// Every source file of the workspace with its path from the root.
fn sources() -> BTreeMap<String, String> {
    let mut files = Vec::new();
    for folder in ARROWS.iter().map(|(name, _)| *name).chain(ASSEMBLY.iter().copied()) {
        rust_files(&root().join(folder), &mut files);
    }
    let name = |path: &PathBuf| path.strip_prefix(root()).expect("below the root").display().to_string();
    files.iter().map(|path| (name(path), fs::read_to_string(path).expect("a source file reads"))).collect()
}

fn words(name: &str) -> Vec<String> {
    let mut words = vec![String::new()];
    for letter in name.chars() {
        if letter == '_' || letter == '-' || letter.is_uppercase() {
            words.push(String::new());
        }
        if letter.is_alphanumeric() {
            words.last_mut().expect("never empty").extend(letter.to_lowercase());
        }
    }
    words
}

/// The name that a line of code defines, if it defines a type or a module.
fn defined(line: &str) -> Option<&str> {
    let mut tokens = line.split(|c: char| !(c.is_alphanumeric() || c == '_')).filter(|t| !t.is_empty());
    while let Some(token) = tokens.next() {
        match token {
            "pub" | "crate" | "super" | "unsafe" => continue,
            "struct" | "enum" | "trait" | "mod" | "type" | "union" => return tokens.next(),
            _ => return None,
        }
    }
    None
}

#[test]
fn every_folder_with_a_manifest_is_in_the_table() {
    let known: BTreeSet<_> = ARROWS.iter().map(|(name, _)| *name).chain(ASSEMBLY.iter().copied()).collect();
    let entries = fs::read_dir(root()).expect("the root lists").flatten();
    for entry in entries.filter(|e| e.path().join("Cargo.toml").exists()) {
        let name = entry.file_name().into_string().expect("folder names are text");
        assert!(known.contains(name.as_str()), "{name}/ has no arrows in tests/tidy.rs");
    }
}

#[test]
fn arrows_point_downwards_only() {
    for (folder, allowed) in ARROWS {
        for name in dependencies(folder, &["dependencies"]) {
            let Some(other) = name.strip_prefix("baton-") else { continue };
            assert!(allowed.contains(&other), "forbidden arrow: {folder} -> {other}");
        }
    }
}

#[test]
fn crates_never_hold_what_they_must_not() {
    for (folder, never) in NEVER {
        let names = dependencies(folder, &["dependencies", "build-dependencies"]);
        for package in *never {
            assert!(!names.contains(*package), "{folder} must never depend on {package}");
        }
    }
}

#[test]
fn openraft_stays_in_its_folder_and_the_ledger_is_pure() {
    for (path, text) in sources() {
        let raft = path.starts_with("coordinator/src/raft") || path.starts_with("tests/");
        assert!(raft || !text.contains("openraft::"), "{path}: openraft's types stay in coordinator/src/raft/");
        if path.starts_with("coordinator/src/state") {
            for word in ["async fn", "Instant", "SystemTime", "HashMap", "tokio::"] {
                assert!(!text.contains(word), "{path}: the ledger is pure, but holds {word:?}");
            }
        }
    }
}

#[test]
fn product_code_does_not_know_the_simulator() {
    for (path, text) in sources() {
        let outside = path.starts_with("sim/") || path.starts_with("tests/") || path.starts_with("cli/");
        assert!(outside || !text.contains("cfg(sim"), "{path}: product code has no cfg(sim)");
        assert!(outside || !text.contains("turmoil::"), "{path}: product code does not import turmoil");
    }
}

#[test]
fn only_cli_reads_the_environment_and_ends_the_process() {
    for (path, text) in sources() {
        let allowed = path.starts_with("cli/")
            || path.starts_with("tests/")
            || path.contains("/tests/")
            || path.contains("/examples/")
            || path.contains("build.rs");
        for call in ["env::var(", "env::args(", "process::exit("] {
            assert!(allowed || !text.contains(call), "{path}: {call} belongs to cli");
        }
    }
}

#[test]
fn names_come_from_the_glossary() {
    for (path, text) in sources() {
        let stem = Path::new(&path).file_stem().and_then(|s| s.to_str()).unwrap_or_default().to_string();
        let names = text.lines().filter_map(|line| defined(line.trim_start())).map(str::to_string);
        for name in names.chain([stem]).filter(|name| !FOREIGN.contains(&name.as_str())) {
            let banned = words(&name).into_iter().find(|word| BANNED.contains(&word.as_str()));
            assert!(banned.is_none(), "{path}: {name} uses {banned:?}, which the glossary replaces");
        }
    }
}

#[test]
fn files_have_a_header_and_no_tail() {
    for (path, text) in sources() {
        let lines = text.lines().count();
        assert!(lines <= LINES_MAX, "{path} has {lines} lines; is it one thing?");
        let first = text.lines().find(|line| !line.starts_with("#![")).unwrap_or_default();
        assert!(first.starts_with("//!"), "{path} does not say in its first line what it is for");
    }
}

#[test]
fn nothing_unfinished_is_left() {
    let marks = ["todo!(", "unimplemented!(", concat!("FIX", "ME"), concat!("X", "XX")];
    for (path, text) in sources() {
        let mark = marks.iter().find(|mark| text.contains(**mark) && path != "tests/tidy.rs");
        assert!(mark.is_none(), "{path} holds {mark:?}");
    }
}

#[test]
fn the_words_test_sees_through_camel_case() {
    assert_eq!(words("SessionTable")[1..], ["session", "table"]);
    assert_eq!(words("kv_page")[..], ["kv", "page"]);
    assert_eq!(defined("pub(crate) struct JobQueue {"), Some("JobQueue"));
    assert_eq!(defined("let instance = 3;"), None);
}
