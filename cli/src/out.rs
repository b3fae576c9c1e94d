//! Standard output that may be closed: `baton sim shrink | head` ends with `head`, as any program does there.

use std::fmt::Arguments;
use std::io::{ErrorKind, Write};

use crate::exit::{FAILED, OUTPUT_CLOSED};

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

/// Prints, and ends the process where that cannot be: without a word where nobody reads any more.
pub(crate) fn print(text: Arguments<'_>) {
    let mut out = std::io::stdout().lock();
    let Err(error) = out.write_fmt(text).and_then(|()| out.flush()) else { return };
    let code = match error.kind() {
        ErrorKind::BrokenPipe => OUTPUT_CLOSED,
        _ => {
            eprintln!("error: standard output cannot be written: {error}");
            FAILED
        }
    };
    #[allow(clippy::disallowed_methods, reason = "what was asked for cannot be told")]
    std::process::exit(i32::from(code));
}

/// Prints a line for whoever reads; that nobody does any more ends nothing.
pub(crate) fn offer(line: Arguments<'_>) {
    let mut out = std::io::stdout().lock();
    let _ = writeln!(out, "{line}").and_then(|()| out.flush());
}
