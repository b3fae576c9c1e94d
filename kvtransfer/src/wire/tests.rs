//! Round trips, damage, and noise.

use proptest::prelude::*;

use super::*;

fn tag() -> impl Strategy<Value = Tag> {
    (any::<u64>(), any::<u32>(), any::<u64>()).prop_map(|(transfer, attempt, epoch)| Tag {
        transfer: TransferId(transfer),
        attempt,
        epoch: Epoch(epoch),
    })
}

fn summary() -> impl Strategy<Value = Summary> {
    (any::<u64>(), any::<u64>(), any::<u64>()).prop_map(|(extents, bytes, digest)| Summary { extents, bytes, digest })
}

fn body() -> impl Strategy<Value = Body> {
    let refused = prop::sample::select(Refused::ALL.to_vec());
    let aborted = prop::sample::select(Aborted::ALL.to_vec());
    prop_oneof![
        (".{0,200}", any::<u16>()).prop_map(|(text, features)| Body::Hello { text, features }),
        ".{0,200}".prop_map(Body::Offer),
        prop::collection::vec(any::<(u32, u32)>(), 1..=RESEND_MAX).prop_map(Body::Resend),
        ".{0,200}".prop_map(Body::Mismatch),
        (any::<u128>(), any::<u128>(), any::<Option<u128>>()).prop_map(|(id, grant, ticket)| Body::Open {
            request: RequestId(id),
            grant,
            ticket
        }),
        Just(Body::Opened),
        refused.prop_map(Body::Refused),
        any::<u64>().prop_map(Body::Ack),
        summary().prop_map(Body::Commit),
        summary().prop_map(Body::Committed),
        (aborted, any::<bool>()).prop_map(|(reason, quiesced)| Body::Abort { reason, quiesced }),
        any::<bool>().prop_map(|quiesced| Body::Aborted { quiesced }),
        Just(Body::Ping),
        prop::collection::vec(any::<(u32, u64)>(), 1..HANDOFF_LANES_MAX).prop_map(Body::Barrier),
    ]
}

fn message() -> impl Strategy<Value = Message> {
    (tag(), body()).prop_map(|(tag, body)| Message { tag, body })
}

fn header() -> impl Strategy<Value = Header> {
    let kind = prop::sample::select(Kind::ALL.to_vec());
    let numbers = (any::<u16>(), any::<u16>(), any::<u16>(), any::<u64>(), any::<u32>(), any::<u64>());
    (kind, tag(), 0..=LENGTH_MAX as u32, numbers).prop_map(|(kind, tag, length, numbers)| {
        let (flags, layer, layers, sequence, blocks, payload_sum) = numbers;
        Header { kind, flags, tag, layer, layers, sequence, blocks, length, payload_sum }
    })
}

fn decode(bytes: &[u8]) -> Result<Message, BadFrame> {
    let (head, payload) = bytes.split_first_chunk().expect("a header");
    Message::decode(&Header::decode(head)?, payload)
}

proptest! {
    #[test]
    fn headers_round_trip(header in header()) {
        prop_assert_eq!(Header::decode(&header.encode()), Ok(header));
    }

    #[test]
    fn messages_round_trip(message in message()) {
        prop_assert_eq!(decode(&message.encode()), Ok(message));
    }

    #[test]
    fn every_bit_of_a_message_counts(message in message()) {
        let bytes = message.encode();
        for bit in 0..bytes.len() * 8 {
            let mut flipped = bytes.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            prop_assert!(decode(&flipped).is_err(), "bit {bit}");
        }
    }

    #[test]
    fn a_shortened_or_longer_payload_is_refused(message in message(), extra in 1usize..9) {
        let bytes = message.encode();
        let longer = [&bytes[..], &vec![0; extra]].concat();
        prop_assert_eq!(decode(&longer), Err(BadFrame::PayloadChecksum));
        for end in HEADER_BYTES..bytes.len() {
            prop_assert_eq!(decode(&bytes[..end]), Err(BadFrame::PayloadChecksum));
        }
    }

    #[test]
    fn an_oversized_length_is_refused(mut header in header(), length in LENGTH_MAX as u32 + 1..) {
        header.length = length;
        prop_assert_eq!(Header::decode(&header.encode()), Err(BadFrame::Length { length }));
    }

    #[test]
    fn another_version_is_named(header in header(), theirs in any::<u8>().prop_filter("other", |v| *v != VERSION)) {
        let mut bytes = header.encode();
        bytes[4] = theirs;
        prop_assert_eq!(Header::decode(&bytes), Err(BadFrame::Version { theirs }));
    }

    #[test]
    fn entries_round_trip(position in any::<u32>(), index in any::<u32>(), generation in any::<u32>(), source in any::<u32>(), sum in any::<u64>()) {
        let entry = Entry { position, block: BlockId { index, generation }, source, sum };
        prop_assert_eq!(Entry::decode(&entry.encode()), entry);
    }

    /// Noise behind a header that is right, so that the payload parsers see it.
    #[test]
    fn noise_never_panics(mut header in header(), payload in prop::collection::vec(any::<u8>(), 0..300), honest in any::<bool>()) {
        header.length = payload.len() as u32;
        if honest {
            header.payload_sum = xxh3_64(&payload);
        }
        let _ = Message::decode(&header, &payload);
        let _ = entries(&header, &payload).map(|entries| entries.count());
        for layer_bytes in [1, 7, 64, 1 << 20] {
            prop_assert!(entries_bytes(&header, layer_bytes).unwrap_or(0) <= header.length as usize);
        }
    }

    #[test]
    fn noise_is_not_a_header(bytes in any::<[u8; 32]>()) {
        let mut noise = [0; HEADER_BYTES];
        noise[..32].copy_from_slice(&bytes);
        prop_assert!(Header::decode(&noise).is_err());
    }
}

#[test]
fn long_texts_are_cut_between_characters() {
    let message = Message { tag: Tag::default(), body: Body::Hello { text: "ä".repeat(TEXT_BYTES_MAX), features: 0 } };
    let Ok(Message { body: Body::Hello { text, .. }, .. }) = decode(&message.encode()) else { panic!("refused") };
    assert_eq!(text, "ä".repeat(TEXT_BYTES_MAX / 2));
}
