//! Placement at its boundaries, then properties over random pools.

use baton_core::NumericsClass;
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
        World(names.iter().map(|name| (WorkerId(name.to_string()), model())).collect())
    }

    fn candidates(&self) -> Vec<Candidate<'_>> {
        let candidate = |(worker, model)| {
            let WorkerId(name): &WorkerId = worker;
            Candidate {
                worker,
                incarnation: Incarnation(1),
                role: if name.starts_with('p') { Role::Prefill } else { Role::Decode },
                model,
                load: Load { blocks_available: 1000, ..Load::default() },
                hits: 0,
                suspect: false,
            }
        };
        self.0.iter().map(|(worker, model)| candidate((worker, model))).collect()
    }
}

fn question() -> Question<'static> {
    Question {
        model: "m",
        prompt_tokens: 160,
        tokens_max: 10,
        choices: 1,
        full_prefill: false,
        exclude: &[],
        numerics: None,
    }
}

/// The chosen names: decode, then prefill or "-".
fn names(result: &Result<Decision, Declined>) -> (String, String) {
    let decision = result.as_ref().expect("placed");
    let prefill = decision.prefill.as_ref().map_or("-".to_string(), |(id, _)| id.0.clone());
    (decision.decode.0.0.clone(), prefill)
}

fn check(question: &Question, candidates: &[Candidate], decode: &str, prefill: &str) {
    let result = place(question, candidates, &Policy::default());
    assert_eq!(names(&result), (decode.into(), prefill.into()), "{result:?}");
}

fn check_declined(question: &Question, candidates: &[Candidate], reason: Refused) {
    let declined = place(question, candidates, &Policy::default()).expect_err("declined");
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
fn only_equal_layouts_and_numerics_pair() {
    let mut world = World::new(&["d0", "p0", "p1"]);
    world.0[1].1.layout = "other".into();
    world.0[2].1.numerics = NumericsClass("other".into());
    check(&question(), &world.candidates(), "d0", "-");
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
    let result = place(&Question { numerics: Some(&gone), ..question() }, &world.candidates(), &Policy::default());
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
    c[0].load.waiting = Policy::default().queue_max;
    check_declined(&question(), &c, Refused::NoCapacity);
}

#[test]
fn without_blocks_now_it_queues_on_decode_without_a_handoff() {
    let world = World::new(&["d0", "p0"]);
    let mut c = world.candidates();
    c[0].load.blocks_available = 3;
    check(&question(), &c, "d0", "-");
}

fn load() -> impl Strategy<Value = (Load, u64, bool)> {
    let load = (0u64..1000, 0u64..300, 0u64..300, 0u64..20_000, 0u64..5000, any::<bool>());
    let load = load.prop_map(|(blocks_available, running, waiting, tokens_waiting, prefill_rate, draining)| Load {
        blocks_available,
        running,
        waiting,
        tokens_waiting,
        prefill_rate,
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
        let result = place(&asked, &c, &policy);
        let mut turned = c.clone();
        turned.rotate_left(shift);
        prop_assert_eq!(&place(&asked, &turned, &policy), &result);
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
