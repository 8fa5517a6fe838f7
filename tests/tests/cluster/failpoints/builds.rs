//! Builds of every kind, and what must be true of each at its end.

use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};

use helix_failpoint::Point;
use helix_tests::cluster::{Cluster, PATIENCE, wait_for};
use serde_json::{Value, json};

use super::site::{Site, Statuses, Victim};

/// Lines of a build's log.
const LINES: u32 = 40;
/// Lines of one that outgrows what is kept of a log.
const LOUD_LINES: u32 = 100_000;
/// Bytes of an artifact that has a file of its own.
const LARGE_BYTES: usize = 300_000;

/// What a build does.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Kind {
    /// Says lines.
    Lines,
    /// Makes an artifact that shares a segment.
    Small,
    /// Makes one that has a file.
    Large,
    /// Says more than is kept.
    Loud,
    /// Builds a commit of a repository that no agent knows yet.
    Repository,
    /// Ends with a code that is its own.
    Failing,
    /// Never ends, and is cancelled.
    Stuck,
}

/// A build that was acknowledged.
#[derive(Clone, Debug)]
pub(super) struct Build {
    id: String,
    kind: Kind,
}

/// Builds that were submitted together, under a label of their own.
pub(super) struct Round {
    label: String,
    builds: Vec<Build>,
}

impl Round {
    /// Submits builds of all kinds that lead to these points, until they are acknowledged; cancels one of them, likewise.
    pub(super) fn submit(cluster: &Cluster, points: &[Point], name: &str, round: &str) -> Self {
        let mut kinds = vec![Kind::Lines, Kind::Small, Kind::Large, Kind::Failing, Kind::Stuck];
        let lead_to = |some: &[Point]| some.iter().any(|point| points.contains(point));
        if lead_to(&[Point::SpoolRotate, Point::SpoolRotated, Point::SealWrite]) {
            kinds.push(Kind::Loud);
        }
        if lead_to(&[Point::MirrorMade, Point::MirrorFetched]) {
            kinds.push(Kind::Repository);
        }
        let build = |kind: Kind| Build { id: format!("{name}-{round}-{kind:?}").to_lowercase(), kind };
        let builds: Vec<_> = kinds.into_iter().map(build).collect();
        let lines: String = builds.iter().map(|build| format!("{}\n", build.spec(cluster, round))).collect();
        // Under the same ids, so that whoever died in between has nothing made twice.
        wait_for("the builds to be acknowledged", PATIENCE, || {
            let mut command = cluster.command(&["submit", "--batch", "-"]);
            let mut child = command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
            let written = child.stdin.take().unwrap().write_all(lines.as_bytes());
            (written.is_ok() & child.wait().unwrap().success()).then_some(())
        });
        for stuck in builds.iter().filter(|build| build.kind == Kind::Stuck) {
            wait_for("a cancel to be acknowledged", PATIENCE, || {
                (cluster.helix(&["cancel", &stuck.id, "--no-wait"]).code == 0).then_some(())
            });
        }
        Self { label: format!("round={round}"), builds }
    }

    /// Whether every build has. They are there: they were acknowledged.
    pub(super) fn has_ended(&self, site: &Site) -> bool {
        let statuses = site.statuses(Some(&self.label));
        let missing: Vec<_> = self.builds.iter().filter(|build| !statuses.contains_key(&build.id)).collect();
        assert!(missing.is_empty(), "acknowledged and lost: {missing:?}");
        self.builds.iter().all(|build| build.is_ended(&statuses))
    }

    /// Waits for the end of all, and looks at each.
    pub(super) fn check(self, site: &Site, victims: &[Victim]) -> Vec<Build> {
        wait_for("every acknowledged build to end", PATIENCE, || {
            if victims.contains(&Victim::Runner) {
                site.release();
            }
            self.has_ended(site).then_some(())
        });
        let statuses = site.statuses(Some(&self.label));
        for build in &self.builds {
            build.check_state(&statuses);
            build.check(&site.cluster, &statuses[&build.id]);
        }
        self.builds
    }
}

impl Build {
    fn spec(&self, cluster: &Cluster, round: &str) -> Value {
        let mark = format!("echo \"$HELIX_BUILD_ID $HELIX_ATTEMPT\" >> {}", marks(cluster).display());
        let hidden = "if env | grep -q HELIX_FAILPOINTS; then exit 9; fi";
        let say = format!("i=0; while [ $i -lt {LINES} ]; do i=$((i+1)); echo line $i; done");
        let begin = format!("{mark}; {hidden}");
        let no_output = self.artifact().is_none();
        let mut spec = json!({ "id": self.id, "label": { "round": round }, "no_output": no_output });
        let line = match self.kind {
            Kind::Lines => format!("{begin}; {say}"),
            Kind::Small => format!("{begin}; echo \"$HELIX_BUILD_ID\" > \"$HELIX_OUTPUT\""),
            Kind::Large => format!("{begin}; yes \"$HELIX_BUILD_ID\" | head -c {LARGE_BYTES} > \"$HELIX_OUTPUT\""),
            // Random, or it would be small when it is sealed.
            Kind::Loud => {
                let noise = "head -c 400000 /dev/urandom | base64";
                format!("{begin}; echo line 1; {noise}; seq -f 'line %.0f' 2 {LOUD_LINES}")
            }
            Kind::Repository => {
                spec["repo"] = json!(format!("file://{}", repository(cluster, &self.id).display()));
                format!("{begin}; cat said")
            }
            Kind::Failing => {
                spec["keep_workdir"] = json!("1s");
                format!("{begin}; {say}; exit 3")
            }
            Kind::Stuck => format!("{mark}; sleep 1000"),
        };
        spec["command"] = json!(line);
        spec
    }

    /// The bytes of its artifact.
    fn artifact(&self) -> Option<Vec<u8>> {
        let line = format!("{}\n", self.id);
        match self.kind {
            Kind::Small => Some(line.into_bytes()),
            Kind::Large => Some(line.bytes().cycle().take(LARGE_BYTES).collect()),
            Kind::Lines | Kind::Loud | Kind::Repository | Kind::Failing | Kind::Stuck => None,
        }
    }

    fn is_ended(&self, statuses: &Statuses) -> bool {
        ["succeeded", "failed", "cancelled"].iter().any(|end| statuses[&self.id]["state"] == **end)
    }

    pub(super) fn check_state(&self, statuses: &Statuses) {
        let expected = match self.kind {
            Kind::Failing => "failed",
            Kind::Stuck => "cancelled",
            Kind::Lines | Kind::Small | Kind::Large | Kind::Loud | Kind::Repository => "succeeded",
        };
        let status = statuses.get(&self.id).unwrap_or_else(|| panic!("{} is lost", self.id));
        assert_eq!(status["state"], expected, "{status}");
    }

    fn check(&self, cluster: &Cluster, status: &Value) {
        let last = status["attempt"].as_u64().unwrap_or(0);
        let text = fs::read_to_string(marks(cluster)).unwrap_or_default();
        let ran: Vec<u64> = text
            .lines()
            .filter_map(|line| line.split_once(' ').filter(|(id, _)| *id == self.id)?.1.parse().ok())
            .collect();
        let mut once = ran.clone();
        once.sort_unstable();
        once.dedup();
        assert_eq!(once.len(), ran.len(), "{}: an attempt ran twice: {ran:?}", self.id);
        if self.kind != Kind::Stuck {
            assert!(ran.contains(&last), "{}: attempt {last} counts, and those that ran are {ran:?}", self.id);
        }
        if self.kind == Kind::Failing {
            assert_eq!((&status["reason"], &status["exit_code"]), (&json!("exit"), &json!(3)), "{status}");
        }
        self.check_log(cluster);
        if let Some(bytes) = self.artifact() {
            let target = cluster.root().join("fetched");
            let got = cluster.helix(&["artifacts", "get", &self.id, "-O", target.to_str().unwrap()]);
            assert_eq!(got.code, 0, "{}: {}", self.id, got.stderr);
            assert!(fs::read(&target).unwrap() == bytes, "{}: the artifact is another", self.id);
            fs::remove_file(target).unwrap();
        }
    }

    /// Every line once and in order; of a loud one the beginning and the end, with the gap told.
    fn check_log(&self, cluster: &Cluster) {
        let lines = match self.kind {
            Kind::Lines | Kind::Failing => LINES,
            Kind::Loud => LOUD_LINES,
            Kind::Repository => 1,
            Kind::Small | Kind::Large | Kind::Stuck => return,
        };
        // It is sealed behind the end of a build that failed.
        let whole = |said: &str| {
            let numbers: Vec<u32> = said.lines().filter_map(|line| line.strip_prefix("line ")?.parse().ok()).collect();
            let order = numbers.windows(2).all(|two| two[0] < two[1]);
            assert!(order, "{}: lines twice or out of order", self.id);
            let gap = numbers.len() < lines as usize;
            (numbers.first() == Some(&1) && numbers.last() == Some(&lines) && (!gap || self.kind == Kind::Loud))
                .then_some(())
        };
        wait_for(&format!("the whole log of {}", self.id), PATIENCE, || {
            let said = cluster.helix(&["logs", &self.id]);
            (said.code == 0).then_some(said.stdout).and_then(|said| whole(&said))
        });
    }
}

/// Where every attempt leaves a line.
fn marks(cluster: &Cluster) -> std::path::PathBuf {
    cluster.root().join("marks")
}

/// A repository with one commit.
fn repository(cluster: &Cluster, name: &str) -> std::path::PathBuf {
    let path = cluster.root().join("repositories").join(name);
    fs::create_dir_all(&path).unwrap();
    fs::write(path.join("said"), "line 1\n").unwrap();
    let git = |arguments: &[&str]| git(&path, arguments);
    git(&["init", "--quiet", "--initial-branch=main"]);
    git(&["add", "said"]);
    git(&["-c", "user.name=t", "-c", "user.email=t@t", "commit", "--quiet", "--message=one"]);
    path
}

fn git(path: &Path, arguments: &[&str]) {
    let mut command = Command::new("git");
    command.current_dir(path).args(arguments).env("GIT_CONFIG_GLOBAL", "/dev/null").env("GIT_CONFIG_NOSYSTEM", "1");
    let output = command.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}
