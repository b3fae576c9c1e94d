//! The one Generate stream to each decode worker. All requests of this gateway on a worker share it: commands go out on
//! it, and one message per engine step comes back with everything the step had for them.
//!
//! ```text
//! request ── Start{handle} ─┐                                ┌─► inbox of handle 1
//! request ── Start{handle} ─┼─► stream to the worker ─► step ┼─► inbox of handle 2
//! drop    ── Cancel{handle} ┘                                └─► ...        stream lost: every inbox closes
//! ```

use std::collections::BTreeMap;
use std::error::Error;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use baton_core::planted::{self, Bug};
use baton_core::{Net, Place, RequestId, limits};
use baton_proto::v1::decode_client::DecodeClient;
use baton_proto::v1::generate_command::Command;
use baton_proto::v1::request_output::Output;
use baton_proto::v1::{Cancel, ClusterView, GenerateCommand, Resume, Start, StepOutput};
use tokio::sync::{Notify, mpsc};
use tokio::task::JoinSet;
use tokio_stream::wrappers::ReceiverStream;

/// A worker that leaves so many commands unread is not serving; its stream is given up.
const COMMANDS_MAX: usize = 2 * limits::GATEWAY_REQUESTS_MAX;

/// The streams to all decode workers in use.
pub(crate) struct Links {
    net: Arc<dyn Net>,
    state: Mutex<LinksState>,
}

#[derive(Default)]
struct LinksState {
    links: BTreeMap<Place, Arc<Link>>,
    tasks: JoinSet<()>,
}

/// Why nothing more comes for a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Closed {
    /// The worker's life ended while the request was there: the connection broke, or the ledger has fenced it.
    #[error("the worker died")]
    Died,
    /// The worker ended the stream in good order, or never had it.
    #[error("the stream to the worker was lost")]
    Lost,
    #[error("the client reads too slowly")]
    Overrun,
}

struct Link {
    commands: mpsc::Sender<GenerateCommand>,
    requests: Mutex<Requests>,
    /// The worker's life has ended, whatever its connection says.
    fenced: Notify,
}

#[derive(Default)]
struct Requests {
    /// Set when the stream has ended; nothing can be started on it.
    closed: Option<Closed>,
    last_handle: u32,
    open: BTreeMap<u32, Outlet>,
}

/// The link's end of a request's events.
struct Outlet {
    events: mpsc::Sender<Output>,
    overrun: Arc<AtomicBool>,
}

/// The request's end: its events, in order. Dropping it cancels the request at the worker.
pub(crate) struct Inbox {
    link: Arc<Link>,
    handle: u32,
    events: mpsc::Receiver<Output>,
    overrun: Arc<AtomicBool>,
}

impl Links {
    pub(crate) fn new(net: Arc<dyn Net>) -> Links {
        Links { net, state: Mutex::default() }
    }

    /// Starts a request on `worker`, over the stream there is or a new one. `start` is given its handle.
    pub(crate) fn start(&self, worker: &Place, start: Start) -> Result<Inbox, Closed> {
        self.command(worker, |handle| Command::Start(Start { handle, ..start.clone() }))
    }

    /// Takes over a tenant's request that goes on at `worker`; what it has said so far comes first.
    pub(crate) fn resume(&self, worker: &Place, request: RequestId, tenant: &str) -> Result<Inbox, Closed> {
        let (request, tenant) = (request.to_string(), tenant.to_string());
        let resume = |handle| Resume { handle, request: request.clone(), tenant: tenant.clone() };
        self.command(worker, |handle| Command::Resume(resume(handle)))
    }

    fn command(&self, worker: &Place, command: impl Fn(u32) -> Command) -> Result<Inbox, Closed> {
        let mut state = lock(&self.state);
        while state.tasks.try_join_next().is_some() {}
        if let Some(link) = state.links.get(worker)
            && let Ok(inbox) = link.begin(&command)
        {
            return Ok(inbox);
        }
        state.links.retain(|_, link| lock(&link.requests).closed.is_none());
        let link = self.open(worker, &mut state.tasks).ok_or(Closed::Lost)?;
        state.links.insert(worker.clone(), link.clone());
        link.begin(&command)
    }

    /// Ends the streams to lives that are over, so that nothing waits for a connection that says nothing any more, and
    /// nothing that such a life still says is heard.
    pub(crate) fn fence(&self, view: &ClusterView) {
        let mut state = lock(&self.state);
        let is_over = |place: &Place| {
            let member = view.members.iter().find(|m| m.member.as_ref().is_some_and(|m| *m.id == *place.worker.0));
            member.is_some_and(|view| {
                let incarnation = view.member.as_ref().map_or(0, |member| member.incarnation);
                incarnation > place.incarnation.0 || incarnation == place.incarnation.0 && !view.live
            })
        };
        state.links.retain(|place, link| {
            let over = is_over(place);
            if over {
                let requests = link.close(Closed::Died);
                tracing::info!(worker = %place.worker, incarnation = place.incarnation.0, requests, "worker fenced");
                link.fenced.notify_one();
            }
            !over
        });
    }

    /// Requests that wait for events.
    pub(crate) fn open_requests(&self) -> usize {
        lock(&self.state).links.values().map(|link| lock(&link.requests).open.len()).sum()
    }

    fn open(&self, worker: &Place, tasks: &mut JoinSet<()>) -> Option<Arc<Link>> {
        let channel = baton_proto::channel(self.net.clone(), &worker.address).ok()?;
        let client = DecodeClient::new(channel)
            .max_decoding_message_size(limits::MESSAGE_BYTES_MAX)
            .max_encoding_message_size(limits::MESSAGE_BYTES_MAX);
        let (commands, outgoing) = mpsc::channel(COMMANDS_MAX);
        let link = Arc::new(Link { commands, requests: Mutex::default(), fenced: Notify::new() });
        let (name, shared) = (worker.worker.clone(), link.clone());
        tasks.spawn(async move {
            let (closed, problem) = tokio::select! {
                ended = shared.carry(client, outgoing) => ended,
                () = shared.fenced.notified() => (Closed::Died, "fenced".to_string()),
            };
            let requests = shared.close(closed);
            tracing::info!(worker = %name, requests, problem, "stream to worker ended");
        });
        Some(link)
    }
}

impl Link {
    fn begin(self: &Arc<Link>, command: &impl Fn(u32) -> Command) -> Result<Inbox, Closed> {
        let (events, receiver) = mpsc::channel(limits::STREAM_BUFFER_EVENTS_MAX);
        let overrun = Arc::new(AtomicBool::new(false));
        let mut requests = lock(&self.requests);
        if requests.closed.is_some() {
            return Err(Closed::Lost);
        }
        let handle = requests.next_handle();
        if !self.send(command(handle)) {
            requests.close(Closed::Lost);
            return Err(Closed::Lost);
        }
        requests.open.insert(handle, Outlet { events, overrun: overrun.clone() });
        drop(requests);
        Ok(Inbox { link: self.clone(), handle, events: receiver, overrun })
    }

    /// The life of the stream; returns what ended it.
    async fn carry(
        &self,
        mut client: DecodeClient<tonic::transport::Channel>,
        outgoing: mpsc::Receiver<GenerateCommand>,
    ) -> (Closed, String) {
        let mut steps = match client.generate(ReceiverStream::new(outgoing)).await {
            Ok(response) => response.into_inner(),
            Err(status) => return (Closed::Lost, status.message().to_string()),
        };
        loop {
            match steps.message().await {
                Ok(Some(step)) => self.dispatch(step),
                Ok(None) => return (Closed::Lost, "the worker closed it".to_string()),
                // A status that came from the worker has no cause here; one made of a broken connection has.
                Err(status) if status.source().is_none() => return (Closed::Lost, status.message().to_string()),
                Err(status) => return (Closed::Died, status.to_string()),
            }
            if lock(&self.requests).closed.is_some() {
                return (Closed::Lost, "the worker does not read its commands".to_string());
            }
        }
    }

    fn dispatch(&self, step: StepOutput) {
        let mut requests = lock(&self.requests);
        for output in step.outputs {
            let (handle, Some(event)) = (output.handle, output.output) else { continue };
            let Some(outlet) = requests.open.get(&handle) else { continue };
            if outlet.events.try_send(event).is_err() {
                outlet.overrun.store(true, Ordering::Relaxed);
                requests.open.remove(&handle);
                self.send(Command::Cancel(Cancel { handle, ..Cancel::default() }));
            }
        }
    }

    /// Ends all requests; returns how many there were.
    fn close(&self, closed: Closed) -> usize {
        lock(&self.requests).close(closed)
    }

    fn send(&self, command: Command) -> bool {
        self.commands.try_send(GenerateCommand { command: Some(command) }).is_ok()
    }
}

impl Requests {
    fn next_handle(&mut self) -> u32 {
        if planted::is(Bug::SameHandle) {
            return (1..).find(|handle| !self.open.contains_key(handle)).expect("fewer are open");
        }
        loop {
            self.last_handle = self.last_handle.wrapping_add(1);
            if !self.open.contains_key(&self.last_handle) {
                return self.last_handle;
            }
        }
    }

    /// The first cause counts.
    fn close(&mut self, closed: Closed) -> usize {
        self.closed.get_or_insert(closed);
        std::mem::take(&mut self.open).len()
    }
}

impl Inbox {
    /// The next event of the request.
    pub(crate) async fn next(&mut self) -> Result<Output, Closed> {
        match self.events.recv().await {
            Some(event) => Ok(event),
            None if self.overrun.load(Ordering::Relaxed) => Err(Closed::Overrun),
            None => Err(lock(&self.link.requests).closed.unwrap_or(Closed::Lost)),
        }
    }

    /// The worker shall generate no more of these choices.
    pub(crate) fn cancel_choices(&self, choices: Vec<u32>) {
        let mut requests = lock(&self.link.requests);
        if requests.open.contains_key(&self.handle)
            && !self.link.send(Command::Cancel(Cancel { handle: self.handle, choices }))
        {
            requests.close(Closed::Lost);
        }
    }

    /// The worker has ended the request, or is to go on with it for another gateway: there is nothing to cancel.
    pub(crate) fn ended(self) {
        lock(&self.link.requests).open.remove(&self.handle);
    }
}

impl Drop for Inbox {
    fn drop(&mut self) {
        let mut requests = lock(&self.link.requests);
        if requests.open.remove(&self.handle).is_some()
            && !self.link.send(Command::Cancel(Cancel { handle: self.handle, ..Cancel::default() }))
        {
            requests.close(Closed::Lost);
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
