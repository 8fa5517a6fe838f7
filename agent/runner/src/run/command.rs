//! Starting the command: what it inherits is decided here, and nowhere else.
//!
//! A plain fork: this process is small and has one thread, so the child may run any code until it becomes the command.

#![allow(unsafe_code)] // fork, execve, signal dispositions and credentials: libc only.

use std::ffi::{CString, OsStr, OsString};
use std::fs;
use std::io::{self, Read as _};
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::path::PathBuf;

use helix_runner::cgroup::{Cgroup, Groups};
use helix_runner::{Order, Privileges};
use rustix::pipe::{PipeFlags, pipe_with};

use super::fork::{Forked, fork};
use super::isolated;

/// A command is this much likelier than its runner to be chosen when memory runs out.
const OOM_SCORE_ADJ: &str = "500";

/// The command as started.
pub(crate) struct Started {
    pub(crate) pid: u32,
    pub(crate) stdout: OwnedFd,
    pub(crate) stderr: OwnedFd,
    /// Where the command's end is told when the process is not the command itself but its namespaces' init.
    pub(crate) status: Option<OwnedFd>,
}

/// What could not be done, and why.
#[derive(Debug)]
pub(crate) struct StartError {
    pub(crate) errno: i32,
    pub(crate) text: String,
}

impl StartError {
    pub(crate) fn new(what: impl std::fmt::Display, error: &io::Error) -> Self {
        Self { errno: error.raw_os_error().unwrap_or(0), text: format!("{what}: {error}") }
    }
}

/// Starts it in its cgroups. Returns when it runs or has failed to. `note` learns of the new process; one that begins
/// namespaces waits until it has.
pub(crate) fn start(
    order: &Order,
    cgroup: Option<&Cgroup>,
    groups: &Groups,
    note: impl FnOnce(u32) -> io::Result<()>,
) -> Result<Started, StartError> {
    let Some(program) = order.argv.first() else {
        return Err(StartError { errno: libc::EINVAL, text: "there is nothing to run".to_owned() });
    };
    let image =
        Image::new(order).map_err(|error| StartError::new(format!("cannot start {}", program.display()), &error))?;
    let cannot_isolate = |error| StartError::new("cannot isolate the command", &error);
    let bubblewrap = isolated::prepare_bubblewrap(order).map_err(cannot_isolate)?;
    let namespaces = isolated::clone_flags(order);
    let hold = (namespaces != 0).then(isolated::Hold::new).transpose().map_err(cannot_isolate)?;
    let pipes = || -> io::Result<_> {
        let flags = PipeFlags::CLOEXEC;
        Ok((pipe_with(flags)?, pipe_with(flags)?, pipe_with(flags)?, fs::File::open("/dev/null")?))
    };
    let ((stdout, stdout_theirs), (stderr, stderr_theirs), (failure, failure_theirs), null) =
        pipes().map_err(|error| StartError::new("cannot make pipes", &error))?;
    let runner = rustix::process::getpid();
    let directory = cgroup.map(|cgroup| fs::File::open(cgroup.path())).transpose();
    let directory = directory.map_err(|error| StartError::new("cannot open the cgroup", &error))?;
    let cannot_fork = if namespaces == 0 { "cannot fork" } else { "cannot make namespaces" };
    // SAFETY: this process has one thread.
    let forked = unsafe { fork(namespaces, directory.as_ref()) };
    let pid = match forked.map_err(|error| StartError::new(cannot_fork, &error))? {
        Forked::Child { placed } => {
            let outputs = [null.as_fd(), stdout_theirs.as_fd(), stderr_theirs.as_fd()];
            let failure = failure_theirs.as_fd();
            let held = cgroup.filter(|_| !placed).map(Cgroup::procs);
            let cgroups: &[PathBuf] = &held.into_iter().chain(groups.procs()).collect::<Vec<_>>();
            let (what, error) = match hold {
                Some(hold) => {
                    isolated::be_init(isolated::Plan { order, image: &image, cgroups, outputs, failure }, hold)
                }
                None => become_command(order, &image, bubblewrap.as_ref(), cgroups, outputs, runner),
            };
            report(failure, &what, &error);
            // SAFETY: ends this child at once, without running the runner's own exit code.
            unsafe { libc::_exit(127) }
        }
        Forked::Parent { child } => child,
    };
    drop((stdout_theirs, stderr_theirs, failure_theirs));
    let noted = note(pid.cast_unsigned());
    // An init that is not noted must not begin: a sweep takes it that it did not.
    let release = |hold: isolated::Hold| noted.and_then(|()| hold.release());
    let status = hold.map(release).transpose().map_err(cannot_isolate)?;
    let mut report = String::new();
    // Ends empty when exec closes the other side.
    let _ = fs::File::from(failure).read_to_string(&mut report);
    if let Some((errno, what)) = report.split_once(':') {
        // SAFETY: waits for the child that has just reported; no pointers but null.
        unsafe { libc::waitpid(pid, std::ptr::null_mut(), 0) };
        let error = io::Error::from_raw_os_error(errno.parse().unwrap_or(0));
        return Err(StartError::new(what, &error));
    }
    for pipe in [&stdout, &stderr] {
        rustix::io::ioctl_fionbio(pipe, true)
            .map_err(|error| StartError::new("cannot set up pipes", &io::Error::from(error)))?;
    }
    Ok(Started { pid: pid.cast_unsigned(), stdout, stderr, status })
}

/// Tells the runner what a new process could not do.
pub(super) fn report(failure: BorrowedFd<'_>, what: &str, error: &io::Error) {
    let report = format!("{}:{what}", error.raw_os_error().unwrap_or(0));
    let _ = rustix::io::write(failure, report.as_bytes());
}

/// Everything exec needs, made before the fork.
pub(super) struct Image {
    programs: Vec<CString>,
    argv: Vec<CString>,
    environment: Vec<CString>,
}

impl Image {
    fn new(order: &Order) -> io::Result<Self> {
        let entry = |(name, value): &(std::ffi::OsString, std::ffi::OsString)| {
            let mut entry = name.clone().into_vec();
            entry.push(b'=');
            entry.extend_from_slice(value.as_bytes());
            Ok(CString::new(entry)?)
        };
        let environment = order.environment.iter().map(entry).collect::<io::Result<_>>()?;
        let program = order.argv.first().map_or(OsStr::new(""), |program| program.as_os_str());
        let programs = candidates(program, order.variable("PATH").unwrap_or_default());
        Ok(Self { environment, ..Self::bare(&order.argv, programs)? })
    }

    /// One without an environment.
    pub(super) fn bare(argv: &[OsString], programs: Vec<Vec<u8>>) -> io::Result<Self> {
        let argv = argv.iter().map(|argument| Ok(CString::new(argument.as_bytes())?)).collect::<io::Result<_>>()?;
        let programs = programs.into_iter().map(|path| Ok(CString::new(path)?)).collect::<io::Result<_>>()?;
        Ok(Self { programs, argv, environment: Vec::new() })
    }

    /// Becomes the first candidate that can be run; returns why none could.
    pub(super) fn exec(&self) -> io::Error {
        let pointers = |strings: &[CString]| -> Vec<*const libc::c_char> {
            strings.iter().map(|string| string.as_ptr()).chain([std::ptr::null()]).collect()
        };
        let (argv, environment) = (pointers(&self.argv), pointers(&self.environment));
        let mut reason = io::Error::from_raw_os_error(libc::ENOENT);
        for program in &self.programs {
            // SAFETY: all strings end in NUL, both lists in null, and all outlive the call.
            unsafe { libc::execve(program.as_ptr(), argv.as_ptr(), environment.as_ptr()) };
            let error = io::Error::last_os_error();
            // As shells do: one that may not be run counts only if no later one is there.
            match error.raw_os_error() {
                Some(libc::ENOENT | libc::ENOTDIR) => {}
                Some(libc::EACCES) => reason = error,
                _ => return error,
            }
        }
        reason
    }
}

/// Where a program may be: the name itself if it has a slash, else in each directory of `PATH`.
fn candidates(program: &OsStr, path: &OsStr) -> Vec<Vec<u8>> {
    if program.as_bytes().contains(&b'/') {
        return vec![program.as_bytes().to_vec()];
    }
    // An empty entry would mean the current directory: never, a checkout could bring its own `sh`.
    let directories = path.as_bytes().split(|byte| *byte == b':').filter(|directory| !directory.is_empty());
    directories.map(|directory| [directory, b"/", program.as_bytes()].concat()).collect()
}

/// Runs in the child. Returns what could not be done.
fn become_command(
    order: &Order,
    image: &Image,
    bubblewrap: Option<&isolated::Bubblewrap>,
    cgroups: &[PathBuf],
    descriptors: [std::os::fd::BorrowedFd<'_>; 3],
    runner: rustix::process::Pid,
) -> (String, io::Error) {
    let program = order.argv.first().map_or(OsStr::new(""), |program| program.as_os_str()).display();
    // With root's rights, if we have them; nothing of the build's is run with them.
    if let Some(Err(failed)) = bubblewrap.map(|bubblewrap| bubblewrap.lay_out(order)) {
        return failed;
    }
    // Order matters: the cgroup first, so that nothing escapes it; credentials after what needs ours; the working directory
    // after them, so that it is entered with the command's own rights.
    let steps: [(&str, &dyn Fn() -> io::Result<()>); 6] = [
        ("cannot leave the runner's session", &|| Ok(rustix::process::setsid().map(drop)?)),
        ("cannot enter the cgroup", &|| cgroups.iter().try_for_each(|procs| fs::write(procs, "0"))),
        ("cannot set limits", &|| set_limits(order)),
        ("cannot take the ordered user", &|| set_user(order, runner)),
        ("cannot set up descriptors", &|| set_descriptors(descriptors)),
        ("cannot enter the working directory", &|| match bubblewrap {
            // It goes there itself, where the build sees it.
            Some(_) => Ok(()),
            None => std::env::set_current_dir(&order.workdir),
        }),
    ];
    for (what, step) in steps {
        if let Err(error) = step() {
            return (what.to_owned(), error);
        }
    }
    reset_signals();
    match bubblewrap {
        Some(bubblewrap) => bubblewrap.run(),
        None => (format!("cannot start {program}"), image.exec()),
    }
}

pub(super) fn set_limits(order: &Order) -> io::Result<()> {
    rustix::process::umask(rustix::fs::Mode::from_bits_retain(0o022));
    order.limits.set_own()?;
    // SAFETY: plain calls with integers. Dumpable again, or `/proc/self` would not be ours to write.
    unsafe { libc::prctl(libc::PR_SET_DUMPABLE, 1) };
    // It may be higher already, and lowering it may not be allowed.
    let _ = fs::write("/proc/self/oom_score_adj", OOM_SCORE_ADJ);
    if order.privileges == Privileges::NeverMore {
        rustix::thread::set_no_new_privs(true)?;
    }
    Ok(())
}

fn set_user(order: &Order, runner: rustix::process::Pid) -> io::Result<()> {
    let done = |result: libc::c_int| if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) };
    if let Some(user) = order.user {
        // SAFETY: plain calls with integers and an empty list; one thread, so credentials change for all of it.
        unsafe {
            done(libc::setgroups(0, std::ptr::null()))?;
            done(libc::setresgid(user.gid, user.gid, user.gid))?;
            done(libc::setresuid(user.uid, user.uid, user.uid))?;
        }
    }
    // After the credentials, whose change clears it: the command dies with its runner.
    // SAFETY: a plain call with integers.
    done(unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) })?;
    // It may have died just before that call.
    match rustix::process::getppid() {
        Some(parent) if parent == runner => Ok(()),
        _ => Err(io::Error::from_raw_os_error(libc::ESRCH)),
    }
}

/// Exactly 0, 1 and 2 remain after exec.
pub(super) fn set_descriptors([stdin, stdout, stderr]: [std::os::fd::BorrowedFd<'_>; 3]) -> io::Result<()> {
    // None of the three can be among 0 to 2 itself: those were taken when the runner started.
    debug_assert!(stdin.as_raw_fd() > 2 && stdout.as_raw_fd() > 2 && stderr.as_raw_fd() > 2);
    for (from, to) in [(stdin, 0), (stdout, 1), (stderr, 2)] {
        // SAFETY: `from` is open; what `to` was belongs to nobody in this child.
        if unsafe { libc::dup2(from.as_raw_fd(), to) } == -1 {
            return Err(io::Error::last_os_error());
        }
    }
    // SAFETY: only marks descriptors; the one that reports failure closes when exec succeeds.
    let marked =
        unsafe { libc::syscall(libc::SYS_close_range, 3, libc::c_uint::MAX, libc::CLOSE_RANGE_CLOEXEC as libc::c_int) };
    if marked == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Ignored and blocked signals survive exec; a build expects none.
pub(super) fn reset_signals() {
    // All zeros is the default disposition in the kernel's form, which is four words at most.
    let default = [0_usize; 4];
    // SAFETY: dispositions and mask only, the set is initialised by sigemptyset. The system call itself, because libc keeps
    // two signals to itself, which somebody may have ignored all the same; SIGKILL and SIGSTOP are refused, as is right.
    unsafe {
        for signal in 1..=64 {
            let previous = std::ptr::null_mut::<usize>();
            libc::syscall(libc::SYS_rt_sigaction, signal, default.as_ptr(), previous, 8_usize);
        }
        let mut none = std::mem::zeroed();
        libc::sigemptyset(&raw mut none);
        libc::sigprocmask(libc::SIG_SETMASK, &raw const none, std::ptr::null_mut());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn looks_in_no_directory_that_path_does_not_name() {
        let found = candidates(OsStr::new("sh"), OsStr::new("/bin::/usr/bin:"));
        assert_eq!(found, [b"/bin/sh".to_vec(), b"/usr/bin/sh".to_vec()]);
        assert_eq!(candidates(OsStr::new("./x"), OsStr::new("/bin")), [b"./x".to_vec()]);
        assert!(candidates(OsStr::new("sh"), OsStr::new("")).is_empty());
    }
}
