//! A rank's weights as they lie in memory, kept in a file: later starts map it instead of packing, and all processes of the host
//! that map it have the weights once. A file that does not belong to the model as it is now, or is damaged, is written anew.
//!
//! ```text
//! matrix or vector, each where a page begins | index as JSON | bytes of the index: u64 | checksum: u128
//! ```

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use baton_kernels::{ALIGNMENT, Mapped, Packed};
use memmap2::Mmap;
use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::{Xxh3, xxh3_128};

use crate::load::error::LoadError;

/// What the layout of packed matrices and of this file is called: another one is another file.
const VERSION: u32 = 1;
/// Bytes that one thread checks at a time.
const PIECE_BYTES: usize = 4 << 20;
const TRAILER: usize = 8 + 16;

/// Where a rank's weights are kept, and what they must be.
#[derive(Clone, Debug)]
pub(super) struct Place {
    path: PathBuf,
    /// Text that is equal exactly for what would be packed equally.
    identity: String,
    threads: usize,
}

/// What is known of the weights besides themselves.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct About {
    pub(super) weights_hash: String,
    pub(super) parameters: u64,
}

#[derive(Serialize, Deserialize)]
struct Index {
    identity: String,
    about: About,
    /// Where each is: from, to.
    entries: BTreeMap<String, (usize, usize)>,
}

impl Place {
    /// A place in a directory for the model at `model`, by what tells its parts apart (`of`) and what they are (`identity`).
    pub(super) fn new(dir: &Path, model: &Path, of: &str, identity: &str, threads: usize) -> Place {
        let whole = model.canonicalize().unwrap_or_else(|_| model.to_path_buf());
        let key = xxh3_128(format!("{}\n{of}", whole.display()).as_bytes());
        let path = dir.join(format!("{}-{key:032x}.packed", super::name(model)));
        Place { path, identity: format!("{VERSION}\n{of}\n{identity}"), threads }
    }

    /// The file, if there is one with these weights.
    pub(super) fn open(&self) -> Option<Reader> {
        let file = File::open(&self.path).ok()?;
        // SAFETY: files get these names whole and are never changed then; who shortens one ends this process by SIGBUS.
        let map = unsafe { Mmap::map(&file) }.ok()?;
        let (body, index) = split(&map)?;
        let index: Index = serde_json::from_slice(index).ok()?;
        if index.identity != self.identity {
            return None;
        }
        if !map.ends_with(&checksum(&map[..body], self.threads).to_le_bytes()) {
            tracing::warn!(file = %self.path.display(), "damaged: the weights are packed anew");
            return None;
        }
        huge(&map);
        Some(Reader { path: self.path.clone(), file: Arc::new(map), index })
    }

    /// Waits until nobody else writes the file, and lets nobody before this is dropped.
    pub(super) fn lock(&self) -> io::Result<File> {
        if let Some(dir) = self.path.parent() {
            fs::create_dir_all(dir)?;
        }
        let lock = File::create(self.path.with_extension("lock"))?;
        lock.lock()?;
        Ok(lock)
    }

    pub(super) fn write(&self) -> io::Result<Writer> {
        let aside = self.path.with_extension("new");
        let to = BufWriter::with_capacity(1 << 20, File::create(&aside)?);
        Ok(Writer { place: self.clone(), aside, to, at: 0, entries: BTreeMap::new() })
    }
}

/// Bytes before the trailer, and the index among them.
fn split(bytes: &[u8]) -> Option<(usize, &[u8])> {
    let trailer = bytes.len().checked_sub(TRAILER)?;
    let len = u64::from_le_bytes(*bytes[trailer..].first_chunk()?);
    let from = trailer.checked_sub(usize::try_from(len).ok()?)?;
    Some((trailer + 8, &bytes[from..trailer]))
}

/// Of pieces, so that many threads can share it.
fn checksum(bytes: &[u8], threads: usize) -> u128 {
    let pieces: Vec<&[u8]> = bytes.chunks(PIECE_BYTES).collect();
    let next = AtomicUsize::new(0);
    let work = || {
        let mut sums = Vec::new();
        loop {
            let at = next.fetch_add(1, Ordering::Relaxed);
            let Some(piece) = pieces.get(at) else { return sums };
            sums.push((at, xxh3_128(piece)));
        }
    };
    let mut sums = Vec::with_capacity(pieces.len());
    std::thread::scope(|scope| {
        let others: Vec<_> = (1..threads.min(pieces.len())).map(|_| scope.spawn(work)).collect();
        sums.extend(work());
        others.into_iter().for_each(|other| sums.extend(other.join().expect("a checker panicked")));
    });
    sums.sort_unstable();
    let mut hasher = Xxh3::new();
    sums.iter().for_each(|(_, sum)| hasher.update(&sum.to_le_bytes()));
    hasher.digest128()
}

/// Asks for huge pages, which a file's bytes have in some systems; a refusal costs speed only.
#[cfg(target_os = "linux")]
fn huge(map: &Mmap) {
    let _ = map.advise(memmap2::Advice::HugePage);
}

#[cfg(not(target_os = "linux"))]
fn huge(_: &Mmap) {}

/// A file that is being written.
pub(super) struct Writer {
    place: Place,
    aside: PathBuf,
    to: BufWriter<File>,
    at: usize,
    entries: BTreeMap<String, (usize, usize)>,
}

impl Writer {
    pub(super) fn matrix(&mut self, name: &str, matrix: &Packed) -> io::Result<()> {
        self.pad()?;
        let bytes = matrix.write(&mut self.to)?;
        self.add(name, bytes);
        Ok(())
    }

    pub(super) fn vector(&mut self, name: &str, values: &[f32]) -> io::Result<()> {
        self.pad()?;
        values.iter().try_for_each(|value| self.to.write_all(&value.to_le_bytes()))?;
        self.add(name, size_of_val(values));
        Ok(())
    }

    fn pad(&mut self) -> io::Result<()> {
        let padding = self.at.next_multiple_of(ALIGNMENT) - self.at;
        self.at += padding;
        self.to.write_all(&[0; ALIGNMENT][..padding])
    }

    fn add(&mut self, name: &str, bytes: usize) {
        let before = self.entries.insert(name.to_string(), (self.at, self.at + bytes));
        debug_assert!(before.is_none(), "{name} twice");
        self.at += bytes;
    }

    /// Gives the file its name.
    pub(super) fn finish(mut self, about: About) -> io::Result<()> {
        let index = Index { identity: self.place.identity.clone(), about, entries: std::mem::take(&mut self.entries) };
        let index = serde_json::to_vec(&index)?;
        self.to.write_all(&index)?;
        self.to.write_all(&(index.len() as u64).to_le_bytes())?;
        self.to.flush()?;
        // SAFETY: nobody else knows this file.
        let map = unsafe { Mmap::map(&File::open(&self.aside)?) }?;
        let sum = checksum(&map, self.place.threads);
        self.to.write_all(&sum.to_le_bytes())?;
        self.to.flush()?;
        fs::rename(&self.aside, &self.place.path)
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        // One that is finished has another name by now.
        let _ = fs::remove_file(&self.aside);
    }
}

/// A file of kept weights.
pub(super) struct Reader {
    path: PathBuf,
    file: Mapped,
    index: Index,
}

impl Reader {
    pub(super) fn about(&self) -> &About {
        &self.index.about
    }

    pub(super) fn matrix(&self, name: &str, rows: usize, cols: usize) -> Result<Packed, LoadError> {
        let found = self.place(name).and_then(|(from, to)| Packed::map(&self.file, from..to));
        found.filter(|matrix| (matrix.rows(), matrix.cols()) == (rows, cols)).ok_or_else(|| self.lacks(name))
    }

    pub(super) fn vector(&self, name: &str, len: usize) -> Result<Vec<f32>, LoadError> {
        let bytes = self.place(name).and_then(|(from, to)| (*self.file).as_ref().get(from..to));
        let values = bytes.map(|bytes| bytes.as_chunks().0.iter().map(|value| f32::from_le_bytes(*value)).collect());
        values.filter(|values: &Vec<f32>| values.len() == len).ok_or_else(|| self.lacks(name))
    }

    fn place(&self, name: &str) -> Option<(usize, usize)> {
        self.index.entries.get(name).copied()
    }

    fn lacks(&self, name: &str) -> LoadError {
        LoadError::Kept { file: self.path.clone(), what: name.to_string() }
    }
}

/// What a loader does with packed weights.
pub(super) enum Kept {
    No,
    Write(Writer),
    Read(Reader),
}

impl Kept {
    /// Writes, and stops writing at the first error: what is packed is as good.
    pub(super) fn write(&mut self, put: impl FnOnce(&mut Writer) -> io::Result<()>) {
        let Kept::Write(writer) = self else { return };
        if let Err(error) = put(writer) {
            tracing::warn!(file = %writer.place.path.display(), %error, "packed weights cannot be kept");
            *self = Kept::No;
        }
    }
}
