//! Images built for real: podman, a registry on loopback, and all that can go wrong with them.
//!
//! Nothing can be pulled here: images are made `FROM scratch` with busybox. Every test starts its own cluster, every agent has
//! a store of its own, and at the end of each test nothing of it may be mounted or alive.

#![allow(clippy::expect_used, clippy::unwrap_used, clippy::print_stderr)]

#[path = "podman/building.rs"]
mod building;
#[path = "podman/ending.rs"]
mod ending;
#[path = "podman/index.rs"]
mod index;
#[path = "podman/platforms.rs"]
mod platforms;
#[path = "podman/pushing.rs"]
mod pushing;
#[path = "podman/registries.rs"]
mod registries;
#[path = "podman/rootless.rs"]
mod rootless;
#[path = "podman/secrets.rs"]
mod secrets;
#[path = "podman/site.rs"]
mod site;
