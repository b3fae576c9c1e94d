//! Tickets: what shows that whoever opens a transfer was given its grant. A ticket goes only to the sender that a grant is
//! made for, inside its Prefill call, and opens that attempt of that transfer under that epoch and nothing else.

use crate::Grant;
use crate::link::Link;
use crate::wire::FEATURE_TICKETS;

/// What a receiver makes tickets with.
pub(crate) struct Tickets {
    secret: [u8; 32],
    /// Senders that know no tickets are not served.
    pub(crate) required: bool,
}

impl Tickets {
    pub(crate) fn new(secret: [u8; 32], required: bool) -> Tickets {
        Tickets { secret, required }
    }

    /// The ticket for a grant; never zero, which stands for none.
    pub(crate) fn of(&self, grant: &Grant) -> u128 {
        let mut mac = blake3::Hasher::new_keyed(&self.secret);
        mac.update(&grant.digest().to_le_bytes());
        mac.update(&grant.transfer.0.to_le_bytes());
        mac.update(&grant.attempt.to_le_bytes());
        mac.update(&grant.epoch.0.to_le_bytes());
        mac.update(&grant.request.0.to_le_bytes());
        let mac = mac.finalize();
        let first = mac.as_bytes().first_chunk().expect("a blake3 hash has 32 bytes");
        u128::from_le_bytes(*first) | 1
    }

    /// The key of the `count`th link; nobody tells it from chance.
    pub(crate) fn key(&self, count: u64) -> u128 {
        let mac = blake3::Hasher::new_keyed(&self.secret).update(b"link").update(&count.to_le_bytes()).finalize();
        u128::from_le_bytes(*mac.as_bytes().first_chunk().expect("a blake3 hash has 32 bytes"))
    }

    /// Whether what came with an OPEN over `link` opens `grant`. A sender of an earlier release has none.
    pub(crate) fn admit(&self, link: &Link, grant: &Grant, shown: Option<u128>) -> bool {
        match shown {
            // As hashes, which are compared in constant time.
            Some(shown) => hash(shown) == hash(grant.ticket),
            None => !self.required && link.features & FEATURE_TICKETS == 0,
        }
    }
}

fn hash(ticket: u128) -> blake3::Hash {
    blake3::hash(&ticket.to_le_bytes())
}
