//! Being known to the kubelet: serves the interface at a socket in its directory, registers, and begins again when
//! the kubelet does.
//!
//! A kubelet that starts removes every socket in the directory and forgets its plugins, then makes its own socket
//! anew. So both are watched: a new `kubelet.sock` and the end of the own socket are reasons to begin again. The watch
//! is on the directory, since sockets come and go. Events only say when to look; what counts is which files are there,
//! so a lost or a late event does no harm.

use std::{
    fs, io,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, Result, anyhow};
use hyper_util::rt::TokioIo;
use inotify::{EventMask, EventStream, Inotify, WatchMask};
use tokio::net::{UnixListener, UnixStream};
use tokio_stream::{StreamExt as _, wrappers::UnixListenerStream};
use tokio_util::sync::CancellationToken;
use tonic::transport::{Endpoint, Server, Uri};

use crate::{
    api::{
        KUBELET_SOCKET, RegisterRequest, VERSION, device_plugin_server::DevicePluginServer,
        registration_client::RegistrationClient,
    },
    service::{OPTIONS, Service},
};

/// The kubelet answers a registration within this time.
const PATIENCE: Duration = Duration::from_secs(10);
/// Between attempts to register.
const RETRY: Duration = Duration::from_secs(1);
/// Between looks at the own socket.
const LOOK: Duration = Duration::from_secs(10);
/// How long calls in progress may take when the plugin stops.
const FAREWELL: Duration = Duration::from_secs(2);

/// Where the kubelet is, and what it is told.
#[derive(Clone, Debug)]
pub struct Kubelet {
    /// Its directory of device plugins.
    pub dir: PathBuf,
    /// The resource that is offered.
    pub resource: String,
}

/// Device, number and time of change of a file.
type Identity = (u64, u64, i64, i64);

/// Why serving ended.
#[derive(Debug, PartialEq, Eq)]
enum End {
    /// The plugin stops.
    Stopped,
    /// The kubelet is to be told again.
    Again(&'static str),
}

impl Kubelet {
    /// Serves until `stop`, through any number of restarts of the kubelet.
    pub async fn serve(&self, service: &Service, stop: &CancellationToken) -> Result<()> {
        let mut events = self.watch()?;
        loop {
            match self.once(service, stop, &mut events).await? {
                End::Stopped => return Ok(()),
                End::Again(why) => tracing::info!(why, "registering again"),
            }
        }
    }

    fn watch(&self) -> Result<EventStream<[u8; 4096]>> {
        let context = || {
            format!(
                "cannot watch {}; is the kubelet's directory of device plugins mounted there?",
                self.dir.display()
            )
        };
        let inotify = Inotify::init().with_context(context)?;
        let mask = WatchMask::CREATE | WatchMask::DELETE | WatchMask::MOVED_TO | WatchMask::DELETE_SELF;
        inotify.watches().add(&self.dir, mask | WatchMask::ONLYDIR).with_context(context)?;
        inotify.into_event_stream([0; 4096]).with_context(context)
    }

    /// The name of the plugin's socket.
    fn endpoint(&self) -> String {
        format!("{}.sock", self.resource.replace('/', "-"))
    }

    async fn once(
        &self,
        service: &Service,
        stop: &CancellationToken,
        events: &mut EventStream<[u8; 4096]>,
    ) -> Result<End> {
        let socket = self.dir.join(self.endpoint());
        remove(&socket).with_context(|| format!("cannot remove the old {}", socket.display()))?;
        let listener = UnixListener::bind(&socket)
            .with_context(|| format!("cannot listen at {}; may this user write there?", socket.display()))?;
        let identity = identity(&socket);
        let serving = stop.child_token();
        let own = Service { stop: serving.clone(), ..service.clone() };
        let server = tokio::spawn(
            Server::builder().add_service(DevicePluginServer::new(own)).serve_with_incoming_shutdown(
                UnixListenerStream::new(listener),
                serving.clone().cancelled_owned(),
            ),
        );
        let end = self.stand(&socket, identity, stop, events).await;
        serving.cancel();
        match tokio::time::timeout(FAREWELL, server).await {
            Ok(Ok(Ok(()))) | Err(_) => {}
            Ok(Ok(Err(error))) => tracing::warn!(%error, "serving the kubelet failed"),
            Ok(Err(error)) => return Err(anyhow!(error).context("serving the kubelet broke off")),
        }
        // The next plugin of this name may be there already.
        if self::identity(&socket) == identity {
            remove(&socket).with_context(|| format!("cannot remove {}", socket.display()))?;
        }
        Ok(end)
    }

    /// Registers, then waits for a reason to begin again.
    async fn stand(
        &self,
        socket: &Path,
        identity: Option<Identity>,
        stop: &CancellationToken,
        events: &mut EventStream<[u8; 4096]>,
    ) -> End {
        // The kubelet's socket at which the plugin has registered.
        let mut registered = None;
        let mut complained = false;
        loop {
            if registered.is_none() {
                let at = self::identity(&self.dir.join(KUBELET_SOCKET));
                let registering = tokio::time::timeout(PATIENCE, self.register());
                let done = tokio::select! {
                    () = stop.cancelled() => return End::Stopped,
                    done = registering => done.map_err(anyhow::Error::from).and_then(|done| done),
                };
                match done {
                    Ok(()) => {
                        registered = at;
                        tracing::info!(resource = self.resource, "registered with the kubelet");
                    }
                    Err(error) if !complained => {
                        complained = true;
                        let error = format!("{error:#}");
                        tracing::warn!(error, "the kubelet does not take the registration; trying again");
                    }
                    Err(_) => {}
                }
            }
            let wait = if registered.is_some() { LOOK } else { RETRY };
            tokio::select! {
                () = stop.cancelled() => return End::Stopped,
                () = self.change(events) => {}
                () = tokio::time::sleep(wait) => {}
            }
            if self::identity(socket) != identity {
                return End::Again("the plugin's socket is gone");
            }
            let kubelet = self::identity(&self.dir.join(KUBELET_SOCKET));
            if registered.is_some() && kubelet.is_some() && kubelet != registered {
                return End::Again("the kubelet has started again");
            }
        }
    }

    /// Waits until one of the sockets has come or gone; for ever if nothing tells any more.
    async fn change(&self, events: &mut EventStream<[u8; 4096]>) {
        let own = self.endpoint();
        loop {
            match events.next().await {
                Some(Ok(event)) => {
                    let name = event.name.as_deref().and_then(|name| name.to_str());
                    if event.mask.contains(EventMask::Q_OVERFLOW)
                        || name == Some(&own)
                        || name == Some(KUBELET_SOCKET)
                    {
                        return;
                    }
                }
                Some(Err(error)) => {
                    tracing::warn!(%error, "cannot read what happens in the kubelet's directory; looking now and then");
                    std::future::pending::<()>().await;
                }
                None => std::future::pending().await,
            }
        }
    }

    async fn register(&self) -> Result<()> {
        let path = self.dir.join(KUBELET_SOCKET);
        let shown = path.display().to_string();
        // The address is for the form only; the connector knows where to go.
        let channel = Endpoint::from_static("http://localhost")
            .connect_with_connector(tower::service_fn(move |_: Uri| {
                let path = path.clone();
                async move { UnixStream::connect(path).await.map(TokioIo::new) }
            }))
            .await
            .with_context(|| format!("nobody listens at {shown}"))?;
        let request = RegisterRequest {
            version: VERSION.to_owned(),
            endpoint: self.endpoint(),
            resource_name: self.resource.clone(),
            options: Some(OPTIONS),
        };
        RegistrationClient::new(channel)
            .register(request)
            .await
            .map_err(|status| anyhow!("{:?}: {}", status.code(), status.message()))?;
        Ok(())
    }
}

/// Which file is there. A file system gives the number of a removed file to the next one, so its time belongs to it.
fn identity(path: &Path) -> Option<Identity> {
    let metadata = fs::symlink_metadata(path).ok()?;
    Some((metadata.dev(), metadata.ino(), metadata.ctime(), metadata.ctime_nsec()))
}

fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        Ok(()) | Err(_) => Ok(()),
    }
}
