//! The device plugin's program.

use std::{io::IsTerminal as _, path::PathBuf, process::ExitCode, sync::Arc, time::Duration};

use anyhow::{Context as _, Result, ensure};
use clap::Parser;
use nvshare_device_plugin::{
    injection::{GpuAccess, Injection},
    inventory::Source,
    kubelet::Kubelet,
    placement::{Placement, Several},
    service::Service,
    stock::Stock,
};
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::watch,
    time::{Instant, MissedTickBehavior, interval},
};
use tokio_util::sync::CancellationToken;
use tracing_subscriber::EnvFilter;

/// Offers shares of each GPU to Kubernetes as nvshare.com/gpu.
///
/// Runs beside nvshare-agent on every node with GPUs, without privileges. A pod that asks for `nvshare.com/gpu: 1`
/// gets one share of a GPU: the GPU itself, the library that makes its programs clients of the agent, and the agent's
/// socket. Up to --shares pods share a GPU; how much memory and time each has is the agent's business.
///
/// The GPU itself is given by NVIDIA's container toolkit, which must be installed: with --gpu-access env the pod runs
/// under its runtime (RuntimeClass `nvidia`, or the node's default), with cdi the toolkit's CDI description is used.
#[derive(Debug, Parser)]
#[command(version, max_term_width = 100)]
struct Cli {
    /// Devices that each GPU is offered as: how many containers can share it.
    #[arg(long, env = "NVSHARE_SHARES", default_value_t = 10, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1000))]
    shares: u32,
    /// The GPUs a new container goes to: spread over all, or packed so that others stay free. GPUs whose clients thrash
    /// come last in both cases, and of equals the one with the least memory in use comes first.
    #[arg(long, env = "NVSHARE_PLACEMENT", value_enum, default_value = "spread")]
    placement: Placement,
    /// What a container with several devices gets: shares of as many GPUs, or several shares of one.
    #[arg(long, env = "NVSHARE_SEVERAL", value_enum, default_value = "apart")]
    several: Several,
    /// How a container gets the GPU itself: the variable NVIDIA_VISIBLE_DEVICES, or a CDI device.
    #[arg(long, env = "NVSHARE_GPU_ACCESS", value_enum, default_value = "env")]
    gpu_access: GpuAccess,
    /// The kind of CDI device, as `nvidia-ctk cdi list` shows it before the `=`.
    #[arg(long, env = "NVSHARE_CDI_KIND", default_value = "nvidia.com/gpu", value_name = "KIND")]
    cdi_kind: String,
    /// Where the list of GPUs comes from: the agent's address, or a file of the same form.
    #[arg(
        long,
        env = "NVSHARE_INVENTORY",
        default_value = "http://127.0.0.1:9464/gpus.json",
        value_name = "URL|FILE"
    )]
    inventory: Source,
    /// How long the agent may be silent before the devices are unhealthy. Restarting it takes a few seconds.
    #[arg(long, env = "NVSHARE_AGENT_GRACE", default_value = "60", value_name = "SECONDS")]
    agent_grace: u64,
    /// The resource's name.
    #[arg(long, env = "NVSHARE_RESOURCE", default_value = "nvshare.com/gpu", value_name = "NAME")]
    resource: String,
    /// The kubelet's directory of device plugins.
    #[arg(
        long,
        env = "NVSHARE_KUBELET_DIR",
        default_value = "/var/lib/kubelet/device-plugins",
        value_name = "DIR"
    )]
    kubelet_dir: PathBuf,
    /// Directory of libnvshare.so on the node, mounted into containers.
    #[arg(long, env = "NVSHARE_LIBRARY_DIR", default_value = "/var/lib/nvshare/lib", value_name = "DIR")]
    library_dir: PathBuf,
    /// The same directory as this process sees it, if that is another place.
    #[arg(long, env = "NVSHARE_LIBRARY_DIR_HERE", value_name = "DIR")]
    library_dir_here: Option<PathBuf>,
    /// The agent's run directory on the node, mounted into containers.
    #[arg(long, env = "NVSHARE_RUN_DIR", default_value = "/run/nvshare", value_name = "DIR")]
    run_dir: PathBuf,
    /// What goes to the log on standard error, as in `info` or `debug`.
    #[arg(long, env = "NVSHARE_LOG", default_value = "info", value_name = "FILTER")]
    log: String,
}

/// Between looks at the list of GPUs.
const LOOK: Duration = Duration::from_secs(1);

fn main() -> ExitCode {
    match run(Cli::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("nvshare-device-plugin: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(cli: Cli) -> Result<()> {
    let filter =
        EnvFilter::try_new(&cli.log).with_context(|| format!("`{}` is not a log filter", cli.log))?;
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .init();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start the runtime")?;
    runtime.block_on(serve(cli))
}

async fn serve(cli: Cli) -> Result<()> {
    let Cli {
        shares,
        placement,
        several,
        gpu_access,
        cdi_kind,
        inventory,
        agent_grace,
        resource,
        kubelet_dir,
        library_dir,
        library_dir_here,
        run_dir,
        log: _,
    } = cli;
    ensure!(
        resource
            .split_once('/')
            .is_some_and(|(domain, name)| domain.contains('.') && !name.is_empty() && !name.contains('/')),
        "`{resource}` is not the name of a resource; expected one like nvshare.com/gpu"
    );
    for dir in [&library_dir, &run_dir] {
        ensure!(dir.is_absolute(), "{} is not an absolute path on the node", dir.display());
    }
    let stop = CancellationToken::new();
    let mut terminate = signal(SignalKind::terminate()).context("cannot listen for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("cannot listen for SIGINT")?;
    let (stock_tx, mut stock_rx) =
        watch::channel(Arc::new(Stock::new(shares, Duration::from_secs(agent_grace))));
    let service = Service {
        stock_rx: stock_rx.clone(),
        library_dir: library_dir_here.unwrap_or_else(|| library_dir.clone()),
        injection: Injection { library_dir, run_dir, access: gpu_access, cdi_kind },
        placement,
        several,
        stop: stop.clone(),
    };
    let kubelet = Kubelet { dir: kubelet_dir, resource };
    let serving = async {
        // A kubelet that was told of no devices would forget those that its pods have.
        tracing::info!(from = %inventory, "waiting for the list of GPUs");
        tokio::select! {
            () = stop.cancelled() => return Ok(()),
            known = stock_rx.wait_for(|stock| stock.is_known()) => drop(known.context("nobody looks for GPUs")?),
        }
        kubelet.serve(&service, &stop).await
    };
    tokio::pin!(serving);
    let following = follow(&inventory, &stock_tx);
    tokio::select! {
        () = following => {}
        served = &mut serving => return served,
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    tracing::info!("stopping");
    stop.cancel();
    serving.await
}

/// Keeps the stock up to date.
async fn follow(inventory: &Source, stock_tx: &watch::Sender<Arc<Stock>>) {
    let mut looks = interval(LOOK);
    looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut silent = false;
    loop {
        looks.tick().await;
        let news = match inventory.read().await {
            Ok(news) => {
                if silent {
                    tracing::info!("the agent answers again");
                }
                silent = false;
                Some(news)
            }
            Err(error) => {
                if !silent {
                    tracing::warn!(from = %inventory, error = format!("{error:#}"), "no list of GPUs; trying again");
                }
                silent = true;
                None
            }
        };
        stock_tx.send_modify(|stock| {
            if Arc::make_mut(stock).update(news.as_ref(), Instant::now()) {
                let (gpus, healthy) = stock.count();
                tracing::info!(gpus, healthy, shares = stock.shares(), "GPUs");
            }
        });
    }
}
