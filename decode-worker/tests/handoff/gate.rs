//! A backend that can be held at a chosen point, so that a test decides what happens meanwhile.

use std::sync::{Arc, Condvar, Mutex};

use baton_engine::{Backend, Batch, Output};

use crate::cluster::eventually;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Point {
    /// Before a step.
    Step,
    /// Before the step after so many.
    After(usize),
    /// Behind so many layers of a step.
    Layer(usize),
}

#[derive(Default)]
struct State {
    hold: Option<Point>,
    is_held: bool,
    steps: usize,
}

#[derive(Clone, Default)]
pub(crate) struct Gate(Arc<(Mutex<State>, Condvar)>);

impl Gate {
    pub(crate) fn hold(&self, point: Point) {
        self.0.0.lock().unwrap().hold = Some(point);
    }

    pub(crate) fn open(&self) {
        self.0.0.lock().unwrap().hold = None;
        self.0.1.notify_all();
    }

    /// Resolves when the backend stands at the point.
    pub(crate) async fn held(&self) {
        eventually("the backend is held", || self.0.0.lock().unwrap().is_held).await;
    }

    pub(crate) fn steps(&self) -> usize {
        self.0.0.lock().unwrap().steps
    }

    fn pass(&self, point: Point) {
        let mut state = self.0.0.lock().unwrap();
        state.steps += usize::from(point == Point::Step);
        let nth = Point::After(state.steps.saturating_sub(1));
        while state.hold == Some(point) || (point == Point::Step && state.hold == Some(nth)) {
            state.is_held = true;
            state = self.0.1.wait(state).unwrap();
        }
        state.is_held = false;
    }
}

pub(crate) struct Gated {
    pub(crate) backend: Box<dyn Backend>,
    pub(crate) gate: Gate,
}

impl Backend for Gated {
    fn run(&mut self, batch: &Batch, layers: &mut dyn FnMut(usize)) -> Output {
        self.gate.pass(Point::Step);
        self.backend.run(batch, &mut |layer| {
            layers(layer);
            self.gate.pass(Point::Layer(layer + 1));
        })
    }
}
