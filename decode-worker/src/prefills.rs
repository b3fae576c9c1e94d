//! Channels to prefill workers, by address, and the Prefill call.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use baton_core::limits::MESSAGE_BYTES_MAX;
use baton_core::{Aborted, Net, Place};
use baton_proto::convert::{abort, aborted};
use baton_proto::v1::prefill_client::PrefillClient;
use baton_proto::v1::prefill_reply::Outcome;
use baton_proto::v1::{Abort, PrefillRequest, Prefilled};
use tonic::transport::Channel;
use tonic::{Code, Status};

/// Workers that have been called lately; when there are more, all channels are made anew.
const CHANNELS_MAX: usize = 1024;

pub(crate) struct Prefills {
    net: Arc<dyn Net>,
    channels: Mutex<BTreeMap<String, Channel>>,
}

impl Prefills {
    pub(crate) fn new(net: Arc<dyn Net>) -> Prefills {
        Prefills { net, channels: Mutex::default() }
    }

    /// Asks the prefill worker at `place`. Dropping the future tells it to stop.
    pub(crate) async fn call(&self, place: &Place, request: PrefillRequest) -> Result<Prefilled, Abort> {
        let channel = self.channel(&place.address).map_err(|error| blame(place, Aborted::PrefillLost, error))?;
        let mut client = PrefillClient::new(channel)
            .max_encoding_message_size(MESSAGE_BYTES_MAX)
            .max_decoding_message_size(MESSAGE_BYTES_MAX);
        let reply = client.prefill(request).await.map_err(|status| failed(place, &status))?;
        match reply.into_inner().outcome {
            Some(Outcome::Prefilled(prefilled)) => Ok(prefilled),
            Some(Outcome::Aborted(theirs)) => Err(blame(place, aborted(&theirs), theirs.detail)),
            Some(Outcome::Refused(refusal)) => {
                Err(blame(place, Aborted::PrefillRefused, format!("{}: {}", refusal.reason, refusal.detail)))
            }
            None => Err(blame(place, Aborted::Internal, "an answer without outcome".into())),
        }
    }

    fn channel(&self, address: &str) -> Result<Channel, String> {
        let mut channels = self.channels.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        if let Some(channel) = channels.get(address) {
            return Ok(channel.clone());
        }
        let channel = baton_proto::channel(self.net.clone(), address).map_err(|bad| bad.to_string())?;
        if channels.len() >= CHANNELS_MAX {
            channels.clear();
        }
        channels.insert(address.to_string(), channel.clone());
        Ok(channel)
    }
}

/// An abort that names the prefill worker's life as the one to do without.
pub(crate) fn blame(place: &Place, reason: Aborted, detail: String) -> Abort {
    Abort { failed: Some(place.into()), ..abort(reason, detail) }
}

/// A call without an answer: the worker is gone, unless it says itself what is wrong with the message.
fn failed(place: &Place, status: &Status) -> Abort {
    let reason = match status.code() {
        Code::InvalidArgument | Code::Unimplemented | Code::OutOfRange => Aborted::Internal,
        Code::DeadlineExceeded => Aborted::Deadline,
        _ => Aborted::PrefillLost,
    };
    blame(place, reason, status.to_string())
}
