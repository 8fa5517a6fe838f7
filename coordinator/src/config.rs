//! The daemon's configuration: flag over environment (`HELIX_...`) over file (TOML) over default.
//!
//! Only what belongs to one node stands here. Who the node is stands in its data directory; what holds for the
//! whole cluster is policy, replicated. Checked whole before anything is opened.

mod s3;

use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use helix_common::channel::canonical_endpoint;
use helix_common::config::values;
use helix_common::config::{ConfigError, load};
use helix_common::telemetry::{self, Format};
use helix_common::tls::TlsFiles;
use serde::{Deserialize, Serialize};
use toml::Table;

pub use self::s3::S3;

/// The prefix of environment variables.
pub const ENV_PREFIX: &str = "HELIX";

/// The effective values.
#[derive(Clone, PartialEq, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Where the node keeps everything; made by `helix-coordinator init`.
    pub data_dir: PathBuf,
    /// Where clients and agents dial this node: `https://HOST:PORT`. Empty means the listening address if that
    /// names one, else the host's name.
    #[serde(default)]
    pub advertise: String,
    /// Threads of the runtime; 0 for the default, which is the number of processors, at most 8.
    #[serde(default)]
    pub worker_threads: usize,
    /// Where it listens.
    #[serde(default)]
    pub listen: Listen,
    /// Its certificate and whom it trusts.
    pub tls: TlsFiles,
    /// Timings of consensus.
    #[serde(default)]
    pub raft: RaftTimings,
    /// Where its blobs lie, beside its disk.
    #[serde(default)]
    pub blobs: BlobPlaces,
    /// Log lines.
    #[serde(default)]
    pub log: Log,
}

/// See [`Config::listen`].
#[derive(Clone, PartialEq, Eq, Debug, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Listen {
    /// Clients and agents.
    pub grpc: SocketAddr,
    /// Coordinators.
    pub peer: SocketAddr,
    /// Health, readiness, version, metrics; plain HTTP.
    pub http: SocketAddr,
}

impl Default for Listen {
    fn default() -> Self {
        Self {
            grpc: SocketAddr::from(([0, 0, 0, 0], 7420)),
            peer: SocketAddr::from(([0, 0, 0, 0], 7421)),
            http: SocketAddr::from(([127, 0, 0, 1], 7422)),
        }
    }
}

/// See [`Config::blobs`].
#[derive(Clone, PartialEq, Eq, Debug, Default, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct BlobPlaces {
    /// A bucket that large ones move to.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub s3: Option<S3>,
}

/// See [`Config::raft`]. What is not given is chosen from the disk's speed at start.
#[derive(Clone, PartialEq, Eq, Debug, Default, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct RaftTimings {
    /// Between a leader's heartbeats.
    #[serde(with = "values::duration_option", skip_serializing_if = "Option::is_none")]
    pub heartbeat_interval: Option<Duration>,
    /// The shortest silence of a leader after which a follower stands for election.
    #[serde(with = "values::duration_option", skip_serializing_if = "Option::is_none")]
    pub election_timeout_min: Option<Duration>,
    /// The longest.
    #[serde(with = "values::duration_option", skip_serializing_if = "Option::is_none")]
    pub election_timeout_max: Option<Duration>,
    /// Bytes of log after which a snapshot is written.
    #[serde(with = "values::size_option", skip_serializing_if = "Option::is_none")]
    pub snapshot_log_bytes: Option<u64>,
    /// The size from which on the registry's file is written anew, once it is also twice as large as when it was new.
    #[serde(with = "values::size_option", skip_serializing_if = "Option::is_none")]
    pub registry_renew_bytes: Option<u64>,
}

/// See [`Config::log`].
#[derive(Clone, PartialEq, Eq, Debug, Default, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Log {
    /// Which lines; the variable `HELIX_LOG` wins over it. By default consensus's own library says errors only:
    /// an unreachable peer is worth a line, and it has one for every heartbeat. So does the bucket's, which has one for every retry.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub filter: Option<String>,
    /// Their shape: text or json.
    pub format: Format,
}

impl Config {
    /// Loads, completes and checks. Relative paths of a file are relative to the file's directory.
    ///
    /// # Errors
    /// [`ConfigError`], which names the key and where it was found.
    pub fn load(path: Option<&Path>, flags: Table) -> Result<Self, ConfigError> {
        let mut config: Self = load(path, ENV_PREFIX, flags)?;
        if let Some(directory) = path.and_then(Path::parent) {
            config.data_dir = directory.join(config.data_dir);
            config.tls = config.tls.relative_to(directory);
            config.blobs.s3 = config.blobs.s3.map(|s3| s3.relative_to(directory));
        }
        config.complete();
        config.check()?;
        Ok(config)
    }

    fn complete(&mut self) {
        self.log
            .filter
            .get_or_insert_with(|| format!("{},openraft=error,object_store=error", telemetry::FILTER_DEFAULT));
        if self.advertise.is_empty() {
            let port = self.listen.grpc.port();
            self.advertise = match self.listen.grpc.ip() {
                ip if ip.is_unspecified() => format!("https://{}:{port}", host_name()),
                IpAddr::V4(ip) => format!("https://{ip}:{port}"),
                IpAddr::V6(ip) => format!("https://[{ip}]:{port}"),
            };
        }
        if self.worker_threads == 0 {
            let processors = std::thread::available_parallelism().map_or(1, usize::from);
            self.worker_threads = processors.min(8);
        }
    }

    fn check(&self) -> Result<(), ConfigError> {
        let wrong = |key: &str, why: String| {
            Err(ConfigError::Value { key: key.to_owned(), origin: "the configuration".to_owned(), why })
        };
        match canonical_endpoint(&self.advertise) {
            Ok(canonical) if canonical == self.advertise => {}
            Ok(canonical) => return wrong("advertise", format!("{:?} must be written {canonical:?}", self.advertise)),
            Err(error) => return wrong("advertise", error.to_string()),
        }
        if self.worker_threads > 1024 {
            return wrong("worker_threads", format!("{} threads are no sensible number", self.worker_threads));
        }
        let ports =
            [("listen.grpc", self.listen.grpc), ("listen.peer", self.listen.peer), ("listen.http", self.listen.http)];
        for (place, (key, address)) in ports.iter().enumerate() {
            let clash = ports[..place].iter().find(|(_, other)| other.port() == address.port() && address.port() != 0);
            if let Some((other, _)) = clash {
                return wrong(key, format!("{address} has the same port as {other}"));
            }
        }
        if let Some(filter) = &self.log.filter
            && let Err(error) = telemetry::check_filter(filter)
        {
            return wrong("log.filter", error.to_string());
        }
        if let Some(s3) = &self.blobs.s3 {
            s3.check()?;
        }
        self.raft.check()
    }
}

impl RaftTimings {
    fn check(&self) -> Result<(), ConfigError> {
        let wrong = |key: &str, why: String| {
            Err(ConfigError::Value { key: key.to_owned(), origin: "the configuration".to_owned(), why })
        };
        let given = [self.heartbeat_interval, self.election_timeout_min, self.election_timeout_max];
        let [Some(heartbeat), Some(min), Some(max)] = given else {
            if given.iter().any(Option::is_some) {
                let why = "give heartbeat_interval, election_timeout_min and election_timeout_max, or none of them";
                return wrong("raft", why.to_owned());
            }
            return Ok(());
        };
        if heartbeat.is_zero() || min < heartbeat * 2 {
            return wrong("raft.election_timeout_min", format!("{min:?} is under two heartbeats of {heartbeat:?}"));
        }
        if max <= min {
            return wrong("raft.election_timeout_max", format!("{max:?} is not over election_timeout_min, {min:?}"));
        }
        Ok(())
    }
}

fn host_name() -> String {
    rustix::system::uname().nodename().to_str().unwrap_or("localhost").to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    const MINIMAL: &str = "data_dir = 'data'\n[tls]\nca = 'ca.pem'\ncert = 'c.pem'\nkey = 'k.pem'\n";

    fn loaded(more: &str) -> Result<Config, String> {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("coordinator.toml");
        std::fs::write(&path, format!("{more}\n{MINIMAL}")).unwrap();
        let config = Config::load(Some(&path), Table::new()).map_err(|error| error.to_string())?;
        assert_eq!(config.data_dir, directory.path().join("data"));
        assert_eq!(config.tls.ca, directory.path().join("ca.pem"));
        Ok(config)
    }

    #[test]
    fn defaults_are_the_interfaces() {
        let config = loaded("").unwrap();
        assert_eq!(config.listen.grpc.to_string(), "0.0.0.0:7420");
        assert_eq!(config.listen.peer.to_string(), "0.0.0.0:7421");
        assert_eq!(config.listen.http.to_string(), "127.0.0.1:7422");
        assert!(config.advertise.starts_with("https://") && config.advertise.ends_with(":7420"));
        assert!(config.worker_threads >= 1);
        let effective = helix_common::config::effective(&config).unwrap();
        assert_eq!(toml::from_str::<Config>(&effective).unwrap(), config);
    }

    #[test]
    fn a_bucket_is_named_and_the_rest_has_defaults() {
        let more =
            "blobs.s3 = { bucket = 'b', access_key_id_file = 'id', secret_access_key_file = '/s', ca_file = 'ca.pem' }";
        let config = loaded(more).unwrap();
        let effective = helix_common::config::effective(&config).unwrap();
        assert_eq!(toml::from_str::<Config>(&effective).unwrap(), config);
        let s3 = config.blobs.s3.unwrap();
        assert_eq!(
            (s3.prefix.as_str(), s3.region.as_str(), s3.after),
            ("helix", "us-east-1", Duration::from_secs(600))
        );
        assert!(!s3.allow_http && !s3.recall && !s3.virtual_hosted_style);
        assert!(s3.access_key_id_file.unwrap().is_absolute() && s3.ca_file.unwrap().is_absolute());
        assert_eq!(s3.secret_access_key_file, Some(PathBuf::from("/s")));
        let http = "blobs.s3 = { bucket = 'b', endpoint = 'http://s3.example.com', allow_http = true }";
        assert!(loaded(http).is_ok());
    }

    #[test]
    fn mistakes_name_the_key() {
        for (more, expected) in [
            ("dataa_dir = 'x'", "did you mean `data_dir`"),
            ("listen.gpc = '127.0.0.1:1'", "did you mean `listen.grpc`"),
            ("advertise = 'http://h:1'", "`advertise`"),
            ("advertise = 'https://h'", "`advertise`"),
            ("listen.grpc = '127.0.0.1:7421'", "same port as listen.grpc"),
            ("log.filter = 'helix=loud'", "`log.filter`"),
            ("raft.heartbeat_interval = '30ms'", "or none of them"),
            (
                "raft = { heartbeat_interval = '30ms', election_timeout_min = '40ms', election_timeout_max = '90ms' }",
                "two heartbeats",
            ),
            (
                "raft = { heartbeat_interval = '30ms', election_timeout_min = '80ms', election_timeout_max = '80ms' }",
                "not over",
            ),
            ("worker_threads = 'many'", "worker_threads"),
            ("blobs.s3 = { bucket = '' }", "`blobs.s3.bucket`"),
            ("blobs.s3 = { bucket = 'b/c' }", "`blobs.s3.bucket`"),
            ("blobs.s3.region = 'eu-north-1'", "`bucket`"),
            ("blobs.s3 = { bucket = 'b', buckets = 1 }", "did you mean `blobs.s3.bucket`"),
            ("blobs.s3 = { bucket = 'b', prefix = 'a/../b' }", "`blobs.s3.prefix`"),
            ("blobs.s3 = { bucket = 'b', endpoint = 's3.example.com' }", "`blobs.s3.endpoint`"),
            ("blobs.s3 = { bucket = 'b', endpoint = 'http://s3.example.com' }", "`blobs.s3.endpoint`"),
            ("blobs.s3 = { bucket = 'b', endpoint = 'https://id:key@s3.example.com' }", "`blobs.s3.endpoint`"),
            ("blobs.s3 = { bucket = 'b', access_key_id_file = 'id' }", "`blobs.s3.secret_access_key_file`"),
            ("blobs.s3 = { bucket = 'b', secret_access_key_file = 'id' }", "`blobs.s3.access_key_id_file`"),
            ("blobs.s3 = { bucket = 'b', after = 'soon' }", "after"),
        ] {
            let error = loaded(more).unwrap_err();
            assert!(error.contains(expected), "{more}: {error}");
        }
    }
}
