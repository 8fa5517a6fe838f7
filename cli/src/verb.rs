//! One file per verb.

pub(crate) mod artifacts;
pub(crate) mod batch;
pub(crate) mod cancel;
pub(crate) mod cluster;
pub(crate) mod completion;
pub(crate) mod doctor;
pub(crate) mod explain;
pub(crate) mod list;
pub(crate) mod logs;
pub(crate) mod members;
pub(crate) mod pki;
pub(crate) mod policy;
pub(crate) mod purge;
pub(crate) mod retry;
pub(crate) mod snapshot;
pub(crate) mod status;
pub(crate) mod submit;
pub(crate) mod top;
pub(crate) mod version;
pub(crate) mod wait;
pub(crate) mod workers;
