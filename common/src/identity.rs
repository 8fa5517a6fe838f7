//! Who a certificate speaks for: one SPIFFE URI, `spiffe://CLUSTER/ROLE/NAME`.
//!
//! Only the reading and writing of identities; whether a certificate is trusted is decided in `tls`.
//! Invariant: an [`Identity`] is well-formed, and a certificate with none, or with two, has none at all.

use std::fmt;
use std::ops::Deref;
use std::str::FromStr;
use std::sync::Arc;

use helix_model::{InvalidField, NodeId, WorkerName};
use rustls_pki_types::CertificateDer;
use x509_parser::certificate::X509Certificate;
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::FromDer;

/// What a certificate's holder may be.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Role {
    /// A control node. Its NAME is its node id in decimal.
    Coordinator,
    /// A build host. Its NAME is the worker's.
    Agent,
    /// Submits, reads, cancels its own builds.
    Client,
    /// Everything a client may, on all builds, and administration.
    Operator,
}

impl Role {
    /// All roles.
    pub const ALL: &[Self] = &[Self::Coordinator, Self::Agent, Self::Client, Self::Operator];

    /// The word in the URI.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Coordinator => "coordinator",
            Self::Agent => "agent",
            Self::Client => "client",
            Self::Operator => "operator",
        }
    }

    /// Reads the word in the URI.
    #[must_use]
    pub fn parse(word: &str) -> Option<Self> {
        Self::ALL.iter().copied().find(|role| role.as_str() == word)
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

impl FromStr for Role {
    type Err = InvalidField;

    fn from_str(word: &str) -> Result<Self, InvalidField> {
        Self::parse(word).ok_or_else(|| {
            InvalidField::new("role", format!("{word:?} is none of coordinator, agent, client, operator"))
        })
    }
}

/// A cluster's name, or the NAME of an identity: `[a-z0-9][a-z0-9._-]{0,63}`.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Name(Arc<str>);

impl Name {
    /// Checks the text and wraps it.
    ///
    /// # Errors
    /// [`InvalidField`] naming `field` when the text does not match the pattern.
    pub fn new(field: &'static str, text: &str) -> Result<Self, InvalidField> {
        WorkerName::new(text).map_err(|wrong| InvalidField::new(field, wrong.why))?;
        Ok(Self(Arc::from(text)))
    }

    /// The text itself.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl Deref for Name {
    type Target = str;

    fn deref(&self) -> &str {
        &self.0
    }
}

impl PartialEq<str> for Name {
    fn eq(&self, other: &str) -> bool {
        *self.0 == *other
    }
}

impl PartialEq<&str> for Name {
    fn eq(&self, other: &&str) -> bool {
        *self.0 == **other
    }
}

impl FromStr for Name {
    type Err = InvalidField;

    fn from_str(text: &str) -> Result<Self, InvalidField> {
        Self::new("name", text)
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

impl fmt::Debug for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A certificate's identity. Cheap to clone; prints as its SPIFFE URI.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Identity {
    /// The cluster, which is the trust domain.
    pub cluster: Name,
    /// What the holder is.
    pub role: Role,
    /// Which of them it is.
    pub name: Name,
}

impl Identity {
    /// Checks and joins the parts.
    ///
    /// # Errors
    /// [`InvalidField`] when a part does not match its pattern, or a coordinator's name is not a node id.
    pub fn new(cluster: &str, role: Role, name: &str) -> Result<Self, InvalidField> {
        let identity = Self { cluster: Name::new("cluster", cluster)?, role, name: Name::new("name", name)? };
        if role == Role::Coordinator && identity.node().is_none() {
            return Err(InvalidField::new("name", format!("{name:?} is not a node id (a coordinator's name is one)")));
        }
        Ok(identity)
    }

    /// `ROLE/NAME`: how the registry records who did something.
    #[must_use]
    pub fn principal(&self) -> String {
        format!("{}/{}", self.role, self.name)
    }

    /// The node id of a coordinator; `None` for every other role.
    #[must_use]
    pub fn node(&self) -> Option<NodeId> {
        if self.role != Role::Coordinator {
            return None;
        }
        let id: u64 = self.name.parse().ok()?;
        // `01` and `1` would be two certificates for one node.
        (id > 0 && id.to_string() == self.name.as_str()).then_some(NodeId(id))
    }

    /// The worker's name of an agent; `None` for every other role.
    #[must_use]
    pub fn worker(&self) -> Option<WorkerName> {
        if self.role == Role::Agent { WorkerName::new(&self.name).ok() } else { None }
    }

    /// Reads the one SPIFFE URI of a certificate. Says nothing about trust.
    ///
    /// # Errors
    /// [`IdentityError`] when there is no SPIFFE URI, more than one, or a malformed one.
    pub fn from_der(certificate: &CertificateDer<'_>) -> Result<Self, IdentityError> {
        let (_, parsed) = X509Certificate::from_der(certificate).map_err(|_| IdentityError::Unreadable)?;
        Self::from_parsed(&parsed)
    }

    pub(crate) fn from_parsed(certificate: &X509Certificate<'_>) -> Result<Self, IdentityError> {
        let names = certificate.subject_alternative_name().map_err(|_| IdentityError::Unreadable)?;
        let mut uris = names.iter().flat_map(|names| &names.value.general_names).filter_map(|name| match name {
            GeneralName::URI(uri) => Some(*uri),
            _ => None,
        });
        let uri = uris.next().ok_or(IdentityError::Missing)?;
        if uris.next().is_some() {
            return Err(IdentityError::Several);
        }
        uri.parse()
    }
}

impl FromStr for Identity {
    type Err = IdentityError;

    fn from_str(uri: &str) -> Result<Self, IdentityError> {
        let malformed = || IdentityError::Malformed(uri.chars().take(200).collect());
        let rest = uri.strip_prefix("spiffe://").ok_or_else(malformed)?;
        let mut parts = rest.split('/');
        let (Some(cluster), Some(role), Some(name), None) = (parts.next(), parts.next(), parts.next(), parts.next())
        else {
            return Err(malformed());
        };
        let role = Role::parse(role).ok_or_else(malformed)?;
        Self::new(cluster, role, name).map_err(|_| malformed())
    }
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "spiffe://{}/{}/{}", self.cluster, self.role, self.name)
    }
}

/// Why a certificate has no identity.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum IdentityError {
    /// It is not an X.509 certificate.
    #[error("the certificate cannot be read")]
    Unreadable,
    /// There is no URI among its names.
    #[error("the certificate names no spiffe://CLUSTER/ROLE/NAME")]
    Missing,
    /// There is more than one URI: it would be unclear who speaks.
    #[error("the certificate has more than one URI name")]
    Several,
    /// The URI is not of this system's form.
    #[error("{0:?} is not spiffe://CLUSTER/ROLE/NAME")]
    Malformed(String),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn identities_read_back_what_they_print() {
        for uri in
            ["spiffe://demo/coordinator/3", "spiffe://a.b/agent/w-1", "spiffe://c/client/ci", "spiffe://c/operator/o"]
        {
            let identity: Identity = uri.parse().unwrap();
            assert_eq!(identity.to_string(), uri);
        }
        let agent: Identity = "spiffe://demo/agent/w1".parse().unwrap();
        assert_eq!(agent.principal(), "agent/w1");
        assert_eq!(agent.worker().unwrap().as_str(), "w1");
        assert_eq!(agent.node(), None);
    }

    #[test]
    fn malformed_identities_are_refused() {
        for uri in [
            "",
            "https://demo/agent/w",
            "spiffe://demo/agent",
            "spiffe://demo/agent/w/x",
            "spiffe://demo/agent/",
            "spiffe:///agent/w",
            "spiffe://Demo/agent/w",
            "spiffe://demo/root/w",
            "spiffe://demo/Agent/w",
            "spiffe://demo/coordinator/one",
            "spiffe://demo/coordinator/01",
            "spiffe://demo/coordinator/0",
            "spiffe://demo/agent/w?x",
            "spiffe://u@demo/agent/w",
            "spiffe://demo:1/agent/w",
        ] {
            assert!(uri.parse::<Identity>().is_err(), "{uri}");
        }
    }
}
