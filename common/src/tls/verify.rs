//! The two verifiers: rustls checks the chain and the dates, we add identity, cluster, role and revocation.

use std::sync::Arc;
use std::time::SystemTime;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::verify_server_cert_signed_by_trust_anchor;
use rustls::crypto::CryptoProvider;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::ParsedCertificate;
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, Error, OtherError, RootCertStore, SignatureScheme,
};

use super::Expect;
use crate::identity::{Identity, Name, Role};
use crate::pki::{Revoked, Serial, describe};

/// What the checks beyond the chain need of a certificate.
pub(super) struct Leaf {
    pub(super) identity: Identity,
    pub(super) serial: Serial,
    pub(super) not_after: SystemTime,
}

/// Reads identity, serial and end.
pub(super) fn read(leaf: &CertificateDer<'_>) -> Result<Leaf, Error> {
    let info = describe(leaf).map_err(|_| Error::InvalidCertificate(CertificateError::BadEncoding))?;
    let identity = info.identity.map_err(|why| refuse(why.to_string()))?;
    Ok(Leaf { identity, serial: info.serial, not_after: info.not_after.into() })
}

/// A refusal of ours, with its reason for the log; the peer sees a plain `bad_certificate`.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Refused(String);

fn refuse(why: String) -> Error {
    Error::InvalidCertificate(CertificateError::Other(OtherError(Arc::new(Refused(why)))))
}

fn check(leaf: &CertificateDer<'_>, cluster: &Name, revoked: &Revoked) -> Result<Identity, Error> {
    let leaf = read(leaf)?;
    if leaf.identity.cluster != *cluster {
        return Err(refuse(format!("{} is of another cluster than {cluster}", leaf.identity)));
    }
    if revoked.contains(&leaf.serial) {
        return Err(Error::InvalidCertificate(CertificateError::Revoked));
    }
    Ok(leaf.identity)
}

/// Admits every member of the cluster; what each may do is decided per call, in `auth`.
#[derive(Debug)]
pub(super) struct Members {
    pub(super) chain: Arc<dyn ClientCertVerifier>,
    pub(super) cluster: Name,
    pub(super) revoked: Arc<Revoked>,
}

impl ClientCertVerifier for Members {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.chain.root_hint_subjects()
    }

    fn verify_client_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        let verified = self.chain.verify_client_cert(leaf, intermediates, now)?;
        check(leaf, &self.cluster, &self.revoked)?;
        Ok(verified)
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(refuse("only TLS 1.3 is spoken here".to_owned()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        leaf: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.chain.verify_tls13_signature(message, leaf, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.chain.supported_verify_schemes()
    }
}

/// Trusts a coordinator of the expected cluster, whatever its host name.
#[derive(Debug)]
pub(super) struct Coordinators {
    pub(super) roots: Arc<RootCertStore>,
    pub(super) provider: Arc<CryptoProvider>,
    pub(super) expect: Expect,
    pub(super) revoked: Arc<Revoked>,
}

impl ServerCertVerifier for Coordinators {
    fn verify_server_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _host: &ServerName<'_>,
        _ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let parsed = ParsedCertificate::try_from(leaf)?;
        let algorithms = self.provider.signature_verification_algorithms.all;
        verify_server_cert_signed_by_trust_anchor(&parsed, &self.roots, intermediates, now, algorithms)?;
        let identity = check(leaf, &self.expect.cluster, &self.revoked)?;
        if identity.role != Role::Coordinator {
            return Err(refuse(format!("{identity} answered, and only a coordinator may serve")));
        }
        match self.expect.node {
            Some(node) if identity.node() != Some(node) => {
                Err(refuse(format!("{identity} answered where node {node} was expected")))
            }
            _ => Ok(ServerCertVerified::assertion()),
        }
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(refuse("only TLS 1.3 is spoken here".to_owned()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        leaf: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        rustls::crypto::verify_tls13_signature(
            message,
            leaf,
            signature,
            &self.provider.signature_verification_algorithms,
        )
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}
