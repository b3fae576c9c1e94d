//! Random small models of each family through the whole engine: equal tokens and equal log-probability bits, whatever
//! happens around a request.

use baton_core::{Request, SampledToken, TokenId};
use baton_engine::testing::{TinyModel, drain, request, work};
use baton_engine::{CpuModel, EngineConfig, ModelSpec};

use crate::common::{CONFIG, Choices, bits, load_tiny, model_engine, prompt};

const ROOMY: EngineConfig = EngineConfig { blocks: 256, batch_tokens_max: 1024, sequences_max: 64, ..CONFIG };

fn asking(id: u128, prompt: &[TokenId], sampled: bool) -> Request {
    let mut request = Request { logprobs: Some(3), ..request(id, prompt, 36) };
    request.ignore_eos = true;
    if sampled {
        request.sampling.temperature = 0.8;
        request.sampling.seed = id as u64;
        request.sampling.repetition_penalty = 1.1;
    }
    request
}

fn alone(model: &mut CpuModel, spec: &ModelSpec, request: &Request) -> Vec<SampledToken> {
    let mut engine = model_engine(spec, ROOMY);
    engine.admit(work(request)).expect("room");
    Choices::of(drain(&mut engine, model)).sampled(request.id.0, 0).to_vec()
}

/// The same bits alone and among 31 others, in one chunk and in many, with and without a prefix hit, preempted or not.
#[test]
fn bits_do_not_depend_on_company() {
    for (index, tiny) in TinyModel::families().iter().enumerate() {
        let loaded = load_tiny(&format!("company-{index}"), tiny, 1);
        let (mut model, spec) = (loaded.model, loaded.spec);
        let requests: Vec<Request> =
            (0..32).map(|id| asking(id, &prompt(id as u64 % 7, 20 + id as usize, spec.vocab), id % 2 == 1)).collect();
        let expected: Vec<_> = requests.iter().map(|request| alone(&mut model, &spec, request)).collect();
        for (blocks, batch_tokens_max) in [(256, 1024), (256, 40), (9, 33)] {
            let config = EngineConfig { blocks, batch_tokens_max, sequences_max: 32, ..CONFIG };
            let mut engine = model_engine(&spec, config);
            for request in &requests {
                engine.admit(work(request)).expect("room");
            }
            let choices = Choices::of(drain(&mut engine, &mut model));
            for (request, expected) in requests.iter().zip(&expected) {
                let found = choices.sampled(request.id.0, 0);
                assert_eq!(bits(found), bits(expected), "{} request {}", tiny.architecture, request.id);
            }
            assert_eq!(engine.load().preemptions > 0, blocks < 100);
            assert!(engine.load().tokens_hit > 0 || (blocks, batch_tokens_max) != (256, 40));
        }
    }
}
