//! The log against crashes and damage, on a disk in memory: what was acknowledged is there, or the log refuses to open.

use std::time::Duration;

use proptest::prelude::*;

use super::*;

const SMALL: LogOptions = LogOptions { segment_bytes_max: 600, recent_bytes_max: 64 };

fn disk() -> MemoryDisk {
    MemoryDisk::new(Duration::ZERO)
}

fn open(disk: &MemoryDisk) -> Result<Log, LogError> {
    Log::open(Arc::new(disk.clone()), SMALL)
}

/// Runs a future on a runtime of its own.
fn run<T>(future: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
    runtime.block_on(future)
}

fn body(index: u64) -> Bytes {
    Bytes::from(format!("entry {index} {}", "x".repeat(index as usize % 23)))
}

/// Appends entries and waits until they are durable.
async fn append(log: &Log, range: Range<u64>) -> io::Result<()> {
    let (tell, told) = oneshot::channel();
    let entries = range.map(|index| (index, body(index))).collect();
    log.append(entries, Box::new(|result| drop(tell.send(result)))).await?;
    told.await.unwrap()
}

fn bodies(range: Range<u64>) -> Vec<Bytes> {
    range.map(body).collect()
}

/// Disk with a log of a few segments: vote, entries 0..40 of which 30..40 were written anew, purged to 4.
fn written() -> MemoryDisk {
    let disk = disk();
    run(async {
        let log = open(&disk).unwrap();
        log.save_vote(Bytes::from_static(b"vote")).await.unwrap();
        for start in (0..35).step_by(5) {
            append(&log, start..start + 5).await.unwrap();
        }
        log.truncate(30).await.unwrap();
        log.save_committed(Bytes::from_static(b"committed"));
        append(&log, 30..40).await.unwrap();
        log.purge(4, Bytes::from_static(b"tag")).await.unwrap();
        log.close().await;
    });
    disk
}

fn segments(disk: &MemoryDisk) -> Vec<String> {
    disk.list().unwrap().into_iter().filter(|name| name.ends_with(".log")).collect()
}

#[test]
fn everything_comes_back_after_a_restart() {
    let disk = written();
    assert!(segments(&disk).len() > 2, "{:?}", segments(&disk));
    run(async {
        let log = open(&disk).unwrap();
        assert_eq!(log.range(), 5..40);
        assert_eq!(log.read(0..100).unwrap(), bodies(5..40));
        assert_eq!(log.read(7..9).unwrap(), bodies(7..9));
        assert_eq!(log.vote().unwrap(), "vote");
        assert_eq!(log.committed().unwrap(), "committed");
        assert_eq!(log.purged().unwrap(), (4, Bytes::from_static(b"tag")));
        append(&log, 40..45).await.unwrap();
        assert_eq!(log.read(38..45).unwrap(), bodies(38..45));
        log.close().await;
        assert_eq!(open(&disk).unwrap().range(), 5..45);
    });
}

#[test]
fn purging_drops_whole_segments_and_keeps_the_vote() {
    let disk = written();
    let before = segments(&disk).len();
    run(async {
        let log = open(&disk).unwrap();
        log.purge(36, Bytes::from_static(b"later")).await.unwrap();
        log.close().await;
        assert!(segments(&disk).len() < before);
        let log = open(&disk).unwrap();
        assert_eq!((log.range(), log.vote().unwrap()), (37..40, Bytes::from_static(b"vote")));
        log.purge(100, Bytes::from_static(b"beyond")).await.unwrap();
        append(&log, 101..103).await.unwrap();
        log.close().await;
        assert_eq!(open(&disk).unwrap().read(0..200).unwrap(), bodies(101..103));
    });
}

#[test]
fn jobs_that_wait_share_one_sync() {
    let disk = disk();
    run(async {
        let log = open(&disk).unwrap();
        let before = disk.syncs();
        let appends = (0..20).map(|index| append(&log, index..index + 1));
        futures::future::join_all(appends).await;
        assert!(disk.syncs() - before <= 2, "{} syncs", disk.syncs() - before);
    });
}

#[test]
fn a_full_disk_fails_every_later_write_and_loses_nothing_acknowledged() {
    let disk = disk();
    run(async {
        let log = open(&disk).unwrap();
        append(&log, 0..10).await.unwrap();
        disk.limit(Some(0));
        assert_eq!(append(&log, 10..11).await.unwrap_err().kind(), io::ErrorKind::StorageFull);
        disk.limit(None);
        assert!(append(&log, 11..12).await.is_err(), "what the disk holds is unknown after a failed write");
        log.close().await;
        disk.crash(0);
        assert_eq!(open(&disk).unwrap().read(0..100).unwrap(), bodies(0..10));
    });
}

#[test]
fn a_removed_segment_is_noticed() {
    let disk = written();
    let names = segments(&disk);
    for (i, name) in names.iter().enumerate().take(names.len() - 1) {
        let copy = disk.copy();
        copy.remove(name).unwrap();
        let result = run(async { open(&copy).map(|log| log.range()) });
        assert!(result.is_err(), "segment {i} of {}", names.len());
    }
}

#[test]
fn a_newer_version_is_refused() {
    let disk = disk();
    run(async { open(&disk).unwrap().close().await });
    let name = segments(&disk).pop().unwrap();
    disk.edit(&name, |bytes| {
        bytes[8] += 1;
        let crc = crc32fast::hash(&bytes[..20]);
        bytes[20..24].copy_from_slice(&crc.to_le_bytes());
    });
    assert!(matches!(run(async { open(&disk).err() }), Some(LogError::Newer { version: 2, .. })));
}

/// Goal: cut anywhere, the last segment opens to a prefix; any other segment is refused. Method: every length.
#[test]
fn every_truncation_recovers_a_prefix_or_is_refused() {
    let disk = written();
    let names = segments(&disk);
    let whole = run(async { open(&disk.copy()).unwrap().read(0..100).unwrap() });
    for (i, name) in names.iter().enumerate() {
        for len in 0..disk.read(name).unwrap().len() {
            let copy = disk.copy();
            copy.edit(name, |bytes| bytes.truncate(len));
            let found = run(async { open(&copy).map(|log| log.read(0..100).unwrap()) });
            match found {
                Ok(found) if i + 1 == names.len() => assert!(is_prefix_of_history(&found, &whole), "{name} {len}"),
                // A closed segment may lose only the mark at its end, which says nothing; the next one's number tells.
                Ok(_) => panic!("{name} cut to {len} was not noticed"),
                Err(LogError::Damaged { path, .. } | LogError::Missing { path, .. }) => {
                    assert!(path.starts_with("memory/"))
                }
                Err(other) => panic!("{name} {len}: {other}"),
            }
        }
    }
}

/// What a log of `written` held at some earlier moment, or now: a leading run, or the run before the truncation.
fn is_prefix_of_history(found: &[Bytes], whole: &[Bytes]) -> bool {
    let before_purge = bodies(0..40);
    whole.starts_with(found) || before_purge.starts_with(found)
}

/// Goal: no flipped bit goes unnoticed where it matters. Method: each bit of each segment; the log refuses with the
/// path and an offset, or every acknowledged entry reads back as written.
#[test]
fn every_flipped_bit_is_noticed_or_harmless() {
    let disk = written();
    let acknowledged = bodies(5..40);
    let mut harmless = 0;
    for name in segments(&disk) {
        for bit in 0..disk.read(&name).unwrap().len() * 8 {
            let copy = disk.copy();
            copy.edit(&name, |bytes| bytes[bit / 8] ^= 1 << (bit % 8));
            let found = run(async {
                open(&copy).map(|log| (log.read(0..100).unwrap(), log.vote(), log.purged().map(|(index, _)| index)))
            });
            match found {
                Ok(found) => {
                    assert_eq!(found, (acknowledged.clone(), Some("vote".into()), Some(4)), "{name} bit {bit}");
                    harmless += 1;
                }
                Err(LogError::Damaged { path, .. }) => assert!(path.ends_with(&name)),
                Err(LogError::Newer { .. }) => panic!("{name} bit {bit}: the header's checksum comes first"),
                Err(other) => panic!("{name} bit {bit}: {other}"),
            }
        }
    }
    assert_eq!(harmless, 8 * frame::FRAME_HEADER, "only the last mark may be lost");
}

#[test]
fn a_snapshot_is_replaced_whole_and_checked_whole() {
    let disk = disk();
    assert_eq!(load_snapshot(&disk).unwrap(), None);
    save_snapshot(&disk, b"tag", b"one").unwrap();
    save_snapshot(&disk, b"tag 2", b"body two").unwrap();
    let saved = Saved { tag: b"tag 2".to_vec(), body: b"body two".to_vec() };
    assert_eq!(load_snapshot(&disk).unwrap(), Some(saved));
    for bit in 0..disk.read("snapshot").unwrap().len() * 8 {
        let copy = disk.copy();
        copy.edit("snapshot", |bytes| bytes[bit / 8] ^= 1 << (bit % 8));
        assert!(load_snapshot(&copy).is_err(), "bit {bit}");
    }
    for len in 0..disk.read("snapshot").unwrap().len() {
        let copy = disk.copy();
        copy.edit("snapshot", |bytes| bytes.truncate(len));
        assert!(load_snapshot(&copy).is_err(), "length {len}");
    }
}

#[test]
fn a_directory_on_the_file_system_does_the_same() {
    let path = std::env::temp_dir().join(format!("baton-log-{}", std::process::id()));
    run(async {
        let directory = || Arc::new(Directory::open(&path).unwrap());
        let log = Log::open(directory(), SMALL).unwrap();
        append(&log, 0..50).await.unwrap();
        append(&log, 50..60).await.unwrap();
        assert_eq!(log.read(0..60).unwrap(), bodies(0..60));
        log.close().await;
        drop(log);
        let disk = directory();
        assert!(matches!(Directory::open(&path), Err(DirectoryError::InUse(_))));
        save_snapshot(&*disk, b"t", b"b").unwrap();
        let log = Log::open(disk, SMALL).unwrap();
        assert_eq!(log.read(0..60).unwrap(), bodies(0..60));
        log.close().await;
    });
    std::fs::remove_dir_all(&path).unwrap();
}

/// One step of a random history.
#[derive(Clone, Debug)]
enum Step {
    Append(u64),
    Truncate(u64),
    Purge(u64),
    Vote(u8),
    /// Power loss with so many unsynced bytes surviving, and a restart.
    Crash(usize),
    Restart,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => (1u64..8).prop_map(Step::Append),
        1 => (0u64..8).prop_map(Step::Truncate),
        1 => (0u64..8).prop_map(Step::Purge),
        1 => any::<u8>().prop_map(Step::Vote),
        2 => (0usize..200).prop_map(Step::Crash),
        1 => Just(Step::Restart),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    /// Whatever the history of writes, crashes and restarts, the log holds exactly what was acknowledged.
    #[test]
    fn a_log_holds_what_it_acknowledged(steps in proptest::collection::vec(step(), 0..40)) {
        run(async {
            let disk = disk();
            let mut log = open(&disk).unwrap();
            let (mut range, mut vote) = (0u64..0, None);
            for step in steps {
                match step {
                    Step::Append(count) => {
                        append(&log, range.end..range.end + count).await.unwrap();
                        range.end += count;
                    }
                    Step::Truncate(back) => {
                        range.end = range.end.saturating_sub(back).max(range.start);
                        log.truncate(range.end).await.unwrap();
                    }
                    Step::Purge(forward) if range.start + forward < range.end => {
                        log.purge(range.start + forward, Bytes::new()).await.unwrap();
                        // A purge is not waited for; a vote after it is.
                        range.start += forward + 1;
                        log.save_vote(Bytes::from_static(b"v")).await.unwrap();
                        vote = Some(Bytes::from_static(b"v"));
                    }
                    Step::Purge(_) => {}
                    Step::Vote(text) => {
                        log.save_vote(vec![text].into()).await.unwrap();
                        vote = Some(vec![text].into());
                    }
                    Step::Crash(_) | Step::Restart => {
                        log.close().await;
                        if let Step::Crash(kept) = step {
                            disk.crash(kept);
                        }
                        log = open(&disk).unwrap();
                    }
                }
                assert_eq!(log.read(0..u64::MAX).unwrap(), bodies(range.clone()));
                assert_eq!(log.vote(), vote);
            }
        });
    }
}
