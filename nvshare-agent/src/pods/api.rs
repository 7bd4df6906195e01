//! The API server, asked for one thing: what is written on the pods of this node.
//!
//! The request names the node, so no other pods come; and it asks for their metadata only, so neither their variables nor
//! their volumes do.

use std::{
    collections::BTreeMap,
    env, fs,
    net::IpAddr,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use http_body_util::{BodyExt as _, Empty, Limited};
use hyper::{
    Request, StatusCode,
    body::Bytes,
    client::conn::http1,
    header::{ACCEPT, AUTHORIZATION, HOST, USER_AGENT},
};
use hyper_util::rt::TokioIo;
use serde::Deserialize;
use tokio::{net::TcpStream, time::timeout};
use tokio_rustls::{
    TlsConnector,
    rustls::{
        ClientConfig, RootCertStore,
        crypto::ring,
        pki_types::{CertificateDer, ServerName, pem::PemObject as _},
    },
};

use super::{annotations::PREFIX, cgroup::PodUid};

/// Where Kubernetes puts what a pod needs to be known to the API server.
const ACCOUNT: &str = "/var/run/secrets/kubernetes.io/serviceaccount";
/// Metadata without the rest.
const METADATA_ONLY: &str = "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1";
/// A request takes no longer than this.
const PATIENCE: Duration = Duration::from_secs(10);
/// No node's list is longer.
const LONGEST: usize = 32 << 20;

/// The server and the node of which it is asked.
#[derive(Clone)]
pub struct ApiServer {
    host: String,
    port: u16,
    /// Tokens are replaced every hour or so, so the file is read for each request.
    token: PathBuf,
    node: String,
    tls: Arc<ClientConfig>,
}

impl std::fmt::Debug for ApiServer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}:{} for {}", self.host, self.port, self.node)
    }
}

/// One pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pod {
    /// Its identity.
    pub uid: PodUid,
    /// Namespace and name.
    pub name: String,
    /// Our annotations on it.
    pub annotations: BTreeMap<String, String>,
}

#[derive(Deserialize)]
struct List {
    items: Vec<Item>,
}

#[derive(Deserialize)]
struct Item {
    metadata: Metadata,
}

#[derive(Deserialize)]
struct Metadata {
    uid: String,
    name: String,
    #[serde(default)]
    namespace: String,
    #[serde(default)]
    annotations: BTreeMap<String, String>,
}

impl ApiServer {
    /// The server of the cluster that this process runs in. `NODE_NAME` says on which node.
    pub fn in_cluster() -> Result<Self> {
        let variable = |name: &str| {
            env::var(name).ok().filter(|value| !value.is_empty()).with_context(|| {
                format!("{name} is not set; it is in a pod of the DaemonSet (chart value podTerms.enabled)")
            })
        };
        let host = variable("KUBERNETES_SERVICE_HOST")?;
        let port = variable("KUBERNETES_SERVICE_PORT")?;
        let port = port.parse().with_context(|| format!("KUBERNETES_SERVICE_PORT={port} is no port"))?;
        Self::new(host, port, Path::new(ACCOUNT), variable("NODE_NAME")?)
    }

    /// A server at this address; `account` is a folder with `ca.crt` and `token`.
    pub fn new(host: String, port: u16, account: &Path, node: String) -> Result<Self> {
        let authority = account.join("ca.crt");
        let mut roots = RootCertStore::empty();
        let certificates = CertificateDer::pem_file_iter(&authority).with_context(|| {
            format!("cannot read {}; is the service account's token mounted?", authority.display())
        })?;
        for certificate in certificates {
            let certificate = certificate.with_context(|| format!("in {}", authority.display()))?;
            roots.add(certificate).with_context(|| format!("in {}", authority.display()))?;
        }
        let tls = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_safe_default_protocol_versions()
            .context("no TLS")?
            .with_root_certificates(roots)
            .with_no_client_auth();
        // The name is put into an address.
        if node.is_empty() || !node.bytes().all(|byte| byte.is_ascii_alphanumeric() || b".-".contains(&byte))
        {
            bail!("{node:?} is not the name of a node");
        }
        Ok(Self { host, port, token: account.join("token"), node, tls: Arc::new(tls) })
    }

    /// The pods of the node.
    pub async fn pods(&self) -> Result<Vec<Pod>> {
        let text = timeout(PATIENCE, self.get()).await.context("no answer within 10 s")??;
        let List { items } = serde_json::from_slice(&text).context("the answer is not a list of pods")?;
        let pods = items.into_iter().map(|Item { metadata }| Pod {
            uid: metadata.uid.into(),
            name: format!("{}/{}", metadata.namespace, metadata.name),
            annotations: metadata
                .annotations
                .into_iter()
                .filter(|(name, _)| name.starts_with(PREFIX))
                .collect(),
        });
        Ok(pods.collect())
    }

    async fn get(&self) -> Result<Bytes> {
        let token = fs::read_to_string(&self.token)
            .with_context(|| format!("cannot read {}", self.token.display()))?;
        let host = self.host.trim_matches(['[', ']']);
        let name = ServerName::try_from(host.to_owned()).with_context(|| format!("{host:?} is no host"))?;
        let shown = match host.parse::<IpAddr>() {
            Ok(IpAddr::V6(address)) => format!("[{address}]"),
            Ok(IpAddr::V4(_)) | Err(_) => host.to_owned(),
        };
        let stream = TcpStream::connect((host, self.port)).await.context("cannot connect")?;
        let stream = TlsConnector::from(Arc::clone(&self.tls)).connect(name, stream).await.context("TLS")?;
        let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
        // resourceVersion=0: from the server's memory, as the kubelet itself asks.
        let path = format!("/api/v1/pods?fieldSelector=spec.nodeName%3D{}&resourceVersion=0", self.node);
        let request = Request::get(path)
            .header(HOST, format!("{shown}:{}", self.port))
            .header(USER_AGENT, concat!("nvshare-agent/", env!("CARGO_PKG_VERSION")))
            .header(ACCEPT, METADATA_ONLY)
            .header(AUTHORIZATION, format!("Bearer {}", token.trim()))
            .body(Empty::<Bytes>::new())?;
        let answer = async move {
            let response = sender.send_request(request).await?;
            match response.status() {
                StatusCode::OK => {}
                status @ (StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN) => {
                    bail!("{status}: the agent's service account must be allowed to list pods")
                }
                status => bail!("{status}"),
            }
            let body = Limited::new(response.into_body(), LONGEST).collect().await;
            Ok(body.map_err(|error| anyhow::anyhow!("the answer broke off: {error}"))?.to_bytes())
        };
        tokio::pin!(connection);
        tokio::pin!(answer);
        // The connection only moves while it is polled.
        tokio::select! {
            answer = &mut answer => answer,
            ended = &mut connection => {
                ended?;
                answer.await
            }
        }
    }
}
