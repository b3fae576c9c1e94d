//! Weights that are kept as they lie in memory, through whole clusters: the same bytes packed, written and mapped, mapped
//! again, and packed anew where the file was damaged.

use std::path::{Path, PathBuf};

use baton_tests::Cluster;
use baton_tests::cluster::{Scratch, wait_for};
use serde_json::{Map, Value, json};

use crate::same_bytes::answers;

/// Inputs and outputs of zeros that each MLP is widened by, so that the model is one of those whose weights are kept.
const WIDENED: usize = 12_000;

/// The model that ships, wider by what changes nothing, in a directory of its name.
fn widened(scratch: &Scratch) -> PathBuf {
    let (from, to) =
        (Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/baton-3m"), scratch.path().join("baton-3m"));
    std::fs::create_dir_all(&to).expect("a directory");
    for name in ["generation_config.json", "tokenizer.json", "tokenizer_config.json"] {
        std::fs::copy(from.join(name), to.join(name)).expect("copied");
    }
    let mut config: Value =
        serde_json::from_slice(&std::fs::read(from.join("config.json")).expect("read")).expect("JSON");
    let narrow = config["intermediate_size"].as_u64().expect("a number") as usize;
    config["intermediate_size"] = (narrow + WIDENED).into();
    std::fs::write(to.join("config.json"), config.to_string()).expect("written");

    let file = std::fs::read(from.join("model.safetensors")).expect("read");
    let (len, rest) = file.split_first_chunk().expect("a header");
    let (header, data) = rest.split_at(u64::from_le_bytes(*len) as usize);
    let header: Map<String, Value> = serde_json::from_slice(header).expect("JSON");
    let (mut tensors, mut bytes) = (Map::new(), Vec::new());
    for (name, tensor) in header.iter().filter(|(name, _)| *name != "__metadata__") {
        let place = |i: usize| tensor["data_offsets"][i].as_u64().expect("a place") as usize;
        let mut shape: Vec<usize> = serde_json::from_value(tensor["shape"].clone()).expect("a shape");
        let mut values = data[place(0)..place(1)].to_vec();
        if name.contains("gate_proj") || name.contains("up_proj") {
            shape[0] += WIDENED;
            values.resize(shape[0] * shape[1] * 2, 0);
        } else if name.contains("down_proj") {
            let zeros = [0; 2 * WIDENED];
            values = values.chunks(shape[1] * 2).flat_map(|row| [row, &zeros].concat()).collect();
            shape[1] += WIDENED;
        }
        let offsets = [bytes.len(), bytes.len() + values.len()];
        tensors.insert(name.clone(), json!({"dtype": tensor["dtype"], "shape": shape, "data_offsets": offsets}));
        bytes.extend(values);
    }
    let header = Value::Object(tensors).to_string();
    let whole = [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &bytes].concat();
    std::fs::write(to.join("model.safetensors"), whole).expect("written");
    to
}

/// A cluster of both roles, which start one after the other.
async fn up(model: &Path, weights: &str) -> Cluster {
    let cluster = Cluster::up(&["--model", &model.display().to_string(), "--weights-cache", weights]).await;
    wait_for("both workers to be live", || async {
        let status = cluster.status();
        let live = status["workers"].as_array()?.iter().filter(|worker| worker["live"] == true).count();
        (live == 2).then_some(())
    })
    .await;
    cluster
}

#[tokio::test]
async fn kept_weights_give_the_bytes_of_packed_ones() {
    let scratch = Scratch::new("kept");
    let model = widened(&scratch);
    let reference = answers(&up(&model, "none").await.client).await;
    let kept = scratch.path().join("weights");
    let weights = kept.display().to_string();
    let packed = || {
        let files = std::fs::read_dir(&kept).expect("the directory").map(|entry| entry.expect("an entry").path());
        let mut files = files.filter(|path| path.extension().is_some_and(|extension| extension == "packed"));
        let file = files.next().expect("a file of packed weights");
        assert_eq!(files.next(), None, "both workers have the same one");
        file
    };
    assert_eq!(answers(&up(&model, &weights).await.client).await, reference, "packed into the file");
    let whole = std::fs::read(packed()).expect("read");
    assert_eq!(answers(&up(&model, &weights).await.client).await, reference, "mapped");
    let mut damaged = whole.clone();
    let middle = damaged.len() / 2;
    damaged[middle..middle + 64].fill(0xa5);
    std::fs::write(packed(), damaged).expect("written");
    assert_eq!(answers(&up(&model, &weights).await.client).await, reference, "packed anew");
    assert!(std::fs::read(packed()).expect("read") == whole, "the file is whole again");
}
