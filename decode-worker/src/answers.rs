//! What a gateway reads: one message per engine step, with everything the step has for it.

use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use baton_core::planted::{self, Bug};
use baton_engine::{Event, Usage};
use baton_proto::convert::{abort, finish_word, prompt_logprobs, refusal};
use baton_proto::v1::request_output::Output;
use baton_proto::v1::{Admitted, ChoiceFinished, PromptLogprobs, RequestOutput, StepOutput, Tokens};
use baton_worker::outlet::{Inlet, Note, Notes, Phases};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tonic::Status;

/// The answers of one stream. When the gateway goes away this is dropped, and with it all the stream's requests.
pub(crate) struct Answers {
    inlet: Inlet,
    ends: mpsc::Receiver<RequestOutput>,
    following: JoinHandle<Result<(), Status>>,
    /// How `following` ended, once it has.
    ended: Option<Result<(), Status>>,
    over: bool,
}

impl Answers {
    pub(crate) fn new(
        inlet: Inlet,
        ends: mpsc::Receiver<RequestOutput>,
        following: JoinHandle<Result<(), Status>>,
    ) -> Answers {
        Answers { inlet, ends, following, ended: None, over: false }
    }

    /// Learns how `following` ended. Asked before what has come is read: what was said before it ended is then there.
    fn learn_end(&mut self, cx: &mut Context<'_>) {
        if self.ended.is_none()
            && let Poll::Ready(ended) = Pin::new(&mut self.following).poll(cx)
        {
            self.ended = Some(ended.unwrap_or_else(|_| Err(Status::internal("the stream's task panicked"))));
        }
    }

    /// How the stream ends once everything that has come is read: with an error at once, because an engine that is stuck
    /// may hold the other end; else when nothing more can come.
    fn end(&mut self, all_read: bool) -> Poll<Option<Result<StepOutput, Status>>> {
        match &self.ended {
            Some(Err(status)) => {
                self.over = true;
                Poll::Ready(Some(Err(status.clone())))
            }
            Some(Ok(())) if all_read => {
                self.over = true;
                Poll::Ready(None)
            }
            _ => Poll::Pending,
        }
    }
}

impl futures::Stream for Answers {
    type Item = Result<StepOutput, Status>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if self.over {
            return Poll::Ready(None);
        }
        self.learn_end(cx);
        let mut closed = 0;
        match self.ends.poll_recv(cx) {
            Poll::Ready(Some(output)) => return Poll::Ready(Some(Ok(StepOutput { outputs: vec![output] }))),
            Poll::Ready(None) => closed += 1,
            Poll::Pending => {}
        }
        match self.inlet.poll_next(cx) {
            Poll::Ready(Some(notes)) => return Poll::Ready(Some(Ok(step_output(notes)))),
            Poll::Ready(None) => closed += 1,
            Poll::Pending => {}
        }
        // tokio lets a task that has read much pause, and says Pending although more is there.
        if !self.ends.is_empty() || !(self.inlet.is_empty() || self.inlet.is_overrun()) {
            return Poll::Pending;
        }
        self.end(closed == 2)
    }
}

impl Drop for Answers {
    fn drop(&mut self) {
        self.following.abort();
    }
}

fn step_output(notes: Notes) -> StepOutput {
    let outputs = notes.into_iter().filter_map(|(handle, note)| {
        let output = Some(output(note)?);
        Some(RequestOutput { handle, output })
    });
    match planted::is(Bug::CompletionLost) {
        true => StepOutput { outputs: first_end_only(outputs) },
        false => StepOutput { outputs: outputs.collect() },
    }
}

/// The planted bug: of the ends in one step only the first is said.
fn first_end_only(outputs: impl Iterator<Item = RequestOutput>) -> Vec<RequestOutput> {
    let mut ended = false;
    let said = |said: &RequestOutput| {
        let ends = matches!(said.output, Some(Output::Finished(_)));
        let again = ended && ends;
        ended |= ends;
        !again
    };
    outputs.filter(said).collect()
}

/// What a gateway is told; None for what concerns handoffs only.
pub(crate) fn output(note: Note) -> Option<Output> {
    Some(match note {
        Note::Admitted(phases) => Output::Admitted(admitted(phases)),
        Note::Refused(reason) => Output::Refused(refusal(reason, "the engine does not take it")),
        Note::Event(Event::Tokens { choice, tokens, .. }) => {
            Output::Tokens(Tokens { choice, tokens: tokens.into_iter().map(Into::into).collect() })
        }
        Note::Event(Event::PromptLogprobs { tokens, .. }) => {
            Output::PromptLogprobs(PromptLogprobs { tokens: prompt_logprobs(tokens) })
        }
        Note::Event(Event::Finished { choice, finish, usage, .. }) => Output::Finished(finished(choice, finish, usage)),
        Note::Event(Event::Aborted { reason, .. }) => Output::Aborted(abort(reason, "in the decode worker's engine")),
        Note::Layer { .. } | Note::Event(Event::Prefilled { .. }) => return None,
    })
}

fn admitted(phases: Phases) -> Admitted {
    let us = |duration: Duration| duration.as_micros() as u64;
    Admitted {
        cached_tokens: phases.cached_tokens,
        prefill_queue_us: us(phases.prefill_queue),
        prefill_compute_us: us(phases.prefill_compute),
        transfer_us: us(phases.transfer),
        handoff_us: us(phases.handoff),
        local_prefill: phases.local_prefill,
    }
}

fn finished(choice: u32, finish: baton_core::Finish, usage: Usage) -> ChoiceFinished {
    let (reason, stop_token) = finish_word(finish);
    ChoiceFinished {
        choice,
        reason: reason.into(),
        stop_token,
        prompt_tokens: usage.prompt_tokens as u64,
        cached_tokens: usage.cached_tokens as u64,
        generated_tokens: usage.generated_tokens as u64,
    }
}

#[cfg(test)]
mod tests {
    use baton_worker::outlet::outlet;
    use futures::StreamExt;

    use super::*;

    /// More than tokio lets a task read in one go waits when the stream ends with an error: all of it comes first.
    #[tokio::test]
    async fn what_was_said_before_the_end_comes_first() {
        const SAID: usize = 1_000;
        let (_outlet, inlet) = outlet(1);
        let (said, ends) = mpsc::channel(SAID);
        for handle in 0..SAID as u32 {
            said.try_send(RequestOutput { handle, output: None }).unwrap();
        }
        let following = tokio::spawn(async { Err(Status::unavailable("the worker is stopping")) });
        while !following.is_finished() {
            tokio::task::yield_now().await;
        }
        let answers = Answers::new(inlet, ends, following);
        let read: Vec<_> = tokio::spawn(answers.collect()).await.unwrap();
        assert_eq!(read.iter().filter(|answer| answer.is_ok()).count(), SAID);
        assert!(read.last().unwrap().is_err());
    }
}
