//! The operating system's calls on processes that the standard library lacks. All of this crate's `unsafe`.

use std::io;

/// Makes a child die with its parent, however that one ends, and take no signal meant for the terminal.
/// The signal comes when the parent's *thread* ends, so only a thread that lives as long as the process may spawn.
pub(crate) fn bind_to_parent(command: &mut tokio::process::Command) {
    let parent = std::process::id();
    command.process_group(0).kill_on_drop(true);
    // SAFETY: between fork and exec only prctl and getppid are called, both async-signal-safe.
    unsafe {
        command.pre_exec(move || {
            if libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) != 0 {
                return Err(io::Error::last_os_error());
            }
            match libc::getppid() as u32 == parent {
                true => Ok(()),
                false => Err(io::Error::from_raw_os_error(libc::ESRCH)),
            }
        });
    }
}

/// Asks a process of ours to end.
pub(crate) fn terminate(pid: u32) {
    // SAFETY: kill has no memory effects; the caller has not reaped the child, so that the pid is still its.
    unsafe { libc::kill(pid as libc::pid_t, libc::SIGTERM) };
}

/// Whether a process with this id exists.
pub(crate) fn exists(pid: u32) -> bool {
    // SAFETY: signal 0 only asks.
    pid != 0 && unsafe { libc::kill(pid as libc::pid_t, 0) } == 0
}

fn open_files() -> Option<libc::rlimit> {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the struct is ours and outlives the call.
    (unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &mut limit) } == 0).then_some(limit)
}

/// How many files and sockets a process may open once `raise_open_files` has run.
pub(crate) fn open_files_max() -> Option<u64> {
    open_files().map(|limit| limit.rlim_max)
}

/// Lifts the soft limit on open files to the hard one, for thousands of streams.
pub(crate) fn raise_open_files() {
    let Some(mut limit) = open_files() else { return };
    limit.rlim_cur = limit.rlim_max;
    // SAFETY: the struct is ours and outlives the call.
    if unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &limit) } != 0 {
        tracing::warn!("the limit on open files stays as it is: {}", io::Error::last_os_error());
    }
}
