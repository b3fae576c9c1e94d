//! gRPC channels to other workers, by address.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use baton_core::Net;
use tonic::transport::Channel;

/// Workers that have been called lately; when there are more, all channels are made anew.
const CHANNELS_MAX: usize = 1024;

pub struct Channels {
    net: Arc<dyn Net>,
    made: Mutex<BTreeMap<String, Channel>>,
}

impl Channels {
    pub fn new(net: Arc<dyn Net>) -> Channels {
        Channels { net, made: Mutex::default() }
    }

    /// The channel to `address`; the error says what is wrong with that.
    pub fn get(&self, address: &str) -> Result<Channel, String> {
        let mut made = self.made.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        if let Some(channel) = made.get(address) {
            return Ok(channel.clone());
        }
        let channel = baton_proto::channel(self.net.clone(), address).map_err(|bad| bad.to_string())?;
        if made.len() >= CHANNELS_MAX {
            made.clear();
        }
        made.insert(address.to_string(), channel.clone());
        Ok(channel)
    }
}
