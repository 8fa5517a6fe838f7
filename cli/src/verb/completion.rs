//! `helix completion SHELL`.

use clap::{Args, CommandFactory};
use clap_complete::Shell;

use crate::exit::Code;
use crate::failure::Failure;
use crate::output::Output;

/// `helix completion`.
#[derive(Args)]
pub(crate) struct CompletionArguments {
    /// The shell to print a script for
    #[arg(value_enum)]
    shell: Shell,
}

pub(crate) fn run<C: CommandFactory>(arguments: &CompletionArguments, output: &Output) -> Result<Code, Failure> {
    let mut script = Vec::new();
    clap_complete::generate(arguments.shell, &mut C::command(), "helix", &mut script);
    output.block(&script);
    Ok(Code::SUCCESS)
}
