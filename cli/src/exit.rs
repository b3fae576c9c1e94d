//! How the process ends: the exit codes, and errors that know theirs.

use std::fmt;

/// The cluster, a request or a measurement failed after it had begun.
pub(crate) const FAILED: u8 = 1;
/// Refused before anything served: flags, configuration, model, port, data directory.
pub(crate) const REFUSED: u8 = 2;

/// Nobody reads what is printed any more: as of a process that SIGPIPE has ended.
pub(crate) const OUTPUT_CLOSED: u8 = 128 + 13;

/// Files of the data directory are damaged or missing, or the ledger in them is not the leader's (sysexits' EX_CONFIG).
pub(crate) const DAMAGED: u8 = 78;

/// The table every `--help` ends with.
pub(crate) const EXIT_CODES: &str = "Exit codes:
  0  done, or ended as asked (Ctrl-C, SIGTERM)
  1  something failed after it had begun
  2  refused before anything served: flags, configuration, model, port or data directory; nothing is left running
 78  a coordinator's data is damaged (path and offset are named) or differs from the leader's (index and hashes are named)
141  nobody reads its output any more";

/// An error on its way to the terminal, with the exit code it becomes.
#[derive(Debug)]
pub(crate) struct Failure {
    pub(crate) code: u8,
    pub(crate) error: anyhow::Error,
}

impl Failure {
    /// Something that was refused before it began.
    pub(crate) fn refused(error: impl Into<anyhow::Error>) -> Failure {
        Failure { code: REFUSED, error: error.into() }
    }

    /// The same, from a sentence.
    pub(crate) fn refuse(sentence: impl fmt::Display) -> Failure {
        Failure::refused(anyhow::anyhow!("{sentence}"))
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // TOML's errors end in a line break.
        f.write_str(format!("{:#}", self.error).trim_end())
    }
}

impl<E: Into<anyhow::Error>> From<E> for Failure {
    fn from(error: E) -> Failure {
        Failure { code: FAILED, error: error.into() }
    }
}
