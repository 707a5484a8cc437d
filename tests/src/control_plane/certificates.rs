//! Keys and certificates of a control plane, in a folder of its own.

use std::fs;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyPair, KeyUsagePurpose,
};

/// A certificate with its key, as files in PEM.
#[derive(Clone, Debug)]
pub struct Certificate {
    /// The certificate.
    pub certificate: PathBuf,
    /// Its key.
    pub key: PathBuf,
}

/// The certificate authority of a control plane. It is kept: who trusted a control plane still does after it was started
/// again in its folder.
#[derive(Debug)]
pub struct Authority {
    dir: PathBuf,
}

impl Authority {
    /// The authority in `dir`; a new one where there is none.
    pub fn open(dir: &Path) -> Result<Self> {
        fs::create_dir_all(dir).with_context(|| format!("cannot create {}", dir.display()))?;
        let authority = Self {
            dir: dir.to_path_buf(),
        };
        let Certificate { certificate, key } = authority.files("ca");
        if !certificate.exists() {
            let pair = KeyPair::generate().context("cannot make a key")?;
            let signed = authority_params()
                .self_signed(&pair)
                .context("cannot sign the CA")?;
            write(&key, &pair.serialize_pem())?;
            write(&certificate, &signed.pem())?;
        }
        Ok(authority)
    }

    /// The authority's own certificate.
    pub fn certificate(&self) -> Certificate {
        self.files("ca")
    }

    /// A server's certificate for these names and addresses, made anew: they may be others than last time.
    pub fn server(&self, name: &str, names: &[String]) -> Result<Certificate> {
        let mut params = CertificateParams::new(names).context("not the names of a server")?;
        params.distinguished_name = subject(name, None);
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        self.issue(name, params)
    }

    /// A client's certificate: Kubernetes reads the user from the common name and a group from the organization.
    pub fn client(&self, user: &str, group: Option<&str>) -> Result<Certificate> {
        let mut params = CertificateParams::default();
        params.distinguished_name = subject(user, group);
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        self.issue(&user.replace([':', '/'], "-"), params)
    }

    /// The key pair that signs tokens of ServiceAccounts; its `certificate` is the public key.
    pub fn token_key(&self) -> Result<Certificate> {
        let files = Certificate {
            certificate: self.dir.join("service-account.pub"),
            key: self.dir.join("service-account.key"),
        };
        if !files.certificate.exists() {
            let pair = KeyPair::generate().context("cannot make a key")?;
            write(&files.key, &pair.serialize_pem())?;
            write(&files.certificate, &pair.public_key_pem())?;
        }
        Ok(files)
    }

    fn issue(&self, name: &str, mut params: CertificateParams) -> Result<Certificate> {
        let files = self.files(name);
        let key = self.files("ca").key;
        let text = fs::read_to_string(&key).with_context(|| format!("cannot read {}", key.display()))?;
        let signer = KeyPair::from_pem(&text).with_context(|| format!("{} is no key", key.display()))?;
        let issuer = Issuer::new(authority_params(), signer);
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.use_authority_key_identifier_extension = true;
        let pair = KeyPair::generate().context("cannot make a key")?;
        let signed = params
            .signed_by(&pair, &issuer)
            .with_context(|| format!("cannot sign the certificate of {name}"))?;
        write(&files.key, &pair.serialize_pem())?;
        write(&files.certificate, &signed.pem())?;
        Ok(files)
    }

    fn files(&self, name: &str) -> Certificate {
        Certificate {
            certificate: self.dir.join(format!("{name}.crt")),
            key: self.dir.join(format!("{name}.key")),
        }
    }
}

fn authority_params() -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = subject("understudy-bed", None);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::DigitalSignature];
    params
}

fn subject(common_name: &str, organization: Option<&str>) -> DistinguishedName {
    let mut subject = DistinguishedName::new();
    subject.push(DnType::CommonName, common_name);
    if let Some(organization) = organization {
        subject.push(DnType::OrganizationName, organization);
    }
    subject
}

/// Files that only their owner reads: among them are keys.
fn write(path: &Path, text: &str) -> Result<()> {
    use std::io::Write;
    let mut file = fs::File::options()
        .create(true)
        .write(true)
        .truncate(true)
        .mode(0o600)
        .open(path)
        .with_context(|| format!("cannot create {}", path.display()))?;
    file.write_all(text.as_bytes())
        .with_context(|| format!("cannot write {}", path.display()))
}
