//! The command line on a healthy cluster: outputs, exit codes, refusals.

use std::fs;
use std::io::Write;
use std::process::{Command, Stdio};

use helix_tests::cluster::{Cluster, PATIENCE, Shape, alive, programs, wait_for};

/// The first thing that anybody tries works through each of the three endpoints.
#[test]
fn a_followed_submit_works_through_any_endpoint() {
    let cluster = Cluster::start(&Shape::default()).unwrap();
    for member in cluster.all("coordinator") {
        let context = cluster.context_of(&member);
        let said =
            cluster.helix_with(&context, &["submit", "--follow", "--", "echo hi; echo done > \"$HELIX_OUTPUT\""]);
        assert_eq!(said.code, 0, "{}", said.stderr);
        assert_eq!(said.stdout.lines().filter(|line| *line == "hi").count(), 1, "{}", said.stdout);
        let status: serde_json::Value =
            serde_json::from_str(&cluster.helix_with(&context, &["status", "last", "-o", "json"]).stdout).unwrap();
        assert_eq!(status["state"], "succeeded");
        let reported = "d117fa006ba9208500b2930ce69cbde436c647afa917cb7396a9bc9111a46dd2";
        assert_eq!(status["digest"], reported, "the sha256 of done and a newline");
        let id = status["build_id"].as_str().unwrap();
        assert_eq!(status["image_tag"], format!("helix/{id}@sha256:{reported}"));
        let target = cluster.root().join("fetched");
        let said = cluster.helix_with(&context, &["artifacts", "get", id, "-O", target.to_str().unwrap()]);
        assert_eq!(said.code, 0, "{}", said.stderr);
        assert_eq!(fs::read_to_string(target).unwrap(), "done\n");
    }
}

#[test]
fn exit_codes_and_reasons_are_those_that_scripts_expect() {
    let cluster = Cluster::start(&Shape { coordinators: 1, agents: 1, ..Shape::default() }).unwrap();
    let cases: &[(&[&str], i32, &str)] = &[
        (&["--no-output", "--", "exit 7"], 7, "exit"),
        (&["--no-output", "--", "kill -9 $$"], 137, "signal"),
        (&["--", "true"], 120, "artifact_missing"),
        (&["--no-output", "--timeout", "300ms", "--", "sleep 100"], 124, "timeout"),
        (&["--no-output", "--silence-timeout", "300ms", "--", "echo x; sleep 100"], 124, "silence"),
        (&["--no-output", "--repo", "file:///nowhere/at/all", "--", "true"], 120, "source"),
        (&["--no-output", "--output-of-nobody", "--", "true"], 2, ""),
        (&["--no-output", "--", "/no/such/program", "argument"], 127, "exit"),
        (&["--output", "link", "--", "ln -s /etc/passwd link"], 120, "artifact_missing"),
        (&["--no-output", "--", "true"], 0, ""),
    ];
    for (arguments, code, reason) in cases {
        let mut all = vec!["submit", "--wait", "-o", "json"];
        all.extend_from_slice(arguments);
        let said = cluster.helix(&all);
        assert_eq!(said.code, *code, "{arguments:?}: {} {}", said.stdout, said.stderr);
        if *code != 2 {
            let status: serde_json::Value = serde_json::from_str(&said.stdout).unwrap();
            assert_eq!(status["reason"].as_str().unwrap_or_default(), *reason, "{arguments:?}");
            if !reason.is_empty() {
                let log = cluster.helix(&["logs", status["build_id"].as_str().unwrap()]);
                let last = log.stdout.lines().last().unwrap_or_default().to_owned();
                assert!(last.starts_with("helix: ") && last.contains(reason), "{arguments:?}: {}", log.stdout);
            }
        }
    }
    assert_eq!(cluster.helix(&["status", "no-such-build"]).code, 123);
    assert_eq!(cluster.helix(&["workers", "show", "nobody"]).code, 123);
    assert_eq!(cluster.helix(&["submit", "--repo", "--upload-pack=x", "--connect-timeout", "5s"]).code, 2);
    let refused = cluster.helix(&["submit", "--repo", "ext::sh -c id", "--", "true"]);
    assert_eq!(refused.code, 1);
    assert!(refused.stderr.contains("invalid_field") && refused.stderr.contains("repo_url"), "{}", refused.stderr);
    let refused = cluster.helix(&["submit", "--env", "LD_PRELOAD=x", "--", "true"]);
    assert!(refused.code == 1 && refused.stderr.contains("LD_"), "{}", refused.stderr);
}

/// Questions at the edge of what is there get an answer that helps.
#[test]
fn edges_of_logs_and_artifacts_are_what_people_expect() {
    let cluster = Cluster::start(&Shape { coordinators: 1, agents: 1, ..Shape::default() }).unwrap();
    let line = "mkdir -p out/bin; echo x > out/bin/tool; ln -s bin/tool out/tool; echo one; echo two";
    assert_eq!(cluster.helix(&["submit", "--id", "b", "--output", "out", "--wait", "--", line]).code, 0);
    let logs = |arguments: &[&str]| cluster.helix(&[&["logs", "b"], arguments].concat());
    assert_eq!((logs(&["--tail", "0"]).stdout.as_str(), logs(&["--tail", "1"]).stdout.as_str()), ("", "two\n"));
    assert_eq!(logs(&["--tail", "0", "-f"]).stdout, "");
    assert!(logs(&["--attempt", "0"]).stderr.contains("numbered from 1"));
    assert!(logs(&["--task", "linux/amd64"]).stderr.contains("leave out --task"));
    let records: serde_json::Value = serde_json::from_str(&logs(&["-o", "json"]).stdout).unwrap();
    assert_eq!((records[0]["line"].as_str(), records[1]["line"].as_str()), (Some("one"), Some("two")));
    assert_eq!(logs(&["--tail", "0", "-o", "json"]).stdout, "[]\n");
    let followed = logs(&["-f", "-o", "json"]);
    assert!(followed.code == 2 && followed.stderr.contains("jsonl"), "{}", followed.stderr);

    let root = cluster.root().join("fetched");
    fs::create_dir(&root).unwrap();
    let get = |arguments: &[&str]| {
        let mut command = cluster.command(&[&["artifacts", "get", "b"], arguments].concat());
        command.current_dir(&root).output().unwrap()
    };
    assert!(get(&["--extract"]).status.success());
    assert_eq!(fs::read_to_string(root.join("out/tool")).unwrap(), "x\n");
    // Beside a directory of its name, as where it was built.
    assert!(get(&[]).status.success() && root.join("out.tar").is_file());
    assert!(!get(&["--extract"]).status.success(), "what is there is not overwritten");
    assert_eq!(fs::read_dir(&root).unwrap().count(), 2, "nothing else is left");

    let said = cluster.helix(&["workers", "remove", &cluster.all("agent")[0].id]);
    assert!(said.code == 1 && said.stderr.contains("is connected"), "{}", said.stderr);
    let waits = ["submit", "--id", "q", "--park", "--require", "no=where", "--platform", "linux/s390x", "--", "true"];
    assert_eq!(cluster.helix(&waits).code, 0);
    let explained = cluster.helix(&["explain", "q"]).stdout;
    assert_eq!(explained.matches("linux/s390x: ").count(), 1, "{explained}");
    assert_eq!(cluster.helix(&["cancel", "q", "--reason", "not needed"]).code, 0);
    let said = cluster.helix(&["logs", "q"]).stdout;
    assert!(
        said.starts_with("helix: ") && said.contains("cancelled before it ran") && said.contains("not needed"),
        "{said}"
    );
    assert_eq!(cluster.helix(&["purge", "--before", "0s"]).code, 0);
    let said = cluster.helix(&["logs", "b", "-o", "json"]);
    assert!(said.code == 123 && said.stdout.is_empty() && said.stderr.contains("build_purged"), "{said:?}");
    let said = cluster.helix(&["submit", "--id", "b", "--output", "out", "--wait", "-o", "json", "--", line]);
    assert!(said.code == 0 && said.stdout.contains("\"purged_state\": \"succeeded\""), "{said:?}");
    let said = cluster.helix(&["wait", "q", "b", "q", "-o", "json"]);
    let waited: serde_json::Value = serde_json::from_str(&said.stdout).unwrap();
    assert!(said.code == 123 && waited == serde_json::json!([]), "all were purged: {said:?}");
    let config = root.join("config");
    fs::create_dir(&config).unwrap();
    std::os::unix::fs::symlink(cluster.root(), config.join("helix")).unwrap();
    let said = cluster.command(&["list"]).env("HELIX_CONTEXT", "").env("XDG_CONFIG_HOME", &config).output().unwrap();
    assert!(said.status.success(), "{}", String::from_utf8_lossy(&said.stderr));
    let path = ["submit", "--no-output", "--wait", "--env", "PATH=/nowhere", "--", "echo found"];
    assert_eq!(cluster.helix(&path).code, 0);
}

/// Whoever runs the cluster is told what is wrong and what to do.
#[test]
fn doctor_finds_what_is_wrong() {
    let cluster = Cluster::start(&Shape { coordinators: 3, agents: 1, ..Shape::default() }).unwrap();
    let said = cluster.helix(&["doctor"]);
    assert_eq!(said.code, 0, "{}", said.stdout);
    for check in
        ["ok    context: ", "ok    certificate: ", "ok    leader: ", "ok    quorum: 3 of 3", "ok    workers: 1 of 1"]
    {
        assert!(said.stdout.contains(check), "{check}: {}", said.stdout);
    }
    assert_eq!(said.stdout.matches("answers in").count(), 3, "{}", said.stdout);
    assert!(!said.stdout.contains("fail") && !said.stdout.contains("clock"), "{}", said.stdout);
    let leader = cluster.leader();
    let follower = cluster.all("coordinator").into_iter().find(|member| member.id != leader.id).unwrap();
    cluster.kill(&follower);
    cluster.kill(&cluster.all("agent")[0]);
    wait_for("both are missed", PATIENCE, || {
        let said = cluster.helix(&["doctor", "-o", "json"]);
        let report: serde_json::Value = serde_json::from_str(&said.stdout).unwrap();
        let fails = |check: &str| {
            let found = report.as_array().unwrap().iter();
            found
                .filter(|line| line["verdict"] == "fail")
                .any(|line| line["check"].as_str().unwrap().starts_with(check))
        };
        let all = fails("endpoint ") && fails(&format!("coordinator {}", follower.id)) && fails("workers");
        (said.code == 1 && all).then_some(())
    });
    for member in cluster.all("coordinator") {
        if member.id != follower.id {
            cluster.kill(&member);
        }
    }
    let said = cluster.helix(&["doctor"]);
    assert!(said.code == 125 && said.stdout.contains("fail  cluster: no coordinator answers"), "{said:?}");
    let said = cluster.helix_with(&cluster.root().join("none.toml"), &["doctor"]);
    assert!(said.code == 1 && said.stdout.starts_with("fail  context: "), "{said:?}");
}

/// What an earlier life said, and its numbers, are of no help.
#[test]
fn a_dev_cluster_that_cannot_start_shows_this_start_alone() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    let dir = tempfile::tempdir().unwrap();
    let start = || {
        let mut command = Command::new(programs().join("helix"));
        command.args(["dev", "--agents", "0", "--base-port", &port, "--data-dir"]).arg(dir.path().join("cluster"));
        command.output().unwrap()
    };
    let log = dir.path().join("cluster/logs/coordinator-1.log");
    assert_eq!(start().status.code(), Some(1));
    let before = fs::read_to_string(&log).unwrap().lines().count();
    let mark = "a line of an earlier life";
    fs::write(&log, format!("{}{mark}\n", fs::read_to_string(&log).unwrap())).unwrap();
    let said = String::from_utf8(start().stderr).unwrap();
    assert!(before > 0 && said.contains("coordinator 1 ended with code") && said.contains(&port), "{said}");
    assert!(!said.contains(mark), "{said}");
    let members: serde_json::Value =
        serde_json::from_str(&fs::read_to_string(dir.path().join("cluster/cluster.json")).unwrap()).unwrap();
    assert!(members[0]["pid"].is_null(), "{members}");
}

/// Bytes that a coordinator has itself need no leader.
#[test]
fn stale_reads_serve_logs_and_artifacts_without_a_quorum() {
    // Of two, both hold what there is.
    let cluster = Cluster::start(&Shape { coordinators: 2, agents: 1, ..Shape::default() }).unwrap();
    let line = "echo said; echo made > \"$HELIX_OUTPUT\"";
    assert_eq!(cluster.helix(&["submit", "--id", "b", "--wait", "--", line]).code, 0);
    let members = cluster.all("coordinator");
    let context = cluster.context_of(&members[0]);
    let stale = |arguments: &[&str]| cluster.helix_with(&context, &[arguments, &["--stale"]].concat());
    wait_for("the end of the build", PATIENCE, || stale(&["status", "b"]).stdout.contains("succeeded").then_some(()));
    cluster.kill(&members[1]);
    let said = cluster.helix_with(&context, &["logs", "b", "--connect-timeout", "3s"]);
    assert_eq!(said.code, 125, "{}{}", said.stdout, said.stderr);
    let said = stale(&["logs", "b"]);
    assert_eq!((said.code, said.stdout.as_str()), (0, "said\n"), "{}", said.stderr);
    let said = stale(&["artifacts", "get", "b", "-O", "-"]);
    assert_eq!((said.code, said.stdout.as_str()), (0, "made\n"), "{}", said.stderr);
}

#[test]
fn nobody_answers_is_an_exit_code_of_its_own() {
    let mut cluster = Cluster::start(&Shape { coordinators: 1, agents: 0, ..Shape::default() }).unwrap();
    cluster.stop().unwrap();
    let said = cluster.helix(&["list", "--connect-timeout", "1s"]);
    assert_eq!(said.code, 125, "{}", said.stderr);
}

#[test]
fn one_id_is_one_build() {
    let cluster = Cluster::start(&Shape { coordinators: 1, agents: 1, ..Shape::default() }).unwrap();
    let submit =
        |line: &str| cluster.helix(&["submit", "--id", "mine", "--no-output", "--wait", "-o", "quiet", "--", line]);
    let count = cluster.root().join("count");
    let line = format!("echo x >> {}", count.display());
    assert_eq!(submit(&line).code, 0);
    assert_eq!(submit(&line).code, 0);
    assert_eq!(fs::read_to_string(&count).unwrap(), "x\n", "the second submit is the first build");
    let other = submit("true");
    assert!(other.code == 1 && other.stderr.contains("id_taken"), "{}", other.stderr);
    let retried = cluster.helix(&["retry", "mine", "-o", "quiet"]);
    assert_eq!(retried.code, 0, "{}", retried.stderr);
    assert_eq!(cluster.helix(&["wait", retried.stdout.trim()]).code, 0);
    assert_eq!(fs::read_to_string(&count).unwrap(), "x\nx\n");
    assert_eq!(cluster.json(&["status", retried.stdout.trim()])["retry_of"], "mine");
}

#[test]
fn a_batch_is_answered_in_order_and_errors_are_lines_too() {
    let cluster = Cluster::start(&Shape { coordinators: 1, agents: 1, ..Shape::default() }).unwrap();
    let lines = [
        r#"{"id":"b1","command":"true","no_output":true}"#,
        r#"{"id":"b2","comand":"true"}"#,
        r#"{"id":"b3","argv":["true"],"no_output":true}"#,
        r#"{"id":"B4","command":"true"}"#,
        r#"{"id":"b1","command":"true","no_output":true}"#,
    ];
    let mut command = cluster.command(&["submit", "--batch", "-"]);
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(lines.join("\n").as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let answers: Vec<&str> = text.lines().collect();
    assert_eq!((answers.len(), answers[0], answers[2], answers[4]), (5, "b1", "b3", "b1"), "{text}");
    assert!(answers[1].contains("comand") && answers[3].contains("invalid_field"), "{text}");
    assert_eq!(output.status.code(), Some(1), "a batch with an error is not a success");
    assert_eq!(cluster.helix(&["wait", "b1", "b3"]).code, 0);
}

#[test]
fn a_cancel_reaches_a_daemon_that_hides() {
    let cluster = Cluster::start(&Shape { coordinators: 1, agents: 1, ..Shape::default() }).unwrap();
    let file = cluster.root().join("daemon.pid");
    let daemon = format!("trap '' TERM HUP INT; echo $$ > {}; while :; do sleep 1; done", file.display());
    let id = cluster.submit(&format!(
        "(env -i /usr/bin/setsid /bin/sh -c \"{}\" > /dev/null 2>&1 &) ; sleep 1000",
        daemon.replace("$$", "\\$\\$")
    ));
    let pid: i32 = wait_for("the daemon", PATIENCE, || fs::read_to_string(&file).ok()?.trim().parse().ok());
    assert!(alive(pid));
    let said = cluster.helix(&["cancel", &id, "--reason", "enough", "-o", "json"]);
    assert_eq!(said.code, 0, "{}", said.stderr);
    assert!(!alive(pid), "cancelled means that nothing of it is left");
    let status = cluster.json(&["status", &id]);
    assert_eq!((status["state"].as_str(), status["verified"].as_bool()), (Some("cancelled"), Some(true)));
    assert_eq!(status["cancel_reason"], "enough");
    assert_eq!(cluster.helix(&["cancel", &id]).code, 0, "a second cancel is harmless");
    assert_eq!(cluster.helix(&["wait", &id]).code, 122);
}

#[test]
fn waiting_builds_say_why_and_purged_ones_are_gone() {
    let cluster = Cluster::start(&Shape { coordinators: 1, agents: 1, capacity: 1, ..Shape::default() }).unwrap();
    let first = cluster.submit("sleep 1000");
    cluster.wait_state(&first, "running");
    let second = cluster.submit("true");
    let why = cluster.json(&["explain", &second]);
    assert_eq!(why["build"]["state"], "queued");
    let verdicts = why["tasks"][0]["verdicts"].as_array().unwrap();
    assert!(verdicts.len() == 1 && verdicts[0]["fits"] == false, "{why}");
    let refused = cluster.helix(&["submit", "--require", "gpu=yes", "--no-output", "--", "true"]);
    assert!(refused.code == 1 && refused.stderr.contains("unsatisfiable"), "{}", refused.stderr);
    let parked =
        cluster.helix(&["submit", "--park", "--require", "gpu=yes", "--no-output", "-o", "quiet", "--", "true"]);
    assert_eq!(parked.code, 0, "{}", parked.stderr);
    assert_eq!(cluster.helix(&["cancel", parked.stdout.trim()]).code, 0);
    assert_eq!(cluster.helix(&["cancel", &first]).code, 0);
    assert_eq!(cluster.helix(&["wait", &second]).code, 0);
    assert_eq!(cluster.json(&["purge", "--before", "0s"])["purged"], 3);
    assert_eq!(cluster.helix(&["status", &second]).code, 123);
    assert_eq!(cluster.json(&["list", "--all"]).as_array().map(Vec::len), Some(0));
}

#[test]
fn artifacts_of_several_platforms_are_told_apart() {
    let settings = vec![r#"platforms=["linux/amd64", "linux/arm64"]"#.to_owned()];
    let cluster = Cluster::start(&Shape { coordinators: 1, agents: 1, settings, ..Shape::default() }).unwrap();
    let platforms = ["linux/amd64", "linux/arm64"];
    let line = "echo $HELIX_PLATFORM > out; echo $HELIX_PLATFORM > $HELIX_PLATFORM_FILE";
    let line = line.replace("$HELIX_PLATFORM_FILE", "$(echo $HELIX_PLATFORM | tr / -)");
    let mut submit = vec!["submit", "--id", "p", "--wait", "--output", "out"];
    platforms.iter().for_each(|platform| submit.extend(["--platform", platform]));
    submit.extend(["--", &line]);
    let said = cluster.helix(&submit);
    assert_eq!(said.code, 0, "{}", said.stderr);

    let said = cluster.helix(&["artifacts", "get", "p", "-O", "-"]);
    assert!(said.code == 2 && said.stderr.contains("--task: linux/amd64, linux/arm64"), "{said:?}");
    for platform in platforms {
        let said = cluster.helix(&["artifacts", "get", "p", "out", "--task", platform, "-O", "-"]);
        assert_eq!((said.code, said.stdout.trim()), (0, platform), "{}", said.stderr);
    }
    let listed = cluster.json(&["artifacts", "ls", "p"]);
    let tasks: Vec<_> = listed.as_array().unwrap().iter().map(|made| made["task"].as_str().unwrap()).collect();
    assert_eq!(tasks, platforms);
    assert_eq!(cluster.json(&["artifacts", "ls", "p", "--task", "linux/arm64"]).as_array().unwrap().len(), 1);
    let said = cluster.helix(&["artifacts", "ls", "p", "--task", "linux/s390x"]);
    assert!(said.code == 2 && said.stderr.contains("it has linux/amd64, linux/arm64"), "{said:?}");
}

/// What one thing of several is not there for is said of that one; the others are waited for and shown.
#[test]
fn one_that_is_gone_does_not_end_what_others_are_waited_for() {
    let cluster = Cluster::start(&Shape { coordinators: 1, agents: 1, ..Shape::default() }).unwrap();
    let line = |id: &str| format!(r#"{{"id":"{id}","command":"true","no_output":true}}"#);
    let batch = |ids: &[&str]| {
        let mut command = cluster.command(&["submit", "--batch", "-", "--wait"]);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let lines = ids.iter().map(|id| line(id)).collect::<Vec<_>>().join("\n");
        child.stdin.take().unwrap().write_all(lines.as_bytes()).unwrap();
        let output = child.wait_with_output().unwrap();
        (output.status.code(), String::from_utf8(output.stdout).unwrap())
    };
    assert_eq!(batch(&["gone"]).0, Some(0));
    assert_eq!(cluster.helix(&["purge", "--before", "0s"]).code, 0);
    assert_eq!(batch(&["gone", "new"]), (Some(0), "gone\nnew\n".to_owned()));
    let said = cluster.helix(&["wait", "gone", "new", "-o", "json"]);
    let waited: serde_json::Value = serde_json::from_str(&said.stdout).unwrap();
    assert_eq!(
        (said.code, waited.as_array().unwrap().len(), &waited[0]["build_id"]),
        (123, 1, &"new".into()),
        "{said:?}"
    );
    let said = cluster.helix(&["status", "new", "nobody", "-o", "json"]);
    let shown: serde_json::Value = serde_json::from_str(&said.stdout).unwrap();
    assert!(said.code == 123 && shown[0]["build_id"] == "new", "{said:?}");
    let empty = |name: &str| cluster.command(&["list", "-o", "quiet"]).env(name, "").output().unwrap();
    for name in ["HELIX_FORMAT", "HELIX_COLOR", "HELIX_CONNECT_TIMEOUT"] {
        let output = empty(name);
        assert!(output.status.success(), "{name}: {}", String::from_utf8_lossy(&output.stderr));
    }
}

#[test]
fn an_uploaded_directory_is_built() {
    let cluster = Cluster::start(&Shape { coordinators: 1, agents: 1, ..Shape::default() }).unwrap();
    let source = cluster.root().join("source");
    fs::create_dir(&source).unwrap();
    fs::write(source.join("in"), "text").unwrap();
    let said = cluster.helix(&[
        "submit",
        "--wait",
        "--source",
        source.to_str().unwrap(),
        "--output",
        "out",
        "--",
        "cat in in > out",
    ]);
    assert_eq!(said.code, 0, "{}", said.stderr);
    let target = cluster.root().join("fetched");
    assert_eq!(cluster.helix(&["artifacts", "get", "last", "-O", target.to_str().unwrap()]).code, 0);
    assert_eq!(fs::read_to_string(target).unwrap(), "texttext");
}
