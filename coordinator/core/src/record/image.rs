//! What a podman build made, as its agent tells it.

use helix_model::Digest;

/// An image.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Image {
    /// sha256 of its manifest, as a registry of images tells it.
    pub digest: Digest,
    /// Bytes of its layers, unpacked.
    pub size: u64,
    /// sha256 of its configuration: podman's image id.
    pub id: Digest,
    /// Bytes of its manifest; 0 when not known.
    pub manifest_size: u64,
    /// Its manifest's media type.
    pub media_type: String,
}
