//! Weight files, mapped: safetensors or GGUF. Headers are checked before any tensor is touched; nothing here allocates more
//! than the files hold.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};

use baton_kernels::f8::SCALE_BOUND;
use baton_kernels::{Dtype, F8Matrix, Matrix};
use memmap2::{Advice, Mmap, UncheckedAdvice};
use safetensors::SafeTensorError;
use safetensors::tensor::SafeTensors;
use serde::Deserialize;
use xxhash_rust::xxh3::{Xxh3, xxh3_128};

use crate::load::error::LoadError;
use crate::load::gguf::{self, Header};
use crate::load::int8::{self, Packing};

/// Bytes hashed and checked as one piece of work.
const PIECE_BYTES: usize = 4 << 20;

/// What safetensors calls e4m3.
const EIGHTS: &str = "F8_E4M3";
/// Outputs, and inputs, of a block that shares a scale.
const SCALE_BLOCK: usize = 128;

/// All weights of a model directory.
pub struct Checkpoint {
    files: Vec<File>,
    /// File of each tensor.
    index: BTreeMap<String, usize>,
    /// What to name when a tensor is missing.
    whole: PathBuf,
}

pub(super) struct File {
    pub(super) path: PathBuf,
    map: Mmap,
    tensors: BTreeMap<String, gguf::Tensor>,
}

/// One tensor in its file.
pub struct Tensor<'a> {
    file: &'a File,
    pub name: String,
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    /// Of a matrix of 8 bits what they mean in bf16, or nothing (`Checkpoint::kept`).
    pub bytes: Cow<'a, [u8]>,
    /// Where it lies in the file.
    place: Range<usize>,
    eights: Option<Eights<'a>>,
}

/// A matrix of e4m3 as the file has it, with its scales.
struct Eights<'a> {
    bytes: &'a [u8],
    scales: Vec<f32>,
    block: (usize, usize),
}

/// What the numbers of a matrix are multiplied with.
pub(super) struct Scales {
    /// Row by row, one for each block.
    pub(super) values: Vec<f32>,
    /// Outputs and inputs that share one.
    pub(super) block: (usize, usize),
}

#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

impl Checkpoint {
    /// Opens model.safetensors, or the shards that model.safetensors.index.json names.
    pub fn open(dir: &Path) -> Result<Checkpoint, LoadError> {
        let whole = dir.join("model.safetensors.index.json");
        if whole.exists() {
            return Checkpoint::open_shards(dir, whole);
        }
        Ok(Checkpoint::of(File::open(&dir.join("model.safetensors"))?))
    }

    /// Opens a GGUF file; its configuration comes with it, as config.json would say it.
    pub fn open_gguf(path: &Path) -> Result<(Checkpoint, serde_json::Value), LoadError> {
        let map = map(path)?;
        let header = Header::read(path, &map)?;
        let (config, tensors) = (header.config(path, &map)?, header.named(&map));
        Ok((Checkpoint::of(File { path: path.to_path_buf(), map, tensors }), config))
    }

    fn of(file: File) -> Checkpoint {
        let index = file.tensors.keys().map(|name| (name.clone(), 0)).collect();
        Checkpoint { whole: file.path.clone(), files: vec![file], index }
    }

    fn open_shards(dir: &Path, whole: PathBuf) -> Result<Checkpoint, LoadError> {
        let text = std::fs::read(&whole).map_err(|error| LoadError::Unreadable { file: whole.clone(), error })?;
        let map: Index =
            serde_json::from_slice(&text).map_err(|error| LoadError::Json { file: whole.clone(), error })?;
        let (mut files, mut index, mut opened) = (Vec::new(), BTreeMap::new(), BTreeMap::new());
        for (tensor, shard) in map.weight_map {
            let plain = Path::new(&shard).file_name().is_some_and(|name| name == shard.as_str());
            if !plain {
                return Err(LoadError::Shard { file: whole, tensor, found: shard });
            }
            let at = match opened.get(&shard) {
                Some(at) => *at,
                None => {
                    files.push(File::open(&dir.join(&shard))?);
                    opened.insert(shard, files.len() - 1);
                    files.len() - 1
                }
            };
            index.insert(tensor, at);
        }
        Ok(Checkpoint { files, index, whole })
    }

    /// Text that changes when one of the files does: where it is, its size, and when it was written.
    pub fn identity(&self) -> Result<String, LoadError> {
        let of = |file: &File| -> Result<String, LoadError> {
            let known = std::fs::metadata(&file.path).and_then(|known| Ok((known.len(), known.modified()?)));
            let known = known.map_err(|error| LoadError::Unreadable { file: file.path.clone(), error })?;
            Ok(format!("{} {known:?}", file.path.display()))
        };
        Ok(self.files.iter().map(of).collect::<Result<Vec<_>, _>>()?.join("\n"))
    }

    /// Size of all files.
    pub fn bytes(&self) -> u64 {
        self.files.iter().map(|file| file.map.len() as u64).sum()
    }

    /// Element type that the named tensor is loaded as, if there is one and it is known.
    pub fn dtype(&self, name: &str) -> Option<Dtype> {
        if self.integers(name).is_some() {
            return Some(Dtype::Q8_0);
        }
        match &self.found(name)?.1.dtype {
            Ok(dtype) => Some(*dtype),
            Err(found) => (found == EIGHTS).then_some(Dtype::Bf16),
        }
    }

    /// Bytes of all matrices in memory, where those of 8 bits are kept as they are, and of the largest of these in bf16.
    pub fn kept_bytes(&self) -> u64 {
        let matrices =
            self.files.iter().flat_map(|file| file.tensors.values()).filter(|tensor| tensor.shape.len() == 2);
        let sizes = matrices.map(|tensor| (tensor.shape.iter().product::<usize>() as u64, is_eights(tensor)));
        let (sum, largest) = sizes.fold((0, 0), |(sum, largest), (elements, eights)| match eights {
            true => (sum + elements, elements.max(largest)),
            false => (sum + 2 * elements, largest),
        });
        sum + 2 * largest
    }

    fn found(&self, name: &str) -> Option<(&File, &gguf::Tensor)> {
        let file = &self.files[*self.index.get(name)?];
        file.tensors.get(name).map(|tensor| (file, tensor))
    }

    /// The named matrix of 8-bit integers, and how they lie there.
    fn integers(&self, name: &str) -> Option<(&File, &gguf::Tensor, Packing)> {
        let plain = || self.found(name).map(|found| (found, false));
        let ((file, found), packed) = plain().or_else(|| Some((self.found(&format!("{name}_packed"))?, true)))?;
        Packing::of(found, packed).map(|packing| (file, found, packing))
    }

    /// A matrix of 8-bit integers as one of Q8_0.
    fn in_q8_0<'a>(
        &'a self,
        name: &str,
        (rows, cols): (usize, usize),
        (file, found, packing): (&'a File, &gguf::Tensor, Packing),
    ) -> Result<Tensor<'a>, LoadError> {
        let expected = packing.shape(rows, cols);
        if found.shape != expected {
            let (file, tensor, found) = (file.path.clone(), name.to_string(), found.shape.clone());
            return Err(LoadError::Shape { file, tensor, found, expected });
        }
        if let Some((file, zeros)) = self.found(&format!("{name}_zero_point"))
            && file.map[zeros.bytes.clone()].iter().any(|byte| *byte != 0)
        {
            let reason = "zero points; expected symmetric integers".to_string();
            return Err(LoadError::Integers { file: file.path.clone(), tensor: name.to_string(), reason });
        }
        let scales = self.scales(name, (rows, cols))?;
        let bytes = int8::to_q8_0(file, name, (rows, cols), packing, &file.map[found.bytes.clone()], &scales)?;
        let (name, shape, place) = (name.to_string(), vec![rows, cols], found.bytes.clone());
        Ok(Tensor { file, name, dtype: Dtype::Q8_0, shape, bytes: Cow::Owned(bytes), place, eights: None })
    }

    /// The named tensor if there is one; it must have this shape.
    pub fn optional(&self, name: &str, shape: &[usize]) -> Result<Option<Tensor<'_>>, LoadError> {
        match self.index.contains_key(name) {
            true => self.tensor(name, shape).map(Some),
            false => Ok(None),
        }
    }

    /// The named tensor, which must have this shape; 8 bits become bf16.
    pub fn tensor(&self, name: &str, shape: &[usize]) -> Result<Tensor<'_>, LoadError> {
        let mut tensor = self.kept(name, shape)?;
        tensor.widen();
        Ok(tensor)
    }

    /// As `tensor`, with 8 bits left as they are: `Tensor::eights` has them.
    pub fn kept(&self, name: &str, shape: &[usize]) -> Result<Tensor<'_>, LoadError> {
        if let ([rows, cols], Some(found)) = (shape, self.integers(name)) {
            return self.in_q8_0(name, (*rows, *cols), found);
        }
        let Some((file, found)) = self.found(name) else {
            let file = self.index.get(name).map_or(&self.whole, |at| &self.files[*at].path).clone();
            return Err(LoadError::MissingTensor { file, tensor: name.to_string(), expected: shape.to_vec() });
        };
        if found.shape != shape {
            return Err(LoadError::Shape {
                file: file.path.clone(),
                tensor: name.to_string(),
                found: found.shape.clone(),
                expected: shape.to_vec(),
            });
        }
        if is_eights(found) && shape.len() == 2 {
            let Scales { values: scales, block } = self.scales(name, (shape[0], shape[1]))?;
            let eights = Some(Eights { bytes: &file.map[found.bytes.clone()], scales, block });
            let (name, shape, place) = (name.to_string(), shape.to_vec(), found.bytes.clone());
            return Ok(Tensor { file, name, dtype: Dtype::Bf16, shape, bytes: Cow::Borrowed(&[]), place, eights });
        }
        let dtype = found.dtype.clone().map_err(|found| {
            let (file, tensor) = (file.path.clone(), name.to_string());
            LoadError::Dtype { file, tensor, found }
        })?;
        let bytes = &file.map[found.bytes.clone()];
        let bytes = match found.paired {
            Some(head_dim) => Cow::Owned(unpaired(file, name, bytes, shape[0], head_dim)?),
            None => Cow::Borrowed(bytes),
        };
        let (name, shape, place) = (name.to_string(), shape.to_vec(), found.bytes.clone());
        Ok(Tensor { file, name, dtype, shape, bytes, place, eights: None })
    }

    /// Scales of a matrix of 8 bits: `X_scale` (compressed-tensors: one, one for each output, or for each output one for so
    /// many inputs) or `X_scale_inv` (one for 128 by 128). A weight is multiplied by either.
    fn scales(&self, name: &str, (rows, cols): (usize, usize)) -> Result<Scales, LoadError> {
        let blocks = [rows.div_ceil(SCALE_BLOCK), cols.div_ceil(SCALE_BLOCK)];
        let named = [format!("{name}_scale_inv"), format!("{name}_scale")];
        let found = named.into_iter().find_map(|name| self.found(&name).map(|(_, found)| (name, found.shape.clone())));
        let Some((scale, shape)) = found else {
            let (file, tensor) = (self.whole.clone(), format!("{name}_scale"));
            return Err(LoadError::MissingTensor { file, tensor, expected: blocks.to_vec() });
        };
        let block = match shape[..] {
            [] | [1] | [1, 1] => (rows, cols),
            [len] | [len, 1] if len == rows => (1, cols),
            [down, across] if [down, across] == blocks => (SCALE_BLOCK, SCALE_BLOCK),
            [down, across] if down == rows && across > 0 && cols.is_multiple_of(across) => (1, cols / across),
            _ => {
                let file = self.whole.clone();
                return Err(LoadError::Shape { file, tensor: scale, found: shape, expected: blocks.to_vec() });
            }
        };
        let tensor = self.tensor(&scale, &shape)?;
        let scales = tensor.values()?;
        if let Some(index) = scales.iter().position(|scale| !(0.0..SCALE_BOUND).contains(scale)) {
            let (file, value) = (tensor.file.path.clone(), scales[index]);
            return Err(LoadError::Scale { file, tensor: scale, index, value, bound: SCALE_BOUND });
        }
        Ok(Scales { values: scales, block })
    }
}

fn is_eights(tensor: &gguf::Tensor) -> bool {
    tensor.dtype.as_ref().is_err_and(|found| found == EIGHTS)
}

/// Rows of heads as Hugging Face lays them: llama.cpp keeps rows i and i + head_dim/2, which rotate together, side by side.
fn unpaired(file: &File, name: &str, bytes: &[u8], rows: usize, head_dim: usize) -> Result<Vec<u8>, LoadError> {
    if head_dim == 0 || !head_dim.is_multiple_of(2) || !rows.is_multiple_of(head_dim) {
        let reason = format!("its {rows} rows are not whole heads of {head_dim}");
        return Err(LoadError::Gguf { file: file.path.clone(), what: format!("tensor {name}"), reason });
    }
    let (width, half) = (bytes.len() / rows, head_dim / 2);
    let mut out = Vec::with_capacity(bytes.len());
    for row in 0..rows {
        let (head, within) = (row / head_dim, row % head_dim);
        let from = head * head_dim + within % half * 2 + within / half;
        out.extend_from_slice(&bytes[from * width..][..width]);
    }
    Ok(out)
}

impl File {
    fn open(path: &Path) -> Result<File, LoadError> {
        let map = map(path)?;
        let (header, metadata) = SafeTensors::read_metadata(&map).map_err(|error| refused(path, &map, error))?;
        let tensor = |name: String| {
            let found = metadata.info(&name)?;
            let dtype = match found.dtype {
                safetensors::Dtype::F32 => Ok(Dtype::F32),
                safetensors::Dtype::F16 => Ok(Dtype::F16),
                safetensors::Dtype::BF16 => Ok(Dtype::Bf16),
                other => Err(format!("{other:?}")),
            };
            let (from, to) = found.data_offsets;
            let bytes = 8 + header + from..8 + header + to;
            Some((name, gguf::Tensor { dtype, shape: found.shape.clone(), bytes, paired: None }))
        };
        let tensors = metadata.offset_keys().into_iter().filter_map(tensor).collect();
        Ok(File { path: path.to_path_buf(), map, tensors })
    }
}

pub(crate) fn map(path: &Path) -> Result<Mmap, LoadError> {
    let unreadable = |error| LoadError::Unreadable { file: path.to_path_buf(), error };
    let file = std::fs::File::open(path).map_err(unreadable)?;
    // SAFETY: the file is read only here. Someone who shortens it meanwhile ends this process by SIGBUS before it
    // has registered, which is all that can be done about it.
    let map = unsafe { Mmap::map(&file) }.map_err(unreadable)?;
    // Advice only: refused, it costs speed.
    let _ = map.advise(Advice::Sequential);
    Ok(map)
}

/// What is wrong with a file whose header was refused.
fn refused(path: &Path, bytes: &[u8], error: SafeTensorError) -> LoadError {
    let file = path.to_path_buf();
    let found = bytes.len() as u64;
    let described = bytes.first_chunk().map(|len| u64::from_le_bytes(*len));
    match (error, described) {
        (SafeTensorError::MetadataIncompleteBuffer, Some(header)) => {
            let expected = 8 + header + data_bytes(bytes, header);
            LoadError::Truncated { file, found, expected }
        }
        (SafeTensorError::HeaderTooSmall, _) => LoadError::Truncated { file, found, expected: 8 },
        (SafeTensorError::HeaderTooLarge | SafeTensorError::InvalidHeaderLength, Some(header)) => {
            LoadError::Header { file, reason: format!("it claims {header} bytes in a file of {found}") }
        }
        (error, _) => LoadError::Header { file, reason: error.to_string() },
    }
}

/// The end of the last tensor by the header, which has been found well formed but for the length of the file.
fn data_bytes(bytes: &[u8], header: u64) -> u64 {
    let header = bytes.get(8..8 + header as usize).unwrap_or_default();
    let parsed: serde_json::Value = serde_json::from_slice(header).unwrap_or_default();
    let tensors = parsed.as_object().into_iter().flat_map(|tensors| tensors.values());
    tensors.filter_map(|tensor| tensor["data_offsets"][1].as_u64()).max().unwrap_or(0)
}

impl Tensor<'_> {
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }

    /// Bytes of the file.
    pub fn stored_bytes(&self) -> usize {
        self.place.len()
    }

    /// The matrix as the file has it, if that is in 8 bits.
    pub fn eights(&self) -> Option<F8Matrix<'_>> {
        let Eights { bytes, scales, block } = self.eights.as_ref()?;
        Some(F8Matrix { bytes, rows: self.shape[0], cols: self.shape[1], scales, block: *block })
    }

    /// Makes bf16 of 8 bits.
    pub fn widen(&mut self) {
        if let Some(eights) = self.eights() {
            self.bytes = Cow::Owned(eights.widen());
        }
    }

    /// As a matrix; a vector is one column wide.
    pub fn matrix(&self) -> Matrix<'_> {
        let cols = self.shape.get(1).copied().unwrap_or(1);
        Matrix { dtype: self.dtype, bytes: &self.bytes, rows: self.shape[0], cols }
    }

    /// All values of a tensor of floating-point numbers, exactly.
    pub fn values(&self) -> Result<Vec<f32>, LoadError> {
        if !self.dtype.is_float() {
            let (file, tensor) = (self.file.path.clone(), self.name.clone());
            return Err(LoadError::Dtype { file, tensor, found: format!("{:?}", self.dtype) });
        }
        Ok(self.bytes.chunks_exact(self.dtype.unit_bytes()).map(|bytes| value(self.dtype, bytes)).collect())
    }

    /// Content hash of dtype, shape and bytes, or the first value that is not finite. Independent of `threads`, and of whether
    /// 8 bits were made bf16.
    pub fn inspect(&self, threads: usize) -> Result<u128, LoadError> {
        let (stored, size) = match &self.eights {
            Some(eights) => (eights.bytes, 1),
            None => (&self.bytes[..], self.dtype.unit_bytes()),
        };
        let finite = |piece: &[u8]| match &self.eights {
            Some(_) => !piece.iter().fold(false, |found, byte| found | (byte & 0x7f == 0x7f)),
            None => is_finite(self.dtype, piece),
        };
        let pieces: Vec<&[u8]> = stored.chunks(PIECE_BYTES / size * size).collect();
        let next = AtomicUsize::new(0);
        let work = || {
            let mut results = Vec::new();
            while let Some(piece) = pieces.get(next.fetch_add(1, Ordering::Relaxed)) {
                results.push((piece.as_ptr() as usize, xxh3_128(piece), finite(piece)));
            }
            results
        };
        let mut results = Vec::new();
        std::thread::scope(|scope| {
            let others: Vec<_> = (1..threads.min(pieces.len())).map(|_| scope.spawn(work)).collect();
            results.extend(work());
            others.into_iter().for_each(|other| results.extend(other.join().expect("a checker panicked")));
        });
        if results.iter().any(|result| !result.2) {
            return Err(self.not_finite());
        }
        results.sort_unstable();
        let mut hasher = Xxh3::new();
        match &self.eights {
            None => hasher.update(format!("{:?}{:?}", self.dtype, self.shape).as_bytes()),
            Some(eights) => {
                hasher.update(format!("{EIGHTS}{:?}{:?}", self.shape, eights.block).as_bytes());
                eights.scales.iter().for_each(|scale| hasher.update(&scale.to_le_bytes()));
            }
        }
        results.iter().for_each(|result| hasher.update(&result.1.to_le_bytes()));
        Ok(hasher.digest128())
    }

    fn not_finite(&self) -> LoadError {
        if let Some(eights) = &self.eights {
            let index = eights.bytes.iter().position(|byte| byte & 0x7f == 0x7f).unwrap_or(0);
            let (file, tensor) = (self.file.path.clone(), self.name.clone());
            return LoadError::NotFinite { file, tensor, index, value: f32::NAN };
        }
        let units = self.bytes.chunks_exact(self.dtype.unit_bytes()).enumerate();
        let mut values = units.flat_map(|(at, unit)| numbers(self.dtype, unit).map(move |value| (at, value)));
        let (at, value) = values.find(|(_, value)| !value.is_finite()).unwrap_or((0, f32::NAN));
        let index = at * self.dtype.unit();
        LoadError::NotFinite { file: self.file.path.clone(), tensor: self.name.clone(), index, value }
    }

    /// Tells the system that these pages of the file are not needed any more.
    pub fn give_pages_back(&self) {
        let (offset, len) = (self.place.start, self.place.len());
        // SAFETY: the mapping is of a file and read only, so a page dropped is read again from the file when touched.
        let _ = unsafe { self.file.map.unchecked_advise_range(UncheckedAdvice::DontNeed, offset, len) };
    }
}

/// The floating-point number that is, or those that scale, a unit.
fn numbers(dtype: Dtype, unit: &[u8]) -> impl Iterator<Item = f32> {
    let places: &[usize] = match dtype {
        Dtype::F32 | Dtype::F16 | Dtype::Bf16 | Dtype::Q8_0 | Dtype::Q4_0 | Dtype::Q5_0 => &[0],
        Dtype::Q4_1 | Dtype::Q5_1 | Dtype::Q4K | Dtype::Q5K => &[0, 2],
        Dtype::Q6K => &[208],
    };
    places.iter().map(move |&at| value(dtype, &unit[at..]))
}

fn value(dtype: Dtype, bytes: &[u8]) -> f32 {
    match dtype {
        Dtype::F32 => f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]),
        Dtype::Bf16 => f32::from_bits(u32::from(u16::from_le_bytes([bytes[0], bytes[1]])) << 16),
        _ => from_f16(u16::from_le_bytes([bytes[0], bytes[1]])),
    }
}

/// Half precision to single, exactly.
fn from_f16(bits: u16) -> f32 {
    let sign = if bits >> 15 == 1 { -1.0 } else { 1.0 };
    let (exponent, fraction) = (bits >> 10 & 0x1f, f32::from(bits & 0x3ff));
    match exponent {
        0 => sign * fraction * power_of_two(-24),
        0x1f if fraction == 0.0 => sign * f32::INFINITY,
        0x1f => f32::NAN,
        _ => sign * (1024.0 + fraction) * power_of_two(i32::from(exponent) - 25),
    }
}

/// 2^n for n of a normal number.
fn power_of_two(n: i32) -> f32 {
    f32::from_bits(((n + 127) as u32) << 23)
}

/// Whether no exponent, or that of no scale, is all ones.
fn is_finite(dtype: Dtype, bytes: &[u8]) -> bool {
    let halves = |mask: u16| {
        let (pairs, _) = bytes.as_chunks::<2>();
        !pairs.iter().fold(false, |found, pair| found | (u16::from_le_bytes(*pair) & mask == mask))
    };
    match dtype {
        Dtype::Bf16 => halves(0x7f80),
        Dtype::F16 => halves(0x7c00),
        Dtype::F32 => {
            let (words, _) = bytes.as_chunks::<4>();
            !words.iter().fold(false, |found, word| found | (u32::from_le_bytes(*word) & 0x7f80_0000 == 0x7f80_0000))
        }
        _ => bytes.chunks_exact(dtype.unit_bytes()).all(|unit| numbers(dtype, unit).all(f32::is_finite)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn half_precision_widens_exactly() {
        for (bits, expected) in [
            (0x0000, 0.0),
            (0x8000, -0.0),
            (0x0001, 5.960_464_5e-8),
            (0x03ff, 6.097_555e-5),
            (0x0400, 6.103_515_6e-5),
            (0x3c00, 1.0),
            (0xc248, -3.140_625),
            (0x7bff, 65504.0),
            (0xfc00, f32::NEG_INFINITY),
        ] {
            assert_eq!(from_f16(bits).to_bits(), f32::to_bits(expected), "{bits:04x}");
        }
        assert!(from_f16(0x7e00).is_nan());
    }

    #[test]
    fn exponents_of_all_ones_are_found_anywhere() {
        for at in 0..9 {
            let check = |dtype: Dtype, size: usize, bad: &[u8]| {
                let mut bytes = vec![1; 9 * size];
                assert!(is_finite(dtype, &bytes));
                bytes[at * size..][..size].copy_from_slice(bad);
                assert!(!is_finite(dtype, &bytes));
            };
            check(Dtype::Bf16, 2, &[0x80, 0xff]);
            check(Dtype::F16, 2, &[0x00, 0x7c]);
            check(Dtype::F32, 4, &[1, 0, 0x80, 0x7f]);
        }
    }
}
