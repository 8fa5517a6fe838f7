//! The system calls that an isolated command is refused: those that reach around its namespaces or that have no use in a
//! build and a history of holes. A program for the kernel's filter, put together here: a load, and a comparison for each call.
//!
//! Refused means EPERM, as without the right to it; `clone3`, whose flags a filter cannot see, and unknown ways to make
//! calls (x32) mean ENOSYS, upon which libraries take the older way. 32-bit programs on x86-64 have the same list with
//! their own numbers.

use std::io;

/// An instruction, as `struct sock_filter` has it.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct Instruction {
    code: u16,
    jump_true: u8,
    jump_false: u8,
    value: u32,
}

const LOAD: u16 = (libc::BPF_LD | libc::BPF_W | libc::BPF_ABS) as u16;
const JUMP: u16 = (libc::BPF_JMP | libc::BPF_JA) as u16;
const IF_EQUAL: u16 = (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16;
const IF_AT_LEAST: u16 = (libc::BPF_JMP | libc::BPF_JGE | libc::BPF_K) as u16;
const IF_ANY_BIT: u16 = (libc::BPF_JMP | libc::BPF_JSET | libc::BPF_K) as u16;
const RETURN: u16 = (libc::BPF_RET | libc::BPF_K) as u16;

/// Offsets in `struct seccomp_data`.
const NUMBER: u32 = 0;
const ARCHITECTURE: u32 = 4;
const ARGUMENTS: u32 = 16;

const ALLOW: u32 = libc::SECCOMP_RET_ALLOW;
const REFUSE: u32 = libc::SECCOMP_RET_ERRNO | libc::EPERM as u32;
const UNKNOWN: u32 = libc::SECCOMP_RET_ERRNO | libc::ENOSYS as u32;

/// Flags of `clone` and `unshare` that make namespaces.
const NAMESPACES: u32 = (libc::CLONE_NEWNS
    | libc::CLONE_NEWCGROUP
    | libc::CLONE_NEWUTS
    | libc::CLONE_NEWIPC
    | libc::CLONE_NEWUSER
    | libc::CLONE_NEWPID
    | libc::CLONE_NEWNET) as u32;
/// Only `unshare` has it: in `clone` the lowest byte is a signal.
const TIME_NAMESPACE: u32 = 0x80;

/// Terminal requests that put words in somebody's mouth.
const TIOCSTI: u32 = 0x5412;
const TIOCLINUX: u32 = 0x541c;
/// Sockets to the hypervisor, which no namespace separates.
const AF_VSOCK: u32 = 40;

/// What is looked at in a call's argument.
#[derive(Clone, Copy)]
enum When {
    AnyBit(u32),
    Equal(u32),
}

/// One architecture's way to make calls.
struct Calls {
    architecture: u32,
    /// Numbers from here on belong to another way.
    end: Option<u32>,
    refused: &'static [u32],
    unknown: &'static [u32],
    /// Number, argument, and when it is refused.
    looked_at: &'static [(u32, u32, When)],
}

macro_rules! numbers {
    ($($name:ident),* $(,)?) => { &[$(libc::$name as u32),*] };
}

#[cfg(target_arch = "x86_64")]
const CALLS: &[Calls] = &[
    Calls {
        architecture: 0xc000_003e,
        end: Some(0x4000_0000),
        refused: numbers![
            SYS_add_key,
            SYS_request_key,
            SYS_keyctl,
            SYS_bpf,
            SYS_perf_event_open,
            SYS_kexec_load,
            SYS_kexec_file_load,
            SYS_reboot,
            SYS_init_module,
            SYS_finit_module,
            SYS_delete_module,
            SYS_mount,
            SYS_umount2,
            SYS_pivot_root,
            SYS_move_mount,
            SYS_open_tree,
            SYS_fsopen,
            SYS_fsconfig,
            SYS_fsmount,
            SYS_fspick,
            SYS_mount_setattr,
            SYS_swapon,
            SYS_swapoff,
            SYS_quotactl,
            SYS_quotactl_fd,
            SYS_acct,
            SYS_setns,
            SYS_userfaultfd,
            SYS_io_uring_setup,
            SYS_io_uring_enter,
            SYS_io_uring_register,
            SYS_settimeofday,
            SYS_clock_settime,
            SYS_iopl,
            SYS_ioperm,
            SYS_lookup_dcookie,
            SYS_open_by_handle_at,
            SYS_uselib,
            SYS_ustat,
            SYS_sysfs,
            SYS__sysctl,
            SYS_syslog,
            SYS_vhangup,
            SYS_fanotify_init,
            SYS_sethostname,
            SYS_setdomainname,
        ],
        unknown: numbers![SYS_clone3],
        looked_at: &[
            (libc::SYS_clone as u32, 0, When::AnyBit(NAMESPACES)),
            (libc::SYS_unshare as u32, 0, When::AnyBit(NAMESPACES | TIME_NAMESPACE)),
            (libc::SYS_ioctl as u32, 1, When::Equal(TIOCSTI)),
            (libc::SYS_ioctl as u32, 1, When::Equal(TIOCLINUX)),
            (libc::SYS_socket as u32, 0, When::Equal(AF_VSOCK)),
        ],
    },
    // 32-bit x86; the numbers are those of its own table. Sockets have a second way here (socketcall) that a filter cannot
    // look into, and that leads to nothing but the hypervisor's.
    Calls {
        architecture: 0x4000_0003,
        end: None,
        refused: &[
            286, 287, 288, 357, 336, 283, 88, 128, 350, 129, 127, 130, 167, 21, 22, 52, 217, 429, 428, 430, 431, 432,
            433, 442, 87, 115, 131, 443, 51, 346, 374, 425, 426, 427, 25, 79, 264, 404, 110, 101, 113, 166, 253, 342,
            86, 62, 135, 149, 103, 111, 338, 169, 74, 121,
        ],
        unknown: &[435],
        looked_at: &[
            (120, 0, When::AnyBit(NAMESPACES)),
            (310, 0, When::AnyBit(NAMESPACES | TIME_NAMESPACE)),
            (54, 1, When::Equal(TIOCSTI)),
            (54, 1, When::Equal(TIOCLINUX)),
            (359, 0, When::Equal(AF_VSOCK)),
        ],
    },
];

#[cfg(any(target_arch = "aarch64", target_arch = "riscv64"))]
const CALLS: &[Calls] = &[Calls {
    architecture: if cfg!(target_arch = "aarch64") { 0xc000_00b7 } else { 0xc000_00f3 },
    end: None,
    refused: numbers![
        SYS_add_key,
        SYS_request_key,
        SYS_keyctl,
        SYS_bpf,
        SYS_perf_event_open,
        SYS_kexec_load,
        SYS_kexec_file_load,
        SYS_reboot,
        SYS_init_module,
        SYS_finit_module,
        SYS_delete_module,
        SYS_mount,
        SYS_umount2,
        SYS_pivot_root,
        SYS_move_mount,
        SYS_open_tree,
        SYS_fsopen,
        SYS_fsconfig,
        SYS_fsmount,
        SYS_fspick,
        SYS_mount_setattr,
        SYS_swapon,
        SYS_swapoff,
        SYS_quotactl,
        SYS_quotactl_fd,
        SYS_acct,
        SYS_setns,
        SYS_userfaultfd,
        SYS_io_uring_setup,
        SYS_io_uring_enter,
        SYS_io_uring_register,
        SYS_settimeofday,
        SYS_clock_settime,
        SYS_lookup_dcookie,
        SYS_open_by_handle_at,
        SYS_syslog,
        SYS_vhangup,
        SYS_fanotify_init,
        SYS_sethostname,
        SYS_setdomainname,
    ],
    unknown: numbers![SYS_clone3],
    looked_at: &[
        (libc::SYS_clone as u32, 0, When::AnyBit(NAMESPACES)),
        (libc::SYS_unshare as u32, 0, When::AnyBit(NAMESPACES | TIME_NAMESPACE)),
        (libc::SYS_ioctl as u32, 1, When::Equal(TIOCSTI)),
        (libc::SYS_socket as u32, 0, When::Equal(AF_VSOCK)),
    ],
}];

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64", target_arch = "riscv64")))]
const CALLS: &[Calls] = &[];

/// The filter.
///
/// # Errors
/// `Unsupported` on a processor whose calls are not listed here: then there is no isolation rather than a weaker one.
pub(crate) fn program() -> io::Result<Vec<Instruction>> {
    if CALLS.is_empty() {
        return Err(io::Error::new(io::ErrorKind::Unsupported, "no list of system calls for this processor"));
    }
    let mut program = vec![load(ARCHITECTURE)];
    for calls in CALLS {
        let block = block(calls);
        program.push(jump(IF_EQUAL, calls.architecture, 1, 0));
        // By a jump of its own: a comparison's reach is 255 instructions.
        program.push(Instruction { code: JUMP, jump_true: 0, jump_false: 0, value: block.len() as u32 });
        program.extend(block);
    }
    program.push(give(UNKNOWN));
    Ok(program)
}

/// What is said of one architecture's calls; always comes to an answer.
fn block(calls: &Calls) -> Vec<Instruction> {
    let mut block = vec![load(NUMBER)];
    if let Some(end) = calls.end {
        block.extend([jump(IF_AT_LEAST, end, 0, 1), give(UNKNOWN)]);
    }
    for number in calls.refused {
        block.extend([jump(IF_EQUAL, *number, 0, 1), give(REFUSE)]);
    }
    for number in calls.unknown {
        block.extend([jump(IF_EQUAL, *number, 0, 1), give(UNKNOWN)]);
    }
    for (number, argument, when) in calls.looked_at {
        // Flags and families are 32 bits wide; so are the halves that a filter can load.
        let low_half = if cfg!(target_endian = "little") { 0 } else { 4 };
        let (compare, value) = match when {
            When::AnyBit(bits) => (IF_ANY_BIT, *bits),
            When::Equal(value) => (IF_EQUAL, *value),
        };
        block.extend([
            jump(IF_EQUAL, *number, 0, 4),
            load(ARGUMENTS + 8 * argument + low_half),
            jump(compare, value, 0, 1),
            give(REFUSE),
            load(NUMBER),
        ]);
    }
    block.push(give(ALLOW));
    block
}

fn load(offset: u32) -> Instruction {
    Instruction { code: LOAD, jump_true: 0, jump_false: 0, value: offset }
}

fn jump(code: u16, value: u32, jump_true: u8, jump_false: u8) -> Instruction {
    Instruction { code, jump_true, jump_false, value }
}

fn give(answer: u32) -> Instruction {
    Instruction { code: RETURN, jump_true: 0, jump_false: 0, value: answer }
}

/// The filter as `bwrap --seccomp` reads it.
pub(crate) fn bytes(program: &[Instruction]) -> Vec<u8> {
    let of = |one: &Instruction| {
        let mut bytes = [0; 8];
        bytes[..2].copy_from_slice(&one.code.to_ne_bytes());
        (bytes[2], bytes[3]) = (one.jump_true, one.jump_false);
        bytes[4..].copy_from_slice(&one.value.to_ne_bytes());
        bytes
    };
    program.iter().flat_map(of).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the filter answers: a small machine for the instructions used here.
    fn ask(architecture: u32, number: u32, arguments: [u32; 2]) -> u32 {
        let program = program().unwrap();
        let (mut at, mut accumulator) = (0, 0);
        loop {
            let one = program[at];
            at += 1;
            let branch = |condition: bool| usize::from(if condition { one.jump_true } else { one.jump_false });
            match one.code {
                LOAD => {
                    accumulator = match one.value {
                        NUMBER => number,
                        ARCHITECTURE => architecture,
                        offset if cfg!(target_endian = "little") => arguments[(offset as usize - 16) / 8],
                        offset => arguments[(offset as usize - 20) / 8],
                    }
                }
                JUMP => at += one.value as usize,
                IF_EQUAL => at += branch(accumulator == one.value),
                IF_AT_LEAST => at += branch(accumulator >= one.value),
                IF_ANY_BIT => at += branch(accumulator & one.value != 0),
                RETURN => return one.value,
                other => panic!("{other}"),
            }
        }
    }

    #[test]
    fn says_what_the_lists_say() {
        for calls in CALLS {
            let ask = |number, arguments| ask(calls.architecture, number, arguments);
            for number in calls.refused {
                assert_eq!(ask(*number, [0; 2]), REFUSE, "{number}");
            }
            for number in calls.unknown {
                assert_eq!(ask(*number, [0; 2]), UNKNOWN, "{number}");
            }
            for (number, argument, when) in calls.looked_at {
                let mut arguments = [0; 2];
                assert_eq!(ask(*number, arguments), ALLOW, "{number}");
                arguments[*argument as usize] = match when {
                    When::AnyBit(bits) => 1 << bits.trailing_zeros() | 0x11,
                    When::Equal(value) => *value,
                };
                assert_eq!(ask(*number, arguments), REFUSE, "{number}");
            }
            let named = |number: &u32| {
                calls.refused.contains(number)
                    || calls.unknown.contains(number)
                    || calls.looked_at.iter().any(|(looked_at, ..)| looked_at == number)
            };
            for number in (0..500).filter(|number| !named(number)) {
                assert_eq!(ask(number, [u32::MAX; 2]), ALLOW, "{number}");
            }
        }
        assert_eq!(ask(0x1234, 1, [0; 2]), UNKNOWN);
    }

    #[test]
    #[cfg(target_arch = "x86_64")]
    fn x32_is_unknown() {
        assert_eq!(ask(0xc000_003e, 0x4000_0000 + 165, [0; 2]), UNKNOWN);
    }
}
