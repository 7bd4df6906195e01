//! The interface that the kubelet calls.

use std::{collections::BTreeSet, path::PathBuf, pin::Pin, sync::Arc};

use nvshare_core::GpuId;
use tokio::sync::watch;
use tokio_stream::{Stream, StreamExt as _, wrappers::WatchStream};
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status};

use crate::{
    api::{
        AllocateRequest, AllocateResponse, ContainerAllocateRequest, ContainerAllocateResponse,
        ContainerPreferredAllocationRequest, ContainerPreferredAllocationResponse, DevicePluginOptions,
        Empty, ListAndWatchResponse, PreStartContainerRequest, PreStartContainerResponse,
        PreferredAllocationRequest, PreferredAllocationResponse, device_plugin_server::DevicePlugin,
    },
    injection::{Injection, LIBRARY},
    placement::{self, Placement, Several, Wish},
    share::Share,
    stock::Stock,
};

/// What the kubelet is told about this plugin.
pub const OPTIONS: DevicePluginOptions =
    DevicePluginOptions { pre_start_required: false, get_preferred_allocation_available: true };

/// The plugin as the kubelet sees it.
#[derive(Clone, Debug)]
pub struct Service {
    /// What is offered, as it changes.
    pub stock_rx: watch::Receiver<Arc<Stock>>,
    /// What goes into containers.
    pub injection: Injection,
    /// The library's directory as the plugin itself sees it; it is not there before the library was installed.
    pub library_dir: PathBuf,
    /// Which GPUs are taken first.
    pub placement: Placement,
    /// What several shares of one container mean.
    pub several: Several,
    /// Ends the streams, so that the server can end.
    pub stop: CancellationToken,
}

/// A stream that may end with an error.
type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl DevicePlugin for Service {
    async fn get_device_plugin_options(
        &self,
        _: Request<Empty>,
    ) -> Result<Response<DevicePluginOptions>, Status> {
        Ok(Response::new(OPTIONS))
    }

    type ListAndWatchStream = Answers<ListAndWatchResponse>;

    async fn list_and_watch(&self, _: Request<Empty>) -> Result<Response<Self::ListAndWatchStream>, Status> {
        tracing::info!("the kubelet watches the devices");
        let stop = self.stop.clone();
        let (answer_tx, answer_rx) = tokio::sync::mpsc::channel(1);
        let mut stocks = WatchStream::new(self.stock_rx.clone());
        tokio::spawn(async move {
            let mut told = None;
            loop {
                let stock = tokio::select! {
                    () = stop.cancelled() => return,
                    () = answer_tx.closed() => return,
                    stock = stocks.next() => stock,
                };
                let Some(stock) = stock else { return };
                let devices = stock.devices();
                if told.as_ref() == Some(&devices) {
                    continue;
                }
                told = Some(devices.clone());
                if answer_tx.send(Ok(ListAndWatchResponse { devices })).await.is_err() {
                    return;
                }
            }
        });
        Ok(Response::new(Box::pin(tokio_stream::wrappers::ReceiverStream::new(answer_rx))))
    }

    async fn get_preferred_allocation(
        &self,
        request: Request<PreferredAllocationRequest>,
    ) -> Result<Response<PreferredAllocationResponse>, Status> {
        let stock = Arc::clone(&self.stock_rx.borrow());
        let container_responses = request
            .into_inner()
            .container_requests
            .iter()
            .map(|wish| self.prefer(&stock, wish))
            .collect::<Result<_, _>>()
            .map_err(refused)?;
        Ok(Response::new(PreferredAllocationResponse { container_responses }))
    }

    async fn allocate(
        &self,
        request: Request<AllocateRequest>,
    ) -> Result<Response<AllocateResponse>, Status> {
        let stock = Arc::clone(&self.stock_rx.borrow());
        let requests = request.into_inner().container_requests;
        if requests.is_empty() {
            return Err(refused(Status::invalid_argument("the request names no container")));
        }
        let container_responses = requests
            .iter()
            .map(|request| self.give(&stock, request))
            .collect::<Result<_, _>>()
            .map_err(refused)?;
        Ok(Response::new(AllocateResponse { container_responses }))
    }

    async fn pre_start_container(
        &self,
        _: Request<PreStartContainerRequest>,
    ) -> Result<Response<PreStartContainerResponse>, Status> {
        // Not asked for in the options; there is nothing to do.
        Ok(Response::new(PreStartContainerResponse {}))
    }
}

/// Kubernetes shows a refusal in the pod's events only, so it goes to the log too.
fn refused(status: Status) -> Status {
    tracing::warn!(code = ?status.code(), reason = status.message(), "refused");
    status
}

/// Each device once, by its share.
fn shares(ids: &[String]) -> Result<BTreeSet<Share>, Status> {
    let mut shares = BTreeSet::new();
    for id in ids {
        let share: Share = id
            .parse()
            .map_err(|error: crate::share::InvalidShare| Status::invalid_argument(error.to_string()))?;
        if !shares.insert(share) {
            return Err(Status::invalid_argument(format!("device {share} is named twice")));
        }
    }
    Ok(shares)
}

impl Service {
    fn prefer(
        &self,
        stock: &Stock,
        request: &ContainerPreferredAllocationRequest,
    ) -> Result<ContainerPreferredAllocationResponse, Status> {
        let ContainerPreferredAllocationRequest {
            available_device_i_ds,
            must_include_device_i_ds,
            allocation_size,
        } = request;
        let size = usize::try_from(*allocation_size).map_err(|_negative| {
            Status::invalid_argument(format!("{allocation_size} devices cannot be chosen"))
        })?;
        let wish = Wish {
            available: shares(available_device_i_ds)?,
            must_include: shares(must_include_device_i_ds)?,
            size,
        };
        let chosen =
            placement::choose(&wish, stock.shares(), self.placement, self.several, |gpu| stock.advice(gpu))
                .map_err(|error| Status::invalid_argument(error.to_string()))?;
        Ok(ContainerPreferredAllocationResponse {
            device_i_ds: chosen.iter().map(Share::to_string).collect(),
        })
    }

    fn give(
        &self,
        stock: &Stock,
        request: &ContainerAllocateRequest,
    ) -> Result<ContainerAllocateResponse, Status> {
        let wanted = shares(&request.devices_ids)?;
        if wanted.is_empty() {
            return Err(Status::invalid_argument("a container asks for no device"));
        }
        for &share in &wanted {
            stock.check(share).map_err(|error| match error {
                crate::stock::NotToBeHad::UnknownGpu(_) | crate::stock::NotToBeHad::UnknownNumber { .. } => {
                    Status::not_found(error.to_string())
                }
                crate::stock::NotToBeHad::Lost(_) | crate::stock::NotToBeHad::NoAgent(_) => {
                    Status::failed_precondition(error.to_string())
                }
            })?;
        }
        // Without the library every program would start with a complaint of the dynamic linker, and share nothing.
        let library = self.library_dir.join(LIBRARY);
        if !library.is_file() {
            return Err(Status::failed_precondition(format!(
                "{} is not there; the init container of the DaemonSet installs it on the node",
                library.display()
            )));
        }
        let gpus: BTreeSet<GpuId> = wanted.iter().map(|share| share.gpu).collect();
        tracing::info!(devices = request.devices_ids.join(","), gpus = gpus.len(), "given to a container");
        Ok(self.injection.of(&gpus))
    }
}
