//! What a worker shows on `/metrics`: `baton_worker_*`, and the names that dashboards and autoscalers made for vLLM
//! already know (`vllm:*`). Labels are closed sets.

use std::time::Duration;

use baton_core::{Aborted, Refused, Role};
use baton_engine::{CacheStats, EngineConfig, Event, Load, ModelSpec};
use baton_kvtransfer::{Audited, Counters, Dropped, Fallback, LinkCounters, LinkKind, Untrusted};
use metrics::{Counter, Gauge, Histogram, Label, counter, gauge, histogram};

use crate::peers::Pull;
use crate::tiers::Fault;

/// Handles of the engine thread, made once.
pub(crate) struct StepMetrics {
    before: Load,
    running: [Gauge; 2],
    waiting: [Gauge; 2],
    /// free, used, in flight, cached
    blocks: [Gauge; 4],
    usage: Gauge,
    steps: Counter,
    step_seconds: Histogram,
    step_tokens: Histogram,
    prompt_tokens: [Counter; 2],
    generated_tokens: [Counter; 2],
    looked_up: [Counter; 2],
    hit: [Counter; 2],
    preemptions: [Counter; 2],
    drafted: [Counter; 2],
    drafted_right: [Counter; 2],
    overruns: Counter,
    overrun_requests: Counter,
}

impl StepMetrics {
    pub(crate) fn new(model: &str) -> StepMetrics {
        let vllm = vec![Label::new("model_name", model.to_string()), Label::new("engine", "0")];
        let gauges = |own: &'static str, theirs: &'static str| [gauge!(own), gauge!(theirs, vllm.clone())];
        let counters = |own: &'static str, theirs: &'static str| [counter!(own), counter!(theirs, vllm.clone())];
        let block = |state: &'static str| gauge!("baton_worker_blocks", "state" => state);
        StepMetrics {
            before: Load::default(),
            running: gauges("baton_worker_sequences_running", "vllm:num_requests_running"),
            waiting: gauges("baton_worker_sequences_waiting", "vllm:num_requests_waiting"),
            blocks: ["free", "used", "in_flight", "cached"].map(block),
            usage: gauge!("vllm:kv_cache_usage_perc", vllm.clone()),
            steps: counter!("baton_worker_steps_total"),
            step_seconds: histogram!("baton_worker_step_seconds"),
            step_tokens: histogram!("vllm:iteration_tokens_total", vllm.clone()),
            prompt_tokens: counters("baton_worker_prompt_tokens_total", "vllm:prompt_tokens_total"),
            generated_tokens: counters("baton_worker_generated_tokens_total", "vllm:generation_tokens_total"),
            looked_up: counters("baton_worker_prefix_tokens_looked_up_total", "vllm:prefix_cache_queries_total"),
            hit: counters("baton_worker_prefix_tokens_hit_total", "vllm:prefix_cache_hits_total"),
            preemptions: counters("baton_worker_preemptions_total", "vllm:num_preemptions_total"),
            drafted: counters("baton_worker_drafted_tokens_total", "vllm:spec_decode_num_draft_tokens_total"),
            drafted_right: counters("baton_worker_drafted_right_total", "vllm:spec_decode_num_accepted_tokens_total"),
            overruns: counter!("baton_worker_streams_overrun_total"),
            overrun_requests: counter!("baton_worker_aborted_total", "reason" => "overrun"),
        }
    }

    pub(crate) fn step(&self, tokens: usize, took: Duration) {
        self.steps.increment(1);
        self.step_seconds.record(took.as_secs_f64());
        self.step_tokens.record(tokens as f64);
    }

    /// Prompt tokens of an admitted request.
    pub(crate) fn prompt(&self, tokens: usize) {
        add(&self.prompt_tokens, tokens as u64);
    }

    pub(crate) fn event(&self, event: &Event) {
        if let Event::Tokens { tokens, .. } = event {
            add(&self.generated_tokens, tokens.len() as u64);
        }
    }

    pub(crate) fn overrun(&self, requests: usize) {
        self.overruns.increment(1);
        self.overrun_requests.increment(requests as u64);
    }

    pub(crate) fn load(&mut self, load: &Load, cache: &CacheStats) {
        self.running.iter().for_each(|g| g.set(load.running as f64));
        self.waiting.iter().for_each(|g| g.set(load.waiting as f64));
        let counts = [cache.free, cache.used, cache.in_flight, cache.cached];
        self.blocks.iter().zip(counts).for_each(|(gauge, count)| gauge.set(count as f64));
        self.usage.set((cache.used + cache.in_flight) as f64 / cache.total as f64);
        add(&self.looked_up, load.tokens_looked_up - self.before.tokens_looked_up);
        add(&self.hit, load.tokens_hit - self.before.tokens_hit);
        add(&self.preemptions, load.preemptions - self.before.preemptions);
        add(&self.drafted, load.tokens_drafted - self.before.tokens_drafted);
        add(&self.drafted_right, load.drafted_right - self.before.drafted_right);
        self.before = *load;
    }
}

fn add(counters: &[Counter; 2], count: u64) {
    counters.iter().for_each(|counter| counter.increment(count));
}

/// As many connections are there as may be: further ones wait.
pub(crate) fn connections_full() {
    tracing::warn!("as many connections as there may be: further ones wait");
    counter!("baton_worker_connections_full_total").increment(1);
}

/// A block came back out of a tier, or was in the cache itself when a request looked for its prefix.
pub(crate) fn count_tier_hits(tier: &'static str, blocks: usize) {
    counter!("baton_worker_tier_hits_total", "tier" => tier).increment(blocks as u64);
}

pub(crate) fn count_tier_hit(tier: &'static str) {
    count_tier_hits(tier, 1);
}

/// Blocks that another worker holds were to be fetched; what was not fetched was computed.
pub(crate) fn count_pull(how: Pull, blocks: usize) {
    counter!("baton_worker_pulls_total", "outcome" => how.as_str()).increment(1);
    if how == Pull::Fetched {
        count_tier_hits("peer", blocks);
    }
}

/// A block that is used again was compared with what is known of it.
pub(crate) fn count_audit(found: Audited) {
    let result = match found {
        Audited::Right => "right",
        Audited::Noted => "noted",
        Audited::Damaged => "damaged",
    };
    counter!("baton_worker_audited_blocks_total", "result" => result).increment(1);
}

/// Another worker asked for blocks.
pub(crate) fn count_lend(how: &'static str) {
    counter!("baton_worker_lends_total", "outcome" => how).increment(1);
}

/// A request that had to leave a worker that drains goes on here, and how.
pub(crate) fn count_moved(how: &'static str) {
    counter!("baton_worker_moved_total", "how" => how).increment(1);
}

/// A block was written to a tier.
pub(crate) fn count_tier_saved(tier: &'static str) {
    counter!("baton_worker_tier_saved_total", "tier" => tier).increment(1);
}

/// A block had to leave a tier for another one.
pub(crate) fn count_tier_evicted(tier: &'static str) {
    counter!("baton_worker_tier_evicted_total", "tier" => tier).increment(1);
}

/// A block was not kept, or not given back; whoever wanted it computes it.
pub(crate) fn count_tier_fault(tier: &'static str, fault: Fault) {
    counter!("baton_worker_tier_faults_total", "tier" => tier, "reason" => fault.as_str()).increment(1);
}

/// Blocks left the cache before they were saved.
pub(crate) fn count_tier_lost(blocks: u64) {
    counter!("baton_worker_tier_faults_total", "tier" => "cache", "reason" => Fault::Late.as_str()).increment(blocks);
}

/// What a tier holds now.
pub(crate) fn gauge_tier(tier: &'static str, blocks: u64, block_bytes: u64) {
    gauge!("baton_worker_tier_blocks", "tier" => tier).set(blocks as f64);
    gauge!("baton_worker_tier_bytes", "tier" => tier).set((blocks * block_bytes) as f64);
}

/// What does not change while the worker lives.
pub(crate) fn describe(role: Role, spec: &ModelSpec, config: &EngineConfig) {
    let sizes = [
        Label::new("block_size", spec.layout.block_tokens.to_string()),
        Label::new("num_gpu_blocks", config.blocks.to_string()),
        Label::new("cache_dtype", spec.layout.dtype.as_str()),
        Label::new("enable_prefix_caching", config.prefix_cache.to_string()),
        Label::new("model_name", spec.name.clone()),
        Label::new("engine", "0"),
    ];
    gauge!("vllm:cache_config_info", sizes.to_vec()).set(1.0);
    gauge!("baton_worker_model", of_model(role, spec).to_vec()).set(1.0);
}

/// The process serves this role no more.
pub(crate) fn undescribe(role: Role, spec: &ModelSpec) {
    gauge!("baton_worker_model", of_model(role, spec).to_vec()).set(0.0);
}

fn of_model(role: Role, spec: &ModelSpec) -> [Label; 3] {
    [
        Label::new("role", role.as_str()),
        Label::new("model", spec.name.clone()),
        Label::new("numerics", spec.numerics.0.clone()),
    ]
}

/// Something was refused before it began.
pub fn count_refused(reason: Refused) {
    counter!("baton_worker_refused_total", "reason" => reason.as_str()).increment(1);
}

/// A heartbeat found the engine stuck in a step.
pub(crate) fn count_stuck() {
    counter!("baton_worker_stuck_total").increment(1);
}

/// A life of the worker has ended, and how.
pub(crate) fn count_ending(how: &'static str) {
    counter!("baton_worker_lives_ended_total", "how" => how).increment(1);
}

/// Something that had begun was given up.
pub fn count_aborted(reason: Aborted) {
    counter!("baton_worker_aborted_total", "reason" => reason.as_str()).increment(1);
}

/// The phases of a finished handoff, at the prefill worker: queue, compute, transfer that compute did not hide.
pub fn record_prefill(phases: [Duration; 3]) {
    for (phase, took) in ["queue", "compute", "transfer"].into_iter().zip(phases) {
        histogram!("baton_worker_prefill_seconds", "phase" => phase).record(took.as_secs_f64());
    }
}

/// A decode worker computes a prompt itself, because it was `assigned` so or because it holds nearly all of it.
pub fn count_local_prefill(reason: &'static str) {
    counter!("baton_worker_local_prefill_total", "reason" => reason).increment(1);
}

/// Blocks of a handoff that broke which had arrived whole and stay in the prefix cache.
pub fn count_kept_blocks(blocks: u64) {
    counter!("baton_worker_transfer_kept_blocks_total").increment(blocks);
}

/// What a decode worker's receiver has counted since its start.
pub fn record_transfers(counters: &Counters) {
    counter!("baton_worker_transfers_total", "outcome" => "completed").absolute(counters.completed);
    counter!("baton_worker_transfers_total", "outcome" => "failed").absolute(counters.failed);
    counter!("baton_worker_transfer_bytes_total").absolute(counters.bytes);
    counter!("baton_worker_transfer_again_total").absolute(counters.again);
    gauge!("baton_worker_transfers_held").set(counters.held as f64);
    for reason in Untrusted::ALL {
        let untrusted = counter!("baton_worker_link_untrusted_total", "end" => "receiver", "reason" => reason.as_str());
        untrusted.absolute(counters.untrusted(reason));
    }
    for reason in Dropped::ALL {
        let dropped = counter!("baton_worker_transfer_dropped_total", "reason" => reason.as_str());
        dropped.absolute(counters.dropped(reason));
    }
}

/// What a prefill worker's links have counted since its start.
pub fn record_links(counters: &LinkCounters) {
    for (link, begun) in counters.begun() {
        counter!("baton_worker_link_transfers_total", "link" => link).absolute(begun);
    }
    for kind in LinkKind::ALL {
        gauge!("baton_worker_links_up", "link" => kind.as_str()).set(counters.up(kind) as f64);
    }
    for reason in Untrusted::ALL {
        let untrusted = counter!("baton_worker_link_untrusted_total", "end" => "sender", "reason" => reason.as_str());
        untrusted.absolute(counters.untrusted(reason));
    }
    for reason in Fallback::ALL {
        let fallbacks = counter!("baton_worker_link_fallbacks_total", "reason" => reason.as_str());
        fallbacks.absolute(counters.fallbacks(reason));
    }
    counter!("baton_worker_link_resent_total").absolute(counters.resent);
}

/// From a request's arrival at a decode worker to its submission to the engine.
pub fn record_handoff(took: Duration) {
    histogram!("baton_worker_handoff_seconds").record(took.as_secs_f64());
}
