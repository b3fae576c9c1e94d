//! Black-box tests on real processes: `baton up`, HTTP, signals.

mod bad_input;
mod chaos;
mod control;
mod faults;
mod pools;
mod recall;
mod same_bytes;
mod serving;
mod tensor_parallel;
