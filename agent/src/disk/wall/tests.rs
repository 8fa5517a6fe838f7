//! Walls as they stand, and as they go.

use super::*;
use std::fs;
use std::io::Write as _;

use crate::attempt::workdir::remove_expired;

#[allow(unreachable_pub)]
#[path = "../../../../tests/src/skip.rs"]
mod skip;

const MEBIBYTE: usize = 1 << 20;

/// Those of a kind, where they can be had.
fn walls(setting: &str, base: &Path) -> Option<Walls> {
    match Walls::choose(setting, base) {
        Ok(walls) => Some(walls),
        Err(why) => {
            skip::skip(&format!("walls by {setting}"), format!("{why:#}"));
            None
        }
    }
}

fn mounts(base: &Path) -> Vec<String> {
    let base = base.display().to_string();
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap();
    table.lines().filter(|line| line.contains(&base)).map(str::to_owned).collect()
}

/// Loop devices whose file lies below.
fn devices(base: &Path) -> Vec<PathBuf> {
    let base = base.display().to_string();
    let all = fs::read_dir("/sys/block").into_iter().flatten().flatten();
    let files = all.map(|device| device.path().join("loop/backing_file"));
    files.filter(|file| fs::read_to_string(file).is_ok_and(|text| text.contains(&base))).collect()
}

fn nothing_is_left(base: &Path) {
    assert_eq!(mounts(base), Vec::<String>::new());
    // A device goes a moment after its last mount.
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(60);
    while !devices(base).is_empty() {
        assert!(std::time::Instant::now() < deadline, "{:?}", devices(base));
        std::thread::yield_now();
    }
}

/// How many mebibytes can be written into a file.
fn fill(path: &Path) -> (usize, io::ErrorKind) {
    let mut file = fs::File::create(path).unwrap();
    let part = vec![7; MEBIBYTE];
    for count in 0..256 {
        // What is not written yet may find no room either.
        if let Err(error) = file.write_all(&part).and_then(|()| file.sync_data()) {
            return (count, error.kind());
        }
    }
    (256, io::ErrorKind::Other)
}

#[test]
fn what_is_written_ends_at_the_wall_and_nothing_is_left_of_it() {
    for setting in ["loop", "tmpfs"] {
        let base = tempfile::tempdir().unwrap();
        let Some(walls) = walls(setting, base.path()) else { continue };
        nothing_is_left(base.path());
        let key: AttemptKey = "b.0.1".parse().unwrap();
        let workdir = Workdir::new(base.path(), &key);
        workdir.create().unwrap();
        walls.raise(&workdir, &key, 24 << 20, None).unwrap();
        assert_eq!(mounts(base.path()).len(), 3, "{:?}", mounts(base.path()));
        let names = fs::read_dir(workdir.root()).unwrap().count();
        assert_eq!(names, 3);
        // The three have one room together.
        fs::write(workdir.home().join("some"), vec![1; 4 * MEBIBYTE]).unwrap();
        let (written, why) = fill(&workdir.work().join("much"));
        assert!((18..=22).contains(&written), "{setting}: {written} MiB beside 4, of 24");
        assert_eq!(why, io::ErrorKind::StorageFull);
        assert_eq!(walls.look_at(&workdir), Some(workdir.work()));
        assert!(helix_runner::limits::is_at_wall(&workdir.tmp()), "{setting}");
        workdir.remove().unwrap();
        assert!(!workdir.root().exists());
        nothing_is_left(base.path());
    }
}

#[test]
fn the_room_is_there_from_the_beginning_or_the_build_is_not() {
    let base = tempfile::tempdir().unwrap();
    let Some(walls) = walls("loop", base.path()) else { return };
    let key: AttemptKey = "b.0.1".parse().unwrap();
    let workdir = Workdir::new(base.path(), &key);
    let free = |path: &Path| {
        let stat = rustix::fs::statvfs(path).unwrap();
        stat.f_bfree * stat.f_frsize
    };
    // Others write and remove meanwhile, but not so much each time.
    let taken = (0..5).any(|_| {
        workdir.create().unwrap();
        let before = free(base.path());
        walls.raise(&workdir, &key, 256 << 20, Some(100)).unwrap();
        let taken = before.saturating_sub(free(base.path()));
        workdir.remove().unwrap();
        taken > 128 << 20
    });
    assert!(taken, "no room is taken");
    let before = free(base.path());
    workdir.create().unwrap();
    let error = walls.raise(&workdir, &key, before.saturating_mul(4), None).unwrap_err();
    assert!(matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::FileTooLarge), "{error}");
    workdir.remove().unwrap();
    nothing_is_left(base.path());
}

#[test]
fn what_a_killed_agent_left_half_made_goes_and_what_is_kept_stays_walled_in() {
    let base = tempfile::tempdir().unwrap();
    let Some(walls) = walls("loop", base.path()) else { return };
    let key: AttemptKey = "b.0.1".parse().unwrap();
    let workdir = Workdir::new(base.path(), &key);
    workdir.create().unwrap();
    walls.raise(&workdir, &key, 8 << 20, None).unwrap();
    // As if it had died before the last steps, and another one had begun anew on top.
    walls.raise(&workdir, &key, 8 << 20, None).unwrap();
    let whole = workdir.root().join(WHOLE);
    make_private(&whole).unwrap();
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let bound = open_tree(CWD, workdir.work(), flags).unwrap();
    move_mount(&bound, "", CWD, &whole, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH).unwrap();
    drop(bound);
    assert!(mounts(base.path()).len() >= 4);
    // Making it again takes down all of that.
    workdir.create().unwrap();
    nothing_is_left(base.path());

    walls.raise(&workdir, &key, 8 << 20, None).unwrap();
    fs::write(workdir.work().join("evidence"), "x").unwrap();
    let kept = workdir.keep(base.path(), 100).unwrap();
    assert_eq!(fs::read(kept.join("work/evidence")).unwrap(), b"x");
    assert_eq!(remove_expired(base.path(), 100).unwrap(), 1);
    assert!(!kept.exists());
    nothing_is_left(base.path());
}

#[test]
fn what_cannot_be_had_is_said() {
    let base = tempfile::tempdir().unwrap();
    assert_eq!(Walls::choose("watch", base.path()).unwrap(), Walls::none());
    assert_eq!(Walls::none().as_str(), "watched");
    // Where a quota is in force it works; elsewhere that is said, and `auto` takes something else.
    if let Err(why) = Walls::choose("quota", base.path()) {
        assert!(format!("{why:#}").contains("`limits.disk`"), "{why:#}");
    }
    assert_ne!(Walls::choose("auto", base.path()).unwrap().as_str(), "tmpfs");
    assert_eq!(fs::read_dir(base.path()).unwrap().count(), 0);
    assert!(is_known("auto") && !is_known("always"));
}
