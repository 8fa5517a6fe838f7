//! What a hostile build is: what it runs, and how it must end.

/// One attempt at something.
#[derive(Clone, Debug)]
pub(crate) struct Case {
    /// Its build's id.
    pub(crate) name: &'static str,
    /// Further flags of `helix submit`; without an `--output` among them it makes none.
    pub(crate) flags: &'static [&'static str],
    /// Its shell line; see [`Places::fill`] for what stands for what.
    pub(crate) script: String,
    /// How it must end: `succeeded`, or the reason of its failure.
    pub(crate) ends: &'static str,
    /// What its log must hold.
    pub(crate) says: &'static str,
}

/// What an attack prints when it got through.
pub(crate) const BREACH: &str = "BREACH";

/// Where things are on the host that builds have no business with.
pub(crate) struct Places {
    pub(crate) key: String,
    pub(crate) data_dir: String,
    pub(crate) victim: String,
    pub(crate) grpc_port: String,
}

impl Places {
    /// Puts them in: `{key}` the agent's key, `{data}` its data directory, `{victim}` another build's workdir, `{port}` a
    /// coordinator's.
    pub(crate) fn fill(&self, script: &str) -> String {
        let pairs =
            [("{key}", &self.key), ("{data}", &self.data_dir), ("{victim}", &self.victim), ("{port}", &self.grpc_port)];
        pairs.iter().fold(script.to_owned(), |script, (name, value)| script.replace(name, value))
    }
}

/// A build that may do what it does, and must come through well.
pub(crate) fn harmless(name: &'static str, script: &str) -> Case {
    ending(name, &[], script, "succeeded")
}

/// A build that ends in a certain way.
pub(crate) fn ending(name: &'static str, flags: &'static [&'static str], script: &str, ends: &'static str) -> Case {
    Case { name, flags, script: script.to_owned(), ends, says: "" }
}

/// Shell commands none of which may succeed. Each that does is a breach.
pub(crate) fn denied(name: &'static str, commands: &[&str]) -> Case {
    let one = |command: &&str| {
        format!("if {{ {command}; }} > /dev/null 2>&1; then echo '{BREACH} {name}: '{}; fi", quoted(command))
    };
    let tries: Vec<String> = commands.iter().map(one).collect();
    harmless(name, &format!("{}\ntrue", tries.join("\n")))
}

fn quoted(text: &str) -> String {
    format!("'{}'", text.replace('\'', "'\\''"))
}

/// System calls, as Perl's arguments of `syscall`, none of which may succeed.
pub(crate) fn refused_calls(name: &'static str, calls: &[(libc::c_long, &str)]) -> Case {
    let tries: Vec<String> = calls
        .iter()
        .map(|(number, arguments)| {
            format!("perl -e 'print \"{BREACH} call {number}\\n\" if syscall({number}{arguments}) != -1'")
        })
        .collect();
    harmless(name, &format!("command -v perl > /dev/null || exit 9\n{}\ntrue", tries.join("\n")))
}
