//! What this machine can do at most, measured: the ceilings that speeds are stated against. Neighbours move both, so a
//! share of a limit counts only with the limit measured beside it.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use crate::Profile;
use crate::cpu::ceiling;
use crate::memory::Memory;
use crate::pool::Pool;

/// More than any core's own caches hold.
const READ_BYTES: usize = 256 << 20;
/// Unit of the shares of a read.
const LINE: usize = 4096;
/// Enough for a fraction of a millisecond.
const PASSES: usize = 20_000;

/// GB/s at which `threads` together read memory: the best of `tries` passes over 256 MiB.
pub fn read_bandwidth(threads: usize, tries: usize) -> f64 {
    let memory = Memory::new(READ_BYTES);
    // SAFETY: the allocation's bytes, all written before they are read.
    let bytes = unsafe {
        memory.base().write_bytes(1, READ_BYTES);
        std::slice::from_raw_parts(memory.base(), READ_BYTES)
    };
    let mut pool = Pool::new(threads.max(1));
    let seconds = best(tries, || {
        pool.run(&|part| {
            let share = part.share(READ_BYTES / LINE);
            std::hint::black_box(ceiling::read(&bytes[share.start * LINE..share.end * LINE]));
        })
    });
    READ_BYTES as f64 / seconds / 1e9
}

/// GFLOP/s of the profile's multiply-add on registers, `threads` together: the best of `tries`.
pub fn matmul_flops(threads: usize, profile: Profile, tries: usize) -> f64 {
    on_registers(threads, tries, || ceiling::multiply(profile, PASSES))
}

/// GOP/s of products of bytes on registers, as quantized weights are multiplied.
pub fn byte_operations(threads: usize, tries: usize) -> f64 {
    on_registers(threads, tries, || ceiling::multiply_bytes(PASSES))
}

fn on_registers(threads: usize, tries: usize, work: impl Fn() -> usize + Sync) -> f64 {
    let mut pool = Pool::new(threads.max(1));
    let done = AtomicUsize::new(0);
    let seconds = best(tries, || {
        done.store(0, Ordering::Relaxed);
        pool.run(&|_| {
            done.fetch_add(work(), Ordering::Relaxed);
        });
    });
    done.into_inner() as f64 / seconds / 1e9
}

/// Shortest time of several tries, in seconds.
#[allow(clippy::disallowed_methods, reason = "measures the machine")]
pub fn best(tries: usize, mut work: impl FnMut()) -> f64 {
    let time = |_| {
        let start = Instant::now();
        work();
        start.elapsed().as_secs_f64()
    };
    (0..tries.max(1)).map(time).fold(f64::INFINITY, f64::min)
}
