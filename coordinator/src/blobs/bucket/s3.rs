//! The S3 protocol: whole puts, puts in parts, ranges, removal, listing. Every request has an end.
//!
//! Requests are signed with the digest of what they carry, so that a server takes no bytes that changed on the way.

use std::error::Error as _;
use std::fmt::Write as _;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use anyhow::Context;
use bytes::Bytes;
use futures::TryStreamExt;
use object_store::aws::{AmazonS3, AmazonS3Builder, AmazonS3ConfigKey, AwsCredential};
use object_store::path::Path as Key;
use object_store::{
    Certificate, ClientOptions, CredentialProvider, Error, GetOptions, GetRange, ObjectStore, ObjectStoreExt,
    PutPayload, RetryConfig,
};

use super::{BucketError, Patience};
use crate::blobs::BlobError;
use crate::blobs::large::format::LargeBlob;
use crate::config::S3;

/// A part of an upload: what is held in memory. A server takes 10,000 of them, and wants them of one size.
const PART_BYTES: u64 = 8 << 20;
const PARTS_MAX: u64 = 9_000;

/// Objects that one listing tells of: more are found by the next.
const LISTED_MAX: usize = 10_000;

/// Bytes of what a server says that are passed on to people.
const SAID_BYTES_MAX: usize = 300;

/// What the standard variables may say about credentials. Where the bucket is they do not say: that is the configuration's.
const VARIABLES: [&str; 9] = [
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_ROLE_ARN",
    "AWS_ROLE_SESSION_NAME",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
    "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE",
];

pub(super) struct Client {
    store: AmazonS3,
    root: String,
    patience: Patience,
}

impl Client {
    pub(super) fn new(settings: &S3, name: &str, patience: Patience) -> anyhow::Result<Self> {
        // Who asks for a TLS configuration without naming a provider gets the process's; everybody else names ring.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let mut options = ClientOptions::new()
            .with_allow_http(settings.allow_http)
            .with_connect_timeout(patience.connect)
            .with_timeout(patience.request);
        if let Some(path) = &settings.ca_file {
            let wrong = || format!("blobs.s3.ca_file: {}", path.display());
            let pem = std::fs::read(path).with_context(wrong)?;
            let certificates = Certificate::from_pem_bundle(&pem).with_context(wrong)?;
            anyhow::ensure!(!certificates.is_empty(), "{}: there is no certificate in it", wrong());
            options = certificates.into_iter().fold(options, ClientOptions::with_root_certificate);
        }
        let retry =
            RetryConfig { max_retries: patience.retries, retry_timeout: patience.request, ..RetryConfig::default() };
        let mut builder = AmazonS3Builder::new()
            .with_bucket_name(&settings.bucket)
            .with_region(&settings.region)
            .with_virtual_hosted_style_request(settings.virtual_hosted_style)
            .with_client_options(options)
            .with_allow_http(settings.allow_http)
            .with_disable_bulk_delete(true)
            .with_retry(retry);
        if let Some(endpoint) = &settings.endpoint {
            builder = builder.with_endpoint(endpoint);
        }
        builder = match (&settings.access_key_id_file, &settings.secret_access_key_file) {
            (Some(id), Some(secret)) => {
                let files = KeyFiles { id: id.clone(), secret: secret.clone() };
                files.read()?;
                builder.with_credentials(Arc::new(files))
            }
            _ => VARIABLES.iter().fold(builder, |builder, variable| {
                match (std::env::var(variable), variable.to_lowercase().parse()) {
                    (Ok(value), Ok(key)) => builder.with_config(AmazonS3ConfigKey::clone(&key), value),
                    _ => builder,
                }
            }),
        };
        let root = [settings.prefix.trim_matches('/'), name].into_iter().filter(|part| !part.is_empty());
        let root = root.collect::<Vec<_>>().join("/");
        Ok(Self { store: builder.build().context("blobs.s3")?, root, patience })
    }

    /// What all keys begin with.
    pub(super) fn root(&self) -> &str {
        &self.root
    }

    fn key(&self, name: &str) -> Key {
        Key::from(format!("{}/{name}", self.root))
    }

    /// Some bytes of an object, fewer if it ends before, and how long it is.
    pub(super) async fn get(&self, name: &str, range: Range<u64>) -> Result<(Bytes, u64), BucketError> {
        let mut outcome = Err(BucketError::Away("it was not asked".to_owned()));
        for _ in 0..2 {
            let once = self.get_once(name, range.clone());
            outcome = match tokio::time::timeout(self.patience.read, once).await {
                Ok(outcome) => outcome,
                Err(_) => Err(BucketError::Away(format!("no answer within {:?}", self.patience.read))),
            };
            if !matches!(outcome, Err(BucketError::Away(_))) {
                break;
            }
        }
        outcome
    }

    async fn get_once(&self, name: &str, range: Range<u64>) -> Result<(Bytes, u64), BucketError> {
        let options = GetOptions { range: Some(GetRange::Bounded(range)), ..GetOptions::default() };
        let got = match self.store.get_opts(&self.key(name), options).await {
            Ok(got) => got,
            // It ends before the first byte that was asked for.
            Err(error) if text_of(&error).contains("InvalidRange") => return Ok((Bytes::new(), 0)),
            Err(error) => return Err(told(&error)),
        };
        let whole = got.meta.size;
        got.bytes().await.map(|bytes| (bytes, whole)).map_err(|error| told(&error))
    }

    pub(super) async fn put(&self, name: &str, data: Bytes) -> Result<(), BucketError> {
        self.store.put(&self.key(name), data.into()).await.map(|_| ()).map_err(|error| told(&error))
    }

    /// Puts bytes and checksums of a file, at once if they are few, else in parts.
    pub(super) async fn put_file(&self, name: &str, blob: &LargeBlob) -> Result<(), BucketError> {
        let whole = blob.tail().whole();
        let part_bytes = PART_BYTES.max(whole.div_ceil(PARTS_MAX));
        let mut parts = Parts { blob, at: 0, rest: Bytes::new() };
        if whole <= part_bytes {
            let payload = parts.next(part_bytes).await?;
            return self.store.put(&self.key(name), payload).await.map(|_| ()).map_err(|error| told(&error));
        }
        let mut upload = self.store.put_multipart(&self.key(name)).await.map_err(|error| told(&error))?;
        let outcome = async {
            loop {
                let payload = parts.next(part_bytes).await?;
                if payload.content_length() == 0 {
                    return upload.complete().await.map(|_| ()).map_err(|error| told(&error));
                }
                upload.put_part(payload).await.map_err(|error| told(&error))?;
            }
        };
        let outcome = outcome.await;
        if outcome.is_err() {
            // Parts that stay are the bucket's rule to remove.
            let _ = upload.abort().await;
        }
        outcome
    }

    pub(super) async fn delete(&self, name: &str) -> Result<(), BucketError> {
        self.store.delete(&self.key(name)).await.map_err(|error| told(&error))
    }

    /// Names of objects that are wanted and were put at least `age` ago, at most [`LISTED_MAX`] of them.
    pub(super) async fn list(&self, age: Duration, wanted: impl Fn(&str) -> bool) -> Result<Vec<String>, BucketError> {
        let before = SystemTime::now().checked_sub(age).unwrap_or(SystemTime::UNIX_EPOCH);
        let mut found = Vec::new();
        let mut listed = self.store.list(Some(&Key::from(self.root.as_str())));
        while let Some(object) = listed.try_next().await.map_err(|error| told(&error))? {
            let name =
                object.location.as_ref().strip_prefix(self.root.as_str()).and_then(|name| name.strip_prefix('/'));
            found.extend(
                name.filter(|name| SystemTime::from(object.last_modified) <= before && wanted(name)).map(str::to_owned),
            );
            if found.len() >= LISTED_MAX {
                break;
            }
        }
        Ok(found)
    }
}

/// A file cut into parts of one size, each chunk checked before it goes.
struct Parts<'a> {
    blob: &'a LargeBlob,
    /// Bytes of the blob that were read.
    at: u64,
    /// What was read and did not fit.
    rest: Bytes,
}

impl Parts<'_> {
    /// The next part; empty behind the last.
    async fn next(&mut self, bytes: u64) -> Result<PutPayload, BucketError> {
        let mut left = usize::try_from(bytes).unwrap_or(usize::MAX);
        let mut part = Vec::new();
        while left > 0 {
            if self.rest.is_empty() {
                self.rest = self.read().await?;
            }
            if self.rest.is_empty() {
                break;
            }
            let piece = self.rest.split_to(left.min(self.rest.len()));
            left -= piece.len();
            part.push(piece);
        }
        Ok(part.into_iter().collect())
    }

    async fn read(&mut self) -> Result<Bytes, BucketError> {
        let size = self.blob.size();
        if self.at == size {
            self.at += 1;
            return Ok(self.blob.tail().bytes().clone());
        }
        if self.at > size {
            return Ok(Bytes::new());
        }
        let chunk = self.blob.chunk(self.at).await.map_err(|error| match error {
            BlobError::Damaged(_) => BucketError::Damaged,
            error => BucketError::Away(error.to_string()),
        })?;
        self.at += chunk.len() as u64;
        Ok(chunk)
    }
}

/// A key in two files, read for each request: a new one is taken without a restart.
#[derive(Clone, Debug)]
struct KeyFiles {
    id: PathBuf,
    secret: PathBuf,
}

impl KeyFiles {
    fn read(&self) -> anyhow::Result<AwsCredential> {
        let read = |key: &str, path: &Path| {
            let text = std::fs::read_to_string(path).with_context(|| format!("blobs.s3.{key}: {}", path.display()))?;
            let text = text.trim();
            anyhow::ensure!(!text.is_empty(), "blobs.s3.{key}: {} is empty", path.display());
            Ok(text.to_owned())
        };
        let key_id = read("access_key_id_file", &self.id)?;
        Ok(AwsCredential { key_id, secret_key: read("secret_access_key_file", &self.secret)?, token: None })
    }
}

#[tonic::async_trait]
impl CredentialProvider for KeyFiles {
    type Credential = AwsCredential;

    async fn get_credential(&self) -> object_store::Result<Arc<AwsCredential>> {
        let files = self.clone();
        let read = tokio::task::spawn_blocking(move || files.read()).await;
        let key = read.map_err(anyhow::Error::from).and_then(|key| key);
        key.map(Arc::new).map_err(|error| Error::Generic { store: "S3", source: error.into() })
    }
}

/// What an error is to us, in words that carry nothing of a request.
fn told(error: &Error) -> BucketError {
    let text = text_of(error);
    let said = said(&text);
    match error {
        // A proxy that knows nothing of buckets says 404, too.
        Error::NotFound { .. } if text.contains("<Code>NoSuchKey</Code>") => BucketError::Missing,
        Error::NotFound { .. } if text.contains("<Code>NoSuchBucket</Code>") => BucketError::Refused(said),
        Error::PermissionDenied { .. } | Error::Unauthenticated { .. } | Error::NotImplemented { .. } => {
            BucketError::Refused(said)
        }
        _ => BucketError::Away(said),
    }
}

fn text_of(error: &Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        let _ = write!(text, ": {error}");
        source = error.source();
    }
    text
}

/// A server's own code and message, or else the end of the chain of errors, which is where the reason is.
fn said(text: &str) -> String {
    let between = |tag: &str| {
        let (_, from) = text.split_once(&format!("<{tag}>"))?;
        from.split_once(&format!("</{tag}>")).map(|(inside, _)| inside)
    };
    let mut said = match (between("Code"), between("Message")) {
        (Some(code), message) => [Some(code), message].into_iter().flatten().collect::<Vec<_>>().join(": "),
        (None, _) => text.rsplit(": ").take(3).collect::<Vec<_>>().into_iter().rev().collect::<Vec<_>>().join(": "),
    };
    said.truncate(said.floor_char_boundary(SAID_BYTES_MAX));
    said.replace(char::is_control, " ")
}
