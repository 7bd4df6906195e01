//! Puts the agent together, runs it, and takes it apart.

use std::{net::SocketAddr, path::PathBuf, sync::Arc, time::Duration};

use anyhow::{Context as _, Result};
use nvshare_core::Bytes;
use tokio::net::TcpListener;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{
    clients::{
        admission::{Admission, LogBudget},
        listener,
        registry::Registry,
        session::Hub,
    },
    clock,
    config::{Config, MetricsListen, overrides::Overrides},
    driver::{self, Command},
    metrics::Metrics,
    observe::{
        bpf::Bpf,
        gpus::Gpus,
        hazards::Hazards,
        nvml::NvmlSource,
        sampler::{self, Sampler},
        sensors::Sensors,
        source::BpfOptions,
        uvm_counters::UvmCounters,
        uvm_events::{EventSampler, UvmEvents},
    },
    operator::{
        control,
        history::{self, History},
        http,
        report::Desk,
        settings::Settings,
    },
    pods::Pods,
    recording::Recorder,
    run_dir::RunDir,
};

/// How long the first reading of NVML may take before the agent starts without it.
const NVML_FIRST: Duration = Duration::from_secs(5);

/// What the agent is started with.
#[derive(Clone, Debug)]
pub struct Options {
    /// The configuration, command line included.
    pub config: Config,
    /// Where to record the engine's inputs and decisions.
    pub record: Option<PathBuf>,
    /// Where what operators change is kept, and what was kept there.
    pub overrides: (Option<PathBuf>, Overrides),
}

/// Runs the agent until `shutdown` is cancelled.
pub async fn run(options: Options, shutdown: CancellationToken) -> Result<()> {
    let Options { config, record, overrides: (overrides_file, overrides) } = options;
    let started = clock::now();
    raise_descriptor_limit();
    let pods = Arc::new(Pods::new(&config.pods)?);
    let run_dir = RunDir::claim(&config.listen.run_dir, config.listen.control_dir.as_deref())?;
    let metrics = Arc::new(Metrics::new().context("cannot set up the metrics")?);
    let http = listen_http(config.listen.metrics).await?;
    let orders = overrides.orders();
    let settings = Arc::new(Settings::new(config.engine.clone(), overrides_file, overrides));
    let engine = settings.engine().to_core();
    let recorder = record.map(|path| Recorder::create(&path, &engine)).transpose()?;
    let driver = driver::start(engine, Arc::clone(&metrics), recorder);
    for order in orders {
        driver.order(order).await?;
    }

    let nvml = NvmlSource::start(config.driver.nvml.clone(), config.sensors.nvml);
    let bpf_options = BpfOptions {
        driver: config.driver.clone(),
        uvm_kprobe: config.sensors.uvm_kprobe,
        fault_thread: config.sensors.fault_thread,
        xid: config.sensors.xid,
        cuda_uprobe: config.sensors.cuda_uprobe,
    };
    let attaching = tokio::task::spawn_blocking(move || Bpf::attach(&bpf_options));
    nvml.first(NVML_FIRST).await;
    let bpf = attaching.await.context("attaching the eBPF sensors failed")?;

    let gpus = Arc::new(Gpus::new(config.gpu.usable_memory));
    let hub = Arc::new(Hub {
        registry: Registry::new(&config.listen),
        admission: Admission::new(&config.listen),
        log_budget: LogBudget::default(),
        hazards: Hazards::default(),
        driver: driver.clone(),
        metrics,
        counters: Arc::new(UvmCounters::new(config.driver.clone(), config.sensors.uvm_counters)),
        gpus,
        settings,
        pods: Arc::clone(&pods),
    });
    let events = Arc::new(UvmEvents::new(config.driver.clone(), config.sensors.uvm_events));
    let event_sampler = EventSampler::start(Arc::clone(&events), &config.sampling, sampler::PERIOD)
        .context("cannot start the thread that reads event queues")?;
    let sensors = Arc::new(Sensors::new(Arc::clone(&hub), events, nvml.clone(), bpf.status()));
    sensors.update(bpf.status());
    report_gpus(&hub, &nvml).await;
    let sampler = Sampler::new(Arc::clone(&hub), bpf, event_sampler, nvml, Arc::clone(&sensors))
        .start()
        .context("cannot start the sampler's thread")?;
    let address = http.as_ref().and_then(|http| http.local_addr().ok());
    let desk = Arc::new(Desk {
        hub: Arc::clone(&hub),
        sensors,
        started,
        metrics: address,
        history: History::default(),
    });

    let stop = CancellationToken::new();
    let tasks = TaskTracker::new();
    tasks.spawn(listener::serve(run_dir.clients()?, hub, stop.clone()));
    tasks.spawn(pods.keep(stop.clone()));
    tasks.spawn(control::serve(run_dir.control()?, Arc::clone(&desk), stop.clone()));
    tasks.spawn(history::keep(Arc::clone(&desk), stop.clone()));
    if let Some(http) = http {
        tasks.spawn(http::serve(http, desk, stop.clone()));
    }
    tasks.close();
    announce(&config, address);

    shutdown.cancelled().await;
    tracing::info!("stopping: opening every gate");
    driver.shutdown().await;
    stop.cancel();
    tasks.wait().await;
    tokio::task::spawn_blocking(move || sampler.stop()).await.context("stopping the sampler failed")?;
    drop(run_dir);
    tracing::info!("stopped");
    Ok(())
}

async fn listen_http(listen: MetricsListen) -> Result<Option<TcpListener>> {
    match listen {
        MetricsListen::Off => Ok(None),
        MetricsListen::At(address) => {
            let listener = TcpListener::bind(address).await.with_context(|| {
                format!(
                    "cannot listen at {address} for metrics; choose another with --metrics-listen, or `off`"
                )
            })?;
            Ok(Some(listener))
        }
    }
}

/// Each client needs a handful of descriptors, and the usual soft limit is small.
fn raise_descriptor_limit() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let Rlimit { current: _, maximum } = getrlimit(Resource::Nofile);
    if let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum }) {
        tracing::debug!(%error, "the limit of open files stays as it is");
    }
}

async fn report_gpus(hub: &Hub, nvml: &NvmlSource) {
    let Some(reading) = nvml.reading() else {
        tracing::warn!("no GPU is known without NVML; GPUs appear as clients use them");
        return;
    };
    let news = hub.gpus.update(&reading, |_| Bytes::ZERO);
    for gpu in &reading.gpus {
        tracing::info!(gpu = %gpu.id, name = gpu.name, memory = %gpu.total, driver = reading.driver, "GPU");
    }
    if reading.gpus.is_empty() {
        tracing::warn!("NVML lists no GPU");
    }
    hub.driver.send(Command::Facts(news)).await;
}

fn announce(config: &Config, metrics: Option<SocketAddr>) {
    let run_dir = &config.listen.run_dir;
    tracing::info!(clients = %run_dir.join("clients.sock").display(), "serving clients");
    let control_dir = config.listen.control_dir.as_ref().unwrap_or(run_dir);
    tracing::info!(control = %control_dir.join("control.sock").display(), "serving nvsharectl");
    if let Some(address) = metrics {
        tracing::info!("serving http://{address}/metrics and a status page at http://{address}/");
    } else {
        tracing::info!("metrics are off");
    }
}
