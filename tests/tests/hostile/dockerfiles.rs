//! The list of attacks on an agent that builds images: Dockerfiles, and the sources they come with.

use std::fs;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::symlink;
use std::path::Path;

use crate::cases::{BREACH, Case, denied, ending, harmless};

/// What most of them begin with: everything that busybox can do.
pub(crate) const BASE: &str =
    "FROM scratch AS base\nCOPY busybox /bin/busybox\nRUN [\"/bin/busybox\", \"--install\", \"-s\", \"/bin\"]\n";

/// All that one worker can have at once. Their `script` is a Dockerfile; with flags that name another one, it is not used.
pub(crate) fn all() -> Vec<Case> {
    let all = [files(), contexts(), images(), mounts(), reading(), powers(), writing(), processes(), words()].concat();
    // Builds of the other suite may run at the same time, and what is theirs is told by its name.
    let named = |case: Case| Case { name: Box::leak(format!("{}-image", case.name).into_boxed_str()), ..case };
    all.into_iter().map(named).collect()
}

/// The source of all of them.
pub(crate) fn lay_out(source: &Path) {
    let put = |name: &str, text: &[u8]| fs::write(source.join(name), text).unwrap();
    fs::create_dir_all(source.join("directory/below")).unwrap();
    fs::copy("/bin/busybox", source.join("busybox")).unwrap();
    for (name, target) in [("passwd", "/etc/passwd"), ("up", "../../../.."), ("root", "/"), ("loop", "loop")] {
        symlink(target, source.join(name)).unwrap();
    }
    put("x.in", b"FROM scratch\n");
    put("empty", b"");
    put("large", &[b'#'; (1 << 20) + 1]);
    put("binary", b"\0\xff\x7fELF\n\0\0");
    put("excluding", b"*\n!nothing\n");
    put("new\nline", b"odd");
    put("-rf", b"odd");
    fs::write(source.join(std::ffi::OsStr::from_bytes(b"\x1b[2J*")), b"odd").unwrap();
}

/// A Dockerfile on the base.
fn on_base(case: Case) -> Case {
    Case { script: format!("{BASE}{}", case.script), ..case }
}

fn fine(name: &'static str, text: &str) -> Case {
    on_base(harmless(name, text))
}

fn ends(name: &'static str, flags: &'static [&'static str], text: &str, reason: &'static str) -> Case {
    on_base(ending(name, flags, text, reason))
}

fn saying(case: Case, says: &'static str) -> Case {
    Case { says, ..case }
}

/// Shell commands none of which may succeed in a step.
fn denied_in_a_step(name: &'static str, commands: &[&str]) -> Case {
    let case = denied(name, commands);
    // podman says what it runs: there the word must not be read. The rest is one line, in a form that no other shell reads first.
    let script = case.script.replace(BREACH, "BRE''ACH");
    let script = serde_json::to_string(&["/bin/sh", "-c", &script]).unwrap();
    on_base(Case { script: format!("RUN {script}\n"), ..case })
}

/// Dockerfiles that are none.
fn files() -> Vec<Case> {
    let with = |name, flags, says| Case { says, ..ending(name, flags, "", "source") };
    vec![
        with("file-missing", &["-f", "no/such"], "does not exist"),
        with("file-linked-out", &["-f", "passwd"], "leads out of it"),
        with("file-behind-a-link", &["-f", "up/etc/passwd"], "leads out of it"),
        with("file-in-a-loop", &["-f", "loop"], "lead nowhere"),
        with("file-is-a-directory", &["-f", "directory"], "no regular file"),
        with("file-preprocessed", &["-f", "x.in"], "preprocessed"),
        with("file-empty", &["-f", "empty"], "no contents"),
        with("file-large", &["-f", "large"], "more than"),
        with("file-binary", &["-f", "binary"], ""),
        saying(ending("file-without-from", &[], "RUN true\n", "source"), "FROM"),
        saying(ending("unknown-instruction", &[], "FROM scratch\nBOGUS x\n", "source"), "BOGUS"),
        saying(ending("from-of-nothing", &[], "FROM\n", "source"), "FROM"),
        saying(ends("unknown-target", &["--target", "nothing"], "RUN true\n", "source"), "nothing"),
    ]
}

/// What is taken from the source, and from beside it.
fn contexts() -> Vec<Case> {
    vec![
        ending("copy-a-link-out", &[], "FROM scratch\nCOPY passwd /leaked\n", "source"),
        ending("copy-behind-a-link", &[], "FROM scratch\nCOPY up/etc/passwd /leaked\n", "source"),
        ending("copy-from-above", &[], "FROM scratch\nCOPY ../../../../etc/passwd /leaked\n", "source"),
        ending("copy-nothing", &[], "FROM scratch\nCOPY no-such /x\n", "source"),
        saying(
            fine(
                "copy-everything",
                "COPY . /all\nRUN if cat /all/passwd /all/up/etc/shadow /all/root/etc/shadow; then echo BRE''ACH; fi; \
                 ls /all | wc -l; cat /all/new*line\n",
            ),
            "odd",
        ),
        ending("fetch-from-nobody", &[], "FROM scratch\nADD http://127.0.0.1:9/x /x\n", "source"),
    ]
}

/// Images that are no registry's, and instructions that an image brings along.
fn images() -> Vec<Case> {
    let refused = |name, text| saying(ending(name, &[], text, "policy"), "no registry's");
    vec![
        refused("image-directory", "FROM dir:/etc\n"),
        refused("image-archive", "FROM oci-archive:/etc/passwd\n"),
        refused("image-of-a-store", "FROM containers-storage:[overlay@/var/lib/containers/storage]x\n"),
        refused("image-of-a-daemon", "FROM docker-daemon:x:latest\n"),
        refused("copy-from-a-directory", "FROM scratch\nCOPY --from=dir:/etc /passwd /x\n"),
        saying(ends("onbuild-network", &[], "ONBUILD RUN --network=host id\nFROM base\n", "policy"), "podman.network"),
        saying(fine("entrypoint-is-ignored", "ENTRYPOINT [\"/bin/false\"]\nCMD [\"x\"]\nRUN echo fi''ne\n"), "fine"),
        Case { script: format!("# syntax=127.0.0.1:9/frontend\n{BASE}"), ..harmless("syntax-is-ignored", "") },
    ]
}

/// What a step would have mounted. Versions of podman that are in use follow an image's links on the host, for one.
fn mounts() -> Vec<Case> {
    let seen = "ls /m/shadow /m/etc/shadow /m/data && echo BRE''ACH; true\n";
    let refused = |name, text: &str| saying(ends(name, &[], &format!("{text} {seen}"), "policy"), "of this host");
    let unasked =
        |name, text: &str| saying(ends(name, &[], &format!("{text} {seen}"), "policy"), "not allowed on this agent");
    vec![
        refused("mount-a-link-of-an-image", "RUN ln -s /etc /out\nFROM base\nRUN --mount=from=0,source=/out,target=/m"),
        refused(
            "mount-the-root-by-a-link",
            "RUN ln -s / /out\nFROM base\nRUN --mount=type=bind,from=0,source=/out,target=/m,rw",
        ),
        refused("mount-a-link-of-the-source", "RUN --mount=type=bind,source=root,target=/m"),
        refused("mount-behind-a-link-of-the-source", "RUN --mount=type=bind,source=root/etc,target=/m"),
        unasked("mount-a-cache-from-above", "RUN --mount=type=cache,id=../../../../../../../../../../etc,target=/m"),
        unasked("mount-what-holds-the-caches", "RUN --mount=type=cache,id=..,target=/m"),
        unasked("mount-the-runtimes-state", "RUN --mount=type=cache,id=../runtime,target=/m"),
        refused("mount-all-caches", "RUN --mount=type=cache,id=.,target=/m"),
        unasked("mount-and-own", "RUN --mount=type=bind,source=root,target=/m,U"),
        unasked("mount-and-label", "RUN --mount=type=bind,source=root,target=/m,\"z\""),
        refused("mount-in-pieces", "RUN --mo\\\n# comment\n\nunt=type=bind,source=root,target=/m"),
        refused(
            "mount-the-store",
            "RUN ln -s {data}/podman/storage /out\nFROM base\nRUN --mount=from=0,source=/out,target=/m",
        ),
        fine("mount-from-above", &format!("RUN --mount=type=bind,source=../../../../../etc,target=/m {seen}")),
        saying(
            fine(
                "mounts-that-are-fine",
                "FROM base AS other\nCOPY x.in /given/x\nFROM base\nRUN --mount=type=cache,target=/c --mount=type=tmpfs,target=/t \
                 --mount=type=bind,target=/m --mount=from=other,source=/given,target=/g \
                 touch /c/x /t/x && ls /m/busybox /g/x && echo fi''ne\nVOLUME /v\nRUN touch /v/x\n",
            ),
            "fine",
        ),
    ]
}

/// What is to be kept from a step.
fn reading() -> Vec<Case> {
    vec![
        denied_in_a_step("agents-key", &["cat {key}", "test -e {key}", "ls {data}", "ls {data}/podman/storage"]),
        denied_in_a_step("others-workdir", &["cat {victim}/secret", "test -e {victim}"]),
        denied_in_a_step("others-environment", &["cat /proc/[0-9]*/environ | tr '\\0' '\\n' | grep 'VICTIM=secret'"]),
        denied_in_a_step(
            "root-of-init",
            &["ls /proc/1/root{data}", "ls /proc/1/cwd{data}", "test -e /proc/self/cwd/../../../../../../../..{data}"],
        ),
        denied_in_a_step(
            "sockets",
            &["ls /run/podman", "ls /var/run/docker.sock", "test -e {data}/control.sock", "ls /run/systemd"],
        ),
        denied_in_a_step(
            "inherited-descriptors",
            &["for fd in 3 4 5 6 7 8 9; do ls /proc/self/fd/$fd/../../../../etc/shadow && exit 0; done; false"],
        ),
        denied_in_a_step(
            "coordinator",
            &["nc -w 1 127.0.0.1 {port} < /dev/null", "ls /sys/class/net | grep -v '^lo$'"],
        ),
        denied_in_a_step(
            "words-of-podman",
            &["env | grep HELIX", "grep -q . /proc/kcore", "cat /proc/keys | grep .", "ls /sys/firmware/* | grep ."],
        ),
    ]
}

/// What is to be beyond a step's power.
fn powers() -> Vec<Case> {
    vec![
        denied_in_a_step(
            "mount",
            &["mount -t tmpfs none /mnt", "mount -t proc none /proc", "umount /proc", "umount -l /"],
        ),
        denied_in_a_step("remount", &["mount -o remount,rw /sys", "mount -o remount,rw /proc"]),
        denied_in_a_step(
            "namespaces",
            &["unshare -m true", "unshare -n true", "nsenter -t 1 -n true", "pivot_root / /"],
        ),
        denied_in_a_step(
            "device-nodes",
            &[
                "mknod /disk b 8 0 && head -c 1 /disk",
                "mknod /disk2 b 254 0 && head -c 1 /disk2",
                "mknod /memory c 1 1 && head -c 1 /memory",
                "mknod /messages c 1 11 && head -c 1 /messages",
                "mknod /fuse c 10 229 && head -c 1 /fuse",
            ],
        ),
        denied_in_a_step("host-name", &["hostname hostile", "echo hostile > /proc/sys/kernel/hostname"]),
        denied_in_a_step("clock", &["date -s '2001-01-01' > /dev/null; date | grep 2001"]),
        denied_in_a_step(
            "sysctl",
            &[
                "echo '|/bin/true' > /proc/sys/kernel/core_pattern",
                "echo b > /proc/sysrq-trigger",
                "echo 1 > /proc/sys/vm/drop_caches",
                "echo -1000 > /proc/self/oom_score_adj",
            ],
        ),
        denied_in_a_step(
            "control-groups",
            &[
                "mkdir /sys/fs/cgroup/*/below",
                "find /sys/fs/cgroup -name pids.max -o -name memory.limit_in_bytes | while read f; do echo 1 > $f && echo x; done | grep .",
            ],
        ),
        fine(
            "setuid-file",
            "RUN cp /bin/busybox /tool && chmod 6755 /tool && test -u /tool\nUSER 1234:5678\nRUN id -u | grep -x 1234\n",
        ),
        ends("user-of-nobody", &[], "USER nobody-here\nRUN true\n", "exit"),
    ]
}

/// What a step may leave where it may write.
fn writing() -> Vec<Case> {
    vec![
        fine("kernels-files", "RUN rm -rf /proc/* /sys/* /dev/* 2> /dev/null; true\nRUN echo after\n"),
        fine("many-files", "RUN mkdir /many && cd /many && seq 1 10000 | xargs touch\n"),
        fine("deep-tree", "RUN i=0; while [ $i -lt 400 ]; do mkdir d && cd d || exit 1; i=$((i+1)); done; touch end\n"),
        fine("unreadable", "RUN mkdir -p /a/b && touch /a/b/c && chmod -R 000 /a\n"),
        fine("device-left", "RUN mknod /disk b 8 0; mkfifo /pipe\n"),
        fine(
            "copy-through-a-link",
            "RUN ln -s {data} /out\nCOPY busybox /out/planted\nWORKDIR /out/planted-too\nRUN pwd\n",
        ),
        fine("volume-behind-a-link", "RUN ln -s {data} /out\nVOLUME /out/planted-volume\nRUN ls -la /out/\n"),
        fine(
            "names-of-the-hosts",
            "RUN mkdir -p /etc && ln -s {data}/planted-hosts /etc/hosts\nRUN echo x >> /etc/hosts; true\n",
        ),
    ]
}

/// Processes that do not want to end.
fn processes() -> Vec<Case> {
    vec![
        fine(
            "daemon",
            "RUN (setsid sh -c 'trap \"\" TERM HUP; while :; do sleep 1000; done' > /dev/null 2>&1 &); sleep 0.1\n",
        ),
        fine("kills-everything", "RUN kill -9 -1; kill -STOP 1; true\n"),
        fine("zombies", "RUN for i in 1 2 3 4 5 6 7 8 9; do (true &); done; sleep 0.1\n"),
        ends(
            "ignores-sigterm",
            &["--timeout", "4s"],
            "RUN trap '' TERM INT HUP; while :; do sleep 1; done\n",
            "timeout",
        ),
        ends("stands-still", &["--timeout", "4s"], "RUN (sleep 1000 & kill -STOP $!; wait)\n", "timeout"),
        ends(
            "freezes-itself",
            &["--timeout", "4s"],
            "RUN for f in /sys/fs/cgroup/freezer/freezer.state /sys/fs/cgroup/cgroup.freeze; do echo FROZEN > $f; echo 1 > $f; done; \
             sleep 1000\n",
            "timeout",
        ),
        ends("silent", &["--silence-timeout", "4s"], "RUN sleep 1000\n", "silence"),
        ends(
            "fork-bomb",
            &["--timeout", "6s"],
            "RUN b() { b | b & }; trap '' TERM; (b; sleep 1000) & sleep 1000\n",
            "timeout",
        ),
        ends("dies-by-a-signal", &[], "RUN sh -c 'kill -9 $$'; exit $?\n", "exit"),
        ends("podmans-own-code", &[], "RUN exit 125\n", "exit"),
        ends("blames-the-disk", &[], "RUN echo \"x\": no space left on device; exit 125\n", "exit"),
        ends("no-such-program", &[], "RUN /no/such/program\n", "exit"),
    ]
}

/// Output, names and values.
fn words() -> Vec<Case> {
    vec![
        saying(
            fine("line-of-100-megabytes", "RUN head -c 100000000 /dev/zero | tr '\\\\0' x; echo; echo e''nd\n"),
            "end",
        ),
        saying(
            fine(
                "endless-words",
                "RUN line=$(head -c 2000 /dev/zero | tr '\\0' y); yes $line | head -c 60000000; echo; echo e''nd\n",
            ),
            "end",
        ),
        saying(fine("binary-output", "RUN head -c 1000000 /dev/urandom; echo; echo e''nd\n"), "end"),
        saying(fine("escapes", "RUN printf '\\033[2J\\033]0;hostile\\007\\r\\b\\033c'; echo e''nd\n"), "end"),
        saying(
            ends("words-of-others", &[], "RUN echo 'Error: creating build container: x' >&2; exit 3\n", "exit"),
            "exit status 3",
        ),
        saying(
            on_base(ending(
                "argument-is-a-value",
                &["--build-arg", "A=--privileged", "--build-arg", "B=x --volume=/:/host", "--env", "C=--network=host"],
                "ARG A\nARG B\nRUN echo \"given $A $B\"; ls /host/etc && echo BRE''ACH; true\n",
                "succeeded",
            )),
            "given --privileged x --volume=/:/host",
        ),
        fine("labels", "LABEL helix.build=other helix.attempt=other.0.1 helix.cluster=other\n"),
    ]
}
