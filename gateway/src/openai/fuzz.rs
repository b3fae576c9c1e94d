//! The parsers against anything: no input panics, and every refusal names the parameter.

use std::sync::Arc;

use baton_core::SystemClock;
use baton_proto::v1::ModelCard;
use proptest::prelude::*;
use serde_json::{Map, Value, json};

use super::{Fields, chat, completions};
use crate::model::Model;
use crate::text::fixtures::byte_level;

const NAMES: &[&str] = &[
    "messages",
    "prompt",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "logit_bias",
    "seed",
    "n",
    "best_of",
    "logprobs",
    "top_logprobs",
    "prompt_logprobs",
    "stop",
    "stop_token_ids",
    "include_stop_str_in_output",
    "min_tokens",
    "ignore_eos",
    "max_tokens",
    "max_completion_tokens",
    "stream",
    "stream_options",
    "echo",
    "add_special_tokens",
    "add_generation_prompt",
    "chat_template_kwargs",
    "tools",
    "tool_choice",
    "documents",
    "return_token_ids",
    "cache_salt",
    "response_format",
    "service_tier",
    "skip_special_tokens",
    "suffix",
];

fn model() -> Arc<Model> {
    let card = ModelCard {
        name: "m".into(),
        tokenizer_json: byte_level().to_string(false).unwrap().into(),
        chat_template: "{% for m in messages %}{{ m.role + ': ' + m.content }}{% endfor %}{{ tools | tojson }}".into(),
        positions_max: 64,
        block_tokens: 16,
        vocab: 257,
        generation_config_json: json!({"temperature": 0.6, "top_p": "broken", "top_k": 20}).to_string(),
        ..Default::default()
    };
    Arc::new(Model::from_card(card).unwrap())
}

fn anything() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        (-3i64..40).prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        "[a-z<|>{%é👍]{0,12}".prop_map(Value::from),
        Just(json!({"role": "user", "content": "hi"})),
        Just(json!({"type": "text", "text": "hi"})),
    ];
    leaf.prop_recursive(3, 24, 6, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..6).prop_map(Value::from),
            prop::collection::vec(("[a-z0-9_]{0,8}", inner.clone()), 0..4)
                .prop_map(|pairs| Value::Object(pairs.into_iter().collect())),
            prop::collection::vec(
                ("(role|content|type|text|function|tool_calls|arguments|include_usage)", inner),
                0..5
            )
            .prop_map(|pairs| Value::Object(pairs.into_iter().collect())),
        ]
    })
}

fn body() -> impl Strategy<Value = Map<String, Value>> {
    let field = (prop::sample::select(NAMES), anything());
    prop::collection::vec(field, 0..6).prop_map(|fields| {
        let mut body = json!({"messages": [{"role": "user", "content": "hi"}], "prompt": "hi"});
        let object = body.as_object_mut().expect("it is an object");
        object.extend(fields.into_iter().map(|(name, value)| (name.to_string(), value)));
        object.clone()
    })
}

proptest! {
    #[test]
    fn no_body_panics_and_every_refusal_names_its_parameter(body in body()) {
        let model = model();
        let asked = [
            chat::read(Fields(&body), model.clone(), Arc::new(SystemClock)),
            completions::read(Fields(&body), model),
        ];
        for error in asked.into_iter().filter_map(Result::err) {
            prop_assert_eq!(error.status, 400);
            prop_assert!(error.param.is_some());
        }
    }
}

#[test]
fn defaults_come_from_the_model_when_they_are_good() {
    let body = json!({"messages": [{"role": "user", "content": "hi"}]});
    let Ok(ask) = chat::read(Fields(body.as_object().unwrap()), model(), Arc::new(SystemClock)) else {
        panic!("refused")
    };
    let sampling = ask.params.sampling;
    assert_eq!((sampling.temperature, sampling.top_p, sampling.top_k), (0.6, 1.0, 20));
}
