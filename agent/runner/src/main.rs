//! `helix-runner`: owns one attempt's processes and output, from its order to its result. Started by the agent, through
//! the forker; it outlives the agent.
//!
//! podman starts it as well, before the container runtime: see [`guard`].
//!
//! One thread, no allocation in proportion to what the build says, no network; of secrets it knows
//! what the log must not show.

mod fork_server;
mod guard;
mod run;

use std::process::ExitCode;

fn main() -> ExitCode {
    if let Some(rules) = guard::asked() {
        return guard::serve(&rules, std::env::args_os().skip(1).collect());
    }
    let mut arguments = std::env::args_os().skip(1);
    match (arguments.next(), arguments.next()) {
        (Some(word), None) if word == "--forker" => fork_server::serve(),
        (Some(word), None) if !word.as_encoded_bytes().starts_with(b"-") => {
            run::run(word.as_ref(), run::Input::Nothing)
        }
        _ => {
            eprintln!("usage: helix-runner ATTEMPT_DIR | helix-runner --forker\nthe agent starts it; never by hand");
            ExitCode::from(2)
        }
    }
}
