//! Runs that are kept, by name: failures that others had, or that this project had, as plans of a few faults. Each holds,
//! and fails with the planted bug that brings the failure back.

use baton_core::planted::Bug;

use crate::plan::Plan;

/// One kept run.
pub struct Scenario {
    pub name: &'static str,
    /// What went wrong where it did.
    pub about: &'static str,
    /// What brings it back; None: nothing planted does.
    pub bug: Option<Bug>,
    plan: &'static str,
}

macro_rules! scenario {
    ($name:literal, $bug:expr, $about:literal) => {
        Scenario { name: $name, about: $about, bug: $bug, plan: include_str!(concat!("../plans/", $name, ".json")) }
    };
}

pub const ALL: &[Scenario] = &[
    scenario!(
        "nobody_gets_another_prompts_answer",
        Some(Bug::SameHandle),
        "vLLM #52234: 200 with the previous prompt's answer, because the name of what was cancelled was used again"
    ),
    scenario!(
        "damaged_blocks_are_not_committed",
        Some(Bug::CommitEarly),
        "vLLM #52234: blocks that never arrived whole are read, and the answer is another one"
    ),
    scenario!(
        "a_stale_writer_touches_no_block_of_another",
        Some(Bug::FreeEarly),
        "SGLang #24527: after an abort a prefill worker still writes into blocks that another request has by then"
    ),
    scenario!(
        "a_rolling_update_pairs_only_what_computes_alike",
        Some(Bug::IgnoreNumerics),
        "a rolling update: prefill workers of the new version fill blocks for decode workers of the old one"
    ),
    scenario!(
        "an_aborted_handoff_keeps_no_block",
        Some(Bug::LeakOnAbort),
        "vLLM #46283: blocks of an aborted load are never reclaimed"
    ),
    scenario!(
        "a_dead_prefill_worker_wedges_nobody",
        Some(Bug::PrefillDeathWedges),
        "SGLang #28651, #29482: one dead worker holds the other pool's requests until their timeout"
    ),
    scenario!(
        "a_completion_is_not_lost",
        Some(Bug::CompletionLost),
        "an end that is never said: the client waits out its deadline"
    ),
    scenario!(
        "a_resumed_stream_has_every_token",
        Some(Bug::ResumeLosesToken),
        "a stream that moves on to another gateway without a token of it"
    ),
    scenario!(
        "a_worker_serves_its_own_life_only",
        Some(Bug::SkipLifeCheck),
        "Dynamo #11068: a worker that came back goes on with what was given to its earlier life"
    ),
    scenario!(
        "streams_end_with_their_node",
        Some(Bug::StreamsOutliveNode),
        "Dynamo #3493: the control plane is back, and nobody asks it again"
    ),
    scenario!(
        "a_gateways_life_ends_what_it_left",
        Some(Bug::OrphansKept),
        "found here: a gateway that came back under its name kept the requests of its earlier life open"
    ),
    scenario!("a_gateways_life_ends_its_handoff", None, "found here: the same, while blocks were on their way"),
    scenario!(
        "ends_are_told_while_coordinators_are_away",
        None,
        "found here: a gateway gave up telling the ledger of ends while the coordinators were away"
    ),
    scenario!(
        "a_lost_worker_is_no_internal_error",
        None,
        "found here: a lost decode worker was called an internal error, without Retry-After"
    ),
    scenario!(
        "what_waits_for_blocks_wakes_nobody",
        None,
        "found here: an engine that waited for blocks woke itself for the same plan again, without end"
    ),
    scenario!(
        "an_order_taken_back_wants_nothing",
        None,
        "found here: a worker that was ordered to take the role it had was never used again"
    ),
    scenario!(
        "a_model_whose_workers_are_lost_exists",
        None,
        "found here: a gateway that started while all workers were lost called their model unknown, which nobody retries"
    ),
    scenario!(
        "a_stream_that_cannot_go_on_is_ended",
        None,
        "found here: a gateway took over a stream whose worker was lost, and told nobody that it had ended"
    ),
    scenario!(
        "a_snapshot_and_the_log_are_the_ledger",
        Some(Bug::SnapshotForgets),
        "a node that starts from its snapshot holds another ledger than its peers"
    ),
    scenario!(
        "a_node_that_was_removed_before_it_learned_ends",
        None,
        "found here: a coordinator that was taken out before it had learned of its group went on for ever, and asked nobody"
    ),
    scenario!(
        "a_node_that_was_removed_after_a_restart_ends",
        None,
        "found here: the same, where it had been started again meanwhile, and no longer knew who had taken it in"
    ),
    scenario!(
        "a_lost_node_whose_peers_were_all_replaced_ends",
        None,
        "found here: a coordinator without its data waited for ever, because those at its peers' addresses had other numbers by now"
    ),
    scenario!(
        "a_lone_leader_that_comes_back_is_elected_anew",
        None,
        "found here: a coordinator alone whose disk was full led on in the same term, with another entry where a joining node had one"
    ),
    scenario!(
        "what_was_asked_twice_and_refused_is_ended",
        None,
        "found here: a request that was refused when it was asked for again stayed open, because the first question was granted"
    ),
    scenario!(
        "an_end_does_not_overtake_its_adoption",
        None,
        "found here: a client went away while its stream was taken over; the end came before the ledger had the new gateway, and counted for nothing"
    ),
    scenario!(
        "orders_are_carried_out_though_clients_have_ended",
        None,
        "the check's own: an operator that waited for a hung worker ended with the clients, and a spare coordinator stayed"
    ),
    scenario!(
        "a_stuck_worker_is_not_healthy",
        Some(Bug::GreenHealth),
        "Dynamo #9434: health stays green while a pool is poisoned: a worker that answers every question and ends no step is given request after request"
    ),
    scenario!(
        "a_ledger_that_is_read_anew_gives_nothing",
        None,
        "the check's own: a lone coordinator that was started again has read only part of its log, and what had long ended there seemed to be new"
    ),
    scenario!(
        "a_new_leader_hears_before_it_places",
        None,
        "a lone coordinator that was started again gave what had queued to workers that it had not heard of, all to the one that was stuck"
    ),
    scenario!(
        "a_quota_holds_in_a_burst",
        Some(Bug::QuotaUnchecked),
        "requests that are looked at together pass a limit that each alone would keep"
    ),
];

impl Scenario {
    pub fn plan(&self) -> Plan {
        Plan::read(self.plan).expect("kept plans are checked")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kept_plan_can_be_read() {
        for scenario in ALL {
            assert!(Plan::read(scenario.plan).is_ok(), "{}", scenario.name);
        }
    }
}
