//! In place of a client where the program was built without one: nothing can be opened, so that nothing else is ever called.

use std::convert::Infallible;
use std::ops::Range;
use std::time::Duration;

use anyhow::bail;
use bytes::Bytes;

use super::{BucketError, Patience};
use crate::blobs::large::format::LargeBlob;
use crate::config::S3;

pub(super) struct Client(Infallible);

impl Client {
    pub(super) fn new(_: &S3, _: &str, _: Patience) -> anyhow::Result<Self> {
        bail!(
            "this program was built without buckets: take [blobs.s3] out of the configuration, or build it with the feature s3"
        )
    }

    pub(super) fn root(&self) -> &str {
        match self.0 {}
    }

    pub(super) async fn get(&self, _: &str, _: Range<u64>) -> Result<(Bytes, u64), BucketError> {
        match self.0 {}
    }

    pub(super) async fn put(&self, _: &str, _: Bytes) -> Result<(), BucketError> {
        match self.0 {}
    }

    pub(super) async fn put_file(&self, _: &str, _: &LargeBlob) -> Result<(), BucketError> {
        match self.0 {}
    }

    pub(super) async fn delete(&self, _: &str) -> Result<(), BucketError> {
        match self.0 {}
    }

    pub(super) async fn list(&self, _: Duration, _: impl Fn(&str) -> bool) -> Result<Vec<String>, BucketError> {
        match self.0 {}
    }
}
