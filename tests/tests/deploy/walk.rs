//! The runbook, carried out: three control nodes, two build hosts, and where the operator sits.
//!
//! What leaves the cluster another one than before is walked upon a cluster of its own, made by the first chapter.

use std::collections::BTreeSet;
use std::sync::{Mutex, MutexGuard, PoisonError};

use helix_tests::cluster::programs;
use helix_tests::skip::skip;
use serde_json::Value;

use crate::disasters;
use crate::hosts::{Done, Hosts, missing};
use crate::runbook::{Step, first_column, steps};
use crate::{read, root};

/// Who is there when the first chapter ends.
pub(crate) const HOSTS: &[&str] = &["admin", "control-1", "control-2", "control-3", "build-1", "build-2"];

/// The chapter that makes a cluster.
pub(crate) const FROM_NOTHING: &str = "From nothing";

/// One walk at a time: the hosts of each run a dozen daemons.
static WALKING: Mutex<()> = Mutex::new(());

/// A book that is being carried out.
pub(crate) struct Walk {
    text: String,
    pub(crate) hosts: Hosts,
    _alone: MutexGuard<'static, ()>,
}

impl Walk {
    /// Hosts on which nothing was done; `None`, and said so, where there can be none.
    pub(crate) fn begin(test: &'static str, hosts: &[&str]) -> Option<Self> {
        if let Some(why) = missing() {
            skip(test, &why);
            return None;
        }
        let alone = WALKING.lock().unwrap_or_else(PoisonError::into_inner);
        let walk = Self { text: read("RUNBOOK.md"), hosts: Hosts::start(hosts), _alone: alone };
        // The runbook's first, unmarked block: programs and this folder are where the operator sits.
        let (programs, deploy) = (programs().display().to_string(), root().join("deploy").display().to_string());
        let lay = format!(
            "mkdir -p ~/helix/programs\n\
             for program in helix helix-coordinator helix-agent helix-runner; do cp '{programs}'/$program ~/helix/programs/; done\n\
             cp -r '{deploy}' ~/helix/deploy"
        );
        must(&walk.hosts, "admin", "laying out the programs", &lay);
        Some(walk)
    }

    /// Carries out every block for which `wanted` says so, in the book's order; gives what they said.
    fn carry_out(&self, wanted: impl Fn(&Step) -> bool) -> String {
        let steps: Vec<Step> = steps(&self.text).into_iter().filter(wanted).collect();
        assert!(!steps.is_empty(), "there is nothing to carry out");
        let mut said = String::new();
        for step in &steps {
            for host in &step.hosts {
                let began = std::time::Instant::now();
                said.push_str(
                    &must(&self.hosts, host, &format!("the block at line {}", step.line), &step.script).output,
                );
                eprintln!("line {:>4} on {host}: {:.1} s", step.line, began.elapsed().as_secs_f64());
            }
        }
        said
    }

    /// Carries out a chapter or a section; gives what its blocks said.
    pub(crate) fn part(&self, title: &str) -> String {
        self.carry_out(|step| step.under.iter().any(|heading| heading == title))
    }
}

pub(crate) fn must(hosts: &Hosts, host: &str, what: &str, script: &str) -> Done {
    let done = hosts.run(host, script);
    assert!(done.success, "{what} on {host} failed: {}\n{script}\n{}", done.output, hosts.logs());
    done
}

pub(crate) fn json(hosts: &Hosts, script: &str) -> Value {
    let done = must(hosts, "admin", "looking", &format!("{script} 2> /dev/null"));
    serde_json::from_str(&done.output).unwrap_or_else(|error| panic!("{script}: {error}: {}", done.output))
}

/// Whether a block is none of those that have a walk of their own.
fn is_everyday(step: &Step) -> bool {
    !disasters::PARTS.contains(&step.under[1].as_str())
}

#[test]
fn the_runbook_makes_a_cluster_and_keeps_it() {
    let steps = steps(&read("RUNBOOK.md"));
    let used: BTreeSet<&str> =
        steps.iter().filter(|step| is_everyday(step)).flat_map(|step| step.hosts.iter().map(String::as_str)).collect();
    assert_eq!(used, HOSTS.iter().copied().collect::<BTreeSet<_>>(), "every host is used");
    let Some(walk) = Walk::begin("the_runbook_makes_a_cluster_and_keeps_it", HOSTS) else { return };
    walk.carry_out(is_everyday);
    detach_in_mid_build(&walk.hosts);
    look_at_the_end(&walk.hosts, &walk.text);
    wipe_a_node(&walk.hosts);
}

/// What must be true when the last block has run.
fn look_at_the_end(hosts: &Hosts, text: &str) {
    let said = must(hosts, "admin", "a build", "helix submit --no-output --follow -- 'echo all is well'").output;
    assert!(said.contains("all is well"), "{said}");
    let status = json(hosts, "helix cluster status -o json");
    let members = status["members"].as_array().unwrap();
    assert_eq!(members.len(), 3, "{status}");
    assert!(members.iter().all(|member| member["healthy"] == true), "{status}");
    assert_eq!((&status["workers"], &status["load"]), (&Value::from(2), &Value::from(0)), "{status}");
    assert_eq!(status["warnings"], Value::Array(Vec::new()), "{status}");

    // Asked of each node alone: `helix` goes on until one takes it.
    for node in 1..=3 {
        let context = format!(
            "cluster = \"prod\"\nendpoints = [\"https://control-{node}.example.com:7420\"]\n\
             ca = \"ca.pem\"\ncert = \"client-bob.pem\"\nkey = \"client-bob-key.pem\"\n"
        );
        let script = format!(
            "cd ~/helix/pki; echo '{context}' > bob-{node}.toml; \
             helix --context bob-{node}.toml --connect-timeout 2s list"
        );
        let refused = hosts.run("admin", &script);
        assert!(!refused.success, "node {node} takes a revoked certificate: {}\n{}", refused.output, hosts.logs());
        must(hosts, &format!("control-{node}"), "saying why", "grep Revoked /var/log/helix-coordinator.log");
    }

    let metrics = must(hosts, "control-1", "metrics", "curl --silent --fail http://127.0.0.1:7422/metrics").output;
    for metric in first_column(text, "### Metrics") {
        assert!(metrics.contains(&format!("\n{metric}")), "{metric} is not among the metrics:\n{metrics}");
    }

    // Nothing that needs a person happened on the way; what libraries call an error at a node's end is none.
    for host in &HOSTS[1..] {
        let errors = hosts.run(host, "grep -h '\"level\":\"ERROR\".*\"target\":\"helix' /var/log/helix-*.log").output;
        assert!(errors.is_empty(), "{host}: {errors}");
    }
}

/// What the runbook says of a node that comes back empty under its id: it is refused, and the others serve on.
fn wipe_a_node(hosts: &Hosts) {
    let members = "1=control-1.example.com:7421,2=control-2.example.com:7421,3=control-3.example.com:7421";
    let script = format!(
        "systemctl stop helix-coordinator; rm -rf /var/lib/helix/coordinator /var/log/helix-coordinator.log\n\
         runuser -u helix -- helix-coordinator init --cluster prod --id 2 --members {members} \
             --data-dir /var/lib/helix/coordinator\n\
         systemctl start helix-coordinator\n\
         until grep 'under another epoch' /var/log/helix-coordinator.log; do sleep 0.1; done\n\
         while systemctl is-active helix-coordinator; do sleep 0.1; done"
    );
    must(hosts, "control-2", "refusing a wiped node", &script);
    must(hosts, "admin", "serving without it", "helix submit --no-output --follow -- true");
}

/// Submits a build that runs until [`let_go`], and waits until it runs; gives its worker.
pub(crate) fn long_build(hosts: &Hosts, id: &str) -> String {
    let submit = format!(
        "helix submit --id {id} --no-output -- 'until [ -e go ]; do sleep 0.1; done'\n\
         until helix status {id} | grep -q running; do sleep 0.1; done"
    );
    must(hosts, "admin", "a long build", &submit);
    json(hosts, &format!("helix status {id} -o json"))["worker"].as_str().unwrap().to_owned()
}

/// Lets a [`long_build`] end. It must be the attempt that it began as.
pub(crate) fn let_go(hosts: &Hosts, worker: &str, id: &str) {
    // Into the build's workdir: where builds are isolated they see nothing else of the host's.
    let go = format!("until cd /var/lib/helix/agent/work/*/{id}.0.1/work; do sleep 0.1; done; touch go");
    must(hosts, worker, "letting a build end", &go);
    must(hosts, "admin", "the build's end", &format!("helix wait {id}"));
    assert_eq!(json(hosts, &format!("helix status {id} -o json"))["attempt"], 1, "it ran once");
}

/// What the runbook says of upgrading an agent: the build that runs meanwhile ends as if nothing had been.
fn detach_in_mid_build(hosts: &Hosts) {
    let worker = long_build(hosts, "upgrade");
    let upgrade = "helix-agent detach --config /etc/helix/agent.toml; systemctl restart helix-agent";
    must(hosts, &worker, "an upgrade", upgrade);
    let_go(hosts, &worker, "upgrade");
}
