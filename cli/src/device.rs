//! What a worker computes on: `cpu`, or a GPU as `cuda` or `cuda:1`.

#[cfg_attr(feature = "cuda", path = "device/cuda.rs")]
#[cfg_attr(not(feature = "cuda"), path = "device/without.rs")]
mod gpu;

use std::fmt;
use std::str::FromStr;

pub(crate) use gpu::{bench, doctor, finding, read};

/// A device by name.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Device {
    #[default]
    Cpu,
    Cuda(usize),
}

impl FromStr for Device {
    type Err = String;

    fn from_str(text: &str) -> Result<Device, String> {
        let index = match text {
            "cpu" => return Ok(Device::Cpu),
            "cuda" => Some(0),
            _ => text.strip_prefix("cuda:").and_then(|index| index.parse().ok()),
        };
        index.map(Device::Cuda).ok_or_else(|| format!("{text:?} is no device; cpu, cuda and cuda:INDEX are"))
    }
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Device::Cpu => f.write_str("cpu"),
            Device::Cuda(index) => write!(f, "cuda:{index}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_have_one_name_each() {
        for (text, expected) in
            [("cpu", Some(Device::Cpu)), ("cuda", Some(Device::Cuda(0))), ("cuda:3", Some(Device::Cuda(3)))]
        {
            assert_eq!(text.parse().ok(), expected);
        }
        for text in ["", "gpu", "cuda:", "cuda:x", "cuda:-1", "CPU"] {
            assert!(text.parse::<Device>().is_err(), "{text}");
        }
        assert_eq!(Device::Cuda(1).to_string().parse(), Ok(Device::Cuda(1)));
    }
}
