//! `[blobs.s3]`: the bucket that large blobs move to, in Amazon's S3 or anything that speaks as it does.
//!
//! Keys stand in files, or in the standard variables (`AWS_ACCESS_KEY_ID` and its kin), never here.

use std::path::{Path, PathBuf};
use std::time::Duration;

use helix_common::config::{ConfigError, values};
use serde::{Deserialize, Serialize};

use crate::blobs::Moves;

/// A bucket, and what goes there when.
#[derive(Clone, PartialEq, Eq, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct S3 {
    /// Its name.
    pub bucket: String,
    /// What all keys begin with. Nodes, and clusters, may share it: each has a part of its own below.
    #[serde(default = "default_prefix")]
    pub prefix: String,
    /// Its region.
    #[serde(default = "default_region")]
    pub region: String,
    /// Another server than Amazon's: `https://HOST[:PORT]`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub endpoint: Option<String>,
    /// Speak to the endpoint without TLS. Then whoever is on the way reads the bytes.
    #[serde(default)]
    pub allow_http: bool,
    /// The bucket stands in the host's name and not in the path.
    #[serde(default)]
    pub virtual_hosted_style: bool,
    /// A file with the id of the key.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub access_key_id_file: Option<PathBuf>,
    /// A file with the key itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub secret_access_key_file: Option<PathBuf>,
    /// Who is trusted to sign the endpoint's certificate, beside whom the system trusts; PEM.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ca_file: Option<PathBuf>,
    /// How long a blob stays on the disk before it goes.
    #[serde(default = "default_after", with = "values::duration")]
    pub after: Duration,
    /// Bring back to the disk what is in the bucket, and put nothing there.
    #[serde(default)]
    pub recall: bool,
}

fn default_prefix() -> String {
    "helix".to_owned()
}

fn default_region() -> String {
    "us-east-1".to_owned()
}

fn default_after() -> Duration {
    Duration::from_secs(600)
}

impl S3 {
    /// Which blobs move, and when.
    #[must_use]
    pub fn moves(&self) -> Moves {
        Moves { after: self.after, recall: self.recall }
    }

    pub(super) fn relative_to(mut self, directory: &Path) -> Self {
        for file in [&mut self.access_key_id_file, &mut self.secret_access_key_file, &mut self.ca_file] {
            *file = file.take().map(|file| directory.join(file));
        }
        self
    }

    pub(super) fn check(&self) -> Result<(), ConfigError> {
        let wrong = |key: &str, why: String| {
            Err(ConfigError::Value { key: format!("blobs.s3.{key}"), origin: "the configuration".to_owned(), why })
        };
        let is_name = |name: &str| name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte));
        if self.bucket.is_empty() || !is_name(&self.bucket) {
            return wrong("bucket", format!("{:?} is no name of a bucket", self.bucket));
        }
        let parts = self.prefix.split('/');
        if !self.prefix.is_empty() && !parts.into_iter().all(|part| !matches!(part, "" | "." | "..") && is_name(part)) {
            return wrong("prefix", format!("{:?} is not NAME/NAME/...", self.prefix));
        }
        if let Some(endpoint) = &self.endpoint {
            let is_http = endpoint.starts_with("http://");
            let host = endpoint.strip_prefix("https://").or_else(|| endpoint.strip_prefix("http://"));
            match host {
                // What is before an @ would be shown to people.
                Some(host) if !host.is_empty() && !host.contains(['@', '?', '#']) => {}
                _ => return wrong("endpoint", "must be https://HOST[:PORT]".to_owned()),
            }
            if is_http && !self.allow_http {
                return wrong("endpoint", "is http, and blobs.s3.allow_http is not set".to_owned());
            }
        }
        match (&self.access_key_id_file, &self.secret_access_key_file) {
            (Some(_), None) => wrong("secret_access_key_file", "missing beside access_key_id_file".to_owned()),
            (None, Some(_)) => wrong("access_key_id_file", "missing beside secret_access_key_file".to_owned()),
            _ => Ok(()),
        }
    }
}
