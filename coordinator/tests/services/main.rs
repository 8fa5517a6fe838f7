//! The services of a coordinator as clients meet them: a real node in this process, real certificates, real sockets.

mod builds;
mod changing;
mod listing;
mod node;
mod pages;
mod refused;
mod roles;
mod workers;
