//! Packed weights that are kept: the bits of a model that is packed, one file however many load it, and a new file when the
//! model, or the file, is another one.

use std::fs;
use std::os::unix::fs::FileExt;
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
    let beside = ["lock", "checked"].map(|kind| Some(kind.as_ref()));
    let mut packed: Vec<PathBuf> = all.filter(|path| !beside.contains(&path.extension())).collect();
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

/// Three that load at a time, a file cut short, other weights: always the model that is there.
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
    for damaged in [&good[..9000], &[]] {
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

/// Goal: a byte that is changed anywhere in a file is found, whatever is noted of it. Method: flip bits of the first page, of
/// some weights, of the index and of the checksum, in place and with the file's date put back; and note the same of a system
/// that ran before.
#[test]
fn damage_is_found_although_the_file_was_whole_before() {
    let (at, weights) = (dir("kept-damaged"), dir("kept-damaged-model"));
    let options = LoadOptions { threads: 2, ..LoadOptions::default() };
    TinyModel::llama().write(&weights, 1).expect("write a model");
    let expected = said(&mut load(&weights, options, &mut |_| {}).expect("load"), ROOMY);
    assert_eq!(said(&mut kept(&weights, options, &at), ROOMY), expected);
    let [file] = &files(&at)[..] else { panic!("{:?}", files(&at)) };
    let (good, noted) = (fs::read(file).expect("read"), file.with_extension("checked"));
    let last = good.len() - 1;
    for place in [0, 5000, good.len() / 2, last - 200, last - 20, last] {
        let before = fs::metadata(file).and_then(|known| known.modified()).expect("a date");
        let opened = fs::OpenOptions::new().write(true).open(file).expect("open");
        opened.write_all_at(&[good[place] ^ 1], place as u64).expect("write");
        opened.set_modified(before).expect("a date");
        assert_eq!(said(&mut kept(&weights, options, &at), ROOMY), expected, "byte {place}");
        assert!(fs::read(file).expect("read") == good, "byte {place}: written anew");
    }
    let note = fs::read_to_string(&noted).expect("a note");
    let earlier = note.replacen(|digit: char| digit.is_ascii_hexdigit(), "x", 1);
    fs::write(&noted, earlier).expect("write");
    assert_eq!(said(&mut kept(&weights, options, &at), ROOMY), expected);
    assert_eq!(fs::read_to_string(&noted).expect("a note"), note, "checked once more");
}

/// Goal: where the file cannot be written to its end, the weights are there all the same. Method: a directory has the name that
/// files are written under.
#[test]
fn weights_that_cannot_be_written_are_packed() {
    let (at, weights) = (dir("kept-unwritten"), dir("kept-unwritten-model"));
    let options = LoadOptions::default();
    TinyModel::llama().write(&weights, 1).expect("write a model");
    let expected = said(&mut kept(&weights, options, &at), ROOMY);
    let [file] = &files(&at)[..] else { panic!("{:?}", files(&at)) };
    fs::remove_file(file).expect("remove");
    fs::create_dir(file.with_extension("new")).expect("a directory");
    assert_eq!(said(&mut kept(&weights, options, &at), ROOMY), expected);
    assert!(!file.exists());
}
