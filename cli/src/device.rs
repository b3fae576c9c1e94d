//! What a worker computes on: `cpu`, or a GPU as `cuda` or `cuda:1`.

#[cfg_attr(feature = "cuda", path = "device/cuda.rs")]
#[cfg_attr(not(feature = "cuda"), path = "device/without.rs")]
mod gpu;

use std::fmt;
use std::path::Path;
use std::str::FromStr;

use baton_core::{KvDtype, Role};
use baton_kernels::Quantize;

pub(crate) use gpu::{bench, doctor, finding, read, send, transfer};

/// A device by name.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Device {
    #[default]
    Cpu,
    Cuda(usize),
}

impl Device {
    /// Refuses weights and a cache that it cannot compute with.
    pub(crate) fn check(self, model: &Path, quantize: Option<Quantize>, kv_dtype: KvDtype) -> Result<(), String> {
        match self {
            Device::Cuda(_) if kv_dtype != KvDtype::Bf16 => Err(format!(
                "{self} keeps keys and values in bf16; --kv-dtype {} is for --device cpu",
                kv_dtype.as_str()
            )),
            Device::Cuda(_) if quantize.is_some() || model.is_file() => Err(format!(
                "{self} computes in bf16 from a model directory; quantized weights and GGUF files are for --device cpu"
            )),
            _ => Ok(()),
        }
    }
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

/// What the workers of a cluster compute on: `cpu`, `cuda`, or GPUs that they take in turn, as `cuda:0,1`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Devices(Vec<Device>);

impl Devices {
    /// Prefill workers take the first ones, decode workers the last.
    pub(crate) fn of(&self, role: Role, number: usize) -> Device {
        let turn = number % self.0.len();
        match role {
            Role::Prefill => self.0[turn],
            _ => self.0[self.0.len() - 1 - turn],
        }
    }
}

impl FromStr for Devices {
    type Err = String;

    fn from_str(text: &str) -> Result<Devices, String> {
        let Some(indices) = text.strip_prefix("cuda:") else { return Ok(Devices(vec![text.parse()?])) };
        indices.split(',').map(|index| format!("cuda:{index}").parse()).collect::<Result<_, _>>().map(Devices)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gpus_refuse_quantized_weights() {
        let check = |device: Device, model: &str, quantize| device.check(Path::new(model), quantize, KvDtype::Bf16);
        let file = concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.toml");
        assert!(check(Device::Cpu, file, Some(Quantize::Q8_0)).is_ok());
        assert!(check(Device::Cuda(0), "/models/a", None).is_ok());
        assert!(check(Device::Cuda(1), "/models/a", Some(Quantize::Q8_0)).unwrap_err().contains("cuda:1"));
        assert!(check(Device::Cuda(0), file, None).unwrap_err().contains("GGUF"));
    }

    #[test]
    fn gpus_refuse_caches_in_8_bits() {
        for dtype in [KvDtype::F32, KvDtype::Int8, KvDtype::Fp8] {
            assert!(Device::Cpu.check(Path::new("/models/a"), None, dtype).is_ok());
            let refused = Device::Cuda(2).check(Path::new("/models/a"), None, dtype).unwrap_err();
            assert!(refused.contains("cuda:2") && refused.contains(dtype.as_str()), "{refused}");
        }
    }

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

    #[test]
    fn workers_take_gpus_in_turn() {
        let devices: Devices = "cuda:2,5".parse().expect("two GPUs");
        let of = |role| [0, 1, 2].map(|number| devices.of(role, number));
        assert_eq!(of(Role::Prefill), [2, 5, 2].map(Device::Cuda));
        assert_eq!(of(Role::Decode), [5, 2, 5].map(Device::Cuda));
        assert_eq!("cpu".parse::<Devices>().map(|devices| devices.of(Role::Decode, 3)), Ok(Device::Cpu));
        for text in ["cuda:", "cuda:0,", "cuda:0,cpu", "cpu,cuda:0", "cuda,1"] {
            assert!(text.parse::<Devices>().is_err(), "{text}");
        }
    }
}
