//! Real repositories over file://, honest and hostile.

use super::*;
use std::os::unix::fs::PermissionsExt as _;
use std::process::Command;

struct Repository {
    dir: tempfile::TempDir,
    mirrors: Mirrors,
}

impl Repository {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let config = SourceConfig { allow_file_urls: true, ..SourceConfig::default() };
        let mirrors = Mirrors::new(&dir.path().join("mirrors"), &config).unwrap();
        let made = Self { dir, mirrors };
        fs::create_dir(made.path()).unwrap();
        made.git(&["init", "-q", "-b", "main"]);
        made
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("repository")
    }

    fn url(&self) -> String {
        format!("file://{}", self.path().display())
    }

    fn git(&self, args: &[&str]) -> String {
        let mut command = Command::new("git");
        command.args(["-c", "user.name=t", "-c", "user.email=t@t", "-c", "protocol.file.allow=always"]).args(args);
        command.current_dir(self.path()).env("GIT_CONFIG_GLOBAL", "/dev/null").env("GIT_CONFIG_NOSYSTEM", "1");
        let output = command.output().unwrap();
        assert!(output.status.success(), "git {args:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8_lossy(&output.stdout).trim().to_owned()
    }

    fn commit(&self, name: &str, text: &str) -> String {
        fs::write(self.path().join(name), text).unwrap();
        self.git(&["add", "-A"]);
        self.git(&["commit", "-q", "-m", name]);
        self.git(&["rev-parse", "HEAD"])
    }

    async fn check_out(&self, resolved: &Resolved) -> PathBuf {
        let work = self.dir.path().join("work");
        remove_tree(&work).unwrap();
        fs::create_dir(&work).unwrap();
        self.mirrors.check_out(&self.url(), resolved, &work, &self.dir.path().join("index")).await.unwrap();
        work
    }
}

#[tokio::test]
async fn branches_tags_commits_and_the_default_branch_are_found() {
    let repository = Repository::new();
    let first = repository.commit("f", "one");
    repository.git(&["tag", "-a", "v1", "-m", "v1"]);
    let second = repository.commit("f", "two");
    repository.git(&["branch", "feature/x", &first]);
    for (git_ref, commit) in [
        ("", &second),
        ("main", &second),
        ("v1", &first),
        ("feature/x", &first),
        ("refs/heads/main", &second),
        (&first, &first),
        (&first[..10], &first),
    ] {
        let resolved = repository.mirrors.resolve(&repository.url(), git_ref).await.unwrap();
        assert_eq!(&resolved.commit, commit, "{git_ref}");
        assert!(resolved.time_s > 1_600_000_000);
    }
    let resolved = repository.mirrors.resolve(&repository.url(), "v1").await.unwrap();
    let work = repository.check_out(&resolved).await;
    assert_eq!(fs::read_to_string(work.join("f")).unwrap(), "one");
    assert_eq!(fs::read_dir(&work).unwrap().count(), 1);
    assert!(!repository.dir.path().join("index").exists());
}

#[tokio::test]
async fn a_branch_that_moved_or_went_is_seen_and_a_pinned_commit_stays() {
    let repository = Repository::new();
    let first = repository.commit("f", "one");
    repository.git(&["branch", "gone"]);
    assert_eq!(repository.mirrors.resolve(&repository.url(), "gone").await.unwrap().commit, first);
    let second = repository.commit("f", "two");
    assert_eq!(repository.mirrors.resolve(&repository.url(), "main").await.unwrap().commit, second);
    repository.git(&["branch", "-D", "gone"]);
    assert!(repository.mirrors.resolve(&repository.url(), "gone").await.is_err());
    fs::rename(repository.path(), repository.dir.path().join("elsewhere")).unwrap();
    assert_eq!(repository.mirrors.resolve(&repository.url(), &first).await.unwrap().commit, first);
}

#[tokio::test]
async fn what_does_not_exist_is_a_source_failure_that_says_so() {
    let repository = Repository::new();
    repository.commit("f", "one");
    for (url, git_ref, words) in [
        (repository.url(), "nope", "has no branch, tag or commit \"nope\""),
        (repository.url(), &"0".repeat(40) as &str, "has no branch, tag or commit"),
        ("file:///does/not/exist".to_owned(), "main", "cannot fetch"),
    ] {
        let error = repository.mirrors.resolve(&url, git_ref).await.unwrap_err();
        assert_eq!(error.reason, helix_model::Reason::Source);
        assert!(error.message.contains(words) && !error.message.contains('\n'), "{error}");
    }
}

#[tokio::test]
async fn file_urls_need_permission() {
    let dir = tempfile::tempdir().unwrap();
    let mirrors = Mirrors::new(dir.path(), &SourceConfig::default()).unwrap();
    let error = mirrors.resolve("file:///tmp/x", "main").await.unwrap_err();
    assert_eq!(error.reason, helix_model::Reason::Policy);
}

#[tokio::test]
async fn hooks_submodules_and_filters_of_a_repository_do_nothing() {
    let repository = Repository::new();
    let mark = repository.dir.path().join("executed");
    let other = repository.dir.path().join("other");
    fs::create_dir(&other).unwrap();
    for name in ["post-checkout", "pre-receive", "reference-transaction"] {
        let hook = repository.path().join(".git/hooks").join(name);
        fs::create_dir_all(hook.parent().unwrap()).unwrap();
        fs::write(&hook, format!("#!/bin/sh\ntouch {}\n", mark.display())).unwrap();
        fs::set_permissions(&hook, fs::Permissions::from_mode(0o755)).unwrap();
    }
    fs::write(repository.path().join(".gitattributes"), "f filter=evil\n").unwrap();
    let evil = format!("[submodule \"x\"]\n\tpath = x\n\turl = ext::sh -c touch% {}\n", mark.display());
    fs::write(repository.path().join(".gitmodules"), evil).unwrap();
    std::os::unix::fs::symlink("/etc", repository.path().join("outside")).unwrap();
    repository.git(&["add", ".gitmodules"]);
    let _ = fs::remove_file(&mark);
    repository.commit("f", "text");
    let _ = fs::remove_file(&mark);
    let resolved = repository.mirrors.resolve(&repository.url(), "main").await.unwrap();
    let work = repository.check_out(&resolved).await;
    assert_eq!(fs::read_to_string(work.join("f")).unwrap(), "text");
    assert!(fs::symlink_metadata(work.join("outside")).unwrap().is_symlink());
    assert!(!mark.exists());
}

#[tokio::test]
async fn a_mirror_that_was_half_made_is_made_again_and_fetches_are_shared() {
    let repository = Repository::new();
    let commit = repository.commit("f", "one");
    let mirror = repository.mirrors.mirror(&repository.url());
    fs::create_dir_all(mirror.path.join("objects")).unwrap();
    fs::write(mirror.path.join("HEAD"), "rubbish").unwrap();
    let url = repository.url();
    let (a, b) = tokio::join!(repository.mirrors.resolve(&url, "main"), repository.mirrors.resolve(&url, "main"));
    assert_eq!(a.unwrap().commit, commit);
    assert_eq!(b.unwrap().commit, commit);
}

#[test]
fn nothing_of_a_url_or_ref_can_be_an_option() {
    // The model refuses such URLs and refs; that git gets them behind `--` and as full names is the second wall.
    assert!(refspecs("x").iter().all(|spec| spec.starts_with('+')));
    assert!(candidates("x").iter().all(|name| name.starts_with("refs/")));
    let config = SourceConfig {
        ssh_key: Some("/k".into()),
        known_hosts: Some("/h".into()),
        credential_helper: "!f() { echo \"x\"; }; f".to_owned(),
        ..SourceConfig::default()
    };
    assert!(ssh_command(&config).contains("-oBatchMode=yes") && ssh_command(&config).contains("-i '/k'"));
    assert!(git_configuration(&config).contains("helper = \"!f() { echo \\\"x\\\"; }; f\""));
}

#[tokio::test]
async fn the_least_used_mirror_goes_first_and_none_in_use() {
    let repository = Repository::new();
    let commit = repository.commit("f", "one");
    // Several URLs of one repository have a mirror each.
    let urls = [repository.url(), format!("{}/", repository.url()), format!("{}/.git", repository.url())];
    for url in &urls {
        repository.mirrors.resolve(url, "main").await.unwrap();
    }
    let path = |url: &str| repository.mirrors.mirror(url).path.clone();
    for (age_s, url) in urls.iter().enumerate() {
        let used = std::time::SystemTime::now() - Duration::from_secs(100 * age_s as u64);
        File::open(path(url).join(COMPLETE)).unwrap().set_modified(used).unwrap();
    }
    let lease = repository.mirrors.lease(&urls[2]);
    assert!(repository.mirrors.remove_least_used().await);
    assert!(path(&urls[0]).exists() && !path(&urls[1]).exists() && path(&urls[2]).exists());
    drop(lease);
    // A git that outlived its agent still writes.
    let lock = File::open(path(&urls[2]).join(LOCK)).unwrap();
    flock(&lock, FlockOperation::NonBlockingLockExclusive).unwrap();
    assert!(repository.mirrors.remove_least_used().await);
    assert!(!path(&urls[0]).exists() && path(&urls[2]).exists());
    assert!(!repository.mirrors.remove_least_used().await, "the last one is in use");
    drop(lock);
    assert!(repository.mirrors.remove_least_used().await);
    // What was removed is made anew when it is wanted.
    let resolved = repository.mirrors.resolve(&urls[0], "main").await.unwrap();
    assert_eq!(resolved.commit, commit);
    repository.check_out(&resolved).await;
}
