//! How this agent keeps exec builds apart from its host: what its owner wishes, what the host can give, what builds see.
//!
//! Nothing is ever silently weaker than was asked: a wish that cannot be met ends the agent with the reason. Where nothing is
//! wished, namespaces are taken if they work here; if not, the agent says loudly, in its log and to the cluster, why not.
//! Whether they work is found out by running a command in them, exactly as a build would be run.

mod owners;
mod probe;
mod view;

use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use helix_model::AttemptKey;
use helix_runner::isolation::{Entry, Isolation, Network, Tool};

use crate::attempt::workdir::Workdir;
use crate::config::Config;
use crate::starter::Starter;

pub(crate) use owners::number_of;
pub use owners::{Owners, UserSetting};
pub use view::Bind;

/// The offer's word, at most; the cluster takes 512 bytes.
const WORD_BYTES_MAX: usize = 400;

/// What is in force.
#[derive(Debug)]
pub struct Isolated {
    word: String,
    surroundings: Option<Surroundings>,
}

/// What isolated builds of this agent have in common.
#[derive(Debug)]
struct Surroundings {
    tool: Tool,
    network: Network,
    view: Vec<Entry>,
    owners: Owners,
}

/// What the configuration may say.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Wish {
    /// Nothing: the best that works.
    Unsaid,
    /// As the agent's user, on the host as it is.
    None,
    /// The runner's own namespaces.
    Namespaces,
    /// `bwrap`.
    Bubblewrap,
}

impl Wish {
    /// Reads the key `isolation`.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        Some(match text {
            "" => Self::Unsaid,
            "none" => Self::None,
            "namespaces" => Self::Namespaces,
            "bubblewrap" => Self::Bubblewrap,
            _ => return None,
        })
    }
}

impl Isolated {
    /// Finds out what can be had and decides.
    ///
    /// # Errors
    /// When what the owner asked for cannot be had here; says why.
    pub async fn choose(config: &Config, work_root: &Path, starter: &Starter) -> anyhow::Result<Self> {
        let wish = Wish::parse(&config.isolation).context("`isolation` was checked")?;
        let tool = match wish {
            Wish::None => return Ok(Self { word: "none".to_owned(), surroundings: None }),
            Wish::Unsaid | Wish::Namespaces => Tool::Namespaces,
            Wish::Bubblewrap => Tool::Bubblewrap(config.exec.bubblewrap.clone()),
        };
        let name = if tool == Tool::Namespaces { "namespaces" } else { "bubblewrap" };
        let tried = match Surroundings::new(config, tool, work_root) {
            Ok(surroundings) => {
                let made = Self { word: name.to_owned(), surroundings: Some(surroundings) };
                probe::run(&made, config, work_root, starter).await.map(|()| made)
            }
            Err(error) => Err(format!("{error:#}")),
        };
        match (tried, wish) {
            (Ok(made), _) => {
                tracing::info!(isolation = made.word(), "exec builds are isolated");
                Ok(made)
            }
            (Err(why), Wish::Unsaid) if config.exec.bind.is_empty() => {
                tracing::warn!(why, "exec builds are NOT isolated: namespaces cannot be used on this host");
                let mut word = format!("none (namespaces cannot be used here: {why})");
                word.truncate(word.floor_char_boundary(WORD_BYTES_MAX));
                Ok(Self { word, surroundings: None })
            }
            (Err(why), Wish::Unsaid) => {
                bail!("`exec.bind` needs an isolation, and namespaces cannot be used on this host: {why}")
            }
            (Err(why), _) => bail!("`isolation`: {name} cannot be used on this host: {why}"),
        }
    }

    /// What `workers show` tells: the mode in force, and why it is not a better one.
    #[must_use]
    pub fn word(&self) -> &str {
        &self.word
    }

    /// An attempt's part of its order; `None` where builds are not isolated. More may be added to the view.
    #[must_use]
    pub fn of(&self, workdir: &Workdir) -> Option<Isolation> {
        let surroundings = self.surroundings.as_ref()?;
        let mut view = surroundings.view.clone();
        // Parents before what lies in them: a workdir may lie in `/tmp`.
        view.push(Entry::own(workdir.tmp(), "/tmp"));
        view.push(Entry::own(workdir.root(), workdir.root()));
        Some(Isolation { tool: surroundings.tool.clone(), network: surroundings.network, view })
    }

    /// Who an attempt's command is on the host; `None` for the agent's own user.
    #[must_use]
    pub fn user(&self, key: &AttemptKey) -> Option<helix_runner::User> {
        self.surroundings.as_ref()?.owners.of(key)
    }

    /// Hands an attempt's directories to its user, before anything of the build has run. Blocks.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn hand_over(&self, workdir: &Workdir, key: &AttemptKey) -> std::io::Result<()> {
        if self.surroundings.is_none() {
            return Ok(());
        }
        owners::hand_over(workdir, self.user(key))
    }
}

impl Surroundings {
    fn new(config: &Config, tool: Tool, work_root: &Path) -> anyhow::Result<Self> {
        let mut tool = tool;
        if let Tool::Bubblewrap(program) = &mut tool {
            *program = find(program)?;
        }
        let binds: Vec<Entry> = config
            .exec
            .bind
            .iter()
            .map(|text| Ok(Bind::parse(text)?.entry()))
            .collect::<Result<_, String>>()
            .map_err(anyhow::Error::msg)?;
        let view = view::of_host(binds);
        let mut private = vec![config.data_dir.as_path(), work_root, &config.tls.key, &config.tls.cert];
        private.extend(config.source.ssh_key.as_deref());
        view::check_private(&view, &private)?;
        let network = if config.exec.network == "none" { Network::None } else { Network::Host };
        Ok(Self { tool, network, view, owners: Owners::choose(&config.exec.user)? })
    }
}

/// A program by its name, as the agent's own `PATH` has it.
fn find(program: &Path) -> anyhow::Result<PathBuf> {
    if program.components().count() > 1 {
        return Ok(program.to_owned());
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&path).map(|directory| directory.join(program)).find(|path| path.is_file());
    found.with_context(|| format!("{} is not installed (`exec.bubblewrap`)", program.display()))
}
