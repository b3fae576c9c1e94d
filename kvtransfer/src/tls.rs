//! TLS on the network's link. Both ends show a certificate of the cluster's authority, the receiver's for the host at which it is
//! found; what is sent before that is nothing but the handshake. Links within a host are not encrypted: they do not leave it.

use std::io;
use std::sync::Arc;

use baton_core::Stream;
use tokio_rustls::rustls::client::Resumption;
use tokio_rustls::rustls::crypto::{CryptoProvider, ring};
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use tokio_rustls::rustls::server::WebPkiClientVerifier;
use tokio_rustls::rustls::version::TLS13;
use tokio_rustls::rustls::{self, AlertDescription, CertificateError, ClientConfig, RootCertStore, ServerConfig};
use tokio_rustls::{TlsAcceptor, TlsConnector};

use crate::TransferError;
use crate::counters::Untrusted;

/// This worker's certificate, and whose certificates it trusts.
#[derive(Clone)]
pub struct Tls {
    connector: TlsConnector,
    acceptor: TlsAcceptor,
}

/// Why there can be no TLS with what was given.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadTls {
    #[error("the authority's file holds no certificate (PEM, BEGIN CERTIFICATE): {0}")]
    Authority(String),
    #[error("the worker's file holds no certificate (PEM, BEGIN CERTIFICATE): {0}")]
    Certificate(String),
    #[error("the key's file holds no private key (PEM, BEGIN PRIVATE KEY): {0}")]
    Key(String),
    #[error("certificate and key do not fit: {0}")]
    Pair(String),
}

impl Tls {
    /// Out of PEM: the certificates of the authorities, this worker's certificate followed by those between it and its authority,
    /// and its private key.
    ///
    /// # Errors
    /// What of it is missing or does not fit.
    pub fn new(authorities: &[u8], certificate: &[u8], key: &[u8]) -> Result<Tls, BadTls> {
        let provider = Arc::new(provider());
        let mut roots = RootCertStore::empty();
        for authority in certificates(authorities).map_err(BadTls::Authority)? {
            roots.add(authority).map_err(|error| BadTls::Authority(error.to_string()))?;
        }
        let roots = Arc::new(roots);
        let chain = certificates(certificate).map_err(BadTls::Certificate)?;
        let key = PrivateKeyDer::from_pem_slice(key).map_err(|error| BadTls::Key(error.to_string()))?;
        let pair = |error: rustls::Error| BadTls::Pair(error.to_string());
        let verifier = WebPkiClientVerifier::builder_with_provider(roots.clone(), provider.clone()).build();
        let verifier = verifier.map_err(|error| BadTls::Authority(error.to_string()))?;
        let server = ServerConfig::builder_with_provider(provider.clone()).with_protocol_versions(&[&TLS13]);
        let server = server.map_err(pair)?.with_client_cert_verifier(verifier);
        let mut server = server.with_single_cert(chain.clone(), key.clone_key()).map_err(pair)?;
        let client = ClientConfig::builder_with_provider(provider).with_protocol_versions(&[&TLS13]);
        let client = client.map_err(pair)?.with_root_certificates(roots);
        let mut client = client.with_client_auth_cert(chain, key).map_err(pair)?;
        // Every connection shows its certificates: one that has expired since the last connection counts no more.
        (server.send_tls13_tickets, client.resumption) = (0, Resumption::disabled());
        Ok(Tls { connector: Arc::new(client).into(), acceptor: Arc::new(server).into() })
    }

    /// The sender's side. `address` is where the receiver is found, and what its certificate must be for.
    pub(crate) async fn connect(&self, stream: Stream, address: &str) -> Result<Stream, TransferError> {
        let host = address.rsplit_once(':').map_or(address, |(host, _)| host).trim_matches(['[', ']']);
        let lost = |cause: String| TransferError::Lost { peer: address.to_string(), cause };
        let name = ServerName::try_from(host.to_string());
        let name =
            name.map_err(|error| lost(format!("TLS with {host:?}, which no certificate can be for: {error}")))?;
        match self.connector.connect(name, stream).await {
            Ok(stream) => Ok(Box::new(stream)),
            Err(error) => Err(refused(address, &error).unwrap_or_else(|| lost(format!("TLS: {error}")))),
        }
    }

    /// The receiver's side, with the reason for metrics where it is the other end's certificate that is at fault.
    pub(crate) async fn accept(&self, stream: Stream) -> Result<Stream, (Option<Untrusted>, io::Error)> {
        match self.acceptor.accept(stream).await {
            Ok(stream) => Ok(Box::new(stream)),
            Err(error) => Err((untrusted(&error), error)),
        }
    }
}

/// A connection that failed because one end does not trust the other; None for any other reason.
pub(crate) fn refused(address: &str, error: &io::Error) -> Option<TransferError> {
    let (peer, cause) = (address.to_string(), error.to_string());
    untrusted(error).map(|reason| TransferError::Untrusted { peer, reason, cause })
}

/// What is wrong with a certificate, as this end finds or the other one says.
fn untrusted(error: &io::Error) -> Option<Untrusted> {
    use rustls::Error::{AlertReceived, InvalidCertificate, InvalidMessage, NoCertificatesPresented};
    let reason = match error.get_ref()?.downcast_ref::<rustls::Error>()? {
        NoCertificatesPresented | AlertReceived(AlertDescription::CertificateRequired) => Untrusted::NoCertificate,
        InvalidCertificate(bad) => match bad {
            CertificateError::Expired
            | CertificateError::ExpiredContext { .. }
            | CertificateError::NotValidYet
            | CertificateError::NotValidYetContext { .. } => Untrusted::Expired,
            CertificateError::UnknownIssuer | CertificateError::BadSignature => Untrusted::UnknownAuthority,
            CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. } => Untrusted::OtherName,
            _ => Untrusted::BadCertificate,
        },
        AlertReceived(AlertDescription::UnknownCA | AlertDescription::DecryptError) => Untrusted::UnknownAuthority,
        AlertReceived(AlertDescription::CertificateExpired) => Untrusted::Expired,
        InvalidMessage(_) => Untrusted::NoTls,
        _ => Untrusted::BadCertificate,
    };
    Some(reason)
}

/// AES with 128 bits first: it is the fastest where there are instructions for it.
fn provider() -> CryptoProvider {
    use ring::cipher_suite::{TLS13_AES_128_GCM_SHA256, TLS13_AES_256_GCM_SHA384, TLS13_CHACHA20_POLY1305_SHA256};
    let cipher_suites = vec![TLS13_AES_128_GCM_SHA256, TLS13_AES_256_GCM_SHA384, TLS13_CHACHA20_POLY1305_SHA256];
    CryptoProvider { cipher_suites, ..ring::default_provider() }
}

fn certificates(pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, String> {
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem).collect();
    let found = found.map_err(|error| error.to_string())?;
    if found.is_empty() { Err("nothing found".to_string()) } else { Ok(found) }
}
