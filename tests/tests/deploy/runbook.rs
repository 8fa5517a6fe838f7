//! Reading the runbook: which shell blocks are to be run, where, in which order; which words its tables explain.

/// A block that is run on some hosts.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Step {
    /// The line of the runbook where the block begins.
    pub(crate) line: usize,
    /// The headings it stands under: of the chapter and of the section.
    pub(crate) under: [String; 2],
    /// Where it is run, in this order.
    pub(crate) hosts: Vec<String>,
    /// What is run.
    pub(crate) script: String,
}

/// Every block that follows an `on:` comment.
///
/// # Panics
/// When a comment is followed by no block, or a block does not end.
pub(crate) fn steps(text: &str) -> Vec<Step> {
    let mut steps = Vec::new();
    let mut under = [String::new(), String::new()];
    let mut lines = text.lines().enumerate();
    while let Some((number, line)) = lines.next() {
        if let Some(chapter) = line.strip_prefix("## ") {
            under = [chapter.to_owned(), String::new()];
        } else if let Some(section) = line.strip_prefix("### ") {
            section.clone_into(&mut under[1]);
        }
        let Some(marker) = line.strip_prefix("<!-- on:").and_then(|rest| rest.strip_suffix("-->")) else { continue };
        let hosts: Vec<String> = marker.split_whitespace().map(str::to_owned).collect();
        assert!(!hosts.is_empty(), "line {}: a comment without a host", number + 1);
        let fence = lines.next().map(|(_, line)| line);
        assert_eq!(fence, Some("```sh"), "line {}: no shell block follows", number + 1);
        let mut script = String::new();
        loop {
            let (_, line) = lines.next().unwrap_or_else(|| panic!("line {}: the block does not end", number + 1));
            if line == "```" {
                break;
            }
            script.push_str(line);
            script.push('\n');
        }
        steps.push(Step { line: number + 2, under: under.clone(), hosts, script });
    }
    steps
}

/// The words in the first column of the table under a heading.
///
/// # Panics
/// When there is no such heading.
pub(crate) fn first_column(text: &str, heading: &str) -> Vec<String> {
    let (_, rest) = text.split_once(&format!("\n{heading}\n")).unwrap_or_else(|| panic!("no heading {heading:?}"));
    let section = rest.split("\n#").next().unwrap_or_default();
    let cells = section.lines().filter_map(|line| line.strip_prefix("| ")?.split(" |").next());
    cells.filter(|cell| cell.starts_with('`')).flat_map(quoted).collect()
}

/// What stands between back quotes.
fn quoted(text: &str) -> Vec<String> {
    text.split('`').skip(1).step_by(2).map(str::to_owned).collect()
}

#[test]
fn marked_blocks_are_found_with_their_hosts_and_headings() {
    let text = "<!-- on: w -->\n```sh\n:\n```\n## A\n### B\n<!-- on: x y -->\n```sh\necho 1\n\necho 2\n```\n```sh\nnot this\n```\n\
                ## C\n<!-- on: z -->\n```sh\ntrue\n```\n";
    let step = |line, [chapter, section]: [&str; 2], hosts: &[&str], script: &str| Step {
        line,
        under: [chapter.to_owned(), section.to_owned()],
        hosts: hosts.iter().map(|host| (*host).to_owned()).collect(),
        script: script.to_owned(),
    };
    let expected = [
        step(2, ["", ""], &["w"], ":\n"),
        step(8, ["A", "B"], &["x", "y"], "echo 1\n\necho 2\n"),
        step(18, ["C", ""], &["z"], "true\n"),
    ];
    assert_eq!(steps(text), expected);
}

#[test]
fn words_of_a_table_are_found() {
    let text = "\n## A\n\n| code | x |\n|---|---|\n| `a`, `b` | `c` |\n\n## B\n| `d` | |\n";
    assert_eq!(first_column(text, "## A"), ["a", "b"]);
}
