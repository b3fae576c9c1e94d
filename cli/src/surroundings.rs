//! The machine and environment this process finds itself in: variables, home, cores, memory, ports.

use std::net::SocketAddr;
use std::path::PathBuf;

/// An environment variable, if it is set to something.
#[allow(clippy::disallowed_methods)] // cli is the one reader of the environment.
pub(crate) fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|value| !value.is_empty())
}

/// Where a cluster keeps its files unless told otherwise: `$HOME/.baton`, or `./.baton` without a home.
pub(crate) fn default_data() -> PathBuf {
    PathBuf::from(variable("HOME").unwrap_or_else(|| ".".to_string())).join(".baton")
}

/// Where compiled GPU kernels are kept: `$BATON_CUBINS`, or a folder of the default data directory.
pub(crate) fn cubins() -> PathBuf {
    variable("BATON_CUBINS").map_or_else(|| default_data().join("cubins"), PathBuf::from)
}

/// Processors this process may use.
pub(crate) fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, |n| n.get())
}

/// Threads for each of `workers` that share this machine: their share of the cores, rounded up.
pub(crate) fn threads_each(cores: usize, workers: usize) -> usize {
    cores.div_ceil(workers.max(1)).max(1)
}

/// Bytes of memory the operating system could still give out; None where it does not say.
pub(crate) fn memory_available() -> Option<u64> {
    meminfo(&std::fs::read_to_string("/proc/meminfo").ok()?, "MemAvailable")
}

/// Bytes of memory the machine has.
pub(crate) fn memory_total() -> Option<u64> {
    meminfo(&std::fs::read_to_string("/proc/meminfo").ok()?, "MemTotal")
}

/// Resident bytes of a process.
pub(crate) fn resident(pid: u32) -> Option<u64> {
    meminfo(&std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?, "VmRSS")
}

/// Weights of fewer bytes are packed sooner than a file of them would be of use, and multiplied sooner than threads wake.
pub(crate) const LARGE_MODEL_BYTES: u64 = 64 << 20;

/// Bytes of a model's weights: of the GGUF file, or of the safetensors files in the directory; 0 where there are none.
pub(crate) fn model_bytes(model: &std::path::Path) -> u64 {
    let size = |path: &std::path::Path| std::fs::metadata(path).map_or(0, |known| known.len());
    let Ok(files) = std::fs::read_dir(model) else { return size(model) };
    let paths = files.filter_map(|file| Some(file.ok()?.path()));
    paths.filter(|path| path.extension().is_some_and(|kind| kind == "safetensors")).map(|path| size(&path)).sum()
}

fn meminfo(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok().map(|kib| kib * 1024)
}

/// Whether a socket could be bound to the address now.
#[allow(clippy::disallowed_methods)] // Looks before the children do, so that a busy port is told before they start.
pub(crate) fn bindable(address: SocketAddr) -> std::io::Result<()> {
    std::net::TcpListener::bind(address).map(drop)
}

/// Lowest port the operating system hands to outgoing connections. Fixed ports are chosen below it: a client that
/// retries a port of that range, where nobody listens yet, can be connected to itself.
fn ephemeral_port_min() -> u16 {
    let range = std::fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range").unwrap_or_default();
    range.split_whitespace().next().and_then(|port| port.parse().ok()).unwrap_or(32_768)
}

/// A port that is free on the host now, chosen by `rng`, other than those in `taken`.
pub(crate) fn free_port(host: std::net::IpAddr, taken: &[u16], rng: &mut baton_core::Rng) -> Option<u16> {
    const TRIES: usize = 256;
    let max = ephemeral_port_min().max(12_000);
    let min = max / 2;
    let mut candidates = (0..TRIES).map(|_| min + rng.below((max - min) as u64) as u16);
    candidates.find(|port| !taken.contains(port) && bindable(SocketAddr::new(host, *port)).is_ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_lines_are_read_in_bytes() {
        let text = "MemTotal:       16 kB\nMemAvailable:    8 kB\nHugePages_Total:       3\n";
        assert_eq!(meminfo(text, "MemAvailable"), Some(8192));
        assert_eq!(meminfo(text, "HugePages_Total"), None);
        assert_eq!(meminfo(text, "Mem"), None);
    }

    #[test]
    fn workers_share_the_cores_and_have_at_least_one() {
        for (cores, workers, expected) in [(8, 2, 4), (8, 3, 3), (2, 4, 1), (1, 1, 1), (4, 0, 4)] {
            assert_eq!(threads_each(cores, workers), expected, "{cores} cores, {workers} workers");
        }
    }
}
