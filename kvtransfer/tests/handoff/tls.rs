//! TLS on the network's link: who has a certificate of the cluster's authority hands off, everybody else is refused with a reason,
//! and nothing of a transfer is said before that.

use std::sync::{Arc, Mutex};

use baton_core::net::BoxFuture;
use baton_core::{Arena, Listener, Net, Stream};
use baton_kvtransfer::wire::Body;
use baton_kvtransfer::{BadTls, LinkKind, Preferred, Tls, TransferError, Untrusted};
use rcgen::{BasicConstraints, CertificateParams, DistinguishedName, DnType, IsCa, Issuer, KeyPair, date_time_ymd};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, ServerName};
use tokio_rustls::rustls::{ClientConfig, RootCertStore};

use crate::net::Loopback;
use crate::raw::Raw;
use crate::world::{LAYOUT, World, completes, until};

/// Signs workers' certificates.
pub(crate) struct Authority {
    issuer: Issuer<'static, KeyPair>,
    pem: String,
}

impl Authority {
    pub(crate) fn new() -> Authority {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, "an authority");
        let key = KeyPair::generate().unwrap();
        let pem = params.self_signed(&key).unwrap().pem();
        Authority { issuer: Issuer::new(params, key), pem }
    }

    pub(crate) fn worker(&self) -> Tls {
        self.worker_with(|_| {})
    }

    fn worker_with(&self, change: impl FnOnce(&mut CertificateParams)) -> Tls {
        let (certificate, key) = self.sign(change);
        Tls::new(self.pem.as_bytes(), certificate.as_bytes(), key.as_bytes()).unwrap()
    }

    /// A certificate for this host, and its key.
    fn sign(&self, change: impl FnOnce(&mut CertificateParams)) -> (String, String) {
        let mut params = CertificateParams::new(["127.0.0.1".to_string(), "localhost".to_string()]).unwrap();
        change(&mut params);
        let key = KeyPair::generate().unwrap();
        (params.signed_by(&key, &self.issuer).unwrap().pem(), key.serialize_pem())
    }
}

/// One that remembers every byte which goes over it.
#[derive(Clone, Default)]
struct Heard(Arc<Mutex<Vec<u8>>>);

impl Net for Heard {
    fn connect<'a>(&'a self, address: &'a str) -> BoxFuture<'a, std::io::Result<Stream>> {
        Box::pin(async move {
            let mut far = Loopback.connect(address).await?;
            let (near, mut between) = tokio::io::duplex(64 << 10);
            let all = self.0.clone();
            tokio::spawn(async move {
                let (mut up, mut down) = ([0; 4096], [0; 4096]);
                loop {
                    let (heard, to_far) = tokio::select! {
                        read = between.read(&mut up) => (&up[..read.unwrap_or(0)], true),
                        read = far.read(&mut down) => (&down[..read.unwrap_or(0)], false),
                    };
                    all.lock().unwrap().extend_from_slice(heard);
                    let passed = if to_far { far.write_all(heard).await } else { between.write_all(heard).await };
                    if heard.is_empty() || passed.is_err() {
                        return;
                    }
                }
            });
            Ok(Box::new(near) as Stream)
        })
    }

    fn listen<'a>(&'a self, address: &'a str) -> BoxFuture<'a, std::io::Result<Box<dyn Listener>>> {
        Loopback.listen(address)
    }
}

async fn world(receiver: Option<Tls>, sender: Option<Tls>) -> World {
    let source = Arena::new(LAYOUT, 8);
    World::with(Arc::new(Loopback), source, [Preferred::Best; 2], [receiver, sender]).await
}

/// With tickets, as everywhere; whoever listens hears neither names nor keys and values.
#[tokio::test]
async fn blocks_arrive_encrypted() {
    for encrypted in [true, false] {
        let authority = Authority::new();
        let tls = || encrypted.then(|| authority.worker());
        let heard = Heard::default();
        let source = Arena::new(LAYOUT, 8);
        let world = World::with(Arc::new(heard.clone()), source, [Preferred::Best; 2], [tls(), tls()]).await;
        world.receiver.issue_tickets([7; 32], true);
        completes(&world, 8).await;
        let counters = world.links.counters();
        let expected = if encrypted { (1, 0) } else { (0, 1) };
        assert_eq!((counters.tls, counters.tcp), expected);
        assert_eq!((counters.up(LinkKind::Tls), counters.up(LinkKind::Tcp)), expected);
        let heard = heard.0.lock().unwrap();
        let is_heard = |bytes: &[u8]| heard.windows(bytes.len()).any(|window| window == bytes);
        let keys = &crate::world::read(&world.source, 0, 0)[..32];
        assert_eq!((is_heard(keys), is_heard(crate::world::MODEL.as_bytes())), (!encrypted, !encrypted));
    }
}

/// Shared memory is found through TLS; its bytes do not leave the host.
#[tokio::test]
async fn a_host_is_not_left_for_tls() {
    let authority = Authority::new();
    let tls = || Some(authority.worker());
    let source = Arena::shared(LAYOUT, 8).unwrap();
    let world = World::with(Arc::new(Loopback), source, [Preferred::Best; 2], [tls(), tls()]).await;
    completes(&world, 8).await;
    assert_eq!(world.links.counters().up(LinkKind::Shm), 1);
}

/// A sender that the receiver does not trust, or that does not trust the receiver: no transfer opens, and both count why.
#[tokio::test]
async fn who_is_not_trusted_is_refused_with_a_reason() {
    use Untrusted::{Expired, OtherName, UnknownAuthority};
    let (ours, theirs) = (Authority::new(), Authority::new());
    let expired = |params: &mut CertificateParams| params.not_after = date_time_ymd(2020, 1, 1);
    let early = |params: &mut CertificateParams| params.not_before = date_time_ymd(3020, 1, 1);
    let elsewhere = |params: &mut CertificateParams| {
        params.subject_alt_names = CertificateParams::new(["10.1.2.3".to_string()]).unwrap().subject_alt_names;
    };
    let mixed = |trusts: &Authority, is: &Authority| {
        let (certificate, key) = is.sign(|_| {});
        Tls::new(trusts.pem.as_bytes(), certificate.as_bytes(), key.as_bytes()).unwrap()
    };
    // What is wrong with the receiver's, the sender finds.
    for (receiver, reason) in [
        (ours.worker_with(expired), Expired),
        (ours.worker_with(early), Expired),
        (ours.worker_with(elsewhere), OtherName),
        (mixed(&ours, &theirs), UnknownAuthority),
    ] {
        let world = world(Some(receiver), Some(ours.worker())).await;
        let (grant, _incoming) = world.grant_first(4);
        let error = world.links.open(grant).await.err();
        assert!(
            matches!(&error, Some(TransferError::Untrusted { reason: found, .. }) if *found == reason),
            "{error:?}"
        );
        assert!(world.links.counters().untrusted(reason) >= 1);
        assert_eq!((world.counters().links, world.links.counters().connected), (0, 0));
    }
    // What is wrong with the sender's, the receiver does.
    for (sender, reason) in [(ours.worker_with(expired), Expired), (mixed(&ours, &theirs), UnknownAuthority)] {
        let world = world(Some(ours.worker()), Some(sender)).await;
        let (grant, _incoming) = world.grant_first(4);
        assert!(world.links.open(grant).await.is_err());
        until(|| world.counters().untrusted(reason) >= 1).await;
        assert_eq!((world.counters().links, world.counters().extents), (0, 0));
    }
}

/// One end alone has certificates: there is no way around them, in either direction.
#[tokio::test]
async fn there_is_no_falling_back_to_plain_tcp() {
    let authority = Authority::new();
    let plain_sender = world(Some(authority.worker()), None).await;
    let (grant, _incoming) = plain_sender.grant_first(4);
    assert!(plain_sender.links.open(grant).await.is_err());
    until(|| plain_sender.counters().untrusted(Untrusted::NoTls) >= 1).await;
    assert_eq!(plain_sender.links.counters().connected, 0);

    let plain_receiver = world(None, Some(authority.worker())).await;
    let (grant, _incoming) = plain_receiver.grant_first(4);
    assert!(plain_receiver.links.open(grant).await.is_err());
    assert_eq!((plain_receiver.links.counters().connected, plain_receiver.counters().extents), (0, 0));
}

/// Somebody who has the authority's certificate, as everybody may, and none of his own.
#[tokio::test]
async fn who_shows_no_certificate_hears_nothing() {
    let authority = Authority::new();
    let world = world(Some(authority.worker()), None).await;
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_slice(authority.pem.as_bytes()).unwrap()).unwrap();
    let provider = Arc::new(tokio_rustls::rustls::crypto::ring::default_provider());
    let config = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
    let config = config.with_root_certificates(roots).with_no_client_auth();
    let stream = Loopback.connect(&world.receiver.address()).await.unwrap();
    let name = ServerName::try_from("127.0.0.1").unwrap();
    let stream = TlsConnector::from(Arc::new(config)).connect(name, stream).await.unwrap();
    let mut raw = Raw::new(Box::new(stream));
    raw.say(baton_kvtransfer::wire::Tag::default(), Body::Hello { text: "anything".into(), features: 0 }).await;
    assert!(raw.hear().await.is_none());
    until(|| world.counters().untrusted(Untrusted::NoCertificate) == 1).await;
    assert_eq!(world.counters().links, 0);
}

/// What is no certificate, or not that of the key, is said before anything listens.
#[test]
fn what_does_not_fit_is_named() {
    let authority = Authority::new();
    let ((certificate, key), (_, other)) = (authority.sign(|_| {}), authority.sign(|_| {}));
    let new = |ca: &str, certificate: &str, key: &str| {
        Tls::new(ca.as_bytes(), certificate.as_bytes(), key.as_bytes()).map(drop).unwrap_err()
    };
    assert!(matches!(new("", &certificate, &key), BadTls::Authority(_)));
    assert!(matches!(new(&authority.pem, &key, &key), BadTls::Certificate(_)));
    assert!(matches!(new(&authority.pem, &certificate, &certificate), BadTls::Key(_)));
    assert!(matches!(new(&authority.pem, &certificate, &other), BadTls::Pair(_)));
}
