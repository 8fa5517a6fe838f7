//! The runbook explains every word of trouble that the programs know, and no other.

use std::collections::BTreeSet;

use helix_model::{ErrorCode, Reason};

use crate::read;
use crate::runbook::first_column;

fn words(heading: &str) -> BTreeSet<String> {
    let found = first_column(&read("RUNBOOK.md"), heading);
    let set: BTreeSet<String> = found.iter().cloned().collect();
    assert_eq!(set.len(), found.len(), "a word stands twice under {heading}: {found:?}");
    set
}

#[test]
fn every_error_code_is_explained() {
    let known: BTreeSet<String> = ErrorCode::ALL.iter().map(|code| code.as_str().to_owned()).collect();
    assert_eq!(words("## Every error code"), known);
}

#[test]
fn every_reason_is_explained() {
    let known: BTreeSet<String> = Reason::ALL.iter().map(|reason| reason.as_str().to_owned()).collect();
    assert_eq!(words("## Every reason"), known);
}

#[test]
fn links_inside_the_runbook_lead_somewhere() {
    let text = read("RUNBOOK.md");
    let anchor = |heading: &str| {
        let kept = heading.trim_start_matches('#').trim().to_lowercase();
        let kept: String = kept.chars().filter(|c| c.is_alphanumeric() || *c == ' ' || *c == '-').collect();
        kept.replace(' ', "-")
    };
    let anchors: BTreeSet<String> = text.lines().filter(|line| line.starts_with('#')).map(anchor).collect();
    for link in text.split("](#").skip(1).filter_map(|rest| rest.split(')').next()) {
        assert!(anchors.contains(link), "nothing is called #{link}; there are {anchors:?}");
    }
}

#[test]
fn every_key_of_the_policy_is_explained() {
    let known = helix_core::policy::POLICY_KEYS.iter().map(|key| key.name.to_owned()).collect();
    assert_eq!(words("### Limits"), known);
}
