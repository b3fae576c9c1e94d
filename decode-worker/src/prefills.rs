//! Channels to prefill workers, by address, and the Prefill call.

use std::io;
use std::sync::Arc;

use baton_core::limits::MESSAGE_BYTES_MAX;
use baton_core::{Aborted, Net, Place};
use baton_proto::convert::{abort, aborted};
use baton_proto::v1::prefill_client::PrefillClient;
use baton_proto::v1::prefill_reply::Outcome;
use baton_proto::v1::{Abort, PrefillRequest, Prefilled, WorkerPair};
use baton_worker::Channels;
use tonic::{Code, Status};

pub(crate) struct Prefills {
    channels: Channels,
}

impl Prefills {
    pub(crate) fn new(net: Arc<dyn Net>) -> Prefills {
        Prefills { channels: Channels::new(net) }
    }

    /// Asks the pair's prefill worker. Dropping the future tells it to stop.
    pub(crate) async fn call(&self, pair: Pair<'_>, request: PrefillRequest) -> Result<Prefilled, Abort> {
        let address = &pair.prefill.address;
        let channel = self.channels.get(address).map_err(|error| pair.blame_prefill(Aborted::PrefillLost, error))?;
        let mut client = PrefillClient::new(channel)
            .max_encoding_message_size(MESSAGE_BYTES_MAX)
            .max_decoding_message_size(MESSAGE_BYTES_MAX);
        let reply = client.prefill(request).await.map_err(|status| pair.lost(&status))?;
        match reply.into_inner().outcome {
            Some(Outcome::Prefilled(prefilled)) => Ok(prefilled),
            Some(Outcome::Aborted(theirs)) => Err(pair.said(theirs)),
            Some(Outcome::Refused(refusal)) => {
                let detail = format!("{}: {}", refusal.reason, refusal.detail);
                Err(pair.blame_prefill(Aborted::PrefillRefused, detail))
            }
            None => Err(pair.blame_prefill(Aborted::Internal, "an answer without outcome")),
        }
    }
}

/// Both ends of one handoff.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Pair<'a> {
    pub(crate) prefill: &'a Place,
    pub(crate) decode: &'a Place,
}

impl Pair<'_> {
    /// An abort that names the prefill worker's life as the one to do without.
    pub(crate) fn blame_prefill(self, reason: Aborted, detail: impl Into<String>) -> Abort {
        Abort { failed: Some(self.prefill.into()), ..abort(reason, detail) }
    }

    /// An abort that says that these two cannot reach one another; each may be well.
    pub(crate) fn blame_both(self, reason: Aborted, detail: impl Into<String>) -> Abort {
        let pair = WorkerPair { prefill: Some(self.prefill.into()), decode: Some(self.decode.into()) };
        Abort { failed_pair: Some(pair), ..abort(reason, detail) }
    }

    /// What the prefill worker itself gave up for. A transfer lies between the two.
    fn said(self, theirs: Abort) -> Abort {
        match aborted(&theirs) {
            reason @ Aborted::TransferFailed => self.blame_both(reason, theirs.detail),
            reason => self.blame_prefill(reason, theirs.detail),
        }
    }

    /// A call without an answer: the worker is gone, unless it says itself what is wrong with the message. Where no
    /// connection was refused or closed, silence may as well lie between the two.
    fn lost(self, status: &Status) -> Abort {
        let reason = match status.code() {
            Code::InvalidArgument | Code::Unimplemented | Code::OutOfRange => Aborted::Internal,
            Code::DeadlineExceeded => Aborted::Deadline,
            // It was dead before the request came, so the request has not killed it.
            _ if closed(status) == Some(io::ErrorKind::ConnectionRefused) => Aborted::PrefillRefused,
            _ => Aborted::PrefillLost,
        };
        match reason == Aborted::PrefillLost && closed(status).is_none() {
            true => Abort { failed: Some(self.prefill.into()), ..self.blame_both(reason, status.to_string()) },
            false => self.blame_prefill(reason, status.to_string()),
        }
    }
}

/// How the other end, or its machine, said that nobody is there.
fn closed(status: &Status) -> Option<io::ErrorKind> {
    let mut cause = std::error::Error::source(status);
    while let Some(error) = cause {
        let kind = error.downcast_ref::<io::Error>().map(io::Error::kind);
        if let Some(kind) = kind.filter(|kind| CLOSED.contains(kind)) {
            return Some(kind);
        }
        cause = error.source();
    }
    None
}

const CLOSED: &[io::ErrorKind] = &[
    io::ErrorKind::ConnectionRefused,
    io::ErrorKind::ConnectionReset,
    io::ErrorKind::ConnectionAborted,
    io::ErrorKind::BrokenPipe,
    io::ErrorKind::UnexpectedEof,
];

#[cfg(test)]
mod tests {
    use super::*;

    fn status(kind: io::ErrorKind) -> Status {
        Status::from_error(Box::new(io::Error::from(kind)))
    }

    #[test]
    fn a_closed_connection_blames_the_prefill_worker_and_silence_the_pair() {
        let (prefill, decode) = (Place::default(), Place::default());
        let pair = Pair { prefill: &prefill, decode: &decode };
        let check = |abort: Abort, failed, failed_pair| {
            assert_eq!((abort.failed.is_some(), abort.failed_pair.is_some()), (failed, failed_pair), "{abort:?}");
        };
        check(pair.lost(&status(io::ErrorKind::ConnectionReset)), true, false);
        check(pair.lost(&status(io::ErrorKind::TimedOut)), true, true);
        check(pair.lost(&Status::unavailable("silent")), true, true);
        check(pair.lost(&Status::invalid_argument("newer")), true, false);
        let refused = pair.lost(&status(io::ErrorKind::ConnectionRefused));
        assert_eq!(aborted(&refused), Aborted::PrefillRefused, "no death under this request");
        check(refused, true, false);
        check(pair.said(abort(Aborted::TransferFailed, "")), false, true);
        check(pair.said(abort(Aborted::Draining, "")), true, false);
    }
}
