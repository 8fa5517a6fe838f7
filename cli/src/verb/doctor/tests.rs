//! Findings and their verdicts.

use super::*;

fn worst(report: &Report) -> Verdict {
    report.0.iter().map(|finding| finding.verdict).max().unwrap()
}

#[test]
fn a_slow_answer_is_no_clock_that_is_wrong() {
    let now = UNIX_EPOCH + Duration::from_secs(1000);
    let second = Duration::from_secs(1);
    assert_eq!(skew(1_000_000, Duration::ZERO, now), (true, Duration::ZERO));
    assert_eq!(skew(995_000, Duration::ZERO, now), (false, 5 * second));
    assert_eq!(skew(1_007_000, 2 * second, now), (true, 7 * second));
    // Said anywhere in the exchange.
    for said in [994_000, 997_000, 1_000_000] {
        assert_eq!(skew(said, 6 * second, now).1, Duration::ZERO, "{said}");
    }
    assert_eq!(skew(0, Duration::ZERO, now), (false, Duration::ZERO));
}

#[test]
fn quorums_are_judged_by_what_may_still_be_lost() {
    let member = |id, healthy| v1::Member { id, role: "follower".into(), healthy, ..v1::Member::default() };
    for (up, of, expected) in
        [(1, 1, Verdict::Ok), (3, 3, Verdict::Ok), (2, 3, Verdict::Fail), (4, 5, Verdict::Fail), (1, 3, Verdict::Fail)]
    {
        let members = (1..=of).map(|id| member(id, id <= up)).collect();
        let mut report = Report::default();
        look_at_members(&v1::ClusterStatus { members, ..v1::ClusterStatus::default() }, &mut report);
        // A member that is down always fails; the quorum itself says what that means.
        assert_eq!(worst(&report), expected, "{up} of {of}");
        let quorum = &report.0[0];
        let meaning = if up == of {
            Verdict::Ok
        } else if up > of / 2 {
            Verdict::Warn
        } else {
            Verdict::Fail
        };
        assert_eq!(quorum.verdict == Verdict::Fail, meaning == Verdict::Fail, "{up} of {of}: {quorum:?}");
    }
}

#[test]
fn ends_disks_and_workers_are_judged() {
    let day = Duration::from_secs(86_400);
    for (end, expected) in [
        (SystemTime::now() + 100 * day, Verdict::Ok),
        (SystemTime::now() + 5 * day, Verdict::Warn),
        (SystemTime::now() - day, Verdict::Fail),
    ] {
        let mut report = Report::default();
        note_end("certificate", end, "", &mut report);
        assert_eq!(worst(&report), expected);
    }
    for (free_bytes, expected) in [(100, Verdict::Ok), (15, Verdict::Warn), (5, Verdict::Fail)] {
        let mut report = Report::default();
        let status = v1::ClusterStatus { free_bytes, reserve_bytes: 10, ..v1::ClusterStatus::default() };
        look_at_node("endpoint", &status, &mut report);
        assert_eq!(worst(&report), expected);
    }
    let worker = |change: &dyn Fn(&mut v1::WorkerStatus)| {
        let mut worker = v1::WorkerStatus { name: "w".into(), healthy: true, ..v1::WorkerStatus::default() };
        change(&mut worker);
        let mut report = Report::default();
        judge_workers(&[worker], 0, &mut report);
        worst(&report)
    };
    assert_eq!(worker(&|_| {}), Verdict::Ok);
    assert_eq!(worker(&|worker| worker.draining = true), Verdict::Warn);
    assert_eq!(worker(&|worker| worker.pressure = "disk".into()), Verdict::Warn);
    assert_eq!(worker(&|worker| worker.healthy = false), Verdict::Fail);
    let ends = |end: SystemTime| {
        let ms = end.duration_since(UNIX_EPOCH).unwrap().as_millis();
        worker(&|worker| worker.certificate_not_after_ms = i64::try_from(ms).unwrap())
    };
    assert_eq!(ends(SystemTime::now() + 2 * RENEW_BEFORE), Verdict::Ok);
    assert_eq!(ends(SystemTime::now() + RENEW_BEFORE / 2), Verdict::Warn);
    assert_eq!(ends(SystemTime::now() - RENEW_BEFORE), Verdict::Fail);
    assert_eq!(worker(&|worker| worker.certificate_not_after_ms = i64::MAX), Verdict::Ok);
}
