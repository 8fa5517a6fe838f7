//! The story of a failure: what concerns the build, worker or node that the verdict names, out of all that happened.

use std::collections::BTreeSet;

use super::trace::Line;

/// Lines of a story, at most: its beginning and its end.
const STORY_MAX: usize = 200;

/// Ids in a text: of builds and attempts (`c1-4`, `c1-4.0.2`), workers (`w3`), nodes (`node 2`).
fn ids(text: &str) -> BTreeSet<String> {
    let words: Vec<&str> = text.split(|c: char| !(c.is_ascii_alphanumeric() || c == '-' || c == '.')).collect();
    let mut found = BTreeSet::new();
    for (place, word) in words.iter().enumerate() {
        let word = word.trim_end_matches('.');
        let number = |rest: &str| !rest.is_empty() && rest.bytes().all(|byte| byte.is_ascii_digit());
        let build = word.split('.').next().unwrap_or(word);
        let is_build =
            build.strip_prefix('c').and_then(|rest| rest.split_once('-')).is_some_and(|(client, _)| number(client));
        if is_build {
            found.insert(build.to_owned());
        } else if word.strip_prefix('w').is_some_and(number) {
            found.insert(word.to_owned());
        } else if word == "node" && words.get(place + 1).is_some_and(|next| number(next.trim_end_matches('.'))) {
            found.insert(format!("node {}", words[place + 1].trim_end_matches('.')));
        }
    }
    found
}

fn is_build(id: &str) -> bool {
    id.starts_with('c')
}

/// Picks the lines that tell how it came to `why`.
pub(super) fn story(why: &str, lines: &[Line]) -> Vec<Line> {
    let named = ids(why);
    let builds: BTreeSet<&String> = named.iter().filter(|id| is_build(id)).collect();
    let mut about = named.clone();
    // Whoever had to do with the build is part of its story.
    for line in lines {
        let seen = ids(&line.text);
        if seen.iter().any(|id| builds.contains(id)) {
            about.extend(seen.into_iter().filter(|id| id.starts_with('w')));
        }
    }
    let concerns = |line: &&Line| {
        let seen = ids(&line.text);
        let other_build = seen.iter().any(|id| is_build(id)) && !builds.is_empty();
        if other_build {
            return seen.iter().any(|id| builds.contains(id));
        }
        let general = line.text.contains("leads (term") || line.text.contains("the leader, ");
        general || seen.iter().any(|id| about.contains(id)) || line.text == "all is healed"
    };
    let first = lines.iter().position(|line| ids(&line.text).iter().any(|id| builds.contains(id))).unwrap_or(0);
    let picked: Vec<Line> = lines[first..].iter().filter(concerns).cloned().collect();
    shorten(picked)
}

fn shorten(mut lines: Vec<Line>) -> Vec<Line> {
    if lines.len() > STORY_MAX {
        let from = lines.len() - STORY_MAX / 2;
        let left_out = from - STORY_MAX / 2;
        let at_ms = lines[from].at_ms;
        let gap = Line { at_ms, text: format!("({left_out} more lines before this one)") };
        lines.splice(STORY_MAX / 2..from, [gap]);
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_story_is_of_who_is_named_and_of_who_had_to_do_with_them() {
        let line = |at_ms, text: &str| Line { at_ms, text: text.to_owned() };
        let lines = [
            line(1, "w2 is cut off for 10 ms"),
            line(2, "client c1 wants, as its request 1: submit c1-4"),
            line(3, "node 2 leads (term 3); 0 proposals of the leader before are lost"),
            line(4, "the registry commits at 4: assign c1-4.0.1 to w2 (instance d0.b0)"),
            line(5, "the registry commits at 4: assign c1-41.0.1 to w2 (instance d0.b0)"),
            line(6, "the host of w2 boots"),
            line(7, "the host of w3 boots"),
        ];
        let told: Vec<u64> = story("build c1-4 never ended", &lines).iter().map(|line| line.at_ms).collect();
        assert_eq!(told, [2, 3, 4, 6]);
        assert_eq!(ids("worker w3, c0-1.0.2. node 4."), ["c0-1", "node 4", "w3"].map(str::to_owned).into());
    }
}
