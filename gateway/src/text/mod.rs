//! From tokens to text that a client may see: whole characters, nothing of a stop string.

mod choice;
mod detokenizer;
#[cfg(test)]
pub(crate) mod fixtures;
mod stop;
mod vocabulary;

pub(crate) use choice::{ChoiceText, Delta, Ending, TextOptions};
pub(crate) use detokenizer::Detokenizer;
pub(crate) use stop::Stops;
pub(crate) use vocabulary::Vocabulary;
