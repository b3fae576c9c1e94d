//! Packed weights that are kept: the bits of a model that is packed, one file however many load it, and a new file when the
//! model, or the file, is another one.

use std::fs;
use std::path::{Path, PathBuf};

use baton_engine::testing::TinyModel;
use baton_engine::{LoadOptions, Loaded, load, load_kept};
use baton_kernels::Quantize;

use crate::common::dir;
use crate::tensor_parallel::{ROOMY, said};

fn kept(model: &Path, options: LoadOptions, at: &Path) -> Loaded {
    load_kept(model, options, Some(at), &mut |_| {}).expect("load")
}

fn files(at: &Path) -> Vec<PathBuf> {
    let all = fs::read_dir(at).expect("a directory").map(|file| file.expect("a file").path());
    let mut packed: Vec<PathBuf> = all.filter(|path| path.extension().is_some_and(|kind| kind != "lock")).collect();
    packed.sort();
    packed
}

#[test]
fn mapped_weights_give_the_bits_of_packed_ones() {
    for (index, model) in TinyModel::families().iter().enumerate() {
        let (at, weights) = (dir(&format!("kept-{index}")), dir(&format!("kept-model-{index}")));
        model.write(&weights, 7).expect("write a model");
        for (ranks, quantize) in [(1, None), (2, None), (1, Some(Quantize::Q8_0))] {
            let options = LoadOptions { threads: 2, ranks, quantize, ..LoadOptions::default() };
            let mut packed = load(&weights, options, &mut |_| {}).expect("load");
            let expected = said(&mut packed, ROOMY);
            for _ in 0..2 {
                let mut mapped = kept(&weights, options, &at);
                assert_eq!(mapped.spec, packed.spec);
                assert_eq!(mapped.model.weight_bytes(), packed.model.weight_bytes());
                assert_eq!(said(&mut mapped, ROOMY), expected, "{}, {options:?}", model.architecture);
            }
        }
        assert_eq!(files(&at).len(), 4, "one of the whole, two of ranks, one quantized");
    }
}

/// Two that load at a time, a damaged file, a file cut short, other weights: always the model that is there.
#[test]
fn another_file_is_written_anew() {
    let (at, weights) = (dir("kept-anew"), dir("kept-anew-model"));
    let options = LoadOptions::default();
    TinyModel::llama().write(&weights, 1).expect("write a model");
    let expected = said(&mut load(&weights, options, &mut |_| {}).expect("load"), ROOMY);
    std::thread::scope(|scope| {
        let loading: Vec<_> = (0..3).map(|_| scope.spawn(|| said(&mut kept(&weights, options, &at), ROOMY))).collect();
        loading.into_iter().for_each(|one| assert_eq!(one.join().expect("no panic"), expected));
    });
    let [file] = &files(&at)[..] else { panic!("{:?}", files(&at)) };
    let good = fs::read(file).expect("read");
    let mut flipped = good.clone();
    flipped[5000] ^= 1;
    for damaged in [&flipped[..], &good[..9000], &[]] {
        fs::write(file, damaged).expect("write");
        assert_eq!(said(&mut kept(&weights, options, &at), ROOMY), expected);
        assert_eq!(fs::read(file).expect("read"), good, "written anew");
    }
    TinyModel::llama().write(&weights, 2).expect("write a model");
    let other = said(&mut load(&weights, options, &mut |_| {}).expect("load"), ROOMY);
    assert_ne!(other, expected);
    assert_eq!(said(&mut kept(&weights, options, &at), ROOMY), other);
    let nowhere = at.join("a-file");
    fs::write(&nowhere, "").expect("write");
    assert_eq!(said(&mut kept(&weights, options, &nowhere), ROOMY), other, "without a place to keep them");
}
