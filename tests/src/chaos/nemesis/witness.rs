//! A build that runs while something happens that must not concern it: same attempt, and whole at the end.

use std::time::{Duration, Instant};

use crate::chaos::history::Seen;
use crate::chaos::nemesis::{Nemesis, Scene};
use crate::chaos::site::Node;

/// Between two lines of its log: it runs for twenty times as long.
const PAUSE_S: f64 = 0.3;

/// How long it may take to run, and to end.
const BEGIN_LIMIT: Duration = Duration::from_secs(30);
const END_LIMIT: Duration = Duration::from_secs(60);

/// A build that runs, and where.
pub(super) struct Witness {
    id: String,
    attempt: u64,
    /// The agent that runs it.
    pub(super) agent: Node,
}

impl Nemesis {
    /// Submits a witness and waits until it runs.
    pub(super) fn call_witness(&mut self, scene: &mut Scene<'_>) -> anyhow::Result<Option<Witness>> {
        self.witnesses += 1;
        let id = format!("witness-{}", self.witnesses);
        scene.runtime.block_on(scene.load.witness(&scene.endpoints, &id, PAUSE_S));
        let deadline = Instant::now() + BEGIN_LIMIT;
        while Instant::now() < deadline {
            let said = scene.site.helix(&["status", &id, "-o", "json", "--connect-timeout", "5s"]).unwrap_or_default();
            let build: serde_json::Value = serde_json::from_str(&said).unwrap_or_default();
            let agent = scene.site.agents().find(|agent| build["worker"] == agent.name());
            if let (Some(agent), true) = (agent, build["state"] == "running") {
                return Ok(Some(Witness { id, attempt: build["attempt"].as_u64().unwrap_or_default(), agent }));
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        self.write(&format!("{id} did not run within {BEGIN_LIMIT:?}"));
        Ok(None)
    }

    /// Waits for the witness's end, which must be that of its attempt.
    pub(super) fn hear_witness(&mut self, scene: &mut Scene<'_>, witness: &Witness) {
        let deadline = Instant::now() + END_LIMIT;
        while Instant::now() < deadline {
            if let Ok(Seen::Ended { end, .. }) = scene.runtime.block_on(scene.load.look(&scene.endpoints, &witness.id))
            {
                if end.state != "succeeded" || u64::from(end.attempt) != witness.attempt {
                    let (id, attempt) = (&witness.id, witness.attempt);
                    self.wrong(format!(
                        "{id}: it ran as attempt {attempt} and nothing should have disturbed it, but {end:?}"
                    ));
                }
                return;
            }
            std::thread::sleep(Duration::from_millis(100));
        }
        self.wrong(format!("{}: it has not ended within {END_LIMIT:?}", witness.id));
    }
}
