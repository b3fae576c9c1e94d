//! `baton chat`: a conversation in the terminal, streamed. Reads a pipe as well: one message a line.

use std::io::IsTerminal;
use std::sync::Arc;

use baton_proto::TcpNet;
use clap::Args;
use serde_json::{Value, json};
use tokio::task::JoinHandle;

use crate::exit::Failure;
use crate::http::{Client, HttpError};
use crate::out::{say, sayln};

/// Talk to a model in the terminal.
///
/// Each line is a message; the conversation so far is sent with it. Ctrl-C stops an answer, Ctrl-D ends.
/// With a pipe on stdin, each line is a message too, and only the answers are printed.
#[derive(Args, Debug)]
pub(crate) struct ChatFlags {
    /// Address of the endpoint, with or without /v1
    #[arg(long, default_value = "http://127.0.0.1:8000")]
    url: String,
    /// Model to talk to [default: the first the endpoint lists]
    #[arg(long)]
    model: Option<String>,
    /// What the model is told before the conversation
    #[arg(long)]
    system: Option<String>,
    /// Sampling temperature [default: the model's]
    #[arg(long)]
    temperature: Option<f64>,
    /// Tokens of an answer at most [default: the endpoint's]
    #[arg(long)]
    max_tokens: Option<u64>,
    /// Fixes the random choices of every answer
    #[arg(long)]
    seed: Option<u64>,
    /// Key to send as bearer token [default: OPENAI_API_KEY, if set]
    #[arg(long)]
    api_key: Option<String>,
}

pub(crate) fn run(flags: ChatFlags) -> Result<(), Failure> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let result = runtime.block_on(converse(flags));
    // A read of stdin may still be waiting; it must not hold the process.
    runtime.shutdown_background();
    result
}

async fn converse(flags: ChatFlags) -> Result<(), Failure> {
    let key = flags.api_key.clone().or_else(|| crate::surroundings::variable("OPENAI_API_KEY"));
    let client = Client::new(Arc::new(TcpNet), &flags.url, key).map_err(Failure::refused)?;
    let model = match &flags.model {
        Some(model) => model.clone(),
        None => client
            .first_model()
            .await
            .map_err(Failure::refused)?
            .ok_or_else(|| Failure::refuse(format!("{} lists no model yet; name one with --model", flags.url)))?,
    };
    let person = std::io::stdin().is_terminal() && std::io::stdout().is_terminal();
    if person {
        sayln!("{model} at {}. Ctrl-C stops an answer, Ctrl-D ends.", flags.url);
    }
    let mut talk = Talk { flags, client, model, messages: Vec::new() };
    talk.begin();
    let mut lines = Lines::default();
    while let Some(line) = ask(&mut lines, person).await? {
        if !line.trim().is_empty() {
            talk.answer(line, person).await?;
        }
    }
    Ok(())
}

/// The next message; None at the end. Ctrl-C at the prompt only says how to end.
async fn ask(lines: &mut Lines, person: bool) -> std::io::Result<Option<String>> {
    loop {
        if person {
            say!("\n> ");
        }
        tokio::select! {
            line = lines.next() => return line,
            _ = tokio::signal::ctrl_c(), if person => sayln!("\nCtrl-D ends."),
        }
    }
}

/// Lines of stdin, read on a blocking thread.
#[derive(Default)]
struct Lines {
    /// A read that was begun and not yet waited for to its end.
    pending: Option<JoinHandle<std::io::Result<Option<String>>>>,
}

impl Lines {
    /// None at the end. May be dropped and called again: no line is lost.
    async fn next(&mut self) -> std::io::Result<Option<String>> {
        let read = self
            .pending
            .get_or_insert_with(|| tokio::task::spawn_blocking(|| std::io::stdin().lines().next().transpose()));
        let line = read.await.map_err(std::io::Error::other)?;
        self.pending = None;
        line
    }
}

struct Talk {
    flags: ChatFlags,
    client: Client,
    model: String,
    messages: Vec<Value>,
}

impl Talk {
    fn begin(&mut self) {
        let system = self.flags.system.iter().map(|text| json!({"role": "system", "content": text}));
        self.messages = system.collect();
    }

    fn body(&self) -> Value {
        let mut body = json!({"model": self.model, "messages": self.messages, "stream": true});
        let options = [
            ("temperature", self.flags.temperature.map(Value::from)),
            ("max_tokens", self.flags.max_tokens.map(Value::from)),
            ("seed", self.flags.seed.map(Value::from)),
        ];
        for (name, value) in options {
            if let Some(value) = value {
                body[name] = value;
            }
        }
        body
    }

    /// Asks, prints the answer as it comes, and remembers both. A refused message is forgotten, so that a person can
    /// go on; a pipe ends there, and Ctrl-C ends it as it ends any program.
    async fn answer(&mut self, message: String, person: bool) -> Result<(), Failure> {
        self.messages.push(json!({"role": "user", "content": message}));
        let mut text = String::new();
        let outcome = tokio::select! {
            outcome = print_stream(&self.client, self.body(), &mut text) => outcome,
            _ = tokio::signal::ctrl_c(), if person => Ok(()),
        };
        sayln!();
        match outcome {
            Ok(()) => self.messages.push(json!({"role": "assistant", "content": text})),
            Err(error) if person => {
                eprintln!("baton: {error}");
                self.messages.pop();
            }
            Err(error) => return Err(error.into()),
        }
        Ok(())
    }
}

async fn print_stream(client: &Client, body: Value, text: &mut String) -> Result<(), HttpError> {
    let mut answer = client.open("/v1/chat/completions", Some(&body)).await?;
    while let Some(event) = answer.event().await? {
        let Some(piece) = piece(&event)? else { continue };
        text.push_str(&piece);
        say!("{piece}");
    }
    Ok(())
}

/// The text an event adds.
fn piece(event: &str) -> Result<Option<String>, HttpError> {
    if event == "[DONE]" {
        return Ok(None);
    }
    let event: Value = serde_json::from_str(event)?;
    if let Some(error) = event.get("error") {
        let message = error["message"].as_str().unwrap_or("the stream ended in an error").to_string();
        return Err(HttpError::Status { status: 500, message });
    }
    Ok(event["choices"][0]["delta"]["content"].as_str().map(str::to_string))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_give_their_text_or_their_error() {
        assert_eq!(piece(r#"{"choices":[{"delta":{"content":"hi"}}]}"#).unwrap(), Some("hi".to_string()));
        assert_eq!(piece(r#"{"choices":[{"delta":{}}]}"#).unwrap(), None);
        assert_eq!(piece(r#"{"choices":[]}"#).unwrap(), None);
        assert_eq!(piece("[DONE]").unwrap(), None);
        assert!(piece(r#"{"error":{"message":"lost"}}"#).unwrap_err().to_string().contains("lost"));
    }
}
