//! The runbook, carried out: three control nodes, two build hosts, and where the operator sits.

use std::collections::BTreeSet;

use helix_tests::cluster::programs;
use helix_tests::skip::skip;
use serde_json::Value;

use crate::hosts::{Done, Hosts, missing};
use crate::runbook::{first_column, steps};
use crate::{read, root};

const HOSTS: &[&str] = &["admin", "control-1", "control-2", "control-3", "build-1", "build-2"];

fn must(hosts: &Hosts, host: &str, what: &str, script: &str) -> Done {
    let done = hosts.run(host, script);
    assert!(done.success, "{what} on {host} failed: {}\n{script}\n{}", done.output, hosts.logs());
    done
}

fn json(hosts: &Hosts, script: &str) -> Value {
    let done = must(hosts, "admin", "looking", &format!("{script} 2> /dev/null"));
    serde_json::from_str(&done.output).unwrap_or_else(|error| panic!("{script}: {error}: {}", done.output))
}

#[test]
fn the_runbook_makes_a_cluster_and_keeps_it() {
    if let Some(why) = missing() {
        skip("the_runbook_makes_a_cluster_and_keeps_it", &why);
        return;
    }
    let text = read("RUNBOOK.md");
    let steps = steps(&text);
    let used: BTreeSet<&str> = steps.iter().flat_map(|step| step.hosts.iter().map(String::as_str)).collect();
    assert_eq!(used, HOSTS.iter().copied().collect::<BTreeSet<_>>(), "every host is used");

    let hosts = Hosts::start(HOSTS);
    // The runbook's first, unmarked block: programs and this folder are where the operator sits.
    let (programs, deploy) = (programs().display().to_string(), root().join("deploy").display().to_string());
    let lay = format!(
        "mkdir -p ~/helix/programs\n\
         for program in helix helix-coordinator helix-agent helix-runner; do cp '{programs}'/$program ~/helix/programs/; done\n\
         cp -r '{deploy}' ~/helix/deploy"
    );
    must(&hosts, "admin", "laying out the programs", &lay);
    for step in &steps {
        for host in &step.hosts {
            let began = std::time::Instant::now();
            must(&hosts, host, &format!("the block at line {}", step.line), &step.script);
            eprintln!("line {:>4} on {host}: {:.1} s", step.line, began.elapsed().as_secs_f64());
        }
    }
    detach_in_mid_build(&hosts);
    look_at_the_end(&hosts, &text);
    wipe_a_node(&hosts);
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

/// What the runbook says of upgrading an agent: the build that runs meanwhile ends as if nothing had been.
fn detach_in_mid_build(hosts: &Hosts) {
    let submit = "helix submit --id upgrade --no-output -- 'until [ -e go ]; do sleep 0.1; done'\n\
                  until helix status upgrade | grep -q running; do sleep 0.1; done";
    must(hosts, "admin", "a long build", submit);
    let status = json(hosts, "helix status upgrade -o json");
    let worker = status["worker"].as_str().unwrap();
    // Into the build's workdir: where builds are isolated they see nothing else of the host's.
    let upgrade = "helix-agent detach --config /etc/helix/agent.toml; systemctl restart helix-agent\n\
                   until cd /var/lib/helix/agent/work/*/upgrade.0.1/work; do sleep 0.1; done; touch go";
    must(hosts, worker, "an upgrade", upgrade);
    must(hosts, "admin", "the build's end", "helix wait upgrade");
    assert_eq!(json(hosts, "helix status upgrade -o json")["attempt"], 1, "it ran once");
}
