//! Placement at its boundaries, then properties over random pools.

use baton_core::{BlockLayout, KvDtype, NumericsClass, Refused};
use proptest::prelude::*;

use super::*;

fn model() -> Model {
    Model {
        name: "m".into(),
        card_hash: "c".into(),
        numerics: NumericsClass("n".into()),
        block_tokens: 16,
        positions_max: 4096,
        layout: "l".into(),
        blocks_total: 1000,
        block_bytes: 1,
        canary_tokens: vec![],
        vocab: 0,
    }
}

/// Workers by name: `p…` prefill, `d…` decode.
struct World(Vec<(WorkerId, Model)>);

impl World {
    fn new(names: &[&str]) -> World {
        World(names.iter().map(|name| (WorkerId((*name).into()), model())).collect())
    }

    fn candidates(&self) -> Vec<Candidate<'_>> {
        let candidate = |(worker, model)| {
            let WorkerId(name): &WorkerId = worker;
            Candidate {
                worker,
                incarnation: Incarnation(1),
                role: if name.starts_with('p') { Role::Prefill } else { Role::Decode },
                index: 0,
                address: "h:1",
                pid: 1,
                model,
                load: Load { blocks_available: 1000, ..Load::default() },
                hits: 0,
                suspect: false,
                stuck: false,
                unproven: false,
            }
        };
        self.0.iter().map(|(worker, model)| candidate((worker, model))).collect()
    }
}

fn question() -> Question<'static> {
    Question {
        model: "m",
        lane: Lane::Interactive,
        prompt_tokens: 160,
        tokens_max: 10,
        choices: 1,
        full_prefill: false,
        exclude: &[],
        exclude_pairs: &[],
        numerics: None,
    }
}

/// The chosen names: decode, then prefill or "-".
fn names(result: &Result<Decision, Declined>) -> (String, String) {
    let decision = result.as_ref().expect("placed");
    let prefill = decision.prefill.as_ref().map_or("-".to_string(), |(id, _)| id.to_string());
    (decision.decode.0.to_string(), prefill)
}

static NONE_BROKEN: BrokenPairs = BrokenPairs::new();

fn placed(question: &Question, candidates: &[Candidate]) -> Result<Decision, Declined> {
    place(question, &Pools { candidates: candidates.to_vec(), lost: vec![], broken: &NONE_BROKEN }, &Policy::default())
}

fn check(question: &Question, candidates: &[Candidate], decode: &str, prefill: &str) {
    let result = placed(question, candidates);
    assert_eq!(names(&result), (decode.into(), prefill.into()), "{result:?}");
}

fn check_declined(question: &Question, candidates: &[Candidate], reason: Refused) {
    let declined = placed(question, candidates).expect_err("declined");
    assert_eq!(declined.reason, reason, "{}", declined.detail);
}

#[test]
fn equal_workers_are_taken_in_the_order_of_their_names() {
    let world = World::new(&["d1", "d0", "p1", "p0"]);
    check(&question(), &world.candidates(), "d0", "p0");
}

#[test]
fn a_short_uncached_part_is_prefilled_where_it_is_decoded() {
    let world = World::new(&["d0", "p0"]);
    let mut c = world.candidates();
    check(&Question { prompt_tokens: 63, ..question() }, &c, "d0", "-");
    check(&Question { prompt_tokens: 64, ..question() }, &c, "d0", "p0");
    c[0].hits = 7;
    check(&question(), &c, "d0", "-");
    check(&Question { full_prefill: true, ..question() }, &c, "d0", "p0");
}

#[test]
fn prefix_hits_and_load_move_the_choice() {
    let world = World::new(&["d0", "d1", "p0", "p1"]);
    let mut c = world.candidates();
    c[1].hits = 5;
    c[3].hits = 10;
    check(&question(), &c, "d1", "p1");
    c[1].load.running = 20;
    c[3].load.tokens_waiting = 1000;
    check(&question(), &c, "d0", "p0");
}

#[test]
fn nobody_waits_long_where_no_lane_has_its_turn() {
    let world = World::new(&["d0", "p0", "p1"]);
    let mut c = world.candidates();
    c[0].load.running = 1;
    let policy = Policy::default();
    for p in [1, 2] {
        c[p].load =
            Load { running: policy.prefill_waiting_max, tokens_waiting: 5_000, prefill_rate: 1_000, ..c[p].load };
    }
    check_declined(&question(), &c, Refused::NoCapacity);
    assert_eq!(placed(&question(), &c).unwrap_err().retry_after_ms, 5_000);
    let none_is_full = Policy { prefill_waiting_max: u64::MAX, ..policy };
    let pools = Pools { candidates: c.clone(), lost: vec![], broken: &NONE_BROKEN };
    assert_eq!(
        names(&place(&question(), &pools, &none_is_full)),
        ("d0".into(), "p0".into()),
        "what is accepted goes on"
    );
    check(&Question { prompt_tokens: 63, ..question() }, &c, "d0", "-");
    c[0].load.running = 0;
    check(&question(), &c, "d0", "-");
    c[0].load.running = 1;
    c[1].load.prefill_rate = 10_000;
    check(&question(), &c, "d0", "p0");
    c[1].load.prefill_rate = 1_000;
    c[1].load.running = 63;
    check(&question(), &c, "d0", "p0");
    c[1].load.running = 99;
    c[2].load.tokens_waiting = 900;
    c[1].hits = 10;
    check(&question(), &c, "d0", "p1");
}

#[test]
fn only_equal_layouts_and_numerics_pair() {
    let mut world = World::new(&["d0", "p0", "p1"]);
    world.0[1].1.layout = "other".into();
    world.0[2].1.numerics = NumericsClass("other".into());
    check(&question(), &world.candidates(), "d0", "-");
}

/// A worker whose cache is of another dtype is not paired, and the decision says so.
#[test]
fn what_cannot_pair_is_named() {
    let mut world = World::new(&["d0", "p0"]);
    let row = |dtype: KvDtype| BlockLayout { layers: 2, kv_heads: 2, head_dim: 8, block_tokens: 16, dtype }.describe();
    world.0[0].1.layout = row(KvDtype::Bf16);
    world.0[1].1.layout = row(KvDtype::Int8);
    let decision = placed(&question(), &world.candidates()).expect("the decode worker prefills");
    assert!(decision.prefill.is_none());
    let said = "no prefill worker that can pair is free (p0 is full:l2:h2:d8:t16:int8+bf16 and this is full:l2:h2:d8:t16:bf16)";
    assert!(decision.explanation.contains(said), "{}", decision.explanation);
}

#[test]
fn excluded_draining_and_suspect_workers_are_avoided() {
    let world = World::new(&["d0", "d1", "p0", "p1"]);
    let mut c = world.candidates();
    let exclude = [(WorkerId("d0".into()), Incarnation(1)), (WorkerId("p0".into()), Incarnation(9))];
    check(&Question { exclude: &exclude, ..question() }, &c, "d1", "p0");
    c[2].load.draining = true;
    c[0].suspect = true;
    check(&question(), &c, "d1", "p1");
    c[1].load.draining = true;
    check(&question(), &c, "d0", "p1");
}

#[test]
fn an_idle_decode_worker_prefills_when_prefill_is_far_behind() {
    let world = World::new(&["d0", "p0"]);
    let mut c = world.candidates();
    c[1].load.tokens_waiting = 10_000;
    check(&question(), &c, "d0", "-");
    c[0].load.running = 1;
    check(&question(), &c, "d0", "p0");
}

#[test]
fn a_later_attempt_stays_in_its_numerics_class() {
    let mut world = World::new(&["d0", "d1"]);
    world.0[0].1.numerics = NumericsClass("other".into());
    let class = NumericsClass("n".into());
    let asked = Question { numerics: Some(&class), ..question() };
    check(&asked, &world.candidates(), "d1", "-");
    let gone = NumericsClass("gone".into());
    let result = placed(&Question { numerics: Some(&gone), ..question() }, &world.candidates());
    assert!(result.unwrap().explanation.contains("numerics class changed"));
}

#[test]
fn refusals_say_why() {
    let world = World::new(&["d0", "p0"]);
    let mut c = world.candidates();
    check_declined(&question(), &[], Refused::NoWorkers);
    check_declined(&question(), &c[1..], Refused::NoWorkers);
    check_declined(&Question { model: "x", ..question() }, &c, Refused::UnknownModel);
    check_declined(&Question { tokens_max: 4000, ..question() }, &c, Refused::TooLarge);
    check_declined(&Question { tokens_max: 2000, choices: 8, ..question() }, &c, Refused::TooLarge);
    c[0].load.over = Policy::default().decode_waiting_max;
    check_declined(&question(), &c, Refused::NoCapacity);
}

#[test]
fn without_blocks_now_it_queues_on_decode_without_a_handoff() {
    let world = World::new(&["d0", "p0"]);
    let mut c = world.candidates();
    c[0].load.blocks_available = 3;
    check(&question(), &c, "d0", "-");
}

/// Goal: blocks are not sent where none have passed yet, as long as others are known to work. Method: workers that have just
/// come, beside idle and beside busy ones, and alone.
#[test]
fn a_pair_that_no_canary_has_seen_waits_for_it_where_another_is_good() {
    let world = World::new(&["d0", "d1", "p0", "p1"]);
    let mut c = world.candidates();
    (c[0].load.running, c[1].load.running) = (1, 1);
    c[2].unproven = true;
    check(&question(), &c, "d0", "p1");
    c[3].load.tokens_waiting = 100;
    check(&question(), &c, "d0", "p1");
    c[0].unproven = true;
    check(&question(), &c, "d1", "p1");
    c[1].unproven = true;
    check(&question(), &c, "d0", "p0");
    (c[0].unproven, c[1].unproven, c[3].unproven) = (false, false, true);
    check(&question(), &c, "d0", "p0");
}

#[test]
fn a_broken_pair_is_avoided_and_neither_of_its_workers_is() {
    let world = World::new(&["d0", "d1", "p0", "p1"]);
    let mut c = world.candidates();
    c.iter_mut().zip(1..).for_each(|(c, index)| c.index = index);
    let check_with = |c: &[Candidate], broken: &[(WorkerIndex, WorkerIndex)], decode: &str, prefill: &str| {
        let broken = broken.iter().copied().collect();
        let pools = Pools { candidates: c.to_vec(), lost: vec![], broken: &broken };
        let result = place(&question(), &pools, &Policy::default());
        assert_eq!(names(&result), (decode.into(), prefill.into()), "{result:?}");
    };
    check_with(&c, &[(3, 1)], "d0", "p1");
    check_with(&c, &[(3, 1), (4, 1)], "d1", "p0");
    check_with(&c, &[(3, 1), (4, 1), (3, 2)], "d1", "p1");
    check_with(&c, &[(3, 1), (4, 1), (3, 2), (4, 2)], "d0", "-");
    check_with(&c, &[(ALONE, 1), (3, 2), (4, 2)], "d1", "-");
    c[1].load.running = 1_000;
    check_with(&c, &[(3, 1), (4, 1)], "d0", "-");
}

#[test]
fn a_request_leaves_the_pair_that_failed_it() {
    let world = World::new(&["d0", "p0", "p1"]);
    let life = |name: &str| (WorkerId(name.into()), Incarnation(1));
    let pairs = [(life("p0"), life("d0"))];
    check(&Question { exclude_pairs: &pairs, ..question() }, &world.candidates(), "d0", "p1");
    let earlier = [((WorkerId("p0".into()), Incarnation(0)), life("d0"))];
    check(&Question { exclude_pairs: &earlier, ..question() }, &world.candidates(), "d0", "p0");
}

#[test]
fn stuck_workers_and_those_that_fail_their_canary_take_nothing() {
    let world = World::new(&["d0", "d1"]);
    let mut c = world.candidates();
    c.iter_mut().zip(1..).for_each(|(c, index)| c.index = index);
    c[0].stuck = true;
    check(&question(), &c, "d1", "-");
    let broken = BrokenPairs::from([(ALONE, 2)]);
    let declined =
        place(&question(), &Pools { candidates: c, lost: vec![], broken: &broken }, &Policy::default()).unwrap_err();
    assert_eq!(declined.reason, Refused::NoWorkers);
    let told = declined.trace.lines().join("; ");
    assert!(told.contains("set aside d0: it has work and makes no step; set aside d1: its canary fails"), "{told}");
}

#[test]
fn of_equal_prefill_workers_the_one_with_the_better_link_is_taken() {
    let mut world = World::new(&["d0", "p0", "p1", "p2"]);
    world.0.iter_mut().for_each(|(_, model)| model.block_bytes = 1 << 20);
    let mut c = world.candidates();
    (c[1].address, c[2].pid) = ("other:1", 2);
    check(&question(), &c, "d0", "p2");
    c[3].pid = 3;
    check(&question(), &c, "d0", "p1");
    c[2].load.tokens_waiting = 100;
    c[3].load.tokens_waiting = 100;
    check(&question(), &c, "d0", "p0");
}

#[test]
fn a_faster_class_takes_more_and_an_unmeasured_worker_counts_as_the_others() {
    let world = World::new(&["d0", "p0", "p1", "p2"]);
    let mut c = world.candidates();
    (c[1].load.prefill_rate, c[2].load.prefill_rate) = (1_000, 3_000);
    (c[1].load.tokens_waiting, c[2].load.tokens_waiting, c[3].load.tokens_waiting) = (100, 500, 500);
    check(&question(), &c, "d0", "p1");
    c[2].load.tokens_waiting = 900;
    check(&question(), &c, "d0", "p0");
    c[1].load.tokens_waiting = 500;
    check(&question(), &c, "d0", "p2");
}

#[test]
fn old_reports_count_less() {
    let world = World::new(&["d0", "d1", "d2"]);
    let mut c = world.candidates();
    (c[0].load.running, c[1].load.running, c[2].load.running) = (0, 4, 4);
    check(&question(), &c, "d0", "-");
    c[0].load.age_ms = 1_499;
    check(&question(), &c, "d1", "-");
    (c[0].load.running, c[1].load.running, c[2].load.running) = (40, 10, 10);
    let cost = |c: &[Candidate], at: usize| placed(&question(), c).unwrap().trace.decode[at].cost;
    let dear = cost(&c, 2);
    c[0].load.age_ms = 0;
    assert!(dear < cost(&c, 2), "a busy worker that fell silent is not busy for ever");
}

#[test]
fn a_lane_that_aims_at_short_steps_avoids_slow_ones() {
    let world = World::new(&["d0", "d1"]);
    let mut c = world.candidates();
    (c[0].load.step_us, c[0].load.running) = (60_000, 1);
    (c[1].load.step_us, c[1].load.running) = (5_000, 4);
    check(&question(), &c, "d1", "-");
    check(&Question { lane: Lane::Batch, ..question() }, &c, "d0", "-");
}

#[test]
fn every_candidate_and_term_has_its_line() {
    let world = World::new(&["d0", "d1", "p0"]);
    let mut c = world.candidates();
    c[1].load.running = 2;
    c[2].load.tokens_waiting = 10;
    let lines = placed(&question(), &c).unwrap().trace.lines();
    let expected = [
        "decode d0 holds 0/10 blocks, 0 running, 0 waiting; p0 prefills: holds 0 blocks, 10 tokens queued",
        "decode d0 costs 171000 us",
        "decode d0: not in its cache 160000 us",
        "decode d0: blocks 11000 us",
        "decode d1 costs 235000 us",
        "decode d1: steps shared with others 64000 us",
        "decode d1: not in its cache 160000 us",
        "decode d1: blocks 11000 us",
        "prefill p0 costs 170001 us",
        "prefill p0: queue ahead 10000 us",
        "prefill p0: not in its cache 160000 us",
        "prefill p0: link to decode 1 us",
    ];
    assert_eq!(lines, expected);
}

#[test]
fn whoever_holds_more_of_the_prompt_is_named_to_the_one_that_computes() {
    let world = World::new(&["d0", "d1", "p0", "p1"]);
    let check = |c: &[Candidate], question: &Question, expected: Option<(&str, u64)>| {
        let holder = placed(question, c).expect("placed").holder;
        let found = holder.as_ref().map(|holder| (holder.place.worker.0.as_ref(), holder.blocks));
        assert_eq!(found, expected, "{holder:?}");
    };
    let excluded = |name: &str| [(WorkerId(name.into()), Incarnation(1))];
    let mut c = world.candidates();
    check(&c, &question(), None);
    // d1 is too busy to be chosen, and has what p0 lacks.
    (c[1].hits, c[1].load.running) = (7, 1000);
    check(&c, &question(), Some(("d1", 7)));
    check(&c, &Question { full_prefill: true, ..question() }, None);
    check(&c, &Question { exclude: &excluded("d1"), ..question() }, None);
    (c[0].hits, c[2].hits) = (0, 4);
    check(&c, &question(), None);
    c[2].hits = 3;
    check(&c, &question(), Some(("d1", 7)));
    // One that takes nothing any more still has it; one that nobody can reach does not.
    c[1].load.draining = true;
    check(&c, &question(), Some(("d1", 7)));
    c[1].suspect = true;
    check(&c, &question(), None);
}

#[test]
fn headroom_says_whether_each_pool_could_lose_its_largest() {
    let world = World::new(&["d0", "d1", "d2", "p0", "p1"]);
    let mut c = world.candidates();
    let lines =
        |c: &[Candidate]| headroom(c, &Policy::default()).into_iter().map(|h| (h.holds, h.line)).collect::<Vec<_>>();
    assert_eq!(
        lines(&c),
        [
            (
                true,
                "prefill m: 2 workers, can lose any one: its queue would take 0 ms of 1000 without the fastest".into()
            ),
            (true, "decode m: 3 workers, can lose any one: 0 blocks in use, 2000 without the largest".into()),
        ]
    );
    c[0].load.blocks_available = 0;
    c[1].load.blocks_available = 0;
    c[3].load.tokens_waiting = 1_001;
    assert_eq!(lines(&c).iter().map(|(holds, _)| *holds).collect::<Vec<_>>(), [false, true]);
    c[2].load.blocks_available = 999;
    assert!(!lines(&c)[1].0);
    c[1].stuck = true;
    c[2].load.draining = true;
    assert_eq!(lines(&c)[1].1, "decode m: 1 workers, cannot lose one: has no second worker");
    assert!(lines(&[]).is_empty());
}

#[test]
fn a_role_without_a_pool_can_lose_nobody() {
    let world = World::new(&["d0", "d1"]);
    let pools = headroom(&world.candidates(), &Policy::default());
    assert_eq!([Role::Decode, Role::Prefill].map(|role| holds(&pools, role)), [true, false]);
    assert!(!holds(&[], Role::Decode), "nobody is left of it");
}

fn load() -> impl Strategy<Value = (Load, u64, bool)> {
    let load = (0u64..1000, 0u64..300, 0u64..300, 0u64..20_000, 0u64..5000, any::<bool>());
    let load = load.prop_map(|(blocks_available, running, waiting, tokens_waiting, prefill_rate, draining)| Load {
        blocks_available,
        running,
        waiting,
        over: waiting,
        tokens_waiting,
        prefill_rate,
        step_us: running * 1_000,
        age_ms: waiting * 7,
        draining,
    });
    (load, 0u64..12, any::<bool>())
}

proptest! {
    /// The order in which workers are listed decides nothing, and whoever is chosen may be chosen.
    #[test]
    fn choices_are_sound_and_independent_of_order(
        loads in proptest::collection::vec(load(), 6),
        prompt_tokens in 1u64..5000,
        tokens_max in 1u64..5000,
        excluded in 0usize..6,
        shift in 0usize..6,
    ) {
        let world = World::new(&["d0", "d1", "d2", "p0", "p1", "p2"]);
        let mut c = world.candidates();
        for (candidate, (load, hits, suspect)) in c.iter_mut().zip(loads) {
            (candidate.load, candidate.hits, candidate.suspect) = (load, hits, suspect);
        }
        let exclude = [(world.0[excluded].0.clone(), Incarnation(1))];
        let asked = Question { prompt_tokens, tokens_max, exclude: &exclude, ..question() };
        let policy = Policy::default();
        let result = placed(&asked, &c);
        let mut turned = c.clone();
        turned.rotate_left(shift);
        let said = |result: &Result<Decision, Declined>| match result {
            Ok(d) => Ok((d.decode.clone(), d.prefill.clone(), d.trace.decode.clone(), d.trace.prefill.clone())),
            Err(declined) => Err(declined.detail.clone()),
        };
        prop_assert_eq!(said(&placed(&asked, &turned)), said(&result));
        let find = |life: &(WorkerId, Incarnation)| c.iter().find(|c| *c.worker == life.0).unwrap();
        match result {
            Ok(decision) => {
                let lives = [Some(&decision.decode), decision.prefill.as_ref()];
                for life in lives.into_iter().flatten() {
                    prop_assert!(*life != exclude[0] && !find(life).load.draining);
                    prop_assert!(find(life).load.waiting < policy.queue_max);
                }
                prop_assert_eq!(find(&decision.decode).role, Role::Decode);
                prop_assert!(decision.prefill.is_none_or(|p| find(&p).role == Role::Prefill));
            }
            Err(declined) => prop_assert!(declined.reason != Refused::UnknownModel),
        }
    }
}
