//! The lock on a data directory: one `baton up` at a time. The operating system gives it back however the holder ends.

use std::fs::{File, TryLockError};
use std::io::{Read, Seek, Write};
use std::path::Path;

use anyhow::Context;

use crate::exit::Failure;

/// Held while it lives.
#[derive(Debug)]
pub(crate) struct Lock {
    _file: File,
}

impl Lock {
    /// Takes the lock, or says who has it.
    pub(crate) fn take(data: &Path) -> Result<Lock, Failure> {
        let path = data.join("lock");
        let mut options = File::options();
        let opened = options.read(true).write(true).create(true).truncate(false).open(&path);
        let mut file = opened.with_context(|| format!("open {}", path.display())).map_err(Failure::refused)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(taken(data, &mut file)),
            Err(TryLockError::Error(error)) => return Err(Failure::refused(error)),
        }
        let rewritten =
            file.set_len(0).and_then(|()| file.rewind()).and_then(|()| write!(file, "{}", std::process::id()));
        rewritten.with_context(|| format!("write {}", path.display())).map_err(Failure::refused)?;
        Ok(Lock { _file: file })
    }
}

fn taken(data: &Path, file: &mut File) -> Failure {
    let mut holder = String::new();
    let _ = file.read_to_string(&mut holder);
    let holder = if holder.is_empty() { String::new() } else { format!(" (pid {holder})") };
    Failure::refuse(format!(
        "another `baton up`{holder} runs on {}; end it first, or choose another directory with --data",
        data.display()
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_holder_is_told_who_the_first_is() {
        let data = std::env::temp_dir().join(format!("baton-lock-test-{}", std::process::id()));
        std::fs::create_dir_all(&data).unwrap();
        let first = Lock::take(&data).unwrap();
        let refused = Lock::take(&data).unwrap_err();
        assert_eq!(refused.code, crate::exit::REFUSED);
        assert!(refused.to_string().contains(&format!("pid {}", std::process::id())), "{refused}");
        drop(first);
        drop(Lock::take(&data).unwrap());
        std::fs::remove_dir_all(&data).unwrap();
    }
}
