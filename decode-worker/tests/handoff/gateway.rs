//! The gateway's side of a Generate stream.

use std::collections::BTreeMap;
use std::time::Duration;

use baton_core::{Assignment, Epoch, Place, Request};
use baton_engine::{Choice, Engine, EngineConfig, Event, ModelSpec, testing};
use baton_proto::convert::{aborted, refused};
use baton_proto::v1::decode_client::DecodeClient;
use baton_proto::v1::generate_command::Command;
use baton_proto::v1::request_output::Output;
use baton_proto::v1::{
    Abort, Admitted, Cancel, ChoiceFinished, GenerateCommand, PromptLogprob, Refusal, RequestOutput, Resume, Resumed,
    Start, StepOutput, Token,
};
use futures::channel::mpsc;
use tokio::time::timeout;
use tonic::Streaming;

use crate::cluster::{Cluster, Worker};

/// What these gateways write on their requests.
pub(crate) const NOTE: &[u8] = b"a note";

/// One request and who is to serve it.
#[derive(Clone, Debug)]
pub(crate) struct Order {
    pub(crate) request: Request,
    pub(crate) choices: Vec<Choice>,
    pub(crate) decode: Place,
    pub(crate) prefill: Option<Place>,
    pub(crate) epoch: u64,
    /// How long it outlives its stream.
    pub(crate) resumable_ms: u64,
}

impl Order {
    pub(crate) fn new(request: Request, decode: &Worker, prefill: Option<&Worker>) -> Order {
        let choices = (0..request.choices).map(|index| Choice { index, so_far: Vec::new() }).collect();
        Order {
            request,
            choices,
            decode: decode.place(),
            prefill: prefill.map(Worker::place),
            epoch: 1,
            resumable_ms: 0,
        }
    }

    fn start(&self, handle: u32) -> Start {
        let assignment = Assignment {
            holder: None,
            request: self.request.id,
            attempt: 1,
            epoch: Epoch(self.epoch),
            decode: self.decode.clone(),
            prefill: self.prefill.clone(),
            lease_ms: self.request.deadline_ms,
            explanation: String::new(),
            cluster: String::new(),
        };
        let wire = |c: &Choice| baton_proto::v1::Choice { index: c.index, so_far: c.so_far.clone() };
        Start {
            handle,
            assignment: Some(assignment.into()),
            request: Some((&self.request).into()),
            choices: self.choices.iter().map(wire).collect(),
            resumable_ms: self.resumable_ms,
            note: NOTE.into(),
        }
    }
}

/// What a gateway has been told about one request.
#[derive(Clone, Debug, Default)]
pub(crate) struct Told {
    choices: usize,
    pub(crate) admitted: Option<Admitted>,
    pub(crate) tokens: BTreeMap<u32, Vec<Token>>,
    pub(crate) prompt_logprobs: Vec<PromptLogprob>,
    pub(crate) finished: BTreeMap<u32, ChoiceFinished>,
    pub(crate) aborted: Option<Abort>,
    pub(crate) refused: Option<Refusal>,
    pub(crate) resumed: Option<Resumed>,
}

impl Told {
    pub(crate) fn is_over(&self) -> bool {
        self.aborted.is_some() || self.refused.is_some() || self.finished.len() == self.choices
    }

    pub(crate) fn ids(&self) -> BTreeMap<u32, Vec<u32>> {
        self.tokens.iter().map(|(choice, tokens)| (*choice, tokens.iter().map(|t| t.id).collect())).collect()
    }

    pub(crate) fn aborted(&self) -> baton_core::Aborted {
        aborted(self.aborted.as_ref().unwrap_or_else(|| panic!("not aborted: {self:?}")))
    }

    pub(crate) fn refused(&self) -> baton_core::Refused {
        refused(self.refused.as_ref().unwrap_or_else(|| panic!("not refused: {self:?}")))
    }
}

/// One stream to one decode worker.
pub(crate) struct Gateway {
    commands: mpsc::Sender<GenerateCommand>,
    answers: Streaming<StepOutput>,
    told: BTreeMap<u32, Told>,
    /// Messages read.
    pub(crate) messages: usize,
}

impl Gateway {
    pub(crate) async fn connect(cluster: &Cluster, decode: &Worker) -> Gateway {
        Gateway::to(cluster, &decode.running.address()).await
    }

    pub(crate) async fn to(cluster: &Cluster, address: &str) -> Gateway {
        let channel = baton_proto::channel(cluster.net.clone(), address).unwrap();
        let (commands, outgoing) = mpsc::channel(64);
        let answers = DecodeClient::new(channel).generate(outgoing).await.unwrap().into_inner();
        Gateway { commands, answers, told: BTreeMap::new(), messages: 0 }
    }

    pub(crate) fn start(&mut self, order: &Order) -> u32 {
        let handle = self.told.len() as u32;
        self.told.insert(handle, Told { choices: order.choices.len(), ..Told::default() });
        self.send(Command::Start(order.start(handle)));
        handle
    }

    pub(crate) fn cancel(&mut self, handle: u32) {
        self.send(Command::Cancel(Cancel { handle, ..Cancel::default() }));
    }

    pub(crate) fn cancel_choices(&mut self, handle: u32, choices: &[u32]) {
        self.send(Command::Cancel(Cancel { handle, choices: choices.to_vec() }));
    }

    /// Takes over a request of `choices` choices.
    pub(crate) fn resume(&mut self, request: baton_core::RequestId, tenant: &str, choices: usize) -> u32 {
        let handle = self.told.len() as u32;
        self.told.insert(handle, Told { choices, ..Told::default() });
        let (request, tenant) = (request.to_string(), tenant.to_string());
        self.send(Command::Resume(Resume { handle, request, tenant }));
        handle
    }

    fn send(&mut self, command: Command) {
        self.commands.try_send(GenerateCommand { command: Some(command) }).unwrap();
    }

    pub(crate) fn told(&self, handle: u32) -> &Told {
        &self.told[&handle]
    }

    /// Reads until `condition` holds for what the request was told.
    pub(crate) async fn until(&mut self, handle: u32, condition: impl Fn(&Told) -> bool) -> Told {
        while !condition(&self.told[&handle]) {
            let message = timeout(Duration::from_secs(60), self.answers.message()).await;
            let message = message.unwrap_or_else(|_| panic!("nothing more came: {:?}", self.told[&handle]));
            self.read(message.unwrap().expect("the stream goes on"));
        }
        self.told[&handle].clone()
    }

    pub(crate) async fn finish(&mut self, handle: u32) -> Told {
        self.until(handle, Told::is_over).await
    }

    /// How the stream ends.
    pub(crate) async fn ended(&mut self) -> Result<(), tonic::Status> {
        while let Some(message) = timeout(Duration::from_secs(60), self.answers.message()).await.unwrap()? {
            self.read(message);
        }
        Ok(())
    }

    /// Starts and reads to the end.
    pub(crate) async fn run(&mut self, order: &Order) -> Told {
        let handle = self.start(order);
        self.finish(handle).await
    }

    fn read(&mut self, message: StepOutput) {
        self.messages += 1;
        for RequestOutput { handle, output } in message.outputs {
            let told = self.told.get_mut(&handle).expect("a handle of this stream");
            assert!(!told.is_over(), "more after the end: {output:?}");
            match output.expect("an output") {
                Output::Admitted(admitted) => told.admitted = Some(admitted),
                Output::Tokens(new) => told.tokens.entry(new.choice).or_default().extend(new.tokens),
                Output::PromptLogprobs(prompt) => told.prompt_logprobs = prompt.tokens,
                Output::Finished(finished) => drop(told.finished.insert(finished.choice, finished)),
                Output::Aborted(abort) => told.aborted = Some(abort),
                Output::Refused(refusal) => told.refused = Some(refusal),
                Output::Resumed(resumed) => {
                    for said in &resumed.tokens {
                        told.tokens.entry(said.choice).or_default().extend(said.tokens.iter().cloned());
                    }
                    told.finished = resumed.finished.iter().map(|end| (end.choice, end.clone())).collect();
                    told.resumed = Some(resumed);
                }
            }
        }
    }
}

/// What one engine alone makes of a request, with `backend`.
pub(crate) fn alone(
    spec: ModelSpec,
    config: EngineConfig,
    backend: &mut dyn baton_engine::Backend,
    order: &Order,
) -> BTreeMap<u32, Vec<Token>> {
    let mut engine = Engine::new(spec, config);
    engine.admit(baton_engine::Work { choices: order.choices.clone(), ..testing::work(&order.request) }).unwrap();
    let mut tokens: BTreeMap<u32, Vec<Token>> = BTreeMap::new();
    for event in testing::drain(&mut engine, backend) {
        if let Event::Tokens { choice, tokens: new, .. } = event {
            tokens.entry(choice).or_default().extend(new.into_iter().map(Token::from));
        }
    }
    tokens
}
