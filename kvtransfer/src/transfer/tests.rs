//! The state machine under any order of events.

use baton_core::{BlockId, BlockLayout, Epoch, KvDtype, TransferId};
use proptest::prelude::*;

use super::*;

const LAYOUT: BlockLayout = BlockLayout { layers: 2, kv_heads: 1, head_dim: 1, block_tokens: 1, dtype: KvDtype::Bf16 };
const EXTENTS: [(u32, u32); 4] = [(0, 0), (0, 1), (1, 0), (1, 1)];

fn grant() -> Grant {
    let blocks = vec![BlockId { index: 4, generation: 1 }, BlockId { index: 2, generation: 7 }];
    let (transfer, epoch, request) = (TransferId(3), Epoch(4), RequestId(5));
    Grant {
        transfer,
        attempt: 1,
        epoch,
        request,
        address: String::new(),
        layout: LAYOUT,
        slice: None,
        blocks,
        deadline_ms: 1,
        ticket: 0,
    }
}

fn open(grant: &Grant) -> Event {
    Event::Open { tag: grant.tag(), request: grant.request, grant: grant.digest(), resends: false }
}

fn entry(position: u32) -> Entry {
    Entry { position, block: grant().blocks[position as usize], source: 0, sum: 10 + position as u64 }
}

/// An event with the link it comes over, or the arrival of one extent.
#[derive(Clone, Debug)]
enum Input {
    Event(LinkId, Event),
    Extent(LinkId, u32, u32),
}

fn input() -> impl Strategy<Value = Input> {
    let link = || prop_oneof![4 => Just(LinkId(1)), 1 => Just(LinkId(2))];
    let tag = grant().tag();
    let summary = Summary { extents: 4, bytes: 16, digest: 42 };
    let stale = Grant { epoch: Epoch(3), ..grant() };
    let other = Grant { request: RequestId(6), ..grant() };
    let event = prop_oneof![
        6 => Just(open(&grant())),
        1 => Just(open(&stale)),
        1 => Just(open(&other)),
        3 => Just(Event::Commit { tag, summary }),
        1 => Just(Event::Commit { tag, summary: Summary { digest: 1, ..summary } }),
        1 => Just(Event::Commit { tag: Tag { attempt: 2, ..tag }, summary }),
        1 => any::<bool>().prop_map(|quiesced| Event::Abort { reason: Aborted::Internal, quiesced }),
        1 => Just(Event::Quiesced),
        1 => Just(Event::LinkClosed),
        1 => Just(Event::Damaged { layer: 0, position: 0 }),
        1 => Just(Event::Alarm),
        1 => Just(Event::Dropped),
        1 => Just(Event::Closed),
    ];
    prop_oneof![
        1 => (link(), event).prop_map(|(link, event)| Input::Event(link, event)),
        2 => (link(), prop::sample::select(EXTENTS.to_vec())).prop_map(|(link, (l, p))| Input::Extent(link, l, p)),
    ]
}

/// What the outside may conclude from the inputs and actions alone.
#[derive(Default)]
struct Observer {
    writer: Option<LinkId>,
    /// The writer can write no more: it said so, or its link is gone, or this end takes nothing from anyone.
    quiet: bool,
    arrived: std::collections::BTreeSet<(u32, u32)>,
    told: u32,
    released: u32,
}

impl Observer {
    fn extent(&mut self, transfer: &mut Transfer, link: LinkId, layer: u32, position: u32) {
        let mut header = Header::new(crate::wire::Kind::Data, grant().tag());
        header.layer = layer as u16;
        if transfer.admit(link, &header).is_err() {
            return;
        }
        assert!(Some(link) == self.writer && self.released == 0, "only the writer, only while the guard is held");
        let fresh = transfer.expects(layer, &entry(position)).is_ok();
        assert_eq!(fresh, !self.arrived.contains(&(layer, position)));
        if fresh {
            transfer.arrived(layer, &entry(position), 4);
            self.arrived.insert((layer, position));
        }
    }

    fn event(&mut self, transfer: &mut Transfer, link: LinkId, event: Event) {
        if Some(link) == self.writer {
            self.quiet |= match &event {
                Event::Abort { quiesced, .. } => *quiesced,
                Event::Quiesced => self.told > 0,
                Event::Commit { .. } | Event::LinkClosed => true,
                _ => false,
            };
        }
        self.quiet |= matches!(event, Event::Closed);
        for action in transfer.step(link, event) {
            match action {
                Action::Tell(to, Body::Opened) => {
                    assert!(self.writer.is_none() && to == link);
                    self.writer = Some(to);
                }
                Action::Complete(received) => {
                    assert_eq!((self.arrived.len(), received.extents), (4, 4));
                    self.told += 1;
                    self.released += 1;
                }
                Action::Fail(_) => self.told += 1,
                Action::Release => {
                    assert!(self.writer.is_none() || self.quiet, "released while the writer may write");
                    self.released += 1;
                }
                _ => {}
            }
        }
        assert!(self.told <= 1 && self.released <= 1, "ended twice");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4000))]

    /// Whatever happens in whatever order: one ending, the guard released once and never under a writer, complete only
    /// with every extent; and once the receiver closes, nothing is held.
    #[test]
    fn any_order_of_events_ends_once(inputs in prop::collection::vec(input(), 0..40)) {
        let mut transfer = Transfer::new(grant());
        let mut observer = Observer::default();
        for input in inputs {
            match input {
                Input::Event(link, event) => observer.event(&mut transfer, link, event),
                Input::Extent(link, layer, position) => observer.extent(&mut transfer, link, layer, position),
            }
        }
        observer.event(&mut transfer, LinkId::NONE, Event::Closed);
        prop_assert_eq!((observer.told, observer.released), (1, 1));
    }
}

#[test]
fn a_transfer_completes() {
    let (mut transfer, mut observer, link) = (Transfer::new(grant()), Observer::default(), LinkId(1));
    observer.event(&mut transfer, link, open(&grant()));
    EXTENTS.into_iter().for_each(|(layer, position)| observer.extent(&mut transfer, link, layer, position));
    let summary = Summary { extents: 4, bytes: 16, digest: 42 };
    let actions = transfer.step(link, Event::Commit { tag: grant().tag(), summary });
    assert_eq!(actions, [Action::Tell(link, Body::Committed(summary)), Action::Complete(summary)]);
}
