//! The control socket of a running `baton up`: `<data>/control.sock`, a Unix socket that whoever may write the data
//! directory may use. One JSON line asks, JSON lines answer until it is done.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::timeout;

use crate::exit::Failure;

/// A question has no more bytes.
const ASK_BYTES_MAX: u64 = 4096;
/// Whoever connects asks within this time.
const ASK_TIMEOUT: Duration = Duration::from_secs(5);
/// Connections at a time; more wait to be accepted.
const CONNECTIONS_MAX: usize = 8;
/// Answers that wait to be read; a reader who is further behind misses notes, never the end.
const ANSWERS_MAX: usize = 64;

/// What can be asked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub(crate) enum Ask {
    /// Workers of each role there shall be; None leaves the role as it is.
    Scale { prefill: Option<usize>, decode: Option<usize> },
}

/// One line of the answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Answer {
    /// Something happened on the way.
    Note(String),
    /// All is as asked. Nothing follows.
    Done(String),
    /// It is not, and why. Nothing follows.
    Failed(String),
}

/// A question and where its answers go; they end when this is dropped.
#[derive(Debug)]
pub(crate) struct Wish {
    pub(crate) ask: Ask,
    pub(crate) answers: mpsc::Sender<Answer>,
}

fn path(data: &Path) -> PathBuf {
    data.join("control.sock")
}

/// The listening socket; it is removed with its owner.
#[derive(Debug)]
pub(crate) struct Control {
    path: PathBuf,
    _accepting: JoinSet<()>,
}

impl Control {
    /// Listens in a data directory that this process has locked. Wishes come out of the receiver.
    pub(crate) fn listen(data: &Path) -> Result<(Control, mpsc::Receiver<Wish>), Failure> {
        let path = path(data);
        match std::fs::remove_file(&path) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(Failure::refused(error)),
        }
        let listener = UnixListener::bind(&path);
        let advice = || format!("listen on {}; a socket's path has at most 107 bytes, see --data", path.display());
        let listener = listener.with_context(advice).map_err(Failure::refused)?;
        let (wishes, received) = mpsc::channel(CONNECTIONS_MAX);
        let mut accepting = JoinSet::new();
        accepting.spawn(accept(listener, wishes));
        Ok((Control { path, _accepting: accepting }, received))
    }
}

impl Drop for Control {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

async fn accept(listener: UnixListener, wishes: mpsc::Sender<Wish>) {
    let mut connections = JoinSet::new();
    loop {
        while connections.len() >= CONNECTIONS_MAX {
            connections.join_next().await;
        }
        match listener.accept().await {
            Ok((stream, _)) => drop(connections.spawn(serve(stream, wishes.clone()))),
            Err(error) => {
                tracing::warn!("the control socket: {error}");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

async fn serve(stream: UnixStream, wishes: mpsc::Sender<Wish>) {
    let (reader, mut writer) = stream.into_split();
    let mut line = String::new();
    let mut reader = BufReader::new(reader.take(ASK_BYTES_MAX));
    let read = timeout(ASK_TIMEOUT, reader.read_line(&mut line)).await;
    let (answers, mut received) = mpsc::channel(ANSWERS_MAX);
    match (read, serde_json::from_str::<Ask>(&line)) {
        (Ok(Ok(_)), Ok(ask)) => drop(wishes.send(Wish { ask, answers }).await),
        (_, parsed) => {
            let why = parsed.err().map_or("it did not come in time".to_string(), |error| error.to_string());
            let _ = answers.try_send(Answer::Failed(format!("not a question: {why}")));
            drop(answers);
        }
    }
    while let Some(answer) = received.recv().await {
        let line = serde_json::to_string(&answer).unwrap_or_default() + "\n";
        if writer.write_all(line.as_bytes()).await.is_err() {
            return;
        }
    }
}

/// Asks the `baton up` of this data directory and gives `note` each thing that happens. What it says at the end.
pub(crate) async fn ask(data: &Path, ask: &Ask, mut note: impl FnMut(&str)) -> Result<String, Failure> {
    let path = path(data);
    let nobody = || format!("no `baton up` listens on {}; name its directory with --data", path.display());
    let mut stream = UnixStream::connect(&path).await.with_context(nobody).map_err(Failure::refused)?;
    stream.write_all((serde_json::to_string(ask)? + "\n").as_bytes()).await?;
    let mut lines = BufReader::new(stream).lines();
    while let Some(line) = lines.next_line().await? {
        match serde_json::from_str::<Answer>(&line).context("the answer is of another version")? {
            Answer::Note(text) => note(&text),
            Answer::Done(text) => return Ok(text),
            Answer::Failed(why) => return Err(anyhow::anyhow!(why).into()),
        }
    }
    Err(anyhow::anyhow!("`baton up` ended before it was done").into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folder(name: &str) -> PathBuf {
        let data = std::env::temp_dir().join(format!("baton-control-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&data).unwrap();
        data
    }

    #[tokio::test]
    async fn a_question_is_answered_to_its_end() {
        let data = folder("answer");
        let (control, mut wishes) = Control::listen(&data).unwrap();
        let asked = Ask::Scale { prefill: Some(2), decode: None };
        let supervisor = async {
            let Wish { ask, answers } = wishes.recv().await.unwrap();
            answers.send(Answer::Note("one".into())).await.unwrap();
            answers.send(Answer::Done(format!("{ask:?}"))).await.unwrap();
        };
        let mut notes = Vec::new();
        let (answer, ()) = tokio::join!(ask(&data, &asked, |note| notes.push(note.to_string())), supervisor);
        assert_eq!((answer.unwrap(), notes), (format!("{asked:?}"), vec!["one".to_string()]));
        drop(control);
        let error = ask(&data, &asked, |_| {}).await.unwrap_err();
        assert_eq!(error.code, crate::exit::REFUSED);
        std::fs::remove_dir_all(&data).unwrap();
    }

    #[tokio::test]
    async fn nonsense_is_refused_and_bounded() {
        let data = folder("nonsense");
        let (_control, _wishes) = Control::listen(&data).unwrap();
        for line in ["{}\n".to_string(), "{\"scale\":{\"decoder\":1}}\n".to_string(), "x".repeat(1 << 20)] {
            let mut stream = UnixStream::connect(path(&data)).await.unwrap();
            // The other end stops reading at its bound.
            let _ = stream.write_all(line.as_bytes()).await;
            let answer = BufReader::new(stream).lines().next_line().await;
            let refused = answer.ok().flatten().is_none_or(|answer| answer.contains("not a question"));
            assert!(refused, "{line:.20}");
        }
        std::fs::remove_dir_all(&data).unwrap();
    }
}
