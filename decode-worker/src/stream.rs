//! One stream per gateway: commands in, answers out. When it breaks, or its gateway reads too slowly, every request
//! that came by it is cancelled.

use std::collections::BTreeMap;
use std::sync::Arc;

use baton_core::limits::GATEWAY_REQUESTS_MAX;
use baton_core::{Aborted, Refused};
use baton_proto::convert::{abort, refusal};
use baton_proto::v1::decode_server::Decode as DecodeService;
use baton_proto::v1::generate_command::Command;
use baton_proto::v1::request_output::Output;
use baton_proto::v1::{GenerateCommand, RequestOutput, Start};
use baton_worker::outlet::{Outlet, outlet};
use tokio::sync::mpsc;
use tokio::task::{AbortHandle, Id, JoinError, JoinSet};
use tonic::{Response, Status, Streaming};

use crate::Decode;
use crate::answers::Answers;
use crate::request::serve;

/// Steps that a gateway may be behind before its requests are cancelled.
const STEPS_UNREAD_MAX: usize = 1024;
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
    running: BTreeMap<u32, AbortHandle>,
}

impl Requests {
    async fn take(&mut self, command: GenerateCommand) -> Result<(), Status> {
        match command.command {
            Some(Command::Start(start)) => self.start(start).await,
            Some(Command::Cancel(cancel)) => {
                // Unknown handles have ended by themselves meanwhile.
                if let Some(task) = self.running.remove(&cancel.handle) {
                    task.abort();
                }
                Ok(())
            }
            Some(Command::Resume(resume)) => {
                let refusal = refusal(Refused::Unknown, "no request goes on here without its gateway");
                self.say(resume.handle, Output::Refused(refusal)).await;
                Ok(())
            }
            None => Err(Status::invalid_argument("a command of a newer version")),
        }
    }

    async fn start(&mut self, start: Start) -> Result<(), Status> {
        let handle = start.handle;
        if self.running.contains_key(&handle) {
            return Err(Status::invalid_argument(format!("handle {handle} is in use")));
        }
        if self.running.len() >= GATEWAY_REQUESTS_MAX {
            let refusal = refusal(Refused::NoCapacity, "too many requests on one stream");
            self.say(handle, Output::Refused(refusal)).await;
            return Ok(());
        }
        let task = self.tasks.spawn(serve(self.decode.clone(), self.outlet.clone(), self.said.clone(), start));
        self.running.insert(handle, task);
        Ok(())
    }

    async fn ended(&mut self, ended: Result<(Id, u32), JoinError>) {
        let handle = match &ended {
            Ok((_, handle)) => Some(*handle),
            Err(error) => self.running.iter().find(|(_, task)| task.id() == error.id()).map(|(handle, _)| *handle),
        };
        let Some(handle) = handle else { return };
        let id = ended.as_ref().map_or_else(JoinError::id, |(id, _)| *id);
        // A cancelled request's handle may have been given to another one.
        if self.running.get(&handle).is_some_and(|task| task.id() == id) {
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
