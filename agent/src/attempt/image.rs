//! What a podman build is before and after its command: an order for podman, and an image that leaves the host.
//!
//! Every step can be done again: an agent that starts in the middle finds the runner's result and the image, and goes on.
//! A stop that is wished meanwhile ends a step; whoever needs to know that it is dead waits for `Attempt::steps`.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use helix_agent_core::{Artifact, Assignment, Image, SealedLog, Verdict};
use helix_model::{Digest, Executor, Outputs, Reason};
use helix_runner::{AttemptDir, End, Order, Outcome};
use rustix::fs::{CWD, Mode, OFlags, openat};
use serde::Deserialize;
use tokio_util::task::AbortOnDropHandle;

use super::finish::Failure;
use super::{Attempt, RETRY};
use crate::blocking::blocking;
use crate::data_dir::make_private;
use crate::executor::podman::{Finished, Standing, build, context, failure, guard};
use crate::stores::StoreError;
use crate::stores::body::{Body, Source};

/// The artifact that holds an image: an OCI archive.
const ARCHIVE: &str = "image.tar";

/// How long looking at an image may take.
const LOOK_LIMIT: Duration = Duration::from_secs(120);

/// How long writing an image to disk may take.
const EXPORT_LIMIT: Duration = Duration::from_secs(3600);

/// Between two looks at what a build takes of the store, at least, and so many times as long as a look takes.
const STORE_LOOK: Duration = Duration::from_millis(300);
const STORE_LOOK_FACTOR: u32 = 4;

/// What a build that ended well leaves.
pub(super) struct Delivered {
    pub(super) image: Image,
    pub(super) artifacts: Vec<Artifact>,
    /// The index of all platforms' images, if this attempt pushed it.
    pub(super) index: Option<Digest>,
}

/// What podman says of an image.
#[derive(Deserialize)]
struct Inspected {
    #[serde(rename = "Id")]
    id: String,
    #[serde(rename = "Digest")]
    digest: String,
    #[serde(rename = "Size")]
    size: u64,
    #[serde(rename = "ManifestType", default)]
    media_type: String,
}

/// The index of an OCI layout.
#[derive(Deserialize)]
struct Layout {
    manifests: Vec<Descriptor>,
}

#[derive(Deserialize)]
struct Descriptor {
    #[serde(rename = "mediaType")]
    media_type: String,
    digest: String,
    size: u64,
}

pub(super) fn is_podman(assignment: &Assignment) -> bool {
    assignment.spec.executor == Some(Executor::Podman)
}

impl Attempt {
    /// The order of a podman build. Its Dockerfile is looked at first.
    pub(super) async fn podman_order(&self, order: Order, assignment: &Assignment) -> Result<Order, Verdict> {
        let failed = |(reason, message)| Verdict::Failed { reason, message };
        let podman = &self.services.podman;
        // An attempt that was found at the start may be here before podman was tried.
        let standing = podman.standing().wait_for(|standing| *standing != Standing::Untried).await.map(|it| it.clone());
        let standing = standing.unwrap_or(Standing::Untried);
        let Standing::Works(facts) = &standing else {
            return Err(failed((Reason::Internal, format!("podman: {}", standing.words()))));
        };
        let (work, wanted) = (self.workdir.work(), assignment.spec.dockerfile_path.clone());
        let network = self.services.config.podman.network.clone();
        let tmp = self.workdir.tmp();
        let found = blocking(move || {
            make_private(&tmp)?;
            Ok(context::dockerfile(&work, &wanted, &network))
        })
        .await;
        let dockerfile = found
            .map_err(|error| failed((Reason::Internal, format!("cannot look for the Dockerfile: {error}"))))?
            .map_err(failed)?;
        let cluster = &self.services.cluster;
        let place = build::Place { workdir: &self.workdir, dir: &self.dir, cluster, facts };
        let amounts = self.services.limiter.amounts(&assignment.spec.resources);
        let wanted = amounts.map_err(|message| failed((Reason::Policy, message)))?.wanted;
        let limits = podman.limit(&self.key, facts, wanted, order.limits).await;
        let limits = limits.map_err(|error| failed(internal("limit the build", &error)))?;
        Ok(podman.order(Order { limits, ..order }, assignment, &dockerfile, place))
    }

    /// What a failed `podman build` failed of.
    pub(super) async fn why_podman_failed(&self, outcome: &Outcome) -> Option<Verdict> {
        let End::Exited(code @ 1..) = outcome.end else { return None };
        let (dir, spool) = (self.dir.clone(), self.dir.clone());
        match blocking(move || guard::refusal(&spool)).await {
            Ok(Some(message)) => return Some(Verdict::Failed { reason: Reason::Policy, message }),
            Ok(None) => {}
            Err(error) => tracing::warn!(attempt = %self.key, %error, "what was refused cannot be read"),
        }
        let complaint = blocking(move || failure::last_complaint(&dir)).await.unwrap_or_else(|error| {
            tracing::warn!(attempt = %self.key, %error, "the log cannot be read");
            None
        });
        let (reason, message) = failure::classify(i32::from(code), complaint.as_deref());
        Some(Verdict::Failed { reason, message })
    }

    /// Has a build stopped that takes more of the store than it may. Goes on as long as the build.
    pub(super) fn watch_store(&self, assignment: &Assignment) -> Option<AbortOnDropHandle<()>> {
        let amounts = is_podman(assignment).then(|| self.services.limiter.amounts(&assignment.spec.resources))?.ok()?;
        let (services, key, dir) = (Arc::clone(&self.services), self.key.clone(), self.dir.clone());
        let over_store = Arc::clone(&self.over_store);
        let files_max = match services.config.limits.files {
            0 => u64::MAX,
            files => files,
        };
        Some(AbortOnDropHandle::new(tokio::spawn(async move {
            let since = std::fs::metadata(dir.root()).and_then(|dir| dir.created());
            let since = since.unwrap_or_else(|_| std::time::SystemTime::now());
            let mut pause = STORE_LOOK;
            loop {
                tokio::time::sleep(pause).await;
                let began = tokio::time::Instant::now();
                // A list that podman is about to replace is read next time.
                let Ok(used) = services.podman.usage(&key, since).await else { continue };
                pause = STORE_LOOK.max(began.elapsed() * STORE_LOOK_FACTOR);
                if amounts.disk_bytes.is_some_and(|most| used.bytes > most) || used.files > files_max {
                    tracing::info!(attempt = %key, ?used, "a build takes more of the store than it may");
                    // Told first: whoever judges the end may be another agent than this one.
                    let mark = own_limit_mark(&dir);
                    if let Err(error) = blocking(move || std::fs::write(mark, "")).await {
                        tracing::warn!(attempt = %key, %error, "that it was its own limit cannot be noted");
                    }
                    // Only who follows the runner reaches it: it has no socket while somebody does.
                    over_store.notify_one();
                }
            }
        })))
    }

    /// Removes build containers and whatever else podman left of this attempt, whose processes are dead.
    pub(super) async fn sweep_podman(&self) {
        let dead = BTreeSet::from([self.key.clone()]);
        while let Err(error) = self.services.podman.sweep(&self.steps, &dead).await {
            tracing::error!(attempt = %self.key, %error, "what podman left cannot be removed; trying again");
            tokio::time::sleep(RETRY).await;
        }
    }

    /// Sees the image off the host: pushed, or exported and stored. Then the log is stored, too.
    pub(super) async fn deliver_all(&self, assignment: &Assignment) -> Result<(Delivered, SealedLog), Verdict> {
        let all = async {
            // An agent that no leader has spoken to yet pushes nothing: others may have, by now.
            self.services.stores.nodes().settings().await;
            let mut delivered = self.deliver_image(assignment).await?;
            if assignment.spec.pushes_index() {
                delivered.index = self.settle_index(assignment, &delivered.image).await?;
            }
            let deadline = self.services.stores.nodes().settings().await.store_deadline;
            let late = |_| (Reason::Artifact, format!("the log could not be stored within {deadline:?}"));
            let log = tokio::time::timeout(deadline, self.store_log()).await.map_err(late)??;
            Ok((delivered, log))
        };
        let result = tokio::select! {
            cause = self.stop_wished() => Err(super::prepare::stopped(cause)),
            all = all => all.map_err(|(reason, message)| Verdict::Failed { reason, message }),
        };
        if result.is_err() {
            self.steps_are_dead().await;
        }
        result
    }

    /// Waits until no step of this attempt runs.
    pub(super) async fn steps_are_dead(&self) {
        self.steps.close();
        self.steps.wait().await;
        self.steps.reopen();
    }

    async fn deliver_image(&self, assignment: &Assignment) -> Result<Delivered, Failure> {
        let _share = self.services.podman.share().await.map_err(|error| internal("lock the store", &error))?;
        let name = build::local_name(assignment);
        let inspected = self.inspect(&name).await?;
        let mut image = Image {
            digest: digest(&inspected.digest)?,
            size: inspected.size,
            id: digest(&inspected.id)?,
            manifest_size: 0,
            media_type: inspected.media_type,
        };
        self.log_line(format!("built {name}, image id {}, {} bytes", image.id, image.size)).await;
        let spec = &assignment.spec;
        let mut artifacts = Vec::new();
        if !spec.push.is_empty() {
            image.digest = self.push_image(assignment, &inspected.id).await?;
        } else if spec.outputs != Outputs::None {
            let (descriptor, archive) = self.export(&inspected.id, &name).await?;
            image.digest = digest(&descriptor.digest)?;
            (image.manifest_size, image.media_type) = (descriptor.size, descriptor.media_type);
            artifacts.push(archive);
        }
        self.log_line(format!("image digest sha256:{}", image.digest)).await;
        // Its layers stay as a cache, until they are pruned.
        match self.step(vec!["untag".into(), name.clone().into()], LOOK_LIMIT).await {
            Ok(done) if done.success() => {}
            Ok(done) => tracing::debug!(attempt = %self.key, complaint = done.complaint(), "cannot untag {name}"),
            Err(error) => tracing::debug!(attempt = %self.key, %error, "cannot untag {name}"),
        }
        Ok(Delivered { image, artifacts, index: None })
    }

    /// Only an image that exists makes a success.
    async fn inspect(&self, name: &str) -> Result<Inspected, Failure> {
        let id_file = build::id_file(&self.dir);
        let id = blocking(move || std::fs::read_to_string(id_file)).await;
        let id = id.map_err(|error| internal("read what podman built", &error))?;
        let id = id.trim().trim_start_matches("sha256:").to_owned();
        // By its id: an earlier agent may have taken the name away already.
        let arguments = ["image", "inspect", "--format", "json", "--", &id].map(OsString::from).to_vec();
        let done = self.step(arguments, LOOK_LIMIT).await.map_err(|error| internal("run podman", &error))?;
        if !done.success() {
            let message = format!("podman build ended well, but there is no image {name}: {}", done.complaint());
            return Err((Reason::Internal, message));
        }
        let mut found: Vec<Inspected> = serde_json::from_str(&done.stdout)
            .map_err(|error| (Reason::Internal, format!("podman image inspect says what cannot be read: {error}")))?;
        match found.pop() {
            Some(image) if image.id == id => Ok(image),
            _ => Err((Reason::Internal, format!("podman image inspect does not know the image {id}"))),
        }
    }

    /// Writes the image as an OCI layout and stores that as a tar, which is the same for the same image.
    async fn export(&self, id: &str, name: &str) -> Result<(Descriptor, Artifact), Failure> {
        let place = self.workdir.tmp().join("image");
        let old = place.clone();
        let cleared = blocking(move || super::remove_tree(&old)).await;
        cleared.map_err(|error| internal("clear the way for the image", &error))?;
        let destination = OsString::from_iter(["oci:".into(), place.clone().into_os_string(), ":".into(), name.into()]);
        let arguments = vec!["push".into(), "--quiet".into(), "--".into(), id.into(), destination];
        let done = self.step(arguments, EXPORT_LIMIT).await.map_err(|error| internal("export the image", &error))?;
        if !done.success() {
            let reason = if done.stderr.contains("no space left") { Reason::DiskFull } else { Reason::Artifact };
            return Err((reason, format!("the image cannot be exported: {}", done.complaint())));
        }
        let nodes = self.services.stores.nodes();
        let (limit, deadline) = {
            let settings = nodes.settings().await;
            (settings.blob_bytes_max, settings.store_deadline)
        };
        let measured = blocking(move || {
            let layout: Layout = serde_json::from_slice(&std::fs::read(place.join("index.json"))?)?;
            let manifest = layout.manifests.into_iter().next().ok_or(io::ErrorKind::UnexpectedEof)?;
            let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let directory: OwnedFd = openat(CWD, &place, flags, Mode::empty())?;
            Ok((manifest, Body::measure(Source::Tree(Arc::new(directory)), limit)?))
        });
        let (manifest, body) = measured.await.map_err(|error| match error.kind() {
            io::ErrorKind::FileTooLarge => (Reason::Policy, format!("the image has more than {limit} bytes")),
            _ => internal("read the exported image", &error),
        })?;
        let stored = tokio::time::timeout(deadline, self.services.stores.put(&body)).await;
        let late = |_| (Reason::Artifact, format!("the image could not be stored within {deadline:?}"));
        let blob = stored.map_err(late)?.map_err(|error| {
            let reason = if matches!(error, StoreError::Refused(_)) { Reason::Policy } else { Reason::Artifact };
            (reason, format!("the image cannot be stored: {error}"))
        })?;
        Ok((manifest, Artifact { name: ARCHIVE.to_owned(), blob }))
    }

    pub(super) async fn step(&self, arguments: Vec<OsString>, limit: Duration) -> io::Result<Finished> {
        self.services.podman.run(&self.steps, arguments, &self.workdir.tmp(), limit).await
    }

    pub(super) async fn log_step(&self, done: &Finished) {
        let said = format!("{}{}", done.stdout, done.stderr);
        if !said.trim().is_empty() {
            self.log_line(said).await;
        }
    }
}

/// There when a build was stopped for what it took of podman's store, and not for the host's want of room.
pub(super) fn own_limit_mark(dir: &AttemptDir) -> PathBuf {
    dir.root().join("beyond-own-limit")
}

pub(super) fn digest(text: &str) -> Result<Digest, Failure> {
    let hex = text.trim().trim_start_matches("sha256:");
    Digest::parse(hex).map_err(|_| (Reason::Internal, format!("podman names a digest that is none: {text:?}")))
}

pub(super) fn internal(what: &str, error: &io::Error) -> Failure {
    (crate::source::reason_of(error), format!("cannot {what}: {error}"))
}
