//! A kubelet's side of the interface, as far as a plugin can tell.

use std::{
    convert::Infallible,
    future::{Ready, ready},
    path::{Path, PathBuf},
    pin::Pin,
    sync::{Arc, Mutex},
    task::{Context, Poll},
    time::Duration,
};

use hyper_util::rt::TokioIo;
use tokio::{
    net::{UnixListener, UnixStream},
    sync::mpsc,
    task::JoinHandle,
    time::timeout,
};
use tokio_stream::wrappers::UnixListenerStream;
use tonic::{
    Request, Response, Status, Streaming,
    body::Body,
    client::Grpc,
    server::{NamedService, UnaryService},
    transport::{Channel, Endpoint, Server},
};

use crate::wire::{Raw, Wire};

pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

/// A kubelet that serves registrations in a directory.
pub(crate) struct Kubelet {
    dir: PathBuf,
    registered_rx: mpsc::UnboundedReceiver<Wire>,
    server: JoinHandle<()>,
    answer: Arc<Mutex<Result<(), Status>>>,
}

impl Kubelet {
    /// Starts as the real one does: whatever lies in the directory is removed, then the socket appears.
    pub(crate) fn start(dir: &Path) -> Self {
        std::fs::create_dir_all(dir).expect("the kubelet's directory");
        for entry in std::fs::read_dir(dir).expect("the kubelet's directory").flatten() {
            std::fs::remove_file(entry.path()).expect("an old socket");
        }
        Self::listen(dir)
    }

    /// Starts without a look at what lies in the directory.
    pub(crate) fn start_beside(dir: &Path) -> Self {
        std::fs::remove_file(dir.join("kubelet.sock")).expect("the last kubelet's socket");
        Self::listen(dir)
    }

    fn listen(dir: &Path) -> Self {
        let (registered_tx, registered_rx) = mpsc::unbounded_channel();
        let listener = UnixListener::bind(dir.join("kubelet.sock")).expect("the kubelet's socket");
        let answer = Arc::new(Mutex::new(Ok(())));
        let service = Registration { registered_tx, answer: Arc::clone(&answer) };
        let server = tokio::spawn(async move {
            let serving = Server::builder().add_service(service);
            serving.serve_with_incoming(UnixListenerStream::new(listener)).await.expect("the kubelet serves");
        });
        Self { dir: dir.to_owned(), registered_rx, server, answer }
    }

    /// What it answers to registrations from here on.
    pub(crate) fn answer(&self, answer: Result<(), Status>) {
        *self.answer.lock().expect("the answer") = answer;
    }

    /// The next registration.
    pub(crate) async fn registration(&mut self) -> Wire {
        let next = timeout(PATIENCE, self.registered_rx.recv()).await;
        next.expect("a registration in time").expect("a kubelet that runs")
    }

    /// Ends like a process that is killed: its socket stays behind.
    pub(crate) async fn kill(self) {
        self.server.abort();
        drop(self.server.await);
    }

    /// Connects to the plugin that has registered with this endpoint, as the kubelet does.
    pub(crate) async fn plugin(&self, endpoint: &str) -> Plugin {
        let path = self.dir.join(endpoint);
        let channel = Endpoint::from_static("http://localhost")
            .connect_with_connector(tower::service_fn(move |_| {
                let path = path.clone();
                async move { UnixStream::connect(path).await.map(TokioIo::new) }
            }))
            .await
            .expect("a plugin at its socket");
        Plugin(Grpc::new(channel))
    }
}

#[derive(Clone)]
struct Registration {
    registered_tx: mpsc::UnboundedSender<Wire>,
    answer: Arc<Mutex<Result<(), Status>>>,
}

impl NamedService for Registration {
    const NAME: &'static str = "v1beta1.Registration";
}

impl UnaryService<Wire> for Registration {
    type Response = Wire;
    type Future = Ready<Result<Response<Wire>, Status>>;

    fn call(&mut self, request: Request<Wire>) -> Self::Future {
        let answer = self.answer.lock().expect("the answer").clone();
        // Who has gone does not want to know.
        self.registered_tx.send(request.into_inner()).ok();
        ready(answer.map(|()| Response::new(Wire::new())))
    }
}

impl tower::Service<http::Request<Body>> for Registration {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Infallible>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let service = self.clone();
        Box::pin(async move {
            if request.uri().path() == "/v1beta1.Registration/Register" {
                return Ok(tonic::server::Grpc::new(Raw).unary(service, request).await);
            }
            Ok(Status::unimplemented("no such method").into_http())
        })
    }
}

/// A connection to a plugin.
pub(crate) struct Plugin(Grpc<Channel>);

impl Plugin {
    async fn unary(&mut self, method: &'static str, request: Wire) -> Result<Wire, Status> {
        self.0.ready().await.expect("a plugin that listens");
        let path = http::uri::PathAndQuery::from_static(method);
        timeout(PATIENCE, self.0.unary(Request::new(request), path, Raw))
            .await
            .expect("an answer in time")
            .map(Response::into_inner)
    }

    pub(crate) async fn options(&mut self) -> Result<Wire, Status> {
        self.unary("/v1beta1.DevicePlugin/GetDevicePluginOptions", Wire::new()).await
    }

    pub(crate) async fn allocate(&mut self, request: Wire) -> Result<Wire, Status> {
        self.unary("/v1beta1.DevicePlugin/Allocate", request).await
    }

    pub(crate) async fn prefer(&mut self, request: Wire) -> Result<Wire, Status> {
        self.unary("/v1beta1.DevicePlugin/GetPreferredAllocation", request).await
    }

    pub(crate) async fn pre_start(&mut self, request: Wire) -> Result<Wire, Status> {
        self.unary("/v1beta1.DevicePlugin/PreStartContainer", request).await
    }

    pub(crate) async fn watch(&mut self) -> Watch {
        self.0.ready().await.expect("a plugin that listens");
        let path = http::uri::PathAndQuery::from_static("/v1beta1.DevicePlugin/ListAndWatch");
        let stream = timeout(PATIENCE, self.0.server_streaming(Request::new(Wire::new()), path, Raw)).await;
        Watch(stream.expect("an answer in time").expect("a stream").into_inner())
    }
}

/// A stream of device lists.
pub(crate) struct Watch(Streaming<Wire>);

impl Watch {
    /// The next list as (ID, health); `None` at the end of the stream.
    pub(crate) async fn next(&mut self) -> Option<Vec<(String, String)>> {
        let next = timeout(PATIENCE, self.0.message()).await.expect("news in time");
        // The real kubelet treats every end alike.
        let list = next.ok().flatten()?;
        Some(list.all(1).iter().map(|device| (device.one_text(1), device.one_text(2))).collect())
    }

    /// Waits for a list in which this holds.
    pub(crate) async fn until(
        &mut self,
        holds: impl Fn(&[(String, String)]) -> bool,
    ) -> Vec<(String, String)> {
        loop {
            let list = self.next().await.expect("a stream that goes on");
            if holds(&list) {
                return list;
            }
        }
    }
}
