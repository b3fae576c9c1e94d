//! prefill-worker
