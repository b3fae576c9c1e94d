//! Groups of threads, and of memory that processes share: sums are one tree at every number of ranks, and nobody waits for
//! ever.

use std::thread;

use baton_core::Rng;
use proptest::prelude::*;

use super::*;

/// Longer than any test takes.
const PATIENCE: Duration = Duration::from_secs(60);

/// Runs every rank of a group on a thread of its own; what each returned, by rank.
fn together<T: Send>(group: Vec<Collective>, run: impl Fn(&mut Collective) -> T + Sync) -> Vec<T> {
    let run = &run;
    thread::scope(|scope| {
        let ranks: Vec<_> = group.into_iter().map(|mut rank| scope.spawn(move || run(&mut rank))).collect();
        ranks.into_iter().map(|rank| rank.join().expect("no rank panics")).collect()
    })
}

fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|x| x.to_bits()).collect()
}

/// The sums of eight segments added as a tree.
fn tree(mut sums: Vec<Vec<f32>>) -> Vec<f32> {
    while sums.len() > 1 {
        sums = sums.chunks(2).map(|pair| pair[0].iter().zip(&pair[1]).map(|(a, b)| a + b).collect()).collect();
    }
    sums.remove(0)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    /// One, two, four and eight ranks, each with its share of eight segments, come to the same bits, exchanged in one
    /// piece or in many.
    #[test]
    fn sums_do_not_depend_on_the_number_of_ranks(seed in any::<u64>(), len in 1usize..300, words in 1usize..400) {
        let mut rng = Rng::new(seed);
        let mut value = || f32::from_bits((rng.u64() as u32 & 0x807f_ffff) | (110 + rng.below(30) as u32) << 23);
        let segments: Vec<Vec<f32>> = (0..8).map(|_| (0..len).map(|_| value()).collect()).collect();
        let expected = bits(&tree(segments.clone()));
        for world in [1, 2, 4, 8] {
            let sums = together(Collective::threads(world, words, PATIENCE), |rank| {
                let each = 8 / world;
                let mut data = tree(segments[rank.rank() * each..][..each].to_vec());
                rank.all_reduce(&mut data).map(|()| bits(&data))
            });
            for sum in sums {
                prop_assert_eq!(sum.as_ref(), Ok(&expected), "{} ranks", world);
            }
        }
    }

    /// Everybody hears everybody's own, of whatever length, and what the root says.
    #[test]
    fn slices_reach_all_ranks(lens in prop::collection::vec(0usize..60, 1..=8), words in 1usize..70, root in 0usize..8) {
        let (world, root) = (lens.len(), root % lens.len());
        let own = |rank: usize| -> Vec<f32> { (0..lens[rank]).map(|i| (100 * rank + i) as f32).collect() };
        let heard = together(Collective::threads(world, words, PATIENCE), |rank| {
            let mut all: Vec<Vec<f32>> = lens.iter().map(|len| vec![f32::NAN; *len]).collect();
            let longest = lens.iter().copied().max().unwrap_or(0);
            rank.all_gather(&own(rank.rank()), longest, |rank| lens[rank], |rank, offset, values| {
                all[rank][offset..offset + values.len()].copy_from_slice(values);
            })?;
            let mut said = if rank.rank() == root { own(root) } else { vec![f32::NAN; lens[root]] };
            rank.broadcast(root, &mut said)?;
            Ok::<_, Broken>((all, said))
        });
        let expected = (0..world).map(own).collect::<Vec<_>>();
        for (all, said) in heard.into_iter().map(|heard| heard.expect("nobody leaves")) {
            prop_assert_eq!(&all, &expected);
            prop_assert_eq!(&said, &expected[root]);
        }
    }
}

/// A group as processes have it: each rank with a mapping of its own.
fn joined(world: usize, words: usize) -> Vec<Collective> {
    let (first, path) = Collective::processes(world, words, PATIENCE).expect("shared memory");
    let others = (1..world).map(|rank| Collective::join(&path, rank, PATIENCE).expect("the first is there"));
    std::iter::once(first).chain(others).collect()
}

/// Thousands of exchanges in a row: no rank ever reads what another one wrote too early or too late.
#[test]
fn exchanges_do_not_overtake_one_another() {
    for (world, shared) in [(2, false), (4, false), (2, true), (4, true)] {
        let group = if shared { joined(world, 64) } else { Collective::threads(world, 64, PATIENCE) };
        let wrong = together(group, |rank| {
            let mut wrong = 0;
            for round in 0..3000usize {
                let len = 1 + round % 64;
                let mut data = vec![(round * (rank.rank() + 1)) as f32; len];
                rank.all_reduce(&mut data).expect("nobody leaves");
                let expected = (round * world * (world + 1) / 2) as f32;
                wrong += data.iter().filter(|x| **x != expected).count();
                if round % 7 == 0 {
                    rank.barrier().expect("nobody leaves");
                }
            }
            wrong
        });
        assert_eq!(wrong, vec![0; world]);
    }
}

/// An abort from anywhere, or a rank that goes, ends everybody's waiting at once, and all later waiting.
#[test]
fn nobody_waits_for_a_group_that_is_broken() {
    for (dropped, shared) in [(false, false), (true, false), (false, true), (true, true)] {
        let group = if shared { joined(4, 8) } else { Collective::threads(4, 8, PATIENCE) };
        let ends = together(group, |rank| {
            rank.barrier().expect("all come to the first");
            if rank.rank() == 2 {
                if !dropped {
                    rank.abort();
                }
                return vec![];
            }
            vec![rank.all_reduce(&mut [1.0]), rank.barrier(), rank.broadcast(0, &mut [0.0])]
        });
        for (rank, ends) in ends.into_iter().enumerate() {
            assert_eq!(ends, vec![Err(Broken::Aborted); if rank == 2 { 0 } else { 3 }]);
        }
    }
    let mut group = Collective::threads(2, 8, PATIENCE);
    let abort = group[0].aborter();
    let waiting = thread::scope(|scope| {
        let waiting = scope.spawn(|| group[1].barrier());
        abort();
        waiting.join().expect("no panic")
    });
    assert_eq!(waiting, Err(Broken::Aborted));
}

/// Only the memory of a group is joined, and only by ranks that it has.
#[test]
fn what_is_no_group_is_not_joined() {
    let (first, path) = Collective::processes(2, 8, PATIENCE).expect("shared memory");
    let refused = |path: &Path, rank| Collective::join(path, rank, PATIENCE).err().expect("refused").to_string();
    assert!(refused(&path, 2).contains("no rank 2 of 2"));
    let other = baton_core::shared::Mapping::new(c"other", 4096).expect("shared memory");
    assert!(refused(&other.path(), 0).contains("not the memory of a group"));
    drop(first);
}

/// A rank that does not come ends the waiting at the deadline, by name.
#[test]
fn a_rank_that_does_not_come_is_named() {
    let ends = together(Collective::threads(4, 8, Duration::from_millis(50)), |rank| {
        rank.barrier().expect("all come to the first");
        match rank.rank() {
            // Neither comes nor goes before the others have given it up.
            3 => loop {
                match rank.is_broken() {
                    true => return Err(Broken::Aborted),
                    false => thread::yield_now(),
                }
            },
            _ => rank.barrier(),
        }
    });
    let timed_out = ends.iter().filter_map(|end| match end {
        Err(Broken::TimedOut { missing, world: 4, .. }) => Some(missing.clone()),
        _ => None,
    });
    let timed_out: Vec<_> = timed_out.collect();
    assert!(!timed_out.is_empty() && timed_out.iter().all(|missing| *missing == [3]), "{ends:?}");
    assert!(ends.iter().all(Result::is_err));
    let error = Broken::TimedOut { missing: vec![1, 3], world: 4, waited: Duration::from_secs(1) };
    assert_eq!(error.to_string(), "rank 1, 3 of 4 did not come within 1s");
}

#[test]
fn one_rank_waits_for_nobody() {
    let mut alone = Collective::alone();
    let mut data = [1.0, 2.0];
    alone.all_reduce(&mut data).expect("alone");
    alone.broadcast(0, &mut data).expect("alone");
    alone.barrier().expect("alone");
    assert_eq!((data, alone.rank(), alone.world()), ([1.0, 2.0], 0, 1));
}
