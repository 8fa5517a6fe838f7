//! Images on their way to a registry, and the index that names those of all platforms.
//!
//! Every step can be done again, and is, with pauses, until the time for pushing is over: what is at the registry already is
//! not sent again. Who pushes the index the cluster's registry decides, once it knows all images; until it has said so, an
//! attempt of a build for several platforms does not end well.

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use helix_agent_core::{Assignment, Event, Image, PlatformImage};
use helix_common::backoff::Backoff;
use helix_model::{Digest, Reason};
use tokio::time::Instant;

use super::Attempt;
use super::finish::Failure;
use super::image::{digest, internal};
use crate::blocking::blocking;
use crate::executor::podman::{build, guard, platform_suffix};

/// What is pushed.
#[derive(Clone, Copy)]
enum Pushed<'a> {
    /// An image, by its id.
    Image(&'a str),
    /// The index of images that the registry has.
    Index(&'a [PlatformImage]),
}

impl Pushed<'_> {
    fn word(self) -> &'static str {
        match self {
            Self::Image(_) => "image",
            Self::Index(_) => "index",
        }
    }
}

/// Why a try failed, in podman's words.
type Complaint = String;

impl Attempt {
    /// Pushes the image; gives its digest there.
    pub(super) async fn push_image(&self, assignment: &Assignment, id: &str) -> Result<Digest, Failure> {
        self.push(Pushed::Image(id), &image_reference(assignment)?).await
    }

    /// Has the cluster know the image, waits for what follows from it, and pushes the index if that falls to this attempt.
    pub(super) async fn settle_index(&self, assignment: &Assignment, image: &Image) -> Result<Option<Digest>, Failure> {
        self.say(Event::ImagePushed(self.key.clone(), image.clone())).await;
        let mut wished = self.wished.clone();
        let given = wished.wait_for(|wishes| wishes.images.is_some()).await.ok().and_then(|it| it.images.clone());
        // None: the agent is ending.
        let Some(images) = given else { return std::future::pending().await };
        if images.is_empty() {
            return Ok(None);
        }
        let _share = self.services.podman.share().await.map_err(|error| internal("lock the store", &error))?;
        let reference = assignment.spec.push.trim_start_matches("docker://");
        let digest = self.push(Pushed::Index(&images), reference).await?;
        let platforms: Vec<&str> = images.iter().map(|image| image.platform.as_str()).collect();
        self.log_line(format!("pushed the index of {} to {reference}, digest sha256:{digest}", platforms.join(", ")))
            .await;
        Ok(Some(digest))
    }

    /// A failure is tried again, with pauses, until the time for it is over.
    async fn push(&self, what: Pushed<'_>, reference: &str) -> Result<Digest, Failure> {
        let deadline = Instant::now() + self.services.podman.push_limit();
        let mut backoff = Backoff::new(Duration::from_secs(1), Duration::from_secs(30));
        let word = what.word();
        let mut before: Option<Complaint> = None;
        loop {
            let pushed = match what {
                Pushed::Image(id) => self.push_image_once(id, reference, deadline).await?,
                Pushed::Index(images) => self.push_index_once(images, reference, deadline).await?,
            };
            let complaint = match pushed {
                Ok(digest) => return Ok(digest),
                Err(complaint) => complaint,
            };
            // A try that time cut short tells less than the one before it.
            let cut_short = Instant::now() >= deadline;
            let complaint = before.take_if(|_| cut_short).unwrap_or(complaint);
            let wait = backoff.next_wait();
            if Instant::now() + wait >= deadline {
                return Err((Reason::Push, format!("the {word} cannot be pushed to {reference}: {complaint}")));
            }
            let seconds = wait.as_secs_f64().ceil();
            let pushing = match what {
                Pushed::Image(_) => "pushing",
                Pushed::Index(_) => "pushing the index",
            };
            self.log_line(format!("{pushing} failed; trying again in {seconds:.0} s")).await;
            before = Some(complaint);
            tokio::time::sleep(wait).await;
        }
    }

    async fn push_image_once(
        &self,
        id: &str,
        reference: &str,
        deadline: Instant,
    ) -> Result<Result<Digest, Complaint>, Failure> {
        let digest_file = self.dir.root().join("push-digest");
        let arguments = vec![
            "push".into(),
            self.services.podman.tls_verify(),
            digest_option(&digest_file),
            "--".into(),
            id.into(),
            destination(reference),
        ];
        match self.push_step(arguments, deadline).await {
            Ok(()) => pushed_digest(digest_file).await.map(Ok),
            Err(complaint) => Ok(Err(complaint)),
        }
    }

    /// The list is made anew each time: half of one may be left of a try before.
    async fn push_index_once(
        &self,
        images: &[PlatformImage],
        reference: &str,
        deadline: Instant,
    ) -> Result<Result<Digest, Complaint>, Failure> {
        let Some((name, _)) = build::split_reference(reference) else {
            return Err(no_tag(reference));
        };
        let (list, verify) = (build::list_name(&self.key), self.services.podman.tls_verify());
        let digest_file = self.dir.root().join("index-digest");
        let _ = self.step(words(["manifest", "rm", &list]), left(deadline)).await;
        let mut steps = vec![words(["manifest", "create", &list])];
        for image in images {
            let (mut platform, mut add) = (image.platform.as_str().split('/'), words(["manifest", "add"]));
            add.push(verify.clone());
            for option in ["--os", "--arch", "--variant"] {
                if let Some(value) = platform.next() {
                    add.push(format!("{option}={value}").into());
                }
            }
            add.extend(["--".into(), list.clone().into(), destination(&format!("{name}@sha256:{}", image.digest))]);
            steps.push(add);
        }
        let mut push = words(["manifest", "push", "--all=false", "--format=oci"]);
        push.extend([verify, digest_option(&digest_file), "--".into(), list.into(), destination(reference)]);
        steps.push(push);
        for step in steps {
            if let Err(complaint) = self.push_step(step, deadline).await {
                return Ok(Err(complaint));
            }
        }
        pushed_digest(digest_file).await.map(Ok)
    }

    async fn push_step(&self, arguments: Vec<OsString>, deadline: Instant) -> Result<(), Complaint> {
        match self.step(arguments, left(deadline)).await {
            Ok(done) => {
                self.log_step(&done).await;
                if done.success() { Ok(()) } else { Err(done.complaint()) }
            }
            Err(error) => Err(error.to_string()),
        }
    }
}

fn words<const N: usize>(words: [&str; N]) -> Vec<OsString> {
    words.map(OsString::from).to_vec()
}

fn left(deadline: Instant) -> Duration {
    deadline.saturating_duration_since(Instant::now())
}

fn digest_option(file: &std::path::Path) -> OsString {
    OsString::from_iter(["--digestfile=".into(), file.as_os_str().to_owned()])
}

/// Never another transport: those write files on this host.
fn destination(reference: &str) -> OsString {
    format!("docker://{reference}").into()
}

async fn pushed_digest(file: PathBuf) -> Result<Digest, Failure> {
    let text = blocking(move || guard::read_small(&file)).await;
    digest(&text.map_err(|error| internal("read what was pushed", &error))?)
}

/// Where the image goes. Tasks of one build must not take each other's place: each has its platform behind the tag.
fn image_reference(assignment: &Assignment) -> Result<String, Failure> {
    let whole = assignment.spec.push.trim_start_matches("docker://");
    match &assignment.platform {
        Some(platform) if assignment.spec.task_count() > 1 => {
            build::platform_reference(whole, &platform_suffix(platform)).ok_or_else(|| no_tag(whole))
        }
        _ => Ok(whole.to_owned()),
    }
}

fn no_tag(reference: &str) -> Failure {
    (Reason::Push, format!("images of several platforms cannot be pushed to the digest {reference}"))
}
