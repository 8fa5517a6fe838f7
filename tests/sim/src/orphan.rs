//! Runners that die before their attempts. Where cgroups are, what they leave is killed and known to be dead; where not,
//! some of it hides, and its agent must not claim to know.

use helix_core::command::Outcome;
use helix_model::{AttemptKey, Reason};

use super::agent::{Afterwards, Phase};
use super::world::World;

impl World {
    /// A runner of one of the agent's attempts is killed.
    pub(super) fn kill_runner(&mut self, agent: usize) {
        if !self.agents[agent].up {
            return;
        }
        let host = &self.hosts[agent];
        let runs = &self.agents[agent].runs;
        let has_runner = |key: &&AttemptKey| {
            !host.hidden.contains(*key) && matches!(runs.get(*key), Some((Phase::Running | Phase::Killing(_), _)))
        };
        let Some(key) = host.processes.keys().find(has_runner).cloned() else { return };
        let hides = !host.cgroups && self.random.chance(50);
        self.note(|| format!("w{agent}'s runner of {key} is killed; hides: {hides}"));
        let host = &mut self.hosts[agent];
        if !host.cgroups {
            host.unproven.insert(key.clone());
        }
        if hides {
            host.hidden.insert(key.clone());
        } else {
            host.processes.remove(&key);
        }
        self.is_dead(agent, &key);
        if matches!(self.agents[agent].runs.get(&key), Some((Phase::Running | Phase::Killing(Afterwards::Report), _))) {
            let message = "the runner died".to_owned();
            let report = self.report(agent, &key, Outcome::Failed { reason: Reason::Internal, message });
            self.agents[agent].runs.insert(key, (Phase::Reporting(Box::new(report)), 0));
        }
    }
}
