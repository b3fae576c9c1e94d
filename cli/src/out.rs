//! Standard output that may be closed: `baton sim shrink | head` ends with `head`, as any program does there.

use std::fmt::Arguments;
use std::io::{ErrorKind, Write};

use crate::exit::OUTPUT_CLOSED;

/// `print!` where standard output may be closed.
macro_rules! say {
    ($($text:tt)*) => { $crate::out::print(format_args!($($text)*)) };
}
pub(crate) use say;

/// `println!` where standard output may be closed.
macro_rules! sayln {
    () => { $crate::out::print(format_args!("\n")) };
    ($($text:tt)*) => { $crate::out::print(format_args!("{}\n", format_args!($($text)*))) };
}
pub(crate) use sayln;

/// Prints, and ends the process where nobody reads any more.
pub(crate) fn print(text: Arguments<'_>) {
    let mut out = std::io::stdout().lock();
    if let Err(error) = out.write_fmt(text).and_then(|()| out.flush()) {
        if error.kind() == ErrorKind::BrokenPipe {
            #[allow(clippy::disallowed_methods, reason = "nobody is left to tell anything")]
            std::process::exit(i32::from(OUTPUT_CLOSED));
        }
        panic!("standard output cannot be written: {error}");
    }
}

/// Prints a line for whoever reads; that nobody does any more ends nothing.
pub(crate) fn offer(line: Arguments<'_>) {
    let mut out = std::io::stdout().lock();
    let _ = writeln!(out, "{line}").and_then(|()| out.flush());
}
