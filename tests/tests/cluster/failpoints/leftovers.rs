//! What must not be left when every build has ended and every process is back.

use std::fs;
use std::path::{Path, PathBuf};

use helix_tests::cluster::{Cluster, Member, PATIENCE, wait_for};

/// Waits until there is nothing left on any member but what its store says that it keeps.
pub(super) fn check(cluster: &Cluster) {
    for agent in cluster.all("agent") {
        wait(&agent, agent_leftovers);
    }
    for coordinator in cluster.all("coordinator") {
        // What a crash left goes at the next start, and who did not die had none.
        cluster.kill(&coordinator);
        cluster.start_again(&coordinator);
        wait(&coordinator, coordinator_leftovers);
    }
}

fn wait(member: &Member, look: fn(&Path) -> Vec<PathBuf>) {
    let what = format!("nothing to be left in {}", member.data_dir.display());
    wait_for(&what, PATIENCE, || look(&member.data_dir).is_empty().then_some(()));
}

fn agent_leftovers(root: &Path) -> Vec<PathBuf> {
    let mut left = names(&root.join("attempts"));
    for work in names(&root.join("work")) {
        left.extend(names(&work).into_iter().filter(|path| !path.ends_with(".kept")));
        left.extend(names(&work.join(".kept")));
    }
    left.extend(temporaries(root));
    left.extend(temporaries(&root.join("mirrors")));
    left
}

fn coordinator_leftovers(root: &Path) -> Vec<PathBuf> {
    let mut left = temporaries(root);
    // One to keep and one before it, whole.
    let snapshots = names(&root.join("snapshots"));
    left.extend(snapshots.iter().filter(|path| path.extension().is_none_or(|it| it != "snapshot")).cloned());
    if snapshots.len() > 2 {
        left.extend(snapshots);
    }
    // An upload that broke off can be gone on with for a day.
    let part = |path: &PathBuf| path.extension().is_some_and(|it| it == "part");
    left.extend(names(&root.join("blobs/uploads")).into_iter().filter(|path| !part(path)));
    left.extend(names(&root.join("blobs/damaged")));
    left.extend(names(&root.join("logs")));
    left
}

/// Files that were to take another's place.
pub(super) fn temporaries(directory: &Path) -> Vec<PathBuf> {
    names(directory).into_iter().filter(|path| path.extension().is_some_and(|it| it == "tmp")).collect()
}

fn names(directory: &Path) -> Vec<PathBuf> {
    fs::read_dir(directory).into_iter().flatten().flatten().map(|entry| entry.path()).collect()
}
