//! One stream per gateway: commands in, answers out. When it breaks, or its gateway reads too slowly, every request
//! that came by it is cancelled, but for those that were to outlive it.

use std::collections::BTreeMap;
use std::sync::Arc;

use baton_core::limits::{CHOICES_MAX, GATEWAY_REQUESTS_MAX};
use baton_core::{Aborted, Refused};
use baton_proto::convert::{abort, refusal, request_id};
use baton_proto::v1::decode_server::Decode as DecodeService;
use baton_proto::v1::generate_command::Command;
use baton_proto::v1::request_output::Output;
use baton_proto::v1::{Cancel, GenerateCommand, RequestOutput, Resume, Start};
use baton_worker::outlet::{Outlet, outlet};
use tokio::sync::{mpsc, watch};
use tokio::task::{AbortHandle, Id, JoinError, JoinSet};
use tonic::{Response, Status, Streaming};

use crate::Decode;
use crate::answers::Answers;
use crate::kept::{Kept, Reader};
use crate::outlive::{begin, pass};
use crate::request::serve;

/// Steps that a gateway may be behind before its requests are cancelled.
pub(crate) const STEPS_UNREAD_MAX: usize = 1024;
/// Refusals and aborts that wait for a gateway to read them; more wait in their requests' tasks.
const ENDS_UNREAD_MAX: usize = 256;

/// The Generate service.
pub(crate) struct Streams(pub(crate) Arc<Decode>);

#[tonic::async_trait]
impl DecodeService for Streams {
    type GenerateStream = Answers;

    async fn generate(
        &self,
        commands: tonic::Request<Streaming<GenerateCommand>>,
    ) -> Result<Response<Answers>, Status> {
        let (outlet, inlet) = outlet(STEPS_UNREAD_MAX);
        let (said, ends) = mpsc::channel(ENDS_UNREAD_MAX);
        let requests =
            Requests { decode: self.0.clone(), outlet, said, tasks: JoinSet::new(), running: BTreeMap::new() };
        let following = tokio::spawn(follow(requests, commands.into_inner()));
        Ok(Response::new(Answers::new(inlet, ends, following)))
    }
}

/// Runs a stream's requests until its commands end and they have too. An error ends them all.
async fn follow(mut requests: Requests, mut commands: Streaming<GenerateCommand>) -> Result<(), Status> {
    let (shell, outlet) = (requests.decode.shell.clone(), requests.outlet.clone());
    let mut closed = std::pin::pin!(shell.closed());
    let mut overrun = std::pin::pin!(outlet.overrun());
    let mut open = true;
    while open || !requests.tasks.is_empty() {
        tokio::select! {
            command = commands.message(), if open => match command? {
                Some(command) => requests.take(command).await?,
                None => open = false,
            },
            Some(ended) = requests.tasks.join_next_with_id() => requests.ended(ended).await,
            () = &mut overrun => return Err(Status::resource_exhausted("the gateway reads too slowly")),
            () = &mut closed => return Err(Status::unavailable("the worker is stopping")),
        }
    }
    Ok(())
}

/// The requests of one stream. Dropping it cancels them.
struct Requests {
    decode: Arc<Decode>,
    outlet: Outlet,
    said: mpsc::Sender<RequestOutput>,
    /// Each returns its request's handle.
    tasks: JoinSet<u32>,
    running: BTreeMap<u32, Running>,
}

/// One request of a stream.
struct Running {
    task: AbortHandle,
    wanted: Wanted,
}

/// Where it is told which of its choices nobody wants any more.
enum Wanted {
    Here(watch::Sender<Vec<u32>>),
    Kept(Arc<Kept>),
}

impl Requests {
    async fn take(&mut self, command: GenerateCommand) -> Result<(), Status> {
        match command.command {
            Some(Command::Start(start)) => self.start(start).await,
            Some(Command::Cancel(cancel)) => {
                self.cancel(&cancel);
                Ok(())
            }
            Some(Command::Resume(resume)) => self.resume(resume).await,
            None => Err(Status::invalid_argument("a command of a newer version")),
        }
    }

    async fn start(&mut self, start: Start) -> Result<(), Status> {
        let handle = start.handle;
        if self.running.contains_key(&handle) {
            return Err(Status::invalid_argument(format!("handle {handle} is in use")));
        }
        if self.running.len() >= GATEWAY_REQUESTS_MAX {
            baton_worker::metrics::count_refused(Refused::NoCapacity);
            let refusal = refusal(Refused::NoCapacity, "too many requests on one stream");
            self.say(handle, Output::Refused(refusal)).await;
            return Ok(());
        }
        if start.resumable_ms > 0 {
            match begin(&self.decode, start) {
                Ok((kept, reader)) => self.read(handle, kept, reader, None),
                Err(refusal) => self.say(handle, Output::Refused(refusal)).await,
            }
            return Ok(());
        }
        let (unwanted, choices) = watch::channel(Vec::new());
        let (decode, outlet, said) = (self.decode.clone(), self.outlet.clone(), self.said.clone());
        let task = self.tasks.spawn(serve(decode, outlet, said, choices, start));
        self.running.insert(handle, Running { task, wanted: Wanted::Here(unwanted) });
        Ok(())
    }

    /// Takes over a kept request.
    async fn resume(&mut self, resume: Resume) -> Result<(), Status> {
        let handle = resume.handle;
        if self.running.contains_key(&handle) {
            return Err(Status::invalid_argument(format!("handle {handle} is in use")));
        }
        let request = request_id(&resume.request).map_err(|bad| Status::invalid_argument(bad.to_string()))?;
        match self.decode.keeper.find(request, &resume.tenant) {
            Some(kept) => {
                let (resumed, reader) = kept.resume();
                self.read(handle, kept, reader, Some(Output::Resumed(resumed)));
            }
            None => {
                let refusal = refusal(Refused::Unknown, "no such request goes on here without its gateway");
                self.say(handle, Output::Refused(refusal)).await;
            }
        }
        Ok(())
    }

    fn read(&mut self, handle: u32, kept: Arc<Kept>, reader: Reader, first: Option<Output>) {
        let task = self.tasks.spawn(pass(reader, first, handle, self.said.clone()));
        self.running.insert(handle, Running { task, wanted: Wanted::Kept(kept) });
    }

    /// Unknown handles have ended by themselves meanwhile.
    fn cancel(&mut self, cancel: &Cancel) {
        if !cancel.choices.is_empty() {
            let Some(running) = self.running.get(&cancel.handle) else { return };
            let unwanted = match &running.wanted {
                Wanted::Here(unwanted) => unwanted,
                Wanted::Kept(kept) => &kept.unwanted_choices,
            };
            return unwanted.send_modify(|unwanted| {
                let new = cancel.choices.iter().take(CHOICES_MAX as usize).filter(|new| !unwanted.contains(new));
                let new: Vec<u32> = new.copied().collect();
                unwanted.extend(new.into_iter().filter(|choice| *choice < CHOICES_MAX));
            });
        }
        let Some(Running { task, wanted }) = self.running.remove(&cancel.handle) else { return };
        task.abort();
        if let Wanted::Kept(kept) = wanted {
            kept.give_up();
        }
    }

    async fn ended(&mut self, ended: Result<(Id, u32), JoinError>) {
        let handle = match &ended {
            Ok((_, handle)) => Some(*handle),
            Err(error) => self.running.iter().find(|(_, one)| one.task.id() == error.id()).map(|(handle, _)| *handle),
        };
        let Some(handle) = handle else { return };
        let id = ended.as_ref().map_or_else(JoinError::id, |(id, _)| *id);
        // A cancelled request's handle may have been given to another one.
        if self.running.get(&handle).is_some_and(|running| running.task.id() == id) {
            self.running.remove(&handle);
        }
        if ended.is_err_and(|error| error.is_panic()) {
            self.say(handle, Output::Aborted(abort(Aborted::Internal, "the request's task panicked"))).await;
        }
    }

    async fn say(&self, handle: u32, output: Output) {
        // Without a reader the stream is about to end.
        let _ = self.said.send(RequestOutput { handle, output: Some(output) }).await;
    }
}
