//! Giving up what an isolated command must not have: capabilities, namesakes of the host's sockets, system calls.

use std::io;

use super::seccomp::Instruction;

/// The newest form of the kernel's capability sets: two words for each of three sets.
const CAPABILITY_VERSION: u32 = 0x2008_0522;

#[repr(C)]
struct CapabilityHeader {
    version: u32,
    pid: i32,
}

/// Drops every capability, for this process and all it will start.
pub(crate) fn drop_capabilities() -> io::Result<()> {
    // SAFETY: plain calls with integers; the two structs are of the form that the version names and outlive the call.
    unsafe {
        for capability in 0..64 {
            // The kernel has fewer, and says so at the first that it does not know.
            if libc::prctl(libc::PR_CAPBSET_DROP, capability, 0, 0, 0) == -1 {
                let error = io::Error::last_os_error();
                if error.raw_os_error() == Some(libc::EINVAL) {
                    break;
                }
                return Err(error);
            }
        }
        // Kernels without ambient capabilities have none to clear.
        libc::prctl(libc::PR_CAP_AMBIENT, libc::PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0);
        let header = CapabilityHeader { version: CAPABILITY_VERSION, pid: 0 };
        let none = [0_u32; 6];
        if libc::syscall(libc::SYS_capset, &raw const header, none.as_ptr()) == -1 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

/// `struct landlock_ruleset_attr`.
#[repr(C)]
struct Ruleset {
    files: u64,
    network: u64,
    scoped: u64,
}

/// Sockets with abstract names belong to the network, not to the file system: on the host's network those of the host
/// would be within reach. Kernels from 6.12 on with Landlock can tell them apart; on others only `exec.network = "none"` does.
pub(crate) fn leave_abstract_sockets() -> io::Result<()> {
    const ABSTRACT_SOCKETS_AND_SIGNALS: u64 = 1 | 2;
    const SCOPES_SINCE: libc::c_long = 6;
    const ASK_VERSION: u32 = 1;
    // SAFETY: the struct outlives the calls; the descriptor is ours and closes with exec.
    unsafe {
        let nothing = std::ptr::null::<Ruleset>();
        if libc::syscall(libc::SYS_landlock_create_ruleset, nothing, 0_usize, ASK_VERSION) < SCOPES_SINCE {
            return Ok(());
        }
        let ruleset = Ruleset { files: 0, network: 0, scoped: ABSTRACT_SOCKETS_AND_SIGNALS };
        let made = libc::syscall(libc::SYS_landlock_create_ruleset, &raw const ruleset, size_of::<Ruleset>(), 0_u32);
        if made == -1 || libc::syscall(libc::SYS_landlock_restrict_self, made, 0_u32) == -1 {
            return Err(io::Error::last_os_error());
        }
        libc::close(made as libc::c_int);
    }
    Ok(())
}

/// Has the kernel refuse what the program says, from here on and for ever. Wants `no_new_privs`.
pub(crate) fn refuse_calls(program: &[Instruction]) -> io::Result<()> {
    let filter = libc::sock_fprog {
        len: u16::try_from(program.len()).map_err(|_| io::ErrorKind::InvalidInput)?,
        filter: program.as_ptr().cast_mut().cast(),
    };
    // SAFETY: the instructions have the kernel's form and outlive the call, which copies them.
    let done = unsafe {
        libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER as libc::c_ulong, &raw const filter, 0, 0)
    };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
