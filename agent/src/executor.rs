//! What runs builds other than by a plain command.
//!
//! Exec builds need no module of their own: their command goes to the runner as it is.

pub mod podman;
