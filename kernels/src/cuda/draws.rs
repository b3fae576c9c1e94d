//! Reading tokens off logits on the GPU, by the rules of the engine's sampling.

use baton_core::{SampledToken, Sampling, TokenId};

use super::error::GpuError;
use super::gpu::Gpu;
use super::launch::{self, Adjust, Alternative, Edit, Report, Sample};
use super::memory::{Floats, Memory};

/// One thing to read off a row.
pub struct GpuDraw<'a> {
    /// Row of the logits.
    pub row: usize,
    pub kind: GpuDrawKind<'a>,
    /// Alternatives to report beside the token's log-probability; None reports neither.
    pub top: Option<u32>,
}

pub enum GpuDrawKind<'a> {
    /// Sample a token.
    Next(GpuNext<'a>),
    /// Report this one.
    Given(TokenId),
}

/// Everything that decides a sampled token besides the logits.
pub struct GpuNext<'a> {
    pub sampling: &'a Sampling,
    pub position: u32,
    pub choice: u32,
    /// Tokens so far with how often the output has each, when a penalty needs them; no id twice.
    pub seen: &'a [(TokenId, u32)],
    pub banned: &'a [TokenId],
}

impl GpuNext<'_> {
    fn changes_logits(&self) -> bool {
        !(self.sampling.logit_bias.is_empty() && self.seen.is_empty() && self.banned.is_empty())
    }
}

/// What drawing needs on the GPU; grows and stays.
pub struct GpuDraws {
    adjusted: Floats,
    edits: Memory,
    adjusts: Memory,
    samples: Memory,
    tokens: Memory,
    reports: Memory,
    logprobs: Memory,
    top: Memory,
}

/// The draws as the kernels take them.
#[derive(Default)]
struct Lists {
    edits: Vec<Edit>,
    adjusts: Vec<Adjust>,
    samples: Vec<Sample>,
    reports: Vec<Report>,
    alternatives: usize,
}

impl Lists {
    fn of(draws: &[GpuDraw], vocab: usize) -> Lists {
        let mut lists = Lists::default();
        for draw in draws {
            let sampled = lists.samples.len() as u32;
            let given = match &draw.kind {
                GpuDrawKind::Given(token) => Some(*token),
                GpuDrawKind::Next(next) => {
                    lists.next(draw.row as u32, next);
                    None
                }
            };
            let Some(top) = draw.top else { continue };
            let (top, at) = (top.min(vocab as u32), lists.alternatives as u32);
            let (row, token, given) = (draw.row as u32, given.unwrap_or(0), given.is_some() as u32);
            lists.reports.push(Report { row, draw: sampled, token, given, top, at });
            lists.alternatives += top as usize;
        }
        lists
    }

    fn next(&mut self, row: u32, next: &GpuNext) {
        let sampling = next.sampling;
        let changed = next.changes_logits();
        let adjusted = self.adjusts.len() as u32;
        if changed {
            let at = self.edits.len() as u32;
            let edit = |id: TokenId, count: u32, bias: f32| Edit { id, count, bias, _pad: 0 };
            self.edits.extend(sampling.logit_bias.iter().map(|(id, bias)| edit(*id, 0, *bias)));
            self.edits.extend(next.seen.iter().map(|(id, count)| edit(*id, *count, 0.0)));
            self.edits.extend(next.banned.iter().map(|id| edit(*id, 0, 0.0)));
            self.adjusts.push(Adjust {
                row,
                out: adjusted,
                at,
                biases: sampling.logit_bias.len() as u32,
                penalties: next.seen.len() as u32,
                bans: next.banned.len() as u32,
                repetition: sampling.repetition_penalty,
                presence: sampling.presence_penalty,
                frequency: sampling.frequency_penalty,
                _pad: 0,
            });
        }
        self.samples.push(Sample {
            row: if changed { adjusted } else { row },
            adjusted: changed as u32,
            seed_low: sampling.seed as u32,
            seed_high: (sampling.seed >> 32) as u32,
            position: next.position,
            choice: next.choice,
            temperature: sampling.temperature,
            top_k: sampling.top_k,
            top_p: sampling.top_p,
            min_p: sampling.min_p,
        });
    }
}

impl Gpu {
    pub fn draws(&self) -> Result<GpuDraws, GpuError> {
        let small = || Memory::new(&self.driver, 1);
        Ok(GpuDraws {
            adjusted: self.floats(1)?,
            edits: small()?,
            adjusts: small()?,
            samples: small()?,
            tokens: small()?,
            reports: small()?,
            logprobs: small()?,
            top: small()?,
        })
    }

    /// Reads the draws off `rows` rows of logits, which stay as they are. Waits for the answer.
    pub fn draw(
        &self,
        scratch: &mut GpuDraws,
        logits: &Floats,
        rows: usize,
        vocab: usize,
        draws: &[GpuDraw],
    ) -> Result<Vec<SampledToken>, GpuError> {
        assert!(logits.len() >= rows * vocab && draws.iter().all(|draw| draw.row < rows), "rows do not fit");
        let lists = Lists::of(draws, vocab);
        let (width, from) = (vocab as u32, logits.at());
        put(&mut scratch.edits, &lists.edits)?;
        put(&mut scratch.adjusts, &lists.adjusts)?;
        put(&mut scratch.samples, &lists.samples)?;
        put(&mut scratch.reports, &lists.reports)?;
        scratch.adjusted.ensure(lists.adjusts.len() * vocab)?;
        scratch.tokens.ensure(lists.samples.len() * 4)?;
        scratch.logprobs.ensure(lists.reports.len() * 4)?;
        scratch.top.ensure(lists.alternatives * size_of::<Alternative>())?;
        let (adjusted, edits, adjusts) = (scratch.adjusted.at(), scratch.edits.at(), scratch.adjusts.at());
        let (samples, tokens, reports) = (scratch.samples.at(), scratch.tokens.at(), scratch.reports.at());
        let (logprobs, top) = (scratch.logprobs.at(), scratch.top.at());
        let grid = |count: usize| [count, 1, 1];
        self.launch(launch::ADJUST, grid(lists.adjusts.len()), &[&from, &width, &adjusts, &edits, &adjusted])?;
        self.launch(launch::SAMPLE, grid(lists.samples.len()), &[&from, &adjusted, &width, &samples, &tokens])?;
        let arguments: [&dyn launch::Argument; 6] = [&from, &width, &reports, &tokens, &logprobs, &top];
        self.launch(launch::REPORT, grid(lists.reports.len()), &arguments)?;
        let mut ids = scratch.tokens.read::<u32>(0, lists.samples.len())?.into_iter();
        // Reading nothing would wait all the same.
        let logprobs: Vec<f32> = match lists.reports.len() {
            0 => Vec::new(),
            count => scratch.logprobs.read(0, count)?,
        };
        let alternatives: Vec<Alternative> = match lists.alternatives {
            0 => Vec::new(),
            count => scratch.top.read(0, count)?,
        };
        let mut found = logprobs.into_iter().zip(&lists.reports);
        let token = |draw: &GpuDraw| {
            let id = match draw.kind {
                GpuDrawKind::Given(token) => token,
                GpuDrawKind::Next(_) => ids.next().expect("one per sample"),
            };
            let Some((logprob, report)) = draw.top.and_then(|_| found.next()) else {
                return SampledToken { id, logprob: 0.0, top: Vec::new() };
            };
            let top = &alternatives[report.at as usize..][..report.top as usize];
            SampledToken { id, logprob, top: top.iter().map(|one| (one.id, one.logprob)).collect() }
        };
        Ok(draws.iter().map(token).collect())
    }
}

fn put<T: launch::Plain>(memory: &mut Memory, values: &[T]) -> Result<(), GpuError> {
    memory.ensure(size_of_val(values))?;
    memory.write(0, values)
}
