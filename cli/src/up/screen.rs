//! What `baton up` shows a person: progress on a terminal, one table, one URL, one command to try.

use std::path::{Path, PathBuf};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};

use super::cluster_file::Process;
use super::supervisor::Cluster;
use crate::out::offer;
use crate::table;

/// The terminal.
pub(crate) struct Screen {
    bar: ProgressBar,
    model: PathBuf,
}

impl Screen {
    /// The bar is drawn on stderr, and only if that is a terminal.
    pub(crate) fn new(model: &Path) -> Screen {
        let style =
            ProgressStyle::with_template("loading {bar:40} {percent}% {elapsed}").expect("the template is well-formed");
        Screen { bar: ProgressBar::new(0).with_style(style), model: model.to_path_buf() }
    }

    pub(crate) fn loading(&self, done: u64, total: u64) {
        self.bar.set_length(total);
        self.bar.set_position(done);
    }

    pub(crate) fn clear(&self) {
        self.bar.finish_and_clear();
    }

    /// One line that something happened.
    pub(crate) fn note(&self, line: &str) {
        self.bar.suspend(|| offer(format_args!("{line}")));
    }

    pub(crate) fn announce(&self, cluster: &Cluster, processes: &[Process], took: Duration) {
        self.clear();
        let row = |p: &Process| vec![p.role.to_string(), p.id.clone(), p.pid.to_string(), p.address.clone()];
        let rows: Vec<_> = processes.iter().map(row).collect();
        offer(format_args!("{}", table::render(&["ROLE", "ID", "PID", "ADDRESS"], &rows)));
        offer(format_args!("{} serves at {}/v1 after {:.2} s. Try:\n", cluster.model, cluster.url, took.as_secs_f64()));
        offer(format_args!("  {}\n", curl(&cluster.url, &cluster.model, has_chat_template(&self.model))));
        offer(format_args!("Logs: {}. Ctrl-C ends everything.", cluster.data.join("logs").display()));
    }
}

/// A command that works: a chat where the model has a template for one, else a completion.
fn curl(url: &str, model: &str, chat: bool) -> String {
    let (path, ask) = match chat {
        true => ("chat/completions", r#""messages":[{"role":"user","content":"Tell me a story."}]"#),
        false => ("completions", r#""prompt":"Once upon a time","max_tokens":64"#),
    };
    format!(
        "curl -N {url}/v1/{path} -H 'content-type: application/json' -d '{{\"model\":\"{model}\",{ask},\"stream\":true}}'"
    )
}

fn has_chat_template(model: &Path) -> bool {
    let config = std::fs::read(model.join("tokenizer_config.json")).unwrap_or_default();
    let config: serde_json::Value = serde_json::from_slice(&config).unwrap_or_default();
    config.get("chat_template").is_some() || model.join("chat_template.jinja").exists()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_carries_well_formed_json() {
        for chat in [true, false] {
            let line = curl("http://127.0.0.1:8000", "a-model", chat);
            let body = line.split('\'').rev().nth(1).unwrap();
            let body: serde_json::Value = serde_json::from_str(body).unwrap();
            assert_eq!((&body["model"], &body["stream"]), (&"a-model".into(), &true.into()), "{line}");
        }
    }
}
