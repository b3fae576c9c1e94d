//! Requests that outlive their gateway. What one of them has said is kept, so that another gateway can take it over from
//! any token; it goes on by itself while somebody reads it, and for a while after nobody does.
//!
//! ```text
//! engine ──notes──► task of the request ──► log ──► reader (a task of the gateway's stream)
//!                                            └────► the next reader, after Resume
//! ```

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use baton_core::planted::{self, Bug};
use baton_core::{Refused, RequestId};
use baton_proto::convert::refusal;
use baton_proto::v1::request_output::Output;
use baton_proto::v1::{Refusal, Resumed, Tokens};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until};

/// Requests kept at a time; the longest ended one makes room.
const KEPT_MAX: usize = 1024;
/// What one request may have said before it cannot be taken over any more, in bytes.
const SAID_BYTES_MAX: usize = 16 << 20;
/// The longest window, in milliseconds.
pub(crate) const WINDOW_MS_MAX: u64 = 300_000;
/// A gateway's note, in bytes.
pub(crate) const NOTE_BYTES_MAX: usize = 64 << 10;

/// All kept requests of a worker, and their tasks.
#[derive(Default)]
pub(crate) struct Keeper {
    kept: Mutex<BTreeMap<RequestId, Arc<Kept>>>,
    tasks: Mutex<JoinSet<()>>,
}

impl Keeper {
    /// Keeps a request from now on; `task` drives it to its end.
    pub(crate) fn keep(&self, kept: Arc<Kept>, task: impl Future<Output = ()> + Send + 'static) -> Result<(), Refusal> {
        let mut all = lock(&self.kept);
        if all.get(&kept.request).is_some_and(|older| older.epoch > kept.epoch) {
            return Err(refusal(Refused::Stale, "a newer assignment of the request is kept here"));
        }
        if all.len() >= KEPT_MAX && !all.contains_key(&kept.request) {
            let ended = all.values().filter_map(|kept| Some((kept.log().ended?, kept.request)));
            let Some((_, longest)) = ended.min() else {
                return Err(refusal(Refused::NoCapacity, "too many resumable requests on this worker"));
            };
            all.remove(&longest).iter().for_each(|kept| kept.give_up());
        }
        // An older assignment has lost its right.
        all.insert(kept.request, kept).iter().for_each(|older| older.give_up());
        drop(all);
        let mut tasks = lock(&self.tasks);
        while tasks.try_join_next().is_some() {}
        tasks.spawn(task);
        Ok(())
    }

    /// The request, if this tenant may take it over.
    pub(crate) fn find(&self, request: RequestId, tenant: &str) -> Option<Arc<Kept>> {
        let kept = lock(&self.kept).get(&request).cloned();
        kept.filter(|kept| {
            let log = kept.log();
            kept.tenant == tenant && !log.is_cut() && !log.given_up
        })
    }

    pub(crate) fn forget(&self, kept: &Arc<Kept>) {
        let mut all = lock(&self.kept);
        if all.get(&kept.request).is_some_and(|known| Arc::ptr_eq(known, kept)) {
            all.remove(&kept.request);
        }
    }
}

/// One kept request.
pub(crate) struct Kept {
    /// Choices that nobody wants any more.
    pub(crate) unwanted_choices: watch::Sender<Vec<u32>>,
    request: RequestId,
    epoch: u64,
    tenant: String,
    window: Duration,
    /// What does not change: assignment, request, note, choices.
    frame: Resumed,
    log: Mutex<Log>,
    changed: watch::Sender<()>,
}

struct Log {
    said: VecDeque<Output>,
    /// Entries that are gone from the front, all of them read.
    base: usize,
    bytes: usize,
    /// When the request ended.
    ended: Option<Instant>,
    given_up: bool,
    /// A reader has read it to its end.
    heard: bool,
    /// The reader that counts; earlier ones have been replaced.
    reader: u64,
    /// The reader's next entry; None: nobody reads.
    next: Option<usize>,
    /// When the last reader went.
    left: Instant,
}

impl Log {
    fn is_cut(&self) -> bool {
        self.base > 0
    }

    fn end(&self) -> usize {
        self.base + self.said.len()
    }
}

impl Kept {
    pub(crate) fn new(request: RequestId, epoch: u64, tenant: String, window: Duration, frame: Resumed) -> Arc<Kept> {
        let log = Log {
            said: VecDeque::new(),
            base: 0,
            bytes: 0,
            ended: None,
            given_up: false,
            heard: false,
            reader: 0,
            next: None,
            left: Instant::now(),
        };
        let (log, changed) = (Mutex::new(log), watch::Sender::new(()));
        let unwanted_choices = watch::Sender::new(Vec::new());
        Arc::new(Kept { unwanted_choices, request, epoch, tenant, window, frame, log, changed })
    }

    /// Remembers something that is said of the request, for the reader there is and those to come.
    pub(crate) fn say(&self, output: Output) {
        let mut log = self.log();
        log.bytes += bytes(&output);
        log.said.push_back(output);
        if log.bytes > SAID_BYTES_MAX || log.is_cut() {
            // Nobody can take it over any more; what has been read is not needed.
            let read = log.next.map_or(0, |next| next - log.base);
            log.said.drain(..read);
            log.base += read;
        }
        drop(log);
        self.changed.send_replace(());
    }

    /// Nothing more will be said.
    pub(crate) fn end(&self) {
        self.log().ended = Some(Instant::now());
        self.changed.send_replace(());
    }

    /// Nobody wants it any more.
    pub(crate) fn give_up(&self) {
        self.log().given_up = true;
        self.changed.send_replace(());
    }

    /// Resolves when a reader has read it to its end.
    pub(crate) async fn heard(&self) {
        let mut changed = self.changed.subscribe();
        while !self.log().heard {
            // The sender lives as long as `self`.
            let _ = changed.changed().await;
        }
    }

    /// Resolves when it is given up, or when nobody has read it for its window.
    pub(crate) async fn unwanted(&self) {
        let mut changed = self.changed.subscribe();
        loop {
            let until = {
                let log = self.log();
                let until = log.left.max(log.ended.unwrap_or(log.left)) + self.window;
                let cut = log.is_cut() && log.next.is_none();
                let waits = log.next.is_none() || log.ended.is_some();
                if log.given_up || cut || (waits && until <= Instant::now()) {
                    return;
                }
                waits.then_some(until)
            };
            let due = async {
                match until {
                    Some(until) => sleep_until(until).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                // The sender lives as long as `self`.
                _ = changed.changed() => {}
                () = due => {}
            }
        }
    }

    /// A reader from the first word on; an earlier reader ends.
    pub(crate) fn read(self: &Arc<Kept>) -> Reader {
        let mut log = self.log();
        let at = log.base;
        self.reader(&mut log, at)
    }

    /// All that has been said so far, and a reader of what follows.
    pub(crate) fn resume(self: &Arc<Kept>) -> (Resumed, Reader) {
        let mut resumed = self.frame.clone();
        let mut tokens: BTreeMap<u32, Tokens> = BTreeMap::new();
        let mut log = self.log();
        // How it failed is said after it was resumed.
        let failed = log.said.iter().position(|output| matches!(output, Output::Aborted(_) | Output::Refused(_)));
        let told = failed.unwrap_or(log.said.len());
        let lost = usize::from(planted::is(Bug::ResumeLosesToken));
        for output in log.said.iter().take(told.saturating_sub(lost)) {
            match output {
                Output::Tokens(new) => {
                    let of = || Tokens { choice: new.choice, tokens: Vec::new() };
                    tokens.entry(new.choice).or_insert_with(of).tokens.extend(new.tokens.iter().cloned());
                }
                Output::Finished(finished) => resumed.finished.push(finished.clone()),
                Output::PromptLogprobs(prompt) => resumed.prompt_logprobs = Some(prompt.clone()),
                Output::Admitted(admitted) => resumed.admitted = Some(*admitted),
                Output::Aborted(_) | Output::Refused(_) | Output::Resumed(_) => {}
            }
        }
        resumed.tokens = tokens.into_values().collect();
        let at = log.base + told;
        let reader = self.reader(&mut log, at);
        (resumed, reader)
    }

    fn reader(self: &Arc<Kept>, log: &mut Log, at: usize) -> Reader {
        log.reader += 1;
        log.next = Some(at);
        let number = log.reader;
        let changed = self.changed.subscribe();
        self.changed.send_replace(());
        Reader { kept: self.clone(), number, changed }
    }

    fn log(&self) -> MutexGuard<'_, Log> {
        lock(&self.log)
    }
}

/// Reads one kept request. When it is dropped the request's window begins.
pub(crate) struct Reader {
    kept: Arc<Kept>,
    number: u64,
    changed: watch::Receiver<()>,
}

impl Reader {
    /// Whether somebody else reads instead.
    pub(crate) fn is_replaced(&self) -> bool {
        self.kept.log().reader != self.number
    }

    /// What is said next; None after the last word, or once somebody else reads.
    pub(crate) async fn next(&mut self) -> Option<Vec<Output>> {
        loop {
            self.changed.borrow_and_update();
            {
                let mut log = self.kept.log();
                let at = log.next.filter(|_| log.reader == self.number)?;
                let new: Vec<Output> = log.said.iter().skip(at - log.base).cloned().collect();
                log.next = Some(log.end());
                if !new.is_empty() {
                    return Some(new);
                }
                if log.ended.is_some() || log.given_up {
                    log.heard = true;
                    drop(log);
                    self.kept.changed.send_replace(());
                    return None;
                }
            }
            self.changed.changed().await.ok()?;
        }
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        let mut log = self.kept.log();
        if log.reader == self.number {
            (log.next, log.left) = (None, Instant::now());
        }
        drop(log);
        self.kept.changed.send_replace(());
    }
}

/// About how much memory one entry takes.
fn bytes(output: &Output) -> usize {
    let token = |token: &baton_proto::v1::Token| size_of_val(token) + 8 * token.top.len();
    size_of_val(output)
        + match output {
            Output::Tokens(tokens) => tokens.tokens.iter().map(token).sum(),
            Output::PromptLogprobs(prompt) => {
                prompt.tokens.iter().map(|entry| 64 + entry.token.as_ref().map_or(0, token)).sum()
            }
            _ => 0,
        }
}

/// A poisoned lock means that a thread panicked between two consistent states; going on is safe.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

#[cfg(test)]
mod tests {
    use baton_proto::convert::abort;
    use baton_proto::v1::{ChoiceFinished, Token};
    use tokio::time::{advance, timeout};

    use super::*;

    const WINDOW: Duration = Duration::from_secs(10);

    fn kept(request: u128) -> Arc<Kept> {
        Kept::new(RequestId(request), 1, "t".into(), WINDOW, Resumed::default())
    }

    fn token(id: u32) -> Output {
        Output::Tokens(Tokens { choice: 0, tokens: vec![Token { id, ..Token::default() }] })
    }

    fn ids(resumed: &Resumed) -> Vec<u32> {
        resumed.tokens.iter().flat_map(|tokens| tokens.tokens.iter().map(|token| token.id)).collect()
    }

    #[tokio::test]
    async fn a_second_reader_gets_all_and_the_first_one_ends() {
        let kept = kept(1);
        let mut first = kept.read();
        kept.say(token(1));
        assert_eq!(first.next().await, Some(vec![token(1)]));
        kept.say(token(2));
        let (resumed, mut second) = kept.resume();
        assert_eq!((ids(&resumed), first.next().await), (vec![1, 2], None));
        kept.say(token(3));
        kept.say(Output::Finished(ChoiceFinished::default()));
        drop(first);
        assert_eq!(second.next().await.unwrap().len(), 2);
        kept.end();
        assert!(timeout(Duration::from_millis(1), kept.heard()).await.is_err(), "its end has not been read");
        assert_eq!(second.next().await, None);
        kept.heard().await;
        let (resumed, mut third) = kept.resume();
        assert_eq!((ids(&resumed), resumed.finished.len(), third.next().await), (vec![1, 2, 3], 1, None));
    }

    #[tokio::test]
    async fn how_it_was_aborted_is_said_after_it_was_resumed() {
        let kept = kept(1);
        kept.say(token(1));
        let aborted = Output::Aborted(abort(baton_core::Aborted::Deadline, ""));
        kept.say(aborted.clone());
        kept.end();
        let (resumed, mut reader) = kept.resume();
        assert_eq!((ids(&resumed), reader.next().await), (vec![1], Some(vec![aborted])));
        assert_eq!(reader.next().await, None);
    }

    #[tokio::test(start_paused = true)]
    async fn it_is_wanted_while_it_is_read_and_for_its_window_after() {
        let kept = kept(1);
        let unwanted = || timeout(Duration::from_millis(1), kept.unwanted());
        let reader = kept.read();
        advance(WINDOW * 3).await;
        assert!(unwanted().await.is_err());
        drop(reader);
        advance(WINDOW - Duration::from_secs(1)).await;
        assert!(unwanted().await.is_err());
        let (_, reader) = kept.resume();
        advance(WINDOW * 3).await;
        assert!(unwanted().await.is_err());
        // Once it has ended its reader does not hold it for ever.
        kept.end();
        advance(WINDOW + Duration::from_secs(1)).await;
        assert!(unwanted().await.is_ok());
        drop(reader);
    }

    #[tokio::test]
    async fn what_grows_too_large_is_read_on_and_cannot_be_taken_over() {
        let (keeper, kept) = (Keeper::default(), kept(1));
        lock(&keeper.kept).insert(kept.request, kept.clone());
        let mut reader = kept.read();
        let large = || {
            let top = vec![baton_proto::v1::TokenLogprob::default(); SAID_BYTES_MAX / 16];
            Output::Tokens(Tokens { choice: 0, tokens: vec![Token { top, ..Token::default() }] })
        };
        kept.say(large());
        assert_eq!(reader.next().await.map(|new| new.len()), Some(1));
        assert!(keeper.find(RequestId(1), "t").is_some());
        kept.say(large());
        kept.say(token(1));
        assert_eq!(reader.next().await.map(|new| new.len()), Some(2));
        assert!(keeper.find(RequestId(1), "t").is_none());
        assert!(kept.log().said.len() <= 2);
    }

    #[tokio::test]
    async fn only_its_tenant_and_the_newest_epoch_count() {
        let keeper = Keeper::default();
        let (older, newer) = (kept(1), Kept::new(RequestId(1), 2, "t".into(), WINDOW, Resumed::default()));
        keeper.keep(older.clone(), std::future::ready(())).unwrap();
        keeper.keep(newer.clone(), std::future::ready(())).unwrap();
        assert!(older.log().given_up && !newer.log().given_up);
        assert!(keeper.keep(older.clone(), std::future::ready(())).is_err());
        assert!(keeper.find(RequestId(1), "other").is_none());
        keeper.forget(&older);
        assert!(keeper.find(RequestId(1), "t").is_some_and(|kept| Arc::ptr_eq(&kept, &newer)));
        keeper.forget(&newer);
        assert!(keeper.find(RequestId(1), "t").is_none());
    }

    #[tokio::test]
    async fn the_longest_ended_request_makes_room() {
        let keeper = Keeper::default();
        for id in 0..KEPT_MAX as u128 {
            keeper.keep(kept(id), std::future::ready(())).unwrap();
        }
        let keep = |id| keeper.keep(kept(id), std::future::ready(()));
        assert_eq!(keep(9_999).unwrap_err().reason, "no_capacity");
        keeper.find(RequestId(7), "t").unwrap().end();
        keep(9_999).unwrap();
        assert!(keeper.find(RequestId(7), "t").is_none());
    }
}
