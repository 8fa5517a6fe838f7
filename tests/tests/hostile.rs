//! Hostile builds: what other people's code may try on a build host, how each attempt has to end, and that nothing is left of
//! any of them afterwards, by a look that is itself shown to notice.

#![allow(clippy::expect_used, clippy::unwrap_used, clippy::print_stderr)]

#[path = "hostile/attacks.rs"]
mod attacks;
#[path = "hostile/cases.rs"]
mod cases;
#[path = "hostile/dockerfiles.rs"]
mod dockerfiles;
#[path = "hostile/exec.rs"]
mod exec;
#[path = "hostile/podman.rs"]
mod podman;
#[path = "hostile/traces.rs"]
mod traces;
