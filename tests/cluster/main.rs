//! Black-box tests on real processes: `baton up`, HTTP, signals.

mod access;
mod bad_input;
mod canary;
mod chaos;
mod control;
mod explain;
mod faults;
mod kept;
mod kv_dtypes;
mod late;
mod ledger;
mod links;
mod moves;
mod poison;
mod pools;
mod quantized;
mod recall;
mod refusals;
mod resume;
mod same_bytes;
mod serving;
mod tensor_parallel;
mod tiers;
