//! The ledger against its promises: replaying gives the same state, repeating changes nothing, a request has one
//! assignment and ends once, numbers only grow.

use baton_core::limits::ATTEMPTS_MAX;
use baton_core::{Lane, Refused, Role};
use proptest::prelude::*;

use super::*;

const WORKERS: [(&str, Role); 4] =
    [("p0", Role::Prefill), ("p1", Role::Prefill), ("d0", Role::Decode), ("d1", Role::Decode)];

fn registration(worker: usize, key: u8) -> Registration {
    let (id, role) = WORKERS[worker];
    Registration {
        worker: WorkerId(id.into()),
        role,
        address: format!("{id}:{key}"),
        pid: u32::from(key),
        version: "1".into(),
        model: Model { name: "m".into(), ..Model::default() },
        process_key: format!("{key}"),
    }
}

/// A decode worker's registration, by its name and process.
pub(super) struct Shape {
    pub(super) id: String,
    pub(super) key: String,
}

impl Shape {
    pub(super) fn registration(self) -> Registration {
        Registration { worker: WorkerId(self.id.into()), process_key: self.key, ..registration(2, 0) }
    }
}

/// A proposal without a place.
pub(super) fn shaped(request: u128) -> Proposed {
    Proposed { deadline_ms: 600_000, ..proposed(request, 1, (2, 0), None) }
}

fn proposed(request: u128, attempt: u32, decode: (usize, u64), prefill: Option<(usize, u64)>) -> Proposed {
    let life = |(worker, incarnation): (usize, u64)| (WorkerId(WORKERS[worker].0.into()), Incarnation(incarnation));
    Proposed {
        request: RequestId(request),
        attempt,
        tenant: String::new(),
        lane: Lane::Interactive,
        gateway: "g".into(),
        prompt_tokens: 10,
        tokens_max: 5,
        choices: 1,
        deadline_ms: 50,
        decode: life(decode),
        prefill: prefill.map(life),
        key: String::new(),
        resumable_ms: 0,
        fingerprint: 0,
        killed: vec![],
    }
}

fn finished(request: u128, epoch: Epoch) -> Command {
    Command::Finish(Finished {
        request: RequestId(request),
        epoch,
        outcome: "complete".into(),
        prompt_tokens: 10,
        cached_tokens: 0,
        generated_tokens: 5,
    })
}

/// Applies one command at the next index and returns its outcome.
fn one(ledger: &mut Ledger, time_ms: u64, command: Command) -> Outcome {
    let index = ledger.index() + 1;
    ledger.apply(index, Batch { time_ms, commands: vec![command] }).pop().unwrap()
}

/// A ledger with one prefill and one decode worker, and their incarnations.
fn pair() -> (Ledger, u64, u64) {
    let mut ledger = Ledger::default();
    let mut life = |worker| match one(&mut ledger, 1, Command::Register(registration(worker, 1))) {
        Outcome::Registered { incarnation } => incarnation.0,
        other => panic!("{other:?}"),
    };
    let (p, d) = (life(0), life(2));
    (ledger, p, d)
}

fn assign(ledger: &mut Ledger, p: Proposed) -> Outcome {
    one(ledger, 2, Command::Assign(Box::new(p)))
}

fn epoch(outcome: &Outcome) -> Epoch {
    match outcome {
        Outcome::Assigned(assigned) => assigned.epoch,
        other => panic!("{other:?}"),
    }
}

#[test]
fn the_same_attempt_gives_the_same_assignment_and_a_later_one_a_later_epoch() {
    let (mut ledger, p, d) = pair();
    let first = assign(&mut ledger, proposed(1, 1, (2, d), Some((0, p))));
    assert_eq!(assign(&mut ledger, proposed(1, 1, (2, d), None)), first);
    let second = assign(&mut ledger, proposed(1, 2, (2, d), None));
    assert!(epoch(&second) > epoch(&first));
    assert_eq!(assign(&mut ledger, proposed(1, 1, (2, d), None)), Outcome::Refused(Refused::Stale));
    assert_eq!(ledger.requests_open(), 1);
}

fn follow(ledger: &mut Ledger, gateway: &str, previous: Epoch, p: Proposed) -> Outcome {
    let proposed = Box::new(Proposed { gateway: gateway.into(), ..p });
    one(ledger, 2, Command::AssignAfter { proposed, previous })
}

/// Goal: no two gateways run a request under one epoch, and a later attempt follows the assignment in force. Method: two
/// gateways that repeat, follow and take over.
#[test]
fn an_assignment_has_one_gateway_and_one_successor() {
    let (mut ledger, _, d) = pair();
    let attempt = |attempt| proposed(1, attempt, (2, d), None);
    let stale = Outcome::Refused(Refused::Stale);
    let first = follow(&mut ledger, "g", Epoch(0), attempt(1));
    assert_eq!(follow(&mut ledger, "g", Epoch(0), attempt(1)), first, "asked again");
    assert_eq!(follow(&mut ledger, "h", Epoch(0), attempt(1)), stale, "another gateway");
    assert_eq!(follow(&mut ledger, "g", Epoch(0), attempt(2)), stale, "it does not know the assignment in force");
    assert_eq!(follow(&mut ledger, "g", Epoch(epoch(&first).0 + 1), attempt(2)), stale);
    let second = follow(&mut ledger, "g", epoch(&first), attempt(2));
    assert!(epoch(&second) > epoch(&first));
    assert_eq!(follow(&mut ledger, "g", epoch(&first), attempt(2)), second, "asked again");
    assert_eq!(follow(&mut ledger, "g", epoch(&first), attempt(3)), stale, "it has been followed");
    assert_eq!(follow(&mut ledger, "g", epoch(&first), attempt(1)), stale);
    let adopt = Command::Adopt { request: RequestId(1), gateway: "h".into() };
    assert_eq!(epoch(&one(&mut ledger, 2, adopt)), epoch(&second));
    assert_eq!(follow(&mut ledger, "g", epoch(&second), attempt(2)), stale, "another gateway has taken over");
    let open = ledger.request(RequestId(1)).unwrap();
    assert_eq!(["g", "h", ""].map(|gateway| open.is_of(gateway)), [false, true, true], "what a leader asks of \"g\"");
    assert!(epoch(&follow(&mut ledger, "h", epoch(&second), attempt(3))) > epoch(&second));
}

/// Goal: what version 3 wrote means what it meant: an assignment asks for neither. Method: bytes marked as of version 3.
#[test]
fn bytes_of_version_3_are_read_as_they_were_meant() {
    let (mut ledger, _, d) = pair();
    let old = |mut bytes: Vec<u8>| {
        bytes[..2].copy_from_slice(&3u16.to_le_bytes());
        bytes
    };
    for (attempt, gateway) in [(1, "g"), (1, "h"), (2, "h")] {
        let p = Proposed { gateway: gateway.into(), ..proposed(1, attempt, (2, d), None) };
        let batch = Batch { time_ms: 2, commands: vec![Command::Assign(Box::new(p))] };
        let read = decode_batch(&old(encode_batch(&batch))).unwrap();
        assert_eq!(read, batch);
        assert!(matches!(ledger.apply(ledger.index() + 1, read)[..], [Outcome::Assigned(_)]), "{attempt} {gateway}");
    }
    assert_eq!(decode_ledger(&old(encode_ledger(&ledger))).unwrap(), ledger);
}

#[test]
fn a_placement_on_a_life_that_is_over_is_handed_back() {
    let (mut ledger, p, d) = pair();
    assert_eq!(assign(&mut ledger, proposed(1, 1, (2, d + 1), None)), Outcome::Misplaced);
    assert_eq!(assign(&mut ledger, proposed(1, 1, (0, p), None)), Outcome::Misplaced, "a prefill worker cannot decode");
    one(&mut ledger, 3, Command::Fence { worker: WorkerId("p0".into()), incarnation: Incarnation(p) });
    assert_eq!(assign(&mut ledger, proposed(1, 1, (2, d), Some((0, p)))), Outcome::Misplaced);
    assert_eq!(ledger.requests_open(), 0);
}

#[test]
fn a_process_keeps_its_incarnation_until_it_is_fenced() {
    let (mut ledger, p, _) = pair();
    let again = one(&mut ledger, 2, Command::Register(registration(0, 1)));
    assert_eq!(again, Outcome::Registered { incarnation: Incarnation(p) });
    let Outcome::Registered { incarnation } = one(&mut ledger, 2, Command::Register(registration(0, 2))) else {
        panic!("a restarted worker takes over");
    };
    assert!(incarnation.0 > p);
    one(&mut ledger, 3, Command::Fence { worker: WorkerId("p0".into()), incarnation });
    let after = one(&mut ledger, 3, Command::Register(registration(0, 2)));
    assert!(matches!(after, Outcome::Registered { incarnation: later } if later > incarnation));
}

#[test]
fn a_request_ends_once_and_stays_ended() {
    let (mut ledger, _, d) = pair();
    let granted = epoch(&assign(&mut ledger, proposed(1, 1, (2, d), None)));
    let later = epoch(&assign(&mut ledger, proposed(1, 2, (2, d), None)));
    assert_eq!(one(&mut ledger, 3, finished(1, granted)), Outcome::Refused(Refused::Stale));
    assert_eq!(one(&mut ledger, 3, finished(1, later)), Outcome::Ended);
    let ended = ledger.clone();
    assert_eq!(one(&mut ledger, 3, finished(1, later)), Outcome::Ended);
    assert_eq!(assign(&mut ledger, proposed(1, 3, (2, d), None)), Outcome::Ended);
    assert_eq!((ledger.open, ledger.ended), (ended.open, ended.ended));
}

#[test]
fn a_cancel_that_overtakes_its_assignment_wins() {
    let (mut ledger, _, d) = pair();
    assert_eq!(one(&mut ledger, 2, finished(1, Epoch(0))), Outcome::Ended);
    assert_eq!(assign(&mut ledger, proposed(1, 1, (2, d), None)), Outcome::Ended);
}

#[test]
fn an_overdue_request_is_ended_and_a_new_attempt_does_not_move_its_deadline() {
    let (mut ledger, _, d) = pair();
    assign(&mut ledger, proposed(1, 1, (2, d), None));
    one(&mut ledger, 40, Command::Assign(Box::new(proposed(1, 2, (2, d), None))));
    assert_eq!(ledger.deadline_next(), Some(52));
    assert_eq!(one(&mut ledger, 51, Command::Expire), Outcome::Expired { requests: vec![] });
    assert_eq!(one(&mut ledger, 52, Command::Expire), Outcome::Expired { requests: vec![RequestId(1)] });
    assert_eq!((ledger.requests_open(), ledger.has_ended(RequestId(1))), (0, true));
}

#[test]
fn ended_requests_are_remembered_up_to_their_bound() {
    let mut ledger = Ledger::default();
    for request in 0..EndedRequests::MAX as u128 + 10 {
        one(&mut ledger, 1, finished(request, Epoch(0)));
    }
    assert_eq!(ledger.ended.len(), EndedRequests::MAX);
    assert!(!ledger.has_ended(RequestId(9)) && ledger.has_ended(RequestId(10)));
}

#[test]
fn time_never_falls() {
    let mut ledger = Ledger::default();
    one(&mut ledger, 9, Command::Expire);
    one(&mut ledger, 3, Command::Expire);
    assert_eq!(ledger.time_ms(), 9);
}

#[test]
fn bytes_of_a_newer_version_are_refused() {
    let mut bytes = encode_batch(&Batch { time_ms: 1, commands: vec![Command::Expire] });
    assert!(decode_batch(&bytes).is_ok());
    bytes[..2].copy_from_slice(&(VERSION + 1).to_le_bytes());
    assert_eq!(decode_batch(&bytes), Err(CodecError::Newer { found: VERSION + 1, known: VERSION }));
    assert!(matches!(decode_ledger(&[]), Err(CodecError::Damaged(..))));
    assert!(matches!(decode_batch(&[0, 0, 1]), Err(CodecError::Damaged(0, _))));
}

const ORDERS: [Order; 4] = [Order::Serve, Order::Drain, Order::BecomePrefill, Order::BecomeDecode];

fn set_tenant(requests_open_max: u64, tokens_per_minute: u64) -> Command {
    Command::SetTenant {
        name: "t".into(),
        limits: Limits { requests_open_max, tokens_per_minute, ..Limits::default() },
    }
}

fn key(id: u8) -> Key {
    Key { secret_hash: [id; 32], tenant: "t".into(), created_unix_s: 0 }
}

fn command() -> impl Strategy<Value = Command> {
    let incarnation = (0u64..12).prop_map(|index| Incarnation(index * COMMANDS_MAX as u64));
    let life = (0usize..4, (0u64..12).prop_map(|index| index * COMMANDS_MAX as u64));
    let worker = (0usize..4).prop_map(|worker| WorkerId(WORKERS[worker].0.into()));
    let (worker_again, life_again) = (worker.clone(), life.clone());
    let killed = proptest::option::of((0usize..4, (0u64..12).prop_map(|index| index * COMMANDS_MAX as u64)));
    prop_oneof![
        4 => (0usize..4, 0u8..3).prop_map(|(worker, key)| Command::Register(registration(worker, key))),
        1 => (worker.clone(), incarnation.clone()).prop_map(|(worker, incarnation)| Command::Fence { worker, incarnation }),
        1 => (worker, incarnation).prop_map(|(worker, incarnation)| Command::Leave { worker, incarnation }),
        6 => (0u128..4, 1u32..10, life.clone(), proptest::option::of(life), killed).prop_map(
            |(request, attempt, decode, prefill, killed)| {
                let p = proposed(request, attempt, decode, prefill);
                let killed = killed.into_iter().map(|(w, i)| (WorkerId(WORKERS[w].0.into()), Incarnation(i))).collect();
                let (tenant, fingerprint) = (if request > 1 { "t".into() } else { String::new() }, request);
                Command::Assign(Box::new(Proposed { killed, tenant, fingerprint, ..p }))
            }
        ),
        3 => (0u128..4, 1u32..4, life_again, 0u8..2, 0u64..8).prop_map(|(request, attempt, decode, gateway, previous)| {
            let p = Proposed { gateway: format!("g{gateway}"), ..proposed(request, attempt, decode, None) };
            Command::AssignAfter { proposed: Box::new(p), previous: Epoch(previous * COMMANDS_MAX as u64) }
        }),
        3 => (0u128..4, 0u64..40).prop_map(|(request, index)| finished(request, Epoch(index * COMMANDS_MAX as u64))),
        1 => Just(Command::Expire),
        1 => (worker_again, 0usize..4).prop_map(|(worker, order)| Command::Order { worker, order: ORDERS[order] }),
        2 => (0u64..3, 0u64..60).prop_map(|(requests, tokens)| set_tenant(requests, tokens)),
        1 => Just(Command::RemoveTenant { name: "t".into() }),
        1 => (0u8..3).prop_map(|id| Command::CreateKey { id: format!("k{id}"), key: key(id) }),
        1 => (0u8..3).prop_map(|id| Command::RevokeKey { id: format!("k{id}") }),
        1 => (0u128..4, 0u8..3).prop_map(|(request, g)| Command::Adopt { request: RequestId(request), gateway: format!("g{g}") }),
        1 => Just(Command::Found { cluster: "c".into() }),
    ]
}

fn batches() -> impl Strategy<Value = Vec<Batch>> {
    let batch = (0u64..200, proptest::collection::vec(command(), 0..4));
    proptest::collection::vec(batch.prop_map(|(time_ms, commands)| Batch { time_ms, commands }), 0..40)
}

/// What must hold after every entry.
fn check_invariants(ledger: &Ledger) {
    assert_eq!(ledger.gateways.values().sum::<u64>(), ledger.open.len() as u64);
    for (name, account) in &ledger.tenants {
        let open = ledger.open.values().filter(|open| open.tenant == *name).count() as u64;
        assert_eq!(account.requests_open, open, "{name}");
    }
    assert!(ledger.keys.iter().all(|(_, key)| ledger.tenants.contains_key(&key.tenant)));
    for (id, open) in &ledger.open {
        assert_eq!(ledger.is_suspect(*id), open.strikes >= SUSPECT_STRIKES, "{id}");
    }
    let deadlines: Vec<_> = ledger.open.iter().map(|(id, open)| (open.deadline_ms, *id)).collect();
    assert_eq!(ledger.deadlines.iter().copied().collect::<BTreeSet<_>>(), deadlines.into_iter().collect());
    for (id, open) in &ledger.open {
        assert!(!ledger.has_ended(*id), "open and ended");
        assert!(ledger.gateways[&open.gateway] > 0);
        assert!(open.attempt <= ATTEMPTS_MAX && open.epoch.0 / COMMANDS_MAX as u64 <= ledger.index);
    }
}

proptest! {
    /// Replaying entries, also through an encoded snapshot in their middle, gives the same state and outcomes.
    #[test]
    fn replay_is_deterministic(batches in batches(), cut in 0usize..40) {
        let (mut straight, mut restored) = (Ledger::default(), Ledger::default());
        for (i, batch) in batches.iter().enumerate() {
            if i == cut {
                restored = decode_ledger(&encode_ledger(&restored)).unwrap();
            }
            let again = decode_batch(&encode_batch(batch)).unwrap();
            prop_assert_eq!(straight.apply(i as u64 + 1, batch.clone()), restored.apply(i as u64 + 1, again));
        }
        prop_assert_eq!(hash(&straight), hash(&restored));
        prop_assert_eq!(straight, restored);
    }

    /// One assignment per request, never after its end; epochs and incarnations only grow.
    #[test]
    fn invariants_hold(batches in batches()) {
        let mut ledger = Ledger::default();
        let mut granted: BTreeMap<RequestId, Epoch> = BTreeMap::new();
        let mut ended: BTreeSet<RequestId> = BTreeSet::new();
        for (i, batch) in batches.into_iter().enumerate() {
            let commands = batch.commands.clone();
            let outcomes = ledger.apply(i as u64 + 1, batch);
            check_invariants(&ledger);
            for (command, outcome) in commands.into_iter().zip(outcomes) {
                match (command, outcome) {
                    (Command::Assign(p) | Command::AssignAfter { proposed: p, .. }, Outcome::Assigned(a)) => {
                        prop_assert!(!ended.contains(&p.request), "assigned after its end");
                        let before = granted.insert(p.request, a.epoch);
                        prop_assert!(before.is_none_or(|before| before <= a.epoch));
                    }
                    (Command::Finish(f), Outcome::Ended) if ledger.has_ended(f.request) => drop(ended.insert(f.request)),
                    (_, Outcome::Expired { requests }) => ended.extend(requests),
                    _ => {}
                }
            }
        }
    }

    /// Saying any entry twice leaves workers, open and ended requests as saying it once does.
    #[test]
    fn repetition_changes_nothing(batches in batches()) {
        let mut ledger = Ledger::default();
        for (i, batch) in batches.into_iter().enumerate() {
            // Within one entry a later command may undo an earlier one; repeat entries of one command.
            let batch = Batch { commands: batch.commands.into_iter().take(1).collect(), ..batch };
            ledger.apply(2 * i as u64 + 1, batch.clone());
            let once = ledger.clone();
            ledger.apply(2 * i as u64 + 2, batch);
            prop_assert_eq!((&ledger.workers, &ledger.open, &ledger.ended), (&once.workers, &once.open, &once.ended));
            prop_assert_eq!((&ledger.tenants, &ledger.keys, &ledger.poison), (&once.tenants, &once.keys, &once.poison));
        }
    }
}

/// An operator who takes an order back before the worker has heard it, or repeats it too late, does not lose the worker.
#[test]
fn an_order_to_take_the_role_a_worker_has_wants_nothing_of_it() {
    let check = |worker: usize, order: Order, wanted: Order| {
        let mut ledger = Ledger::default();
        let id = registration(worker, 1).worker;
        one(&mut ledger, 1, Command::Register(registration(worker, 1)));
        one(&mut ledger, 2, Command::Order { worker: id.clone(), order });
        assert_eq!(ledger.worker(&id).unwrap().wanted(), wanted);
    };
    check(0, Order::BecomePrefill, Order::Serve);
    check(0, Order::BecomeDecode, Order::BecomeDecode);
    check(2, Order::BecomeDecode, Order::Serve);
    check(2, Order::BecomePrefill, Order::BecomePrefill);
    check(2, Order::Drain, Order::Drain);
}
