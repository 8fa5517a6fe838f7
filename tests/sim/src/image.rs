//! Images of several platforms, as agents of the simulation push them: the image first, and then the index, if that falls to
//! the attempt. A registry of images is a map from an index to what it names.

use helix_core::command::{self as cmd, Outcome};
use helix_core::record::Image;
use helix_core::{Command, Known};
use helix_model::{AttemptKey, Digest, Platform};

use super::agent::Phase;
use super::world::World;

/// An image that was pushed, and the report that has to wait for what follows from it.
#[derive(Clone, Debug)]
pub(super) struct Pushed {
    image: Image,
    report: cmd::FinishAttempt,
}

impl Pushed {
    pub(super) fn command(&self) -> Command {
        let cmd::FinishAttempt { key, worker, instance, .. } = self.report.clone();
        Command::RecordImage(cmd::RecordImage { key, worker, instance, image: self.image.clone() })
    }
}

impl World {
    /// What an attempt does whose command ended so: it reports, or pushes an image before.
    pub(super) fn after_the_end(&self, report: cmd::FinishAttempt) -> Phase {
        let pushes = |id| {
            let known = self.registry.nodes.iter().find_map(|node| node.state.build(id));
            matches!(known, Some(Known::Open(build)) if build.spec.pushes_index())
        };
        if matches!(report.outcome, Outcome::Succeeded { .. }) && pushes(&report.key.build) {
            let image = image(&report.key);
            let outcome = Outcome::Succeeded { digest: Some(image.digest), size: image.size, image_tag: String::new() };
            return Phase::Pushed(Box::new(Pushed { image, report: cmd::FinishAttempt { outcome, ..report } }));
        }
        Phase::Reporting(Box::new(report))
    }

    /// It is known who pushes the index.
    pub(super) fn images_given(&mut self, agent: usize, key: &AttemptKey, images: Vec<(Platform, Digest)>) {
        let Some((phase @ Phase::Pushed(_), again)) = self.agents[agent].runs.get_mut(key) else { return };
        let Phase::Pushed(pushed) = phase.clone() else { return };
        let Pushed { image, mut report } = *pushed;
        report.image = Some(image);
        if !images.is_empty() {
            let index = digest(key, 1);
            self.oracle.indexes.insert(index, images);
            report.index = Some(index);
        }
        (*phase, *again) = (Phase::Reporting(Box::new(report)), 0);
    }

    /// The registry wants no image of it: its report tells the rest.
    pub(super) fn image_refused(&mut self, agent: usize, key: &AttemptKey) {
        if let Some((phase @ Phase::Pushed(_), again)) = self.agents[agent].runs.get_mut(key)
            && let Phase::Pushed(pushed) = phase.clone()
        {
            (*phase, *again) = (Phase::Reporting(Box::new(pushed.report)), 0);
        }
    }
}

fn image(key: &AttemptKey) -> Image {
    Image { digest: digest(key, 0), size: 1, id: digest(key, 2), manifest_size: 0, media_type: String::new() }
}

/// Tells attempts apart, and what is made of them.
fn digest(key: &AttemptKey, kind: u8) -> Digest {
    let mut out = [kind; 32];
    for (place, byte) in key.to_string().bytes().enumerate() {
        out[1 + place % 31] = out[1 + place % 31].wrapping_mul(31).wrapping_add(byte);
    }
    Digest(out)
}
