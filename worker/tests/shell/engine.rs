//! The engine thread: notes in order, cancellation by drop, readers that do not read, and a backend that panics.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex};

use crate::{config, eventually, net, start, start_with};
use baton_core::Refused;
use baton_engine::testing::{request, work};
use baton_engine::{Backend, Batch, Event, Goal, Output, Work};
use baton_worker::outlet::{Note, Outlet, Phases, outlet};
use baton_worker::testing::{FakeCoordinator, hash_model};
use baton_worker::{Admission, Error, LoadedModel, Running, StartError, Submission};

async fn worker() -> (FakeCoordinator, Running) {
    let coordinator = FakeCoordinator::start(&net()).await.unwrap();
    let worker = start(config(&[&coordinator])).await.unwrap();
    (coordinator, worker)
}

fn submit(worker: &Running, work: Work, outlet: &Outlet) -> Result<Admission, Refused> {
    let started = tokio::time::Instant::now();
    let submission = Submission { work, outlet: outlet.clone(), tag: 5, phases: Phases::default(), started };
    worker.shell().engine.submit(submission)
}

fn is_free(worker: &Running) -> bool {
    let stats = worker.shell().engine.cache().stats();
    stats.used == 0 && stats.in_flight == 0
}

#[tokio::test]
async fn notes_come_in_order_one_message_a_step() {
    let (_coordinator, worker) = worker().await;
    let (outlet, mut inlet) = outlet(64);
    let mut admission = submit(&worker, work(&request(1, &[1, 2, 3], 4)), &outlet).unwrap();
    admission.ended().await;
    drop((outlet, admission));
    let mut told = String::new();
    while let Some(notes) = inlet.next().await {
        for (tag, note) in notes {
            assert_eq!(tag, 5);
            told.push(match note {
                Note::Admitted(_) => 'a',
                Note::Event(Event::Tokens { .. }) => 't',
                Note::Event(Event::Finished { .. }) => 'f',
                other => panic!("{other:?}"),
            });
        }
        told.push('|');
    }
    assert_eq!(told, "a|t|t|t|tf|");
    eventually("its blocks are free", || is_free(&worker)).await;
}

/// Each layer of each block is announced once, in order, and the blocks are held until the notes are dropped.
#[tokio::test]
async fn layers_are_announced_while_they_are_computed() {
    let (_coordinator, worker) = worker().await;
    let (outlet, mut inlet) = outlet(1024);
    let prompt: Vec<u32> = (0..150).collect();
    let goal = Goal::Prefill { skip_blocks: 2, on_device: false };
    let admission = submit(&worker, Work { goal, ..work(&request(1, &prompt, 4)) }, &outlet).unwrap();
    let (mut announced, mut kept, mut done) = (Vec::new(), Vec::new(), false);
    while !done {
        for (_, note) in inlet.next().await.unwrap() {
            match note {
                Note::Layer { layer, export } => {
                    announced.extend(export.blocks.iter().map(|(index, _)| (*index, layer)));
                    kept.push(export);
                }
                Note::Event(Event::Prefilled { .. }) => done = true,
                _ => {}
            }
        }
    }
    announced.sort_unstable();
    let expected: Vec<(usize, usize)> = (2..38).flat_map(|block| [(block, 0), (block, 1)]).collect();
    assert_eq!(announced, expected);
    drop(admission);
    assert_eq!(worker.shell().engine.cache().stats().used, 36);
    drop(kept);
    eventually("its blocks are free", || is_free(&worker)).await;
}

#[tokio::test]
async fn dropping_an_admission_cancels() {
    let (_coordinator, worker) = worker().await;
    let (outlet, mut inlet) = outlet(1024);
    let admission = submit(&worker, work(&request(1, &[1, 2, 3], 200)), &outlet).unwrap();
    inlet.next().await.unwrap();
    drop(admission);
    eventually("its blocks are free", || is_free(&worker)).await;
}

/// Nobody reads: the work is cancelled, the reader learns it, and the engine goes on with other work.
#[tokio::test]
async fn a_reader_that_does_not_read_is_overrun() {
    let (_coordinator, worker) = worker().await;
    let (slow, mut unread) = outlet(2);
    let mut first = submit(&worker, work(&request(1, &[1, 2, 3], 200)), &slow).unwrap();
    let mut second = submit(&worker, work(&request(2, &[4], 200)), &slow).unwrap();
    slow.overrun().await;
    first.ended().await;
    second.ended().await;
    assert!(unread.is_overrun() && unread.next().await.is_none());
    let (quick, mut inlet) = outlet(64);
    submit(&worker, work(&request(3, &[1, 2, 3], 2)), &quick).unwrap().ended().await;
    assert!(inlet.next().await.is_some());
    eventually("its blocks are free", || is_free(&worker)).await;
}

/// Computes as it should until it is told to do what `then` says.
struct Fails {
    backend: Box<dyn Backend>,
    armed: Arc<AtomicBool>,
    then: fn(),
}

impl Backend for Fails {
    fn run(&mut self, batch: &Batch, layers: &mut dyn FnMut(usize)) -> Output {
        if self.armed.load(Ordering::Relaxed) {
            (self.then)();
        }
        self.backend.run(batch, layers)
    }
}

async fn failing(coordinator: &FakeCoordinator, armed: &Arc<AtomicBool>, then: fn()) -> Result<Running, StartError> {
    let model = hash_model();
    let backend = Box::new(Fails { backend: model.backend, armed: armed.clone(), then });
    start_with(config(&[coordinator]), LoadedModel { backend, ..model }).await
}

#[tokio::test]
async fn a_backend_that_panics_ends_the_worker() {
    let coordinator = FakeCoordinator::start(&net()).await.unwrap();
    let armed = Arc::new(AtomicBool::new(false));
    let mut worker = failing(&coordinator, &armed, || panic!("the device is gone")).await.unwrap();
    armed.store(true, Ordering::Relaxed);
    let (outlet, _inlet) = outlet(8);
    submit(&worker, work(&request(1, &[1], 1)), &outlet).unwrap().ended().await;
    assert!(matches!(worker.ending().await, Err(Error::EngineDied)));
    let again = submit(&worker, work(&request(2, &[1], 1)), &outlet);
    assert!(again.is_err());
}

#[tokio::test]
async fn a_backend_that_fails_its_canary_is_not_registered() {
    let coordinator = FakeCoordinator::start(&net()).await.unwrap();
    let armed = Arc::new(AtomicBool::new(true));
    let started = failing(&coordinator, &armed, || panic!("the device is gone")).await;
    assert!(matches!(started, Err(StartError::CanaryPanicked)));
    assert_eq!(coordinator.registrations(), 0);
}

/// A step that does not come back stops the count of progress and is reported; one that does, goes on counting.
#[tokio::test]
async fn a_stuck_step_is_reported() {
    static HELD: Mutex<bool> = Mutex::new(true);
    static FREE: Condvar = Condvar::new();
    let wait = || drop(FREE.wait_while(HELD.lock().unwrap(), |held| *held));
    let coordinator = FakeCoordinator::start(&net()).await.unwrap();
    let armed = Arc::new(AtomicBool::new(false));
    let worker = failing(&coordinator, &armed, wait).await.unwrap();
    let (outlet, _inlet) = outlet(1024);
    // Enough steps to know how long they take.
    submit(&worker, work(&request(1, &[1, 2, 3], 60)), &outlet).unwrap().ended().await;
    let load = || coordinator.load("prefill-0").unwrap_or_default();
    eventually("the steps are told", || load().steps > 30).await;
    armed.store(true, Ordering::Relaxed);
    let mut stuck = submit(&worker, work(&request(2, &[4], 3)), &outlet).unwrap();
    eventually("it is reported", || load().stuck_ms > 0 && load().sequences_waiting > 0).await;
    let (steps, beats) = (load().steps, coordinator.beats());
    eventually("more heartbeats have come", || coordinator.beats() > beats + 1).await;
    assert_eq!(load().steps, steps);
    *HELD.lock().unwrap() = false;
    FREE.notify_all();
    stuck.ended().await;
    eventually("it gets on", || load().stuck_ms == 0 && load().steps > steps).await;
}
