//! A rank's weights as they lie in memory, kept in a file: later starts map it instead of packing, and all processes of the host
//! that map it have the weights once. A file that does not belong to the model as it is now, or is damaged, is written anew.
//!
//! ```text
//! matrix or vector, each where a page begins | index as JSON | bytes of the index: u64 | checksum: u128
//! ```

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use baton_kernels::{ALIGNMENT, Cpu, Mapped, Packed, Pieces};
use memmap2::{Mmap, MmapMut};
use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::{Xxh3, xxh3_128};

use crate::load::error::LoadError;

/// What the layout of packed matrices and of this file is called: another one is another file.
const VERSION: u32 = 1;
/// Bytes that one thread checks, or writes, at a time: whole large pages, so that the system keeps and maps the file in them.
const PIECE_BYTES: usize = 4 << 20;
/// Bytes in memory, about, of a file that is being written.
const GATHERED: usize = 8 * PIECE_BYTES;
/// A file is dated back by so much when it is written, so that whoever writes to it later changes its date for certain.
const BACK: Duration = Duration::from_secs(2);
/// By how much a file must be older than the note that it is whole.
const OLDER_S: i64 = 2;
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

    /// The file, if there is one with these weights that is known to be whole.
    pub(super) fn open_checked(&self) -> Option<Reader> {
        let (file, reader) = self.find()?;
        self.is_checked(&file).then_some(reader)
    }

    /// The file, if there is one with these weights. One that is not known to be whole is checked.
    pub(super) fn open(&self) -> Option<Reader> {
        let (file, reader) = self.find()?;
        if !self.is_checked(&file) {
            let state = state(&file);
            if !reader.is_whole(self.threads) {
                tracing::warn!(file = %self.path.display(), "damaged: the weights are packed anew");
                return None;
            }
            self.note(state);
        }
        Some(reader)
    }

    /// A file that says that it holds these weights.
    fn find(&self) -> Option<(File, Reader)> {
        let file = File::open(&self.path).ok()?;
        // SAFETY: files get these names whole and are never changed then; who shortens one ends this process by SIGBUS.
        let map = unsafe { Mmap::map(&file) }.ok()?;
        let (_, index) = split(&map)?;
        let index: Index = serde_json::from_slice(index).ok()?;
        if index.identity != self.identity {
            return None;
        }
        huge(&map);
        Some((file, Reader { path: self.path.clone(), file: Arc::new(map), index }))
    }

    /// Whether somebody has found the file whole since this system started, and nobody has touched it since.
    fn is_checked(&self, file: &File) -> bool {
        let dates = || Some((fs::metadata(self.checked()).ok()?.mtime(), file.metadata().ok()?.mtime()));
        let noted = fs::read_to_string(self.checked()).ok().filter(|noted| state(file).as_ref() == Some(noted));
        // Two changes within one tick of the file system's clock have one date.
        noted.and_then(|_| dates()).is_some_and(|(noted, written)| noted - written >= OLDER_S)
    }

    /// Notes that a file in this state is whole. Without the note the next one checks again.
    fn note(&self, state: Option<String>) {
        let Some(state) = state else { return };
        if let Err(error) = fs::write(self.checked(), state) {
            tracing::debug!(file = %self.path.display(), %error, "it is not noted that the file is whole");
        }
    }

    fn checked(&self) -> PathBuf {
        self.path.with_extension("checked")
    }

    fn unkept(&self, error: io::Error) -> LoadError {
        LoadError::Keep { file: self.path.clone(), error }
    }

    /// Waits until nobody else writes the file, and lets nobody before this is dropped.
    pub(super) fn lock(&self) -> Result<File, LoadError> {
        let directory = self.path.parent().map_or(Ok(()), fs::create_dir_all);
        let lock = directory.and_then(|()| File::create(self.path.with_extension("lock")));
        let locked = lock.and_then(|lock| lock.lock().map(|()| lock));
        locked.map_err(|error| self.unkept(error))
    }

    pub(super) fn write(&self) -> Result<Writer, LoadError> {
        let aside = self.path.with_extension("new");
        let file = File::create(&aside).map_err(|error| self.unkept(error))?;
        let gathered = MmapMut::map_anon(GATHERED).map_err(|error| self.unkept(error))?;
        let (sums, entries) = (Vec::new(), BTreeMap::new());
        Ok(Writer { place: self.clone(), aside, file, gathered, filled: 0, written: 0, sums, entries })
    }
}

/// Text that stays the same until somebody touches the file or the system starts again; None where the system does not tell.
fn state(file: &File) -> Option<String> {
    let system = fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?;
    let known = file.metadata().ok()?;
    let written = (known.mtime(), known.mtime_nsec());
    let changed = (known.ctime(), known.ctime_nsec());
    Some(format!("{} {} {} {} {written:?} {changed:?}", system.trim(), known.dev(), known.ino(), known.len()))
}

/// Bytes before the trailer, and the index among them.
fn split(bytes: &[u8]) -> Option<(usize, &[u8])> {
    let trailer = bytes.len().checked_sub(TRAILER)?;
    let len = u64::from_le_bytes(*bytes[trailer..].first_chunk()?);
    let from = trailer.checked_sub(usize::try_from(len).ok()?)?;
    Some((trailer + 8, &bytes[from..trailer]))
}

/// What `work` makes of each piece and where it begins, in order; many threads share it.
fn in_pieces<T: Send>(bytes: &[u8], threads: usize, work: impl Fn(usize, &[u8]) -> T + Sync) -> Vec<T> {
    let pieces: Vec<&[u8]> = bytes.chunks(PIECE_BYTES).collect();
    let next = AtomicUsize::new(0);
    let some = || {
        let mut done = Vec::new();
        loop {
            let at = next.fetch_add(1, Ordering::Relaxed);
            let Some(piece) = pieces.get(at) else { return done };
            done.push((at, work(at * PIECE_BYTES, piece)));
        }
    };
    let mut done = Vec::with_capacity(pieces.len());
    std::thread::scope(|scope| {
        let others: Vec<_> = (1..threads.min(pieces.len())).map(|_| scope.spawn(some)).collect();
        done.extend(some());
        others.into_iter().for_each(|other| done.extend(other.join().expect("a checker panicked")));
    });
    done.sort_unstable_by_key(|(at, _)| *at);
    done.into_iter().map(|(_, made)| made).collect()
}

/// Of all pieces.
fn checksum(pieces: &[u128]) -> u128 {
    let mut hasher = Xxh3::new();
    pieces.iter().for_each(|sum| hasher.update(&sum.to_le_bytes()));
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
    file: File,
    /// What comes next in the file, as far as it is filled.
    gathered: MmapMut,
    filled: usize,
    /// Bytes in the file: whole pieces.
    written: usize,
    /// Of each piece that is written.
    sums: Vec<u128>,
    entries: BTreeMap<String, (usize, usize)>,
}

impl Writer {
    /// Packs a matrix into the file.
    pub(super) fn matrix(&mut self, name: &str, cpu: &Cpu, matrix: &Pieces) -> Result<(), LoadError> {
        let packed = self.pack(name, cpu, matrix);
        packed.map_err(|error| self.place.unkept(error))
    }

    fn pack(&mut self, name: &str, cpu: &Cpu, matrix: &Pieces) -> io::Result<()> {
        self.pad()?;
        let from = self.at();
        self.put(&matrix.head())?;
        for run in 0..matrix.runs() {
            self.pad()?;
            let (panels, bytes) = (matrix.panels(run), matrix.panel_bytes(run));
            let mut next = 0;
            while next < panels {
                let room = self.room(bytes)?;
                let some = next..panels.min(next + room.len() / bytes);
                let packed = some.len() * bytes;
                cpu.pack_panels(matrix, run, some.clone(), &mut room[..packed]);
                self.filled += packed;
                next = some.end;
            }
        }
        self.add(name, from);
        Ok(())
    }

    pub(super) fn vector(&mut self, name: &str, values: &[f32]) -> Result<(), LoadError> {
        let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        let put = self.pad().and_then(|()| {
            let from = self.at();
            self.put(&bytes)?;
            self.add(name, from);
            Ok(())
        });
        put.map_err(|error| self.place.unkept(error))
    }

    /// Gives the file its name.
    pub(super) fn finish(mut self, about: About) -> Result<(), LoadError> {
        let end = self.end(about);
        end.map_err(|error| self.place.unkept(error))
    }

    fn end(&mut self, about: About) -> io::Result<()> {
        let index = Index { identity: self.place.identity.clone(), about, entries: std::mem::take(&mut self.entries) };
        let index = serde_json::to_vec(&index)?;
        self.put(&index)?;
        self.put(&(index.len() as u64).to_le_bytes())?;
        let body = self.at();
        self.write_out(self.filled)?;
        self.file.write_all_at(&checksum(&self.sums).to_le_bytes(), body as u64)?;
        // A file that keeps its date is checked by starts of the next seconds.
        let now = self.file.metadata()?.modified()?;
        let _ = self.file.set_modified(now - BACK);
        fs::rename(&self.aside, &self.place.path)?;
        // What was written is what was packed.
        self.place.note(state(&self.file));
        Ok(())
    }

    /// Where in the file the next byte will be.
    fn at(&self) -> usize {
        self.written + self.filled
    }

    fn pad(&mut self) -> io::Result<()> {
        let padding = self.at().next_multiple_of(ALIGNMENT) - self.at();
        self.put(&[0; ALIGNMENT][..padding])
    }

    fn put(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.room(bytes.len())?[..bytes.len()].copy_from_slice(bytes);
        self.filled += bytes.len();
        Ok(())
    }

    fn add(&mut self, name: &str, from: usize) {
        let before = self.entries.insert(name.to_string(), (from, self.at()));
        debug_assert!(before.is_none(), "{name} twice");
    }

    /// Memory for what comes next: so many bytes at least.
    fn room(&mut self, bytes: usize) -> io::Result<&mut [u8]> {
        if self.gathered.len() - self.filled < bytes {
            self.write_out(self.filled / PIECE_BYTES * PIECE_BYTES)?;
        }
        if self.gathered.len() - self.filled < bytes {
            let mut larger = MmapMut::map_anon((self.filled + bytes).next_multiple_of(PIECE_BYTES))?;
            larger[..self.filled].copy_from_slice(&self.gathered[..self.filled]);
            self.gathered = larger;
        }
        Ok(&mut self.gathered[self.filled..])
    }

    /// Writes so many of the bytes that were gathered: whole pieces, or all that there are.
    fn write_out(&mut self, bytes: usize) -> io::Result<()> {
        let written = in_pieces(&self.gathered[..bytes], self.place.threads, |at, piece| {
            let sum = xxh3_128(piece);
            self.file.write_all_at(piece, (self.written + at) as u64).map(|()| sum)
        });
        for sum in written {
            self.sums.push(sum?);
        }
        self.gathered.copy_within(bytes..self.filled, 0);
        (self.filled, self.written) = (self.filled - bytes, self.written + bytes);
        Ok(())
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
    /// Whether all bytes are those that were written.
    fn is_whole(&self, threads: usize) -> bool {
        let bytes = (*self.file).as_ref();
        let sums = |body: usize| in_pieces(&bytes[..body], threads, |_, piece| xxh3_128(piece));
        split(bytes).is_some_and(|(body, _)| bytes[body..] == checksum(&sums(body)).to_le_bytes())
    }

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

#[cfg(test)]
mod tests {
    use baton_kernels::{Dtype, Matrix, Profile};

    use super::*;

    const INPUTS: usize = 1536;

    /// Numbers of bf16 that differ along the matrix.
    fn numbers(count: usize) -> Vec<u8> {
        (0..count as u32).flat_map(|i| (0x3c00 | (i.wrapping_mul(2_654_435_761) >> 24) as u16).to_le_bytes()).collect()
    }

    /// Goal: what is written in many turns is what is packed at once, whole pieces and panels larger than what is gathered at a
    /// time included. Method: products with matrices that come back out of the file, found whole by its checksum.
    #[test]
    fn large_matrices_come_back() {
        let dir = std::env::temp_dir().join(format!("baton-kept-{}", std::process::id()));
        let cpu = Cpu::new(2, Profile::F32Acc).expect("every machine has it");
        let (tall, wide) = (numbers(INPUTS * 14_000), numbers(3 * 300_000));
        let matrix = |bytes, rows, cols| Matrix { dtype: Dtype::Bf16, bytes, rows, cols };
        let all = [
            ("tall", vec![matrix(&tall[..], 14_000, INPUTS)]),
            ("wide", vec![matrix(&wide[..300_000 * 2], 1, 300_000), matrix(&wide[300_000 * 2..], 2, 300_000)]),
            ("small", vec![matrix(&tall[..INPUTS * 2 * 100], 100, INPUTS)]),
        ];
        let place = Place::new(&dir, Path::new("a-model"), "all", "it", 2);
        let _lock = place.lock().expect("a lock");
        let mut writer = place.write().expect("a writer");
        for (name, parts) in &all {
            writer.matrix(name, &cpu, &Pieces::new(parts, None)).expect("written");
            writer.vector(&format!("{name} bias"), &[1.5, -2.0]).expect("written");
        }
        writer.finish(About::default()).expect("finished");
        let reader = place.open_checked().expect("what is written is known");
        assert!(reader.is_whole(1) && reader.is_whole(3));
        for (name, parts) in &all {
            let (rows, cols) = (parts.iter().map(|part| part.rows).sum::<usize>(), parts[0].cols);
            let (kept, packed) = (reader.matrix(name, rows, cols).expect("kept"), cpu.pack(parts));
            let x: Vec<f32> = (0..cols).map(|i| (i % 7) as f32 - 3.0).collect();
            let product = |w: &Packed| {
                let mut y = vec![0.0; rows];
                cpu.matmul(&x, 1, w, &mut y);
                y.into_iter().map(f32::to_bits).collect::<Vec<_>>()
            };
            assert!(product(&kept) == product(&packed), "{name}");
            assert_eq!(reader.vector(&format!("{name} bias"), 2).expect("kept"), [1.5, -2.0]);
        }
        drop(reader);
        fs::remove_dir_all(dir).expect("remove");
    }
}
