//! A tensor-parallel group one of whose ranks breaks: it panics, or does not come any more, after some steps. A worker
//! must end soon then, and nothing may hang.

use std::io;
use std::sync::mpsc::Receiver;

use baton_kernels::Broken;

use crate::model::CpuModel;
use crate::ranks::{Compute, Step};

/// What becomes of a rank.
pub enum Fault {
    Panics,
    /// It stays where it is until the sender is dropped.
    Hangs(Receiver<()>),
}

/// Makes one model of the ranks that `load_ranks` gave; rank `faulty`, not 0, breaks after so many steps.
pub fn faulty_group(mut ranks: Vec<CpuModel>, faulty: usize, steps: usize, fault: Fault) -> io::Result<CpuModel> {
    let mut others: Vec<Compute> = ranks.split_off(1).into_iter().map(CpuModel::compute).collect();
    let mut compute = std::mem::replace(&mut others[faulty - 1], Box::new(|_| Ok(())));
    let mut left = steps;
    others[faulty - 1] = Box::new(move |step: &Step| {
        if left > 0 {
            left -= 1;
            return compute(step);
        }
        match &fault {
            Fault::Panics => panic!("rank {faulty} was made to break"),
            // An error: the sender is gone.
            Fault::Hangs(until) => until.recv().map_or(Err(Broken::Aborted), |()| Ok(())),
        }
    });
    CpuModel::group(ranks.remove(0), others)
}
