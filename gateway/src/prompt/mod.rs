//! From what the client wrote to the tokens of a prompt.

mod encode;
mod template;

pub(crate) use encode::{Encoder, Text};
pub(crate) use template::{Render, Template};
