//! The list of attacks on an agent that isolates its exec builds.

use crate::cases::{Case, denied, ending, harmless, refused_calls};

/// Leaves session, parent, environment and signals behind.
const DAEMON: &str =
    "(env -i setsid sh -c 'trap \"\" TERM HUP INT; cd /; while :; do sleep 1000; done' > /dev/null 2>&1 &)";

/// All of them.
pub(crate) fn all() -> Vec<Case> {
    [reading(), powers(), writing(), processes(), outputs(), resources(), words()].concat()
}

/// What is to be kept from a build.
fn reading() -> Vec<Case> {
    vec![
        denied("agents-key", &["cat {key}", "test -e {key}", "ls {data}/attempts", "cat {data}/instance"]),
        denied("others-workdir", &["cat {victim}/secret", "test -e {victim}", "echo x > {victim}/planted"]),
        denied("others-environment", &["cat /proc/[0-9]*/environ | tr '\\0' '\\n' | grep 'VICTIM=secret'"]),
        denied("others-descriptors", &["ls -l /proc/1/fd/ | grep pipe", "cat /proc/1/maps", "cat /proc/1/mem"]),
        denied("root-of-init", &["ls /proc/1/root/", "ls /proc/1/cwd/", "cat /proc/1/environ | grep ."]),
        denied("home-and-run", &["ls /root", "ls /home/*", "ls /run/* | grep .", "cat /etc/shadow", "ls /boot"]),
        denied(
            "inherited-descriptors",
            &[
                "ls /proc/self/fd | grep -v '^[0123]$'",
                "ls /proc/self/cwd/../../../../../../../../root",
                "for fd in 3 4 5 6 7 8 9; do ls /proc/self/fd/$fd/../../../../etc/shadow && exit 0; done; false",
            ],
        ),
        denied(
            "devices-of-the-host",
            &["test -e /dev/mem", "test -e /dev/kmsg", "ls /dev/[sv]da*", "test -e /dev/fuse"],
        ),
        denied(
            "coordinator",
            &[
                "perl -MSocket -e 'socket(S, AF_INET, SOCK_STREAM, 0); exit !connect(S, pack_sockaddr_in({port}, inet_aton(\"127.0.0.1\")))'",
            ],
        ),
        denied(
            "runners-socket",
            &[
                "perl -MSocket -e 'socket(S, AF_UNIX, SOCK_STREAM, 0); exit !connect(S, pack_sockaddr_un(\"{data}/control.sock\"))'",
            ],
        ),
        denied(
            "abstract-socket",
            &[
                "perl -MSocket -e 'socket(S, AF_UNIX, SOCK_STREAM, 0); exit !connect(S, pack_sockaddr_un(\"\\0helix-hostile-test\"))'",
                "grep helix-hostile-test /proc/net/unix",
            ],
        ),
    ]
}

/// What is to be beyond a build's power.
fn powers() -> Vec<Case> {
    vec![
        denied(
            "mount",
            &["mount -t tmpfs none .", "mount --bind /usr .", "mount -t proc none .", "umount /usr", "umount -l /"],
        ),
        denied(
            "remount",
            &["mount -o remount,rw /", "mount -o remount,rw,bind /usr", "mount -o remount,exec /dev/null"],
        ),
        denied(
            "namespaces",
            &["unshare -Ur true", "unshare -m true", "unshare -n true", "nsenter -t 1 -m true", "chroot / true"],
        ),
        denied(
            "setuid-file",
            &[
                "cp /usr/bin/id own-id && chmod 6755 own-id && ./own-id -u | grep -x 0",
                "su -c true",
                "perl -e '$> = 0; $< = 0; exit($> != 0)'",
            ],
        ),
        denied("device-nodes", &["mknod d c 1 1", "mknod d b 8 0", "mknod d c 5 1"]),
        denied("host-name", &["hostname hostile", "echo hostile > /proc/sys/kernel/hostname"]),
        denied("clock", &["date -s '2001-01-01'"]),
        denied(
            "sysctl",
            &[
                "echo '|/bin/true' > /proc/sys/kernel/core_pattern",
                "echo 0 > /proc/sys/kernel/randomize_va_space",
                "echo b > /proc/sysrq-trigger",
                "echo 1 > /proc/sys/vm/drop_caches",
            ],
        ),
        denied("immutable", &["touch kept && chattr +i kept", "chattr +a ."]),
        denied("out-of-memory-score", &["echo -1000 > /proc/self/oom_score_adj"]),
        refused_calls(
            "kernel-calls",
            &[
                (libc::SYS_keyctl, ", 0, -3, 0"),
                (libc::SYS_add_key, ", \"user\\0\", \"x\\0\", \"y\", 1, -3"),
                (libc::SYS_bpf, ", 0, 0, 0"),
                (libc::SYS_perf_event_open, ", \"\\0\" x 128, 0, -1, -1, 0"),
                (libc::SYS_io_uring_setup, ", 1, \"\\0\" x 128"),
                (libc::SYS_userfaultfd, ", 1"),
                (libc::SYS_kexec_load, ", 0, 0, 0, 0"),
                (libc::SYS_init_module, ", 0, 0, \"\\0\""),
                (libc::SYS_open_by_handle_at, ", 0, \"\\0\" x 32, 0"),
                (libc::SYS_syslog, ", 10, 0, 0"),
                (libc::SYS_unshare, ", 0x10000000"),
                (libc::SYS_mount, ", \"none\\0\", \"/tmp\\0\", \"tmpfs\\0\", 0, 0"),
                (libc::SYS_fsopen, ", \"tmpfs\\0\", 0"),
                (libc::SYS_setns, ", 0, 0"),
                (libc::SYS_fanotify_init, ", 0, 0"),
            ],
        ),
        refused_calls(
            "trace-the-init",
            &[(libc::SYS_ptrace, ", 16, 1, 0, 0"), (libc::SYS_ptrace, ", 0x4206, 1, 0, 0")],
        ),
        denied(
            "control-groups",
            &["ls /sys/fs/cgroup/*", "find /sys /proc/1 -name cgroup.procs 2> /dev/null | grep ."],
        ),
    ]
}

/// Where a build may not write, and what it may leave where it may.
fn writing() -> Vec<Case> {
    vec![
        denied(
            "writes-outside",
            &[
                "touch /usr/hostile",
                "touch /etc/hostile",
                "touch /hostile",
                "touch /var/lib/hostile",
                "touch /run/hostile",
                "touch /sys/devices/system/cpu/online",
                "echo x > /etc/passwd",
                "mkdir /dev/hostile",
                "ln /etc/hosts linked",
            ],
        ),
        harmless(
            "leavings-in-tmp",
            "echo left > /tmp/hostile; echo left > /var/tmp/hostile2; echo left > /dev/shm/hostile; \
            mkfifo /tmp/pipe; ls /tmp /dev/shm",
        ),
        harmless("system-v-memory", "command -v ipcmk > /dev/null && ipcmk -M 4096; true"),
        harmless("unreadable-directories", "mkdir -p a/b/c && touch a/b/c/d && chmod -R 000 a; chmod 000 ."),
        harmless("deep-tree", "perl -e 'for (1 .. 3000) { mkdir(\"d\") && chdir(\"d\") || die }'"),
        harmless("many-files", "mkdir many && cd many && seq 1 3000 | xargs touch"),
        harmless(
            "odd-names",
            "touch \"$(printf 'new\\nline')\" -- '-rf' ' ' '*' \"$(printf '\\377')\" \"$(printf '%0255d' 0)\"; ls | wc -l",
        ),
        harmless("links-out", "ln -s / root; ln -s {data} data; ln -s /proc/1/root init; mkdir d; ln -s .. d/up"),
    ]
}

/// Processes that do not want to end.
fn processes() -> Vec<Case> {
    vec![
        ending("kills-everything", &[], "sh -c 'kill -9 -1' & wait; exec sleep 1000", "signal"),
        harmless("kills-the-init", "kill -9 1; kill -STOP 1; kill -TERM 1; true"),
        Case { says: "left behind", ..harmless("daemon", &format!("{DAEMON}; sleep 0.1; true")) },
        ending("daemon-of-a-failure", &[], &format!("{DAEMON}; exit 3"), "exit"),
        ending("ignores-sigterm", &["--timeout", "1s"], "trap '' TERM INT HUP; while :; do sleep 1; done", "timeout"),
        ending(
            "stands-still",
            &["--timeout", "1s"],
            "(sleep 1000 & kill -STOP $!; wait) & kill -STOP $$; wait",
            "timeout",
        ),
        ending("silent", &["--silence-timeout", "1s"], "echo once; exec sleep 1000", "silence"),
        ending(
            "fork-bomb",
            &["--timeout", "3s"],
            // A shell that cannot fork ends: the first process of the build is none.
            "b() { b | b & }; trap '' TERM; (b; while :; do sleep 1; done) & exec sleep 1000",
            "timeout",
        ),
        ending("hops", &["--timeout", "2s"], "echo 'sh ./hop & exit' > hop; sh ./hop; exec sleep 1000", "timeout"),
        harmless("zombies", "i=0; while [ $i -lt 60 ]; do true & i=$((i+1)); done; exec sleep 0.1"),
        harmless("orphans", "for i in 1 2 3 4 5; do (setsid sleep 1000 > /dev/null 2>&1 < /dev/null &); done; true"),
    ]
}

/// Outputs that are not what they seem.
fn outputs() -> Vec<Case> {
    const OUT: &[&str] = &["--output", "out"];
    const BELOW: &[&str] = &["--output", "dir/out"];
    vec![
        ending("output-symlink", OUT, "ln -s /etc/shadow out", "artifact_missing"),
        ending("output-behind-a-symlink", BELOW, "ln -s /etc dir; ls dir > /dev/null", "artifact_missing"),
        ending("output-fifo", OUT, "mkfifo out", "artifact_missing"),
        ending(
            "output-socket",
            OUT,
            "perl -MSocket -e 'socket(S, AF_UNIX, SOCK_STREAM, 0); bind(S, pack_sockaddr_un(\"out\")) or die'",
            "artifact_missing",
        ),
        ending("output-missing", OUT, "true", "artifact_missing"),
        ending(
            "workdir-replaced",
            OUT,
            "cd ..; mv work elsewhere 2> /dev/null; ln -s /etc work 2> /dev/null; true",
            "artifact_missing",
        ),
        ending(
            "output-with-odd-names",
            &["--output", "dir"],
            "mkdir dir; touch \"$(printf 'dir/new\\nline')\"; chmod 000 dir/*",
            "succeeded",
        ),
        ending(
            "output-too-deep",
            &["--output", "d"],
            "perl -e 'for (1 .. 300) { mkdir(\"d\") && chdir(\"d\") || die }'",
            "artifact_missing",
        ),
        ending("output-sparse-and-hidden", OUT, "echo real > out; chmod 000 out", "succeeded"),
    ]
}

/// More than its share.
fn resources() -> Vec<Case> {
    vec![
        ending(
            "open-files",
            &[],
            "perl -e 'while (open(my $f, \"<\", \"/dev/null\")) { push @f, $f } exit(@f > 5000)'",
            "succeeded",
        ),
        harmless("line-of-100-megabytes", "head -c 100000000 /dev/zero | tr '\\0' x; echo; echo end"),
        harmless("binary-output", "head -c 1000000 /dev/urandom; echo; echo end"),
        ending("endless-log", &["--timeout", "2s"], "yes hostile", "timeout"),
    ]
}

/// Tricks with the environment.
fn words() -> Vec<Case> {
    vec![
        ending("no-such-program", &[], "exec /no/such/program", "exit"),
        ending(
            "shell-variables",
            &["--env", "BASH_ENV=/etc/shadow", "--env", "ENV=/etc/shadow", "--env", "IFS=x"],
            "echo fine",
            "succeeded",
        ),
        ending("another-path", &["--env", "PATH=/no/where"], "/bin/echo fine", "succeeded"),
    ]
}
