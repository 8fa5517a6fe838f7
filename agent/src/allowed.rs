//! What this host's owner allows and which secrets there are, as they were last read: the part of the configuration that
//! counts without a restart.
//!
//! A file is taken whole or not at all. Invariant: what is in force passed the same checks as at the start, together with all
//! that does not change while the agent runs.

use std::path::Path;
use std::sync::Arc;

use tokio::sync::watch;

use crate::config::{Config, ConfigWrong};

/// The configuration with the newest `policy` and `secrets`.
#[derive(Debug)]
pub struct Allowed {
    current: watch::Sender<Arc<Config>>,
}

/// What became of a configuration that was read again.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Taken {
    /// Whether policy or secrets are others than before.
    pub changed: bool,
    /// Other keys that differ; they count after a restart.
    pub waiting: Vec<String>,
}

impl Allowed {
    /// What the agent starts with.
    #[must_use]
    pub fn new(config: Config) -> Self {
        Self { current: watch::Sender::new(Arc::new(config)) }
    }

    /// What is in force now.
    #[must_use]
    pub fn current(&self) -> Arc<Config> {
        Arc::clone(&self.current.borrow())
    }

    /// Changes with what is in force.
    #[must_use]
    pub fn changes(&self) -> watch::Receiver<Arc<Config>> {
        self.current.subscribe()
    }

    /// Puts policy and secrets of a checked configuration in force. `podman_works` says whether there is that to run builds.
    ///
    /// # Errors
    /// The key that does not go together with what cannot change now; then nothing has changed.
    pub fn take(&self, newer: Config, podman_works: bool) -> Result<Taken, ConfigWrong> {
        let current = self.current();
        let waiting = differing(&current, &newer);
        let merged = Config { policy: newer.policy, secrets: newer.secrets, ..(*current).clone() };
        // All paths are absolute already.
        let merged = merged.check(Path::new("/"))?;
        let runs = merged.policy.allows_executor("exec") || (podman_works && merged.policy.allows_executor("podman"));
        if !runs {
            let why = "allows podman alone, which does not work here: nothing could be built".to_owned();
            return Err(ConfigWrong { key: "policy.executors", why });
        }
        let changed = merged != *current;
        if changed {
            self.current.send_replace(Arc::new(merged));
        }
        Ok(Taken { changed, waiting })
    }
}

/// The top-level keys that differ and are not read again.
fn differing(current: &Config, newer: &Config) -> Vec<String> {
    let table = |config: &Config| {
        let mut config = config.clone();
        // Read again, each in its way.
        config.log.filter.clear();
        (config.policy, config.secrets) = (current.policy.clone(), current.secrets.clone());
        toml::Table::try_from(config).unwrap_or_default()
    };
    let (current, newer) = (table(current), table(newer));
    let keys = current.keys().chain(newer.keys().filter(|key| !current.contains_key(*key)));
    keys.filter(|key| current.get(*key) != newer.get(*key)).cloned().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(base: &Path) -> Config {
        crate::testing::config(base).check(base).unwrap()
    }

    #[test]
    fn policy_and_secrets_are_taken_and_nothing_else() {
        let base = tempfile::tempdir().unwrap();
        let allowed = Allowed::new(config(base.path()));
        let mut changes = allowed.changes();
        let same = allowed.take(config(base.path()), false).unwrap();
        assert_eq!(same, Taken { changed: false, waiting: Vec::new() });
        assert!(!changes.has_changed().unwrap());
        let mut newer = config(base.path());
        newer.policy.push = Vec::new();
        newer.capacity += 1;
        newer.exec.env.insert("A".to_owned(), "1".to_owned());
        let taken = allowed.take(newer, false).unwrap();
        assert_eq!(taken, Taken { changed: true, waiting: vec!["capacity".to_owned(), "exec".to_owned()] });
        assert!(changes.has_changed().unwrap());
        let now = changes.borrow_and_update().clone();
        assert_eq!((now.policy.push.len(), now.exec.env.len()), (0, 0));
    }

    #[test]
    fn what_would_leave_nothing_to_run_is_refused_and_changes_nothing() {
        let base = tempfile::tempdir().unwrap();
        let allowed = Allowed::new(config(base.path()));
        let mut newer = config(base.path());
        newer.policy.executors = vec!["podman".to_owned()];
        assert_eq!(allowed.take(newer.clone(), false).unwrap_err().key, "policy.executors");
        // As the file would have it, but not as the agent runs.
        newer.policy.platforms = vec!["linux/s390x".to_owned()];
        newer.platforms = vec!["linux/s390x".to_owned()];
        assert_eq!(allowed.take(newer, true).unwrap_err().key, "policy.platforms");
        assert_eq!(*allowed.current(), config(base.path()));
    }
}
