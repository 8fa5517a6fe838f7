//! Looking for what builds left on the host: processes, mounts, loop devices, control groups, files, shared memory.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

/// The user that an agent which is root gives an attempt: out of a range that nothing else on a host uses, by its key.
pub(crate) fn user_of(attempt: &str) -> u32 {
    let hash = attempt.bytes().fold(0x811c_9dc5_u32, |hash, byte| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193));
    0x7000_0000 + hash % 0x0800_0000
}

/// Everything that is left of these builds under an agent with this data directory, one line each.
pub(crate) fn left(data_dir: &Path, builds: &[String]) -> Vec<String> {
    let users: BTreeSet<u32> =
        builds.iter().flat_map(|build| (1..=3).map(move |number| user_of(&format!("{build}.0.{number}")))).collect();
    let mut found = processes(data_dir, &users);
    found.extend(mounts(data_dir));
    found.extend(loop_devices(data_dir));
    found.extend(control_groups(builds));
    found.extend(workdirs(data_dir));
    for shared in ["/tmp", "/var/tmp", "/dev/shm", "/run", "/dev/mqueue"] {
        owned(Path::new(shared), 3, &users, &mut found);
    }
    found.extend(shared_memory(&users));
    found
}

/// Everything that is left of these podman builds under an agent with this data directory. What the store keeps for later builds,
/// and its mount upon itself, stay by design.
pub(crate) fn left_by_podman(data_dir: &Path, builds: &[String]) -> Vec<String> {
    let mut found = processes(data_dir, &BTreeSet::new());
    found.extend(in_groups_of(builds).into_iter().map(|pid| format!("process {pid} in a control group of a build's")));
    let store = data_dir.join("podman/storage");
    let own = |line: &String| line.split(' ').nth(5).is_some_and(|point| Path::new(point).parent() == Some(&store));
    found.extend(mounts(data_dir).into_iter().filter(|line| !own(line)));
    found.extend(control_groups(builds));
    found.extend(workdirs(data_dir));
    for driver in fs::read_dir(&store).into_iter().flatten().flatten() {
        if driver.file_name().to_string_lossy().ends_with("-containers") {
            let inside = fs::read_dir(driver.path()).into_iter().flatten().flatten();
            let containers = inside.filter(|entry| entry.path().is_dir());
            found.extend(containers.map(|entry| format!("container {}", entry.path().display())));
        }
    }
    // Where runtimes keep what they know of containers, and where podman puts what it has no other place for.
    for (place, begins) in [("/run/runc", "buildah"), ("/run/crun", "buildah"), ("/var/tmp", "buildah")] {
        for entry in fs::read_dir(place).into_iter().flatten().flatten() {
            if entry.file_name().to_string_lossy().starts_with(begins) {
                found.push(format!("file {}", entry.path().display()));
            }
        }
    }
    found
}

/// The processes in control groups of these builds, in whichever tree.
pub(crate) fn in_groups_of(builds: &[String]) -> Vec<i32> {
    let pids = fs::read_dir("/proc").unwrap().flatten();
    let pids = pids.filter_map(|entry| entry.file_name().to_str().and_then(|name| name.parse().ok()));
    pids.filter(|pid: &i32| {
        let groups = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap_or_default();
        builds.iter().any(|build| groups.contains("/helix-") && groups.contains(&format!("-{build}.")))
    })
    .collect()
}

fn processes(data_dir: &Path, users: &BTreeSet<u32>) -> Vec<String> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").unwrap().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else { continue };
        let Ok(owner) = entry.metadata() else { continue };
        let name = || fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default().trim().to_owned();
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        if stat.rsplit(')').next().is_some_and(|rest| rest.trim_start().starts_with('Z')) {
            continue;
        }
        if users.contains(&owner.uid()) {
            found.push(format!("process {pid} ({}) of user {}", name(), owner.uid()));
        } else if fs::read_link(format!("/proc/{pid}/cwd")).is_ok_and(|cwd| cwd.starts_with(data_dir.join("work"))) {
            found.push(format!("process {pid} ({}) in a workdir", name()));
        } else if name() == "helix-runner"
            && fs::read_link(format!("/proc/{pid}/cwd")).is_ok_and(|cwd| cwd.starts_with(data_dir.join("attempts")))
        {
            found.push(format!("runner {pid}"));
        }
    }
    found
}

fn mounts(data_dir: &Path) -> Vec<String> {
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let data_dir = data_dir.display().to_string();
    table.lines().filter(|line| line.contains(&data_dir)).map(|line| format!("mount {line}")).collect()
}

fn loop_devices(data_dir: &Path) -> Vec<String> {
    let data_dir = data_dir.display().to_string();
    let devices = fs::read_dir("/sys/block").into_iter().flatten().flatten();
    let files = devices.filter_map(|device| {
        let file = fs::read_to_string(device.path().join("loop/backing_file")).ok()?;
        Some((device.file_name().to_string_lossy().into_owned(), file))
    });
    let ours = files.filter(|(_, file)| file.contains(&data_dir));
    ours.map(|(name, file)| format!("loop device {name} of {}", file.trim())).collect()
}

fn control_groups(builds: &[String]) -> Vec<String> {
    let mut found = Vec::new();
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap();
    for line in table.lines().filter(|line| line.contains(" - cgroup")) {
        if let Some(at) = line.split(' ').nth(4) {
            groups(Path::new(at), 6, builds, &mut found);
        }
    }
    found
}

fn groups(at: &Path, depth: u32, builds: &[String], found: &mut Vec<String>) {
    for entry in fs::read_dir(at).into_iter().flatten().flatten().filter(|_| depth > 0) {
        if !entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            continue;
        }
        let name = entry.file_name().to_string_lossy().into_owned();
        if name.starts_with("helix-") && builds.iter().any(|build| name.contains(&format!("-{build}."))) {
            found.push(format!("control group {}", entry.path().display()));
        }
        groups(&entry.path(), depth - 1, builds, found);
    }
}

fn workdirs(data_dir: &Path) -> Vec<String> {
    let mut found = Vec::new();
    for root in fs::read_dir(data_dir.join("work")).into_iter().flatten().flatten() {
        let inside = fs::read_dir(root.path()).into_iter().flatten().flatten();
        found.extend(inside.map(|entry| format!("workdir {}", entry.path().display())));
    }
    found
}

fn owned(at: &Path, depth: u32, users: &BTreeSet<u32>, found: &mut Vec<String>) {
    for entry in fs::read_dir(at).into_iter().flatten().flatten() {
        let Ok(data) = entry.path().symlink_metadata() else { continue };
        if users.contains(&data.uid()) || users.contains(&data.gid()) {
            found.push(format!("file {} of user {}", entry.path().display(), data.uid()));
        }
        if data.is_dir() && depth > 0 {
            owned(&entry.path(), depth - 1, users, found);
        }
    }
}

fn shared_memory(users: &BTreeSet<u32>) -> Vec<String> {
    let mut found = Vec::new();
    for (kind, owner_at) in [("shm", 7), ("sem", 4), ("msg", 7)] {
        let table = fs::read_to_string(format!("/proc/sysvipc/{kind}")).unwrap_or_default();
        for line in table.lines().skip(1) {
            let owner = line.split_whitespace().nth(owner_at).and_then(|id| id.parse().ok()).unwrap_or(0);
            if users.contains(&owner) {
                found.push(format!("shared memory ({kind}) {line}"));
            }
        }
    }
    found
}
