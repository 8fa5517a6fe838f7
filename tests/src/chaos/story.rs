//! How to look at a run that failed: what clients saw of a build that something is wrong with, and where daemons speak of it.

use std::collections::BTreeSet;
use std::fs;

use crate::chaos::load::Load;
use crate::chaos::site::Site;

/// Builds that are told of; the others are like them, more often than not.
const TOLD_MAX: usize = 5;

/// Lines of each daemon's log that are shown of a build.
const LINES_MAX: usize = 30;

/// Of the builds that these sentences begin with, their stories; and where everything is.
pub(super) fn tell(site: &Site, load: &Load, wrong: &[String]) -> Vec<String> {
    let history = load.history();
    let mut lines = Vec::new();
    let mut told = BTreeSet::new();
    for id in wrong.iter().filter_map(|sentence| sentence.split(": ").next()) {
        let Some(story) = history.story(id) else { continue };
        if told.len() == TOLD_MAX || !told.insert(id) {
            continue;
        }
        lines.push(format!("story of {id}, in seconds since the load began:"));
        lines.extend(story.into_iter().map(|line| format!("  {line}")));
        for node in site.nodes() {
            let log = fs::read(site.log(*node)).unwrap_or_default();
            let log = String::from_utf8_lossy(&log).into_owned();
            let said = log.lines().enumerate().filter(|(_, line)| line.contains(id));
            lines.extend(
                said.take(LINES_MAX).map(|(number, line)| format!("  {}.log:{}: {line}", node.name(), number + 1)),
            );
        }
    }
    let root = site.root().display();
    lines.push(format!("everything is kept in {root}: NODE.log is what each said, counts/ what builds counted"));
    lines.push(format!("a node's disk is {root}/NODE.img: mount -o loop,ro {root}/NODE.img /mnt"));
    lines
}
