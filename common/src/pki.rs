//! A cluster's certificate authority: makes it, issues identities from it, shows what a certificate says.
//!
//! Small clusters need nothing else; large ones may bring certificates of their own, as long as each has exactly one
//! `spiffe://CLUSTER/ROLE/NAME`. Private keys are written with mode 0600 and never printed.

pub mod revocation;

use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use helix_model::InvalidField;
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
    SanType, SerialNumber,
};
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;
use time::OffsetDateTime;
use x509_parser::certificate::X509Certificate;
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::FromDer;

pub use self::revocation::{REVOKED_FILE, Revoked, Serial, revoke};
use crate::files::{Durability, write_atomic};
use crate::identity::{Identity, IdentityError, Name, Role};

/// The authority's certificate in its directory.
pub const CA_FILE: &str = "ca.pem";

/// The authority's private key in its directory.
pub const CA_KEY_FILE: &str = "ca-key.pem";

/// How long an identity is valid unless told otherwise.
pub const VALID_FOR_DEFAULT: Duration = Duration::from_secs(365 * 24 * 3600);

/// How long an authority is valid.
const AUTHORITY_VALID_FOR: Duration = Duration::from_secs(10 * 365 * 24 * 3600);

/// Certificates begin this long before they are made, for the sake of clocks that run behind.
const BACKDATED: Duration = Duration::from_secs(5 * 60);

/// A certificate authority, with its private key.
pub struct Authority {
    cluster: Name,
    certificate_pem: String,
    key_pem: String,
    not_after: OffsetDateTime,
    issuer: Issuer<'static, KeyPair>,
}

/// An issued identity.
pub struct Issued {
    /// The certificate.
    pub cert_pem: String,
    /// Its private key.
    pub key_pem: String,
}

/// What a certificate says.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct CertificateInfo {
    /// Whom it speaks for, or why nobody.
    pub identity: Result<Identity, IdentityError>,
    /// Its serial number.
    pub serial: Serial,
    /// The first second of its validity.
    pub not_before: OffsetDateTime,
    /// The last.
    pub not_after: OffsetDateTime,
    /// DNS names and addresses.
    pub names: Vec<String>,
}

/// Why something about certificates failed.
#[derive(Debug, thiserror::Error)]
pub enum PkiError {
    /// A name is malformed.
    #[error(transparent)]
    Invalid(#[from] InvalidField),
    /// A file could not be read or written.
    #[error("{path}: {source}")]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// An authority is already there: a new one would orphan all that it issued.
    #[error(
        "{0} exists already: a new authority would orphan every certificate issued by it; choose another directory"
    )]
    Exists(PathBuf),
    /// A file does not hold what it should.
    #[error("{path}: {why}")]
    Malformed {
        /// Which.
        path: PathBuf,
        /// What is wrong.
        why: String,
    },
    /// The text is no PEM certificate.
    #[error("this is not a PEM certificate: {0}")]
    NotACertificate(String),
    /// The signing library refused.
    #[error("cannot make a certificate: {0}")]
    Make(#[from] rcgen::Error),
}

impl Authority {
    /// Makes a new authority for a cluster. Nothing is written yet.
    ///
    /// # Errors
    /// When the cluster's name is malformed.
    pub fn create(cluster: &str) -> Result<Self, PkiError> {
        let cluster = Name::new("cluster", cluster)?;
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::default();
        let now = OffsetDateTime::now_utc();
        params.not_before = now - BACKDATED;
        params.not_after = now + AUTHORITY_VALID_FOR;
        params.serial_number = Some(random_serial());
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        // The SPIFFE id of a signing certificate is its trust domain; `load` reads the cluster's name from it.
        params.subject_alt_names = vec![SanType::URI(format!("spiffe://{cluster}").try_into()?)];
        params.distinguished_name.push(DnType::CommonName, format!("{cluster} helix build authority"));
        let certificate = params.self_signed(&key)?;
        Ok(Self {
            cluster,
            certificate_pem: certificate.pem(),
            key_pem: key.serialize_pem(),
            not_after: params.not_after,
            issuer: Issuer::new(params, key),
        })
    }

    /// Reads an authority from its directory.
    ///
    /// # Errors
    /// When a file is missing or malformed, or key and certificate do not belong together.
    pub fn load(directory: &Path) -> Result<Self, PkiError> {
        let (cert_path, key_path) = (directory.join(CA_FILE), directory.join(CA_KEY_FILE));
        let certificate_pem = read(&cert_path)?;
        let key_pem = read(&key_path)?;
        let wrong = |path: &Path, why: String| PkiError::Malformed { path: path.to_owned(), why };
        let key = KeyPair::from_pem(&key_pem).map_err(|error| wrong(&key_path, error.to_string()))?;
        let der = CertificateDer::from_pem_slice(certificate_pem.as_bytes())
            .map_err(|error| wrong(&cert_path, error.to_string()))?;
        let (_, parsed) = X509Certificate::from_der(&der).map_err(|error| wrong(&cert_path, error.to_string()))?;
        if parsed.public_key().subject_public_key.data.as_ref() != key.public_key_raw() {
            return Err(wrong(&key_path, format!("is not the key of {}", cert_path.display())));
        }
        let cluster = trust_domain(&parsed)
            .ok_or_else(|| wrong(&cert_path, "names no spiffe://CLUSTER: it is not an authority of ours".to_owned()))?;
        let not_after = parsed.validity().not_after.to_datetime();
        let issuer = Issuer::from_ca_cert_der(&der, key)?;
        Ok(Self { cluster, certificate_pem, key_pem, not_after, issuer })
    }

    /// Writes the authority and an empty list of revocations into a directory, which is made if missing.
    ///
    /// # Errors
    /// [`PkiError::Exists`] when another authority is there; else what the file system says.
    pub fn save(&self, directory: &Path) -> Result<(), PkiError> {
        let failed = |path: &Path, source| PkiError::File { path: path.to_owned(), source };
        std::fs::create_dir_all(directory).map_err(|error| failed(directory, error))?;
        let (cert_path, key_path) = (directory.join(CA_FILE), directory.join(CA_KEY_FILE));
        match std::fs::read_to_string(&cert_path) {
            Ok(there) if there != self.certificate_pem => return Err(PkiError::Exists(cert_path)),
            _ => {}
        }
        // The key first: a certificate whose key was lost is of no use, and would stop a second attempt.
        for (path, text, mode) in [(&key_path, &self.key_pem, 0o600), (&cert_path, &self.certificate_pem, 0o644)] {
            write_atomic(path, text.as_bytes(), mode, Durability::Synced).map_err(|error| failed(path, error))?;
        }
        let revoked = directory.join(REVOKED_FILE);
        if !revoked.exists() {
            write_atomic(&revoked, b"", 0o644, Durability::Synced).map_err(|error| failed(&revoked, error))?;
        }
        Ok(())
    }

    /// The cluster this authority speaks for.
    #[must_use]
    pub fn cluster(&self) -> &Name {
        &self.cluster
    }

    /// The authority's certificate, which every member of the cluster needs.
    #[must_use]
    pub fn certificate_pem(&self) -> &str {
        &self.certificate_pem
    }

    /// Issues an identity. `names` are DNS names and addresses that clients dial; only coordinators need them. The
    /// certificate never outlives the authority.
    ///
    /// # Errors
    /// When a name is malformed.
    pub fn issue(&self, role: Role, name: &str, names: &[String], valid_for: Duration) -> Result<Issued, PkiError> {
        let identity = Identity::new(&self.cluster, role, name)?;
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::default();
        let now = OffsetDateTime::now_utc();
        params.not_before = now - BACKDATED;
        params.not_after =
            now.checked_add(valid_for.try_into().unwrap_or(time::Duration::MAX)).unwrap_or(self.not_after);
        params.not_after = params.not_after.min(self.not_after);
        params.serial_number = Some(random_serial());
        params.use_authority_key_identifier_extension = true;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        if role == Role::Coordinator {
            params.extended_key_usages.push(ExtendedKeyUsagePurpose::ServerAuth);
        }
        params.distinguished_name.push(DnType::CommonName, identity.principal());
        params.subject_alt_names.push(SanType::URI(identity.to_string().try_into()?));
        for name in names {
            params.subject_alt_names.push(alternative_name(name)?);
        }
        let certificate = params.signed_by(&key, &self.issuer)?;
        Ok(Issued { cert_pem: certificate.pem(), key_pem: key.serialize_pem() })
    }
}

impl Issued {
    /// Writes the identity as `STEM.pem` and `STEM-key.pem` (0600) into a directory, which is made if missing.
    /// Returns both paths.
    ///
    /// # Errors
    /// What the file system says.
    pub fn save(&self, directory: &Path, stem: &str) -> Result<(PathBuf, PathBuf), PkiError> {
        let failed = |path: &Path, source| PkiError::File { path: path.to_owned(), source };
        std::fs::create_dir_all(directory).map_err(|error| failed(directory, error))?;
        let cert = directory.join(format!("{stem}.pem"));
        let key = directory.join(format!("{stem}-key.pem"));
        write_atomic(&key, self.key_pem.as_bytes(), 0o600, Durability::Synced).map_err(|error| failed(&key, error))?;
        write_atomic(&cert, self.cert_pem.as_bytes(), 0o644, Durability::Synced)
            .map_err(|error| failed(&cert, error))?;
        Ok((cert, key))
    }
}

/// Reads what the first certificate of a PEM text says. Says nothing about trust.
///
/// # Errors
/// [`PkiError::NotACertificate`].
pub fn show(pem: &str) -> Result<CertificateInfo, PkiError> {
    let der =
        CertificateDer::from_pem_slice(pem.as_bytes()).map_err(|error| PkiError::NotACertificate(error.to_string()))?;
    describe(&der)
}

/// Reads what a certificate says. Says nothing about trust.
///
/// # Errors
/// [`PkiError::NotACertificate`].
pub fn describe(der: &CertificateDer<'_>) -> Result<CertificateInfo, PkiError> {
    let (_, parsed) = X509Certificate::from_der(der).map_err(|error| PkiError::NotACertificate(error.to_string()))?;
    let names = parsed.subject_alternative_name().ok().flatten();
    let names = names.iter().flat_map(|names| &names.value.general_names).filter_map(printable_name).collect();
    Ok(CertificateInfo {
        identity: Identity::from_parsed(&parsed),
        serial: Serial::from_bytes(parsed.raw_serial()),
        not_before: parsed.validity().not_before.to_datetime(),
        not_after: parsed.validity().not_after.to_datetime(),
        names,
    })
}

fn read(path: &Path) -> Result<String, PkiError> {
    std::fs::read_to_string(path).map_err(|source| PkiError::File { path: path.to_owned(), source })
}

fn trust_domain(certificate: &X509Certificate<'_>) -> Option<Name> {
    let names = certificate.subject_alternative_name().ok()??;
    let uri = names.value.general_names.iter().find_map(|name| match name {
        GeneralName::URI(uri) => Some(*uri),
        _ => None,
    })?;
    Name::new("cluster", uri.strip_prefix("spiffe://")?).ok()
}

fn alternative_name(name: &str) -> Result<SanType, PkiError> {
    if let Ok(address) = name.parse::<IpAddr>() {
        return Ok(SanType::IpAddress(address));
    }
    // Refuses what no client could match: ports, schemes, spaces.
    rustls_pki_types::DnsName::try_from(name)
        .map_err(|_| InvalidField::new("names", format!("{name:?} is neither a DNS name nor an address")))?;
    Ok(SanType::DnsName(name.try_into()?))
}

fn printable_name(name: &GeneralName<'_>) -> Option<String> {
    match name {
        GeneralName::DNSName(name) => Some((*name).to_owned()),
        GeneralName::IPAddress(bytes) => match <[u8; 4]>::try_from(*bytes) {
            Ok(four) => Some(IpAddr::from(four).to_string()),
            Err(_) => <[u8; 16]>::try_from(*bytes).ok().map(|all| IpAddr::from(all).to_string()),
        },
        _ => None,
    }
}

/// 127 random bits: positive, never zero in practice, never twice.
fn random_serial() -> SerialNumber {
    let mut bytes: [u8; 16] = rand::random();
    bytes[0] = (bytes[0] & 0x7f) | 0x40;
    SerialNumber::from_slice(&bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_authority_reads_back_and_goes_on_issuing() {
        let directory = tempfile::tempdir().unwrap();
        Authority::create("demo").unwrap().save(directory.path()).unwrap();
        let authority = Authority::load(directory.path()).unwrap();
        assert_eq!(authority.cluster(), &"demo");
        let names = ["localhost".to_owned(), "127.0.0.1".to_owned(), "::1".to_owned()];
        let issued = authority.issue(Role::Coordinator, "1", &names, VALID_FOR_DEFAULT).unwrap();
        let info = show(&issued.cert_pem).unwrap();
        assert_eq!(info.identity.unwrap().to_string(), "spiffe://demo/coordinator/1");
        assert_eq!(info.names, names);
        assert!(info.not_before < OffsetDateTime::now_utc());
        assert!((info.not_after - info.not_before).whole_days() == 365);
        assert_eq!(info.serial.as_str().len(), 32);
    }

    #[test]
    fn nothing_outlives_its_authority() {
        let authority = Authority::create("demo").unwrap();
        let issued = authority.issue(Role::Client, "ci", &[], Duration::MAX).unwrap();
        assert_eq!(show(&issued.cert_pem).unwrap().not_after, show(authority.certificate_pem()).unwrap().not_after);
    }

    #[test]
    fn an_authority_is_never_overwritten() {
        let directory = tempfile::tempdir().unwrap();
        let first = Authority::create("demo").unwrap();
        first.save(directory.path()).unwrap();
        first.save(directory.path()).unwrap();
        let error = Authority::create("demo").unwrap().save(directory.path()).unwrap_err();
        assert!(matches!(error, PkiError::Exists(_)), "{error}");
    }

    #[test]
    fn a_foreign_key_is_noticed() {
        let directory = tempfile::tempdir().unwrap();
        Authority::create("demo").unwrap().save(directory.path()).unwrap();
        std::fs::write(directory.path().join(CA_KEY_FILE), KeyPair::generate().unwrap().serialize_pem()).unwrap();
        let error = Authority::load(directory.path()).err().unwrap().to_string();
        assert!(error.contains("is not the key of"), "{error}");
    }

    #[test]
    fn malformed_names_are_refused() {
        let authority = Authority::create("demo").unwrap();
        assert!(Authority::create("De mo").is_err());
        assert!(authority.issue(Role::Agent, "W 1", &[], VALID_FOR_DEFAULT).is_err());
        assert!(authority.issue(Role::Coordinator, "one", &[], VALID_FOR_DEFAULT).is_err());
        for name in ["a:1", "https://a", "a b", ""] {
            assert!(authority.issue(Role::Coordinator, "1", &[name.to_owned()], VALID_FOR_DEFAULT).is_err(), "{name}");
        }
    }
}
