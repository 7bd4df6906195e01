//! Against an API server of our own, over TLS.

use std::{
    convert::Infallible,
    path::Path,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
};

use http_body_util::Full;
use hyper::{Request, Response, StatusCode, body::Bytes, server::conn::http1, service::service_fn};
use hyper_util::rt::TokioIo;
use nvshare_core::Bytes as Size;
use tempfile::TempDir;
use tokio::net::TcpListener;
use tokio_rustls::{
    TlsAcceptor,
    rustls::{ServerConfig, crypto::ring, pki_types::PrivateKeyDer},
};

use super::{
    Pods,
    annotations::{Bounds, Terms},
    api::ApiServer,
    cgroup::PodUid,
};

const BOUNDS: Bounds = Bounds { weight_milli: 1000, priority: 0 };
const UID: &str = "0b7ee0e5-3ac0-4b38-9c4a-6e9b1d1f2a3c";

/// What the server answers, and what it was asked.
struct Server {
    port: u16,
    account: TempDir,
    answer: Arc<Mutex<(StatusCode, String)>>,
    asked: Arc<Mutex<Vec<String>>>,
    requests: Arc<AtomicUsize>,
}

impl Server {
    /// A server that is known by `name`.
    async fn start(name: &str) -> Self {
        let key = rcgen::generate_simple_self_signed([name.to_owned()]).unwrap();
        let account = tempfile::tempdir().unwrap();
        std::fs::write(account.path().join("ca.crt"), key.cert.pem()).unwrap();
        std::fs::write(account.path().join("token"), "secret-1\n").unwrap();
        let private = PrivateKeyDer::try_from(key.signing_key.serialize_der()).unwrap();
        let config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![key.cert.der().clone()], private)
            .unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let server = Self {
            port,
            account,
            answer: Arc::new(Mutex::new((StatusCode::OK, r#"{"items": []}"#.to_owned()))),
            asked: Arc::default(),
            requests: Arc::default(),
        };
        let (answer, asked, requests) =
            (Arc::clone(&server.answer), Arc::clone(&server.asked), Arc::clone(&server.requests));
        tokio::spawn(async move {
            let acceptor = TlsAcceptor::from(Arc::new(config));
            while let Ok((stream, _)) = listener.accept().await {
                // A client that does not trust the server breaks off.
                let Ok(stream) = acceptor.accept(stream).await else { continue };
                let service = service_fn(|request: Request<hyper::body::Incoming>| {
                    requests.fetch_add(1, Ordering::Relaxed);
                    let header = |name: &str| request.headers()[name].to_str().unwrap().to_owned();
                    let (token, form) = (header("authorization"), header("accept"));
                    asked.lock().unwrap().push(format!("{} | {token} | {form}", request.uri()));
                    let (status, body) = answer.lock().unwrap().clone();
                    let mut response = Response::new(Full::new(Bytes::from(body)));
                    *response.status_mut() = status;
                    async move { Ok::<_, Infallible>(response) }
                });
                http1::Builder::new().serve_connection(TokioIo::new(stream), service).await.ok();
            }
        });
        server
    }

    fn answer(&self, status: StatusCode, body: &str) {
        *self.answer.lock().unwrap() = (status, body.to_owned());
    }

    fn lists(&self, uid: &str, annotations: &str) {
        let item = format!(
            r#"{{"metadata": {{"uid": "{uid}", "name": "a", "namespace": "b", "annotations": {annotations}}}}}"#
        );
        let bare = r#"{"metadata": {"uid": "1", "name": "without"}}"#;
        self.answer(
            StatusCode::OK,
            &format!(r#"{{"kind": "PartialObjectMetadataList", "items": [{bare}, {item}]}}"#),
        );
    }

    fn api(&self) -> ApiServer {
        ApiServer::new("127.0.0.1".to_owned(), self.port, self.account.path(), "node-7".to_owned()).unwrap()
    }
}

fn uid() -> PodUid {
    UID.to_owned().into()
}

#[tokio::test]
async fn the_metadata_of_this_nodes_pods_is_asked_for_and_nothing_else() {
    let server = Server::start("127.0.0.1").await;
    server.lists(UID, r#"{"nvshare.com/weight": "0.5", "password": "x"}"#);
    let pods = server.api().pods().await.unwrap();
    assert_eq!(pods.len(), 2);
    assert_eq!((&pods[1].uid, pods[1].name.as_str()), (&uid(), "b/a"));
    assert_eq!(pods[1].annotations.keys().collect::<Vec<_>>(), ["nvshare.com/weight"]);
    let metadata = "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1";
    let expected = format!(
        "/api/v1/pods?fieldSelector=spec.nodeName%3Dnode-7&resourceVersion=0 | Bearer secret-1 | {metadata}"
    );
    assert_eq!(*server.asked.lock().unwrap(), [expected]);
    // A new token is used as soon as it is there.
    std::fs::write(server.account.path().join("token"), "secret-2").unwrap();
    server.api().pods().await.unwrap();
    assert!(server.asked.lock().unwrap()[1].contains("Bearer secret-2"));
}

#[tokio::test]
async fn a_server_of_another_name_or_authority_is_not_told_the_token() {
    let other = Server::start("another.example").await;
    let error = format!("{:#}", other.api().pods().await.unwrap_err());
    assert!(error.contains("certificate"), "{error}");
    let server = Server::start("127.0.0.1").await;
    std::fs::copy(other.account.path().join("ca.crt"), server.account.path().join("ca.crt")).unwrap();
    assert!(server.api().pods().await.is_err());
    assert_eq!(server.requests.load(Ordering::Relaxed) + other.requests.load(Ordering::Relaxed), 0);
}

#[tokio::test]
async fn refusals_and_nonsense_are_explained() {
    let server = Server::start("127.0.0.1").await;
    for (status, body, reason) in [
        (StatusCode::FORBIDDEN, "{}", "allowed to list pods"),
        (StatusCode::TOO_MANY_REQUESTS, "", "429"),
        (StatusCode::OK, "<html>", "not a list of pods"),
    ] {
        server.answer(status, body);
        let error = format!("{:#}", server.api().pods().await.unwrap_err());
        assert!(error.contains(reason), "{error}");
    }
    let port = server.port;
    let bad =
        |node: &str| ApiServer::new("127.0.0.1".to_owned(), port, server.account.path(), node.to_owned());
    assert!(bad("a&fieldSelector=").is_err() && bad("").is_err());
    let missing = ApiServer::new("127.0.0.1".to_owned(), port, Path::new("/nonexistent"), "n".to_owned());
    assert!(format!("{:#}", missing.unwrap_err()).contains("token mounted"));
}

#[tokio::test]
async fn a_pod_is_asked_for_once_and_then_known() {
    let server = Server::start("127.0.0.1").await;
    server.lists(UID, r#"{"nvshare.com/weight": "0.5", "nvshare.com/memory-limit": "4Gi"}"#);
    let pods = Pods::asking(server.api(), BOUNDS);
    let expected = Terms { weight_milli: Some(500), memory_limit: Some(Size::gib(4)), ..Terms::default() };
    for _ in 0..3 {
        assert_eq!(pods.terms_of(&uid()).await, expected);
    }
    assert_eq!(server.requests.load(Ordering::Relaxed), 1);
    // Many strangers at once are one question, and it is not repeated at once.
    let strangers = (0..20).map(|_| async { pods.terms_of(&"unknown".to_owned().into()).await });
    for terms in strangers {
        assert_eq!(terms.await, Terms::default());
    }
    assert!(server.requests.load(Ordering::Relaxed) <= 2);
}

#[tokio::test]
async fn without_an_answer_a_client_is_what_it_says_of_itself() {
    let server = Server::start("127.0.0.1").await;
    server.answer(StatusCode::INTERNAL_SERVER_ERROR, "");
    let pods = Pods::asking(server.api(), BOUNDS);
    assert_eq!(pods.terms_of(&uid()).await, Terms::default());
    // A process outside of pods asks nobody.
    let asked = server.requests.load(Ordering::Relaxed);
    assert_eq!(pods.terms(std::process::id()).await, Terms::default());
    assert_eq!(server.requests.load(Ordering::Relaxed), asked);
    assert_eq!(Pods::off().terms(std::process::id()).await, Terms::default());
}

#[tokio::test]
async fn a_failure_forgets_nothing_that_was_known() {
    let server = Server::start("127.0.0.1").await;
    server.lists(UID, r#"{"nvshare.com/priority": "-1"}"#);
    let pods = Pods::asking(server.api(), BOUNDS);
    let before = pods.terms_of(&uid()).await;
    assert_eq!(before.priority, Some(-1));
    server.answer(StatusCode::INTERNAL_SERVER_ERROR, "");
    pods.terms_of(&"unknown".to_owned().into()).await;
    assert_eq!(pods.terms_of(&uid()).await, before);
}
