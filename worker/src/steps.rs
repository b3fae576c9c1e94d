//! The step loop without its thread: commands in, plan → run → commit, notes out. Nothing here waits.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use baton_core::{Aborted, RequestId};
use baton_engine::{Backend, Batch, Engine, Event, Goal, Load, Output};
use tokio::sync::oneshot;
use tokio::time::Instant;

use crate::inbox::{Admit, Command, Key};
use crate::metrics::StepMetrics;
use crate::outlet::{Broken, Export, Note, Notes, Outlet};
use crate::pace::{Pace, Rows};
use crate::pulse::Pulse;

/// The newest load, for heartbeats and metrics.
#[derive(Default)]
pub(crate) struct Published {
    load: Mutex<(Load, u64)>,
    pub(crate) pulse: Pulse,
}

impl Published {
    /// The load, and prompt tokens computed per second lately (0: unknown).
    pub(crate) fn get(&self) -> (Load, u64) {
        *self.load.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    fn set(&self, load: Load, prefill_tokens_per_s: u64) {
        *self.load.lock().unwrap_or_else(|poisoned| poisoned.into_inner()) = (load, prefill_tokens_per_s);
    }
}

/// Whom the engine's events about one request concern.
struct Route {
    key: Key,
    outlet: Outlet,
    tag: u32,
    cached_tokens: u64,
    /// Choices that have not ended; a prefill counts as one.
    open: Vec<u32>,
    end: oneshot::Sender<()>,
}

pub(crate) struct Steps {
    engine: Engine,
    backend: Box<dyn Backend>,
    routes: BTreeMap<RequestId, Route>,
    requests: BTreeMap<Key, RequestId>,
    /// Of work that has ended; only their drop matters: it tells the task so.
    over: Vec<oneshot::Sender<()>>,
    /// What the current step has for each outlet.
    notes: BTreeMap<u64, (Outlet, Notes)>,
    events: Vec<Event>,
    published: Arc<Published>,
    pace: Pace,
    /// How fast the canary's steps were.
    canary: Pace,
    metrics: StepMetrics,
}

impl Steps {
    pub(crate) fn new(engine: Engine, backend: Box<dyn Backend>, published: Arc<Published>, canary: Pace) -> Steps {
        let metrics = StepMetrics::new(&engine.spec().name);
        Steps {
            engine,
            backend,
            routes: BTreeMap::new(),
            requests: BTreeMap::new(),
            over: Vec::new(),
            notes: BTreeMap::new(),
            events: Vec::new(),
            published,
            pace: Pace::default(),
            canary,
            metrics,
        }
    }

    pub(crate) fn apply(&mut self, commands: impl IntoIterator<Item = Command>) {
        for command in commands {
            match command {
                Command::Admit(admit) => self.admit(*admit),
                Command::Cancel(key) => self.cancel(key),
                Command::CancelChoices(key, choices) => self.cancel_choices(key, &choices),
                Command::Abort(key, reason) => self.abort(key, reason),
                Command::Break => panic!("the backend is broken: a rank of the group has ended"),
            }
        }
        self.deliver_ready();
        self.flush();
        self.publish();
    }

    /// Ends the engine and gives its backend back; what it still held is dropped.
    pub(crate) fn into_backend(self) -> Box<dyn Backend> {
        self.backend
    }

    /// One step; false when there is nothing to do.
    pub(crate) fn step(&mut self) -> bool {
        let Some(batch) = self.plan() else { return false };
        self.compute(batch, Instant::now());
        true
    }

    /// One step of a backend whose time is simulated.
    pub(crate) async fn step_inline(&mut self) -> bool {
        let Some(batch) = self.plan() else { return false };
        let began = Instant::now();
        tokio::time::sleep(self.backend.inline_delay(batch.tokens.len()).unwrap_or_default()).await;
        self.compute(batch, began);
        true
    }

    /// The next batch, of which it is told how long it should take.
    fn plan(&mut self) -> Option<Batch> {
        let batch = self.engine.plan()?;
        let rows = Rows::of(&batch);
        self.published.pulse.expect(self.pace.expected(rows).or_else(|| self.canary.expected(rows)));
        Some(batch)
    }

    fn compute(&mut self, batch: Batch, began: Instant) {
        let rows = Rows::of(&batch);
        let output = self.run(&batch, began);
        self.engine.commit(batch, output, &mut self.events);
        let took = began.elapsed();
        self.pace.add(rows, took);
        self.engine.prompts_beside_decodes(self.pace.prompts_beside());
        self.metrics.step(rows.decodes + rows.prompts, took);
        self.deliver();
        self.flush();
        self.publish();
    }

    /// Layers are announced from inside the backend, so that a layer's blocks leave while the next layer computes.
    fn run(&mut self, batch: &Batch, began: Instant) -> Output {
        if batch.is_empty() {
            return Output::default();
        }
        let announce = self.exports(batch, began);
        self.backend.run(batch, &mut |layer| {
            for (outlet, tag, export) in &announce {
                // A reader that is gone cancels by itself; one that is full is swept up by `flush`.
                let _ = outlet.try_send(vec![(*tag, Note::Layer { layer, export: export.clone() })]);
            }
        })
    }

    fn exports(&self, batch: &Batch, began: Instant) -> Vec<(Outlet, u32, Arc<Export>)> {
        let routed = |export: &baton_engine::Export| {
            let route = self.routes.get(&export.request)?;
            let export = Export { blocks: export.blocks.clone(), began, guard: export.guard.clone() };
            Some((route.outlet.clone(), route.tag, Arc::new(export)))
        };
        batch.exports().iter().filter_map(routed).collect()
    }

    fn admit(&mut self, admit: Admit) {
        let Admit { key, work, outlet, tag, mut phases, started, end } = admit;
        let (request, prompt_tokens) = (work.request.id, work.request.prompt.len());
        if let Some(older) = self.routes.get(&request) {
            // The newest lease check has let this one in, so the older one has lost its right.
            self.abort(older.key, Aborted::Superseded);
        }
        let open = match work.goal {
            Goal::Generate => work.choices.iter().map(|choice| choice.index).collect(),
            Goal::Prefill { .. } => vec![0],
        };
        match self.engine.admit(work) {
            Err(reason) => {
                self.note(outlet, tag, Note::Refused(reason));
                self.over.push(end);
            }
            Ok(()) => {
                self.metrics.prompt(prompt_tokens);
                phases.handoff = started.elapsed();
                self.note(outlet.clone(), tag, Note::Admitted(phases));
                let cached_tokens = phases.cached_tokens;
                self.routes.insert(request, Route { key, outlet, tag, cached_tokens, open, end });
                self.requests.insert(key, request);
            }
        }
    }

    fn cancel(&mut self, key: Key) {
        if let Some(request) = self.requests.remove(&key) {
            // Without a route nothing more is said about it, not even by what the engine still has to say.
            self.drop_route(request);
            self.engine.cancel(request);
            self.deliver_ready();
        }
    }

    fn cancel_choices(&mut self, key: Key, choices: &[u32]) {
        let Some(request) = self.requests.get(&key).copied() else { return };
        let Some(route) = self.routes.get_mut(&request) else { return };
        route.open.retain(|choice| !choices.contains(choice));
        if route.open.is_empty() {
            return self.cancel(key);
        }
        self.engine.cancel_choices(request, choices);
        self.deliver_ready();
    }

    fn abort(&mut self, key: Key, reason: Aborted) {
        let Some(request) = self.requests.get(&key).copied() else { return };
        if let Some(Route { outlet, tag, .. }) = self.routes.get(&request) {
            self.note(outlet.clone(), *tag, Note::Event(Event::Aborted { request, reason }));
        }
        self.cancel(key);
    }

    /// Events that needed no step, such as the first tokens of a handoff.
    fn deliver_ready(&mut self) {
        self.engine.take_events(&mut self.events);
        self.deliver();
    }

    fn deliver(&mut self) {
        for event in std::mem::take(&mut self.events) {
            self.metrics.event(&event);
            self.route(event);
        }
    }

    /// An event without a route belongs to something cancelled.
    fn route(&mut self, mut event: Event) {
        let request = request_of(&event);
        let Some(route) = self.routes.get_mut(&request) else { return };
        if let Event::Finished { usage, .. } = &mut event {
            usage.cached_tokens = (usage.cached_tokens + route.cached_tokens as usize).min(usage.prompt_tokens);
        }
        match &event {
            Event::Tokens { choice, .. } | Event::Finished { choice, .. } if !route.open.contains(choice) => return,
            Event::Tokens { .. } | Event::PromptLogprobs { .. } => {}
            Event::Finished { choice, .. } => route.open.retain(|open| open != choice),
            Event::Prefilled { .. } | Event::Aborted { .. } => route.open.clear(),
        }
        let (outlet, tag, key, over) = (route.outlet.clone(), route.tag, route.key, route.open.is_empty());
        self.note(outlet, tag, Note::Event(event));
        if over {
            self.drop_route(request);
            self.requests.remove(&key);
        }
    }

    fn drop_route(&mut self, request: RequestId) {
        self.over.extend(self.routes.remove(&request).map(|route| route.end));
    }

    fn note(&mut self, outlet: Outlet, tag: u32, note: Note) {
        self.notes.entry(outlet.id()).or_insert_with(|| (outlet, Notes::new())).1.push((tag, note));
    }

    /// One message per outlet. What belongs to a broken outlet is cancelled. Whoever waits for the end of a request learns
    /// of it after its last note is there to be read: a worker that stops closes its streams as soon as nothing is left.
    fn flush(&mut self) {
        while let Some((_, (outlet, notes))) = self.notes.pop_first() {
            if let Err(broken) = outlet.try_send(notes) {
                self.cancel_all(&outlet, broken);
            }
        }
        self.over.clear();
    }

    fn cancel_all(&mut self, outlet: &Outlet, broken: Broken) {
        let same = self.routes.values().filter(|route| route.outlet.id() == outlet.id());
        let keys: Vec<Key> = same.map(|route| route.key).collect();
        if broken == Broken::Overrun {
            self.metrics.overrun(keys.len());
        }
        keys.into_iter().for_each(|key| self.cancel(key));
    }

    fn publish(&mut self) {
        let load = self.engine.load();
        self.metrics.load(&load, &self.engine.cache().stats());
        self.published.set(load, self.pace.prefill_tokens_per_s());
    }
}

fn request_of(event: &Event) -> RequestId {
    match event {
        Event::Tokens { request, .. }
        | Event::PromptLogprobs { request, .. }
        | Event::Finished { request, .. }
        | Event::Prefilled { request, .. }
        | Event::Aborted { request, .. } => *request,
    }
}

#[cfg(test)]
mod tests {
    use std::pin::pin;
    use std::task::{Context, Wake, Waker};

    use baton_core::Arena;
    use baton_engine::testing::{request, work};
    use baton_engine::{Cache, EngineConfig};

    use super::*;
    use crate::outlet::{Inlet, Phases, outlet};
    use crate::testing::hash_model;

    /// Counts the notes that can be read at the moment it is woken.
    struct Listening {
        inlet: Mutex<Inlet>,
        heard: Mutex<Vec<Note>>,
    }

    impl Wake for Listening {
        fn wake(self: Arc<Self>) {
            let mut cx = Context::from_waker(Waker::noop());
            while let std::task::Poll::Ready(Some(notes)) = self.inlet.lock().unwrap().poll_next(&mut cx) {
                self.heard.lock().unwrap().extend(notes.into_iter().map(|(_, note)| note));
            }
        }
    }

    /// Whoever hears that work has ended finds its last note there: a stream that is closed then loses nothing.
    #[test]
    fn the_last_note_is_there_when_work_ends() {
        let model = hash_model();
        let config = EngineConfig {
            blocks: 16,
            batch_tokens_max: 64,
            sequences_max: 4,
            queue_max: 4,
            prefix_cache: true,
            draft_tokens_max: 0,
        };
        let cache = Cache::of(Arena::new(model.spec.layout, config.blocks));
        let engine = Engine::over(cache, model.spec, config);
        let mut steps = Steps::new(engine, model.backend, Arc::default(), Pace::default());
        let (outlet, inlet) = outlet(16);
        let (end, ended) = oneshot::channel();
        let listening = Arc::new(Listening { inlet: Mutex::new(inlet), heard: Mutex::default() });
        let waker = Waker::from(listening.clone());
        let mut ended = pin!(ended);
        assert!(ended.as_mut().poll(&mut Context::from_waker(&waker)).is_pending());
        let (work, started) = (work(&request(1, &[1, 2, 3], 2)), Instant::now());
        let admit = Admit { key: Key(1), work, outlet, tag: 0, phases: Phases::default(), started, end };
        steps.apply([Command::Admit(Box::new(admit))]);
        while steps.step() {}
        let heard = listening.heard.lock().unwrap();
        assert!(matches!(heard.last(), Some(Note::Event(Event::Finished { .. }))), "{heard:?}");
    }
}
