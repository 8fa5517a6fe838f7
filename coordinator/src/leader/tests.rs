//! The leader's loop over the pure core alone, with agents that are channels: stories of what is sent to whom, whatever is
//! lost, late, repeated or refused on the way.

pub(crate) mod agents;
mod assigning;
mod failing;
mod handshake;
mod images;
mod real;
mod reporting;
pub(crate) mod world;

/// For tests of what stands in front of the loop.
pub(crate) mod testing {
    pub(crate) use super::agents::{hello, succeeded};
    pub(crate) use super::world::World;
}
