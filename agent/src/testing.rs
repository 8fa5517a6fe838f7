//! What tests of several modules need.

use std::path::Path;

use helix_common::tls::TlsFiles;

use crate::config::{Config, ExecConfig, LogConfig, PodmanConfig, SourceConfig};

/// A configuration that passed its check.
pub(crate) fn config(data_dir: &Path) -> Config {
    let pem = |name: &str| data_dir.join(name);
    Config {
        name: "w1".to_owned(),
        coordinators: vec!["https://127.0.0.1:1".to_owned()],
        capacity: 1,
        platforms: vec!["linux/amd64".to_owned()],
        labels: std::collections::BTreeMap::new(),
        address: "here".to_owned(),
        data_dir: data_dir.to_owned(),
        isolation: "none".to_owned(),
        runner_path: data_dir.join("helix-runner"),
        tls: TlsFiles { ca: pem("ca"), cert: pem("cert"), key: pem("key"), revoked: None },
        log: LogConfig::default(),
        exec: ExecConfig { allow_job_commands: true, base_dir: data_dir.join("work"), ..ExecConfig::default() },
        source: SourceConfig { allow_file_urls: true, ..SourceConfig::default() },
        limits: crate::config::LimitsConfig::default(),
        resources: crate::config::ResourcesConfig::default(),
        disk: crate::config::DiskConfig {
            reserve_bytes: Some(0),
            reserve_inodes: Some(0),
            ..crate::config::DiskConfig::default()
        },
        podman: PodmanConfig::default(),
        policy: crate::policy::PolicyConfig::default(),
        secrets: std::collections::BTreeMap::new(),
    }
}
