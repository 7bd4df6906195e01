//! One client's session, from its first byte to its end.

use std::{os::fd::OwnedFd, sync::Arc, time::Duration};

use nvshare_core::{Bytes, ClientId, Drain, Epoch, GpuId, Input, JobId, Nanos};
use nvshare_wire::{
    AgentMessage, ClientMessage, Direction, DrainOutcome, Label, MessageError, RefusalCode, page::SLOTS,
};
use tokio::{
    net::UnixStream,
    time::{Instant, timeout},
};
use tokio_util::sync::CancellationToken;

use super::{
    admission::{Admission, Greeting, Limit, LogBudget},
    cgroup::Cgroup,
    client::{Client, Wish, map_page},
    connection::{Connection, ConnectionError, Frame},
    identity::{Death, Identity},
    outbox::{Outbox, Writer, outbox},
    registry::Registry,
};
use crate::{
    clock,
    driver::{Command, DriverHandle},
    metrics::Metrics,
    observe::{gpus::Gpus, hazards::Hazards, uvm_counters::UvmCounters},
    operator::settings::Settings,
    pods::Pods,
};

/// A client must introduce itself, and end a frame that it began, within this time.
const PATIENCE: Duration = Duration::from_secs(5);
/// A gated client that hears nothing for this long opens its gates. The agent sends something each second.
const SILENCE_MS: u32 = 5_000;
/// Time for the last words to a client that is sent away.
const FAREWELL: Duration = Duration::from_secs(1);
/// Messages per second that one client may send in the long run; beyond that it is read more slowly.
const MESSAGES_PER_SECOND: f64 = 500.0;
/// Messages a client may send at once.
const MESSAGE_BURST: f64 = 1000.0;

/// What all sessions share.
#[derive(Debug)]
pub struct Hub {
    /// All clients.
    pub registry: Registry,
    /// Who may connect.
    pub admission: Arc<Admission>,
    /// Hangs of the driver, known and under way.
    pub hazards: Hazards,
    /// What strangers may cause to be logged.
    pub log_budget: LogBudget,
    /// The task that owns the engine.
    pub driver: DriverHandle,
    /// Counters.
    pub metrics: Arc<Metrics>,
    /// The driver's counters on clients.
    pub counters: Arc<UvmCounters>,
    /// The GPUs of this machine.
    pub gpus: Arc<Gpus>,
    /// What the operator changed.
    pub settings: Arc<Settings>,
    /// The pods that clients run in.
    pub pods: Arc<Pods>,
}

/// Why the agent ends a session.
#[derive(Debug)]
struct Refusal {
    code: RefusalCode,
    detail: String,
    /// Which limit it met, if it was one of those.
    limit: Option<Limit>,
}

/// How a session ended.
#[derive(Debug)]
enum End {
    /// The client closed, broke off or died.
    Gone,
    /// The agent sends it away.
    Refused(Refusal),
    /// The client does not read.
    Slow,
    /// The agent stops.
    Shutdown,
}

fn refuse<T>(code: RefusalCode, detail: impl Into<String>) -> Result<T, End> {
    Err(End::Refused(Refusal { code, detail: detail.into(), limit: None }))
}

impl From<ConnectionError> for End {
    fn from(error: ConnectionError) -> Self {
        match error.refusal() {
            Some(code) => Self::Refused(Refusal { code, detail: error.to_string(), limit: None }),
            None => Self::Gone,
        }
    }
}

/// The metric label of a refusal.
fn code_label(code: RefusalCode) -> &'static str {
    match code {
        RefusalCode::Version => "version",
        RefusalCode::Malformed => "malformed",
        RefusalCode::Order => "order",
        RefusalCode::Descriptor => "descriptor",
        RefusalCode::Limit => "limit",
        RefusalCode::Timeout => "timeout",
    }
}

impl Hub {
    /// Counts and logs that somebody was sent away.
    pub(super) fn note_refusal(
        &self,
        identity: Identity,
        code: RefusalCode,
        detail: &str,
        limit: Option<Limit>,
    ) {
        let code = code_label(code);
        self.metrics.refused.with_label_values(&[code]).inc();
        if let Some(limit) = limit {
            self.metrics.limited.with_label_values(&[limit.label()]).inc();
        }
        if let Some(left_out) = self.log_budget.line(clock::now()) {
            tracing::warn!(pid = identity.pid, uid = identity.uid, code, detail, left_out, "session refused");
        }
    }
}

/// Serves one connection.
pub(super) async fn run(
    stream: UnixStream,
    hub: Arc<Hub>,
    (identity, cgroup, greeting): (Identity, Option<Cgroup>, Greeting),
    shutdown: CancellationToken,
) {
    let stream = Arc::new(stream);
    let death = Death::of(&*stream, identity);
    let (outbox, writer) = outbox(Arc::clone(&stream));
    let mut connection = Connection::new(stream);
    let greeted = tokio::select! {
        () = death.wait() => Err(End::Gone),
        () = shutdown.cancelled() => Err(End::Shutdown),
        greeted = hello(&mut connection, &hub, (identity, cgroup)) => greeted,
    };
    drop(greeting);
    let end = match greeted {
        Err(end) => end,
        Ok(client) => {
            let session = Session { hub: &hub, client: &client, outbox: &outbox };
            let end = session.stand(&mut connection, &writer, &death, &shutdown).await;
            hub.registry.remove(client.id);
            hub.metrics.sessions.dec();
            hub.driver.send(Command::Left(client.id)).await;
            tracing::info!(client = %client.id, name = client.name, pid = client.identity.pid, end = %end, "client left");
            end
        }
    };
    match end {
        End::Gone | End::Shutdown => {}
        End::Slow => hub.metrics.slow_readers.inc(),
        End::Refused(Refusal { code, detail, limit }) => {
            hub.note_refusal(identity, code, &detail, limit);
            outbox.send(&AgentMessage::Refused { code, detail: Label::new(&detail) });
        }
    }
    drop(outbox);
    writer.finish(FAREWELL).await;
}

impl std::fmt::Display for End {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Gone => f.write_str("it closed or ended"),
            Self::Refused(Refusal { detail, .. }) => f.write_str(detail),
            Self::Slow => f.write_str("it does not read what it is sent"),
            Self::Shutdown => f.write_str("the agent stops"),
        }
    }
}

/// The first message: checks everything that comes with it and enters the client into the registry.
async fn hello(
    connection: &mut Connection,
    hub: &Hub,
    (identity, cgroup): (Identity, Option<Cgroup>),
) -> Result<Arc<Client>, End> {
    let first = match timeout(PATIENCE, connection.next()).await {
        Ok(first) => first?.ok_or(End::Gone)?,
        Err(_elapsed) => return refuse(RefusalCode::Timeout, "no complete Hello within 5 s of connecting"),
    };
    let Frame { message, mut descriptors } = first;
    let (wish, name) = match message {
        Ok(ClientMessage::Hello { weight_milli, priority, memory_limit, name }) => {
            (Wish::new(weight_milli, priority, memory_limit), name)
        }
        Ok(_) | Err(MessageError::UnknownKind(_)) => {
            return refuse(RefusalCode::Order, "the first message must be Hello");
        }
        Err(error) => return refuse(RefusalCode::Malformed, error.to_string()),
    };
    let Some(page) = descriptors.pop_front() else {
        return refuse(RefusalCode::Descriptor, "Hello came without the descriptor of the client's page");
    };
    hub.metrics.extra_descriptors.inc_by(descriptors.len() as u64);
    let page = match map_page(&page) {
        Ok(page) => page,
        Err(error) => return refuse(RefusalCode::Descriptor, error.to_string()),
    };
    if let Some(gpu) = hub.hazards.hanging().into_keys().next() {
        let limit = Limit::Emergency;
        let detail = format!("the driver of {gpu} hangs; {limit}");
        return Err(End::Refused(Refusal { code: RefusalCode::Limit, detail, limit: Some(limit) }));
    }
    let terms = (wish, hub.pods.terms(identity.pid).await.rule());
    let added = hub.registry.add(identity, cgroup.as_ref(), |id| {
        let whose = (identity, cgroup.clone());
        Client::new(id, whose, name.as_str().to_owned(), terms, clock::now(), page)
    });
    match added {
        Ok(client) => Ok(client),
        Err(limit) => Err(End::Refused(Refusal {
            code: RefusalCode::Limit,
            detail: limit.to_string(),
            limit: Some(limit),
        })),
    }
}

struct Session<'a> {
    hub: &'a Arc<Hub>,
    client: &'a Arc<Client>,
    outbox: &'a Outbox,
}

impl Session<'_> {
    /// Serves a client in the registry until the end.
    async fn stand(
        &self,
        connection: &mut Connection,
        writer: &Writer,
        death: &Death,
        shutdown: &CancellationToken,
    ) -> End {
        let client = self.client;
        self.hub.metrics.sessions.inc();
        self.hub.metrics.sessions_total.inc();
        tracing::info!(client = %client.id, name = client.name, pid = client.identity.pid, uid = client.identity.uid, "client joined");
        self.outbox.send(&AgentMessage::Welcome { client: client.id.0, silence_ms: SILENCE_MS });
        let rule = self.hub.settings.rule(client);
        if let Some(limit) = rule.memory_limit {
            self.outbox.send(&AgentMessage::Limit { bytes: limit.0 });
        }
        let joined = Command::Joined {
            outbox: self.outbox.clone(),
            input: Input::ClientJoined {
                client: client.id,
                // A process is a job of its own as long as nothing says which processes wait for each other.
                job: JobId(client.id.0),
                weight_milli: rule.weight_milli(client.wish.weight_milli),
                priority: rule.priority(client.wish.priority),
            },
            client: client.id,
        };
        self.hub.driver.send(joined).await;
        let mut pace = Pace::new();
        loop {
            let next = tokio::select! {
                () = death.wait() => return End::Gone,
                () = shutdown.cancelled() => return End::Shutdown,
                () = writer.overflowed() => return End::Slow,
                next = next_frame(connection) => next,
            };
            let handled = match next {
                Ok(Some(frame)) => tokio::select! {
                    () = death.wait() => return End::Gone,
                    handled = self.handle(frame) => handled,
                },
                Ok(None) => return End::Gone,
                Err(end) => return end,
            };
            if let Err(end) = handled {
                return end;
            }
            tokio::select! {
                () = death.wait() => return End::Gone,
                () = shutdown.cancelled() => return End::Shutdown,
                () = pace.wait() => {}
            }
        }
    }

    async fn handle(&self, frame: Frame) -> Result<(), End> {
        let Frame { message, mut descriptors } = frame;
        let message = match message {
            Ok(message) => message,
            Err(MessageError::UnknownKind(kind)) => {
                self.hub.metrics.unknown_messages.inc();
                self.hub.metrics.extra_descriptors.inc_by(descriptors.len() as u64);
                tracing::debug!(client = %self.client.id, kind, "a message of an unknown kind was skipped");
                return Ok(());
            }
            Err(error) => return refuse(RefusalCode::Malformed, error.to_string()),
        };
        let descriptor = if message.carries_descriptor() { descriptors.pop_front() } else { None };
        self.hub.metrics.extra_descriptors.inc_by(descriptors.len() as u64);
        match message {
            ClientMessage::Hello { .. } => refuse(RefusalCode::Order, "a second Hello in one session"),
            ClientMessage::UseGpu { slot, gpu } => self.use_gpu(slot as usize, GpuId(gpu)).await,
            ClientMessage::UvmDescriptor => match descriptor {
                Some(descriptor) => {
                    self.offer(descriptor).await;
                    Ok(())
                }
                None => refuse(RefusalCode::Descriptor, "UvmDescriptor came without its descriptor"),
            },
            ClientMessage::Waiting { gpu, threads } => {
                let gpu = self.known(GpuId(gpu))?;
                let now = clock::now();
                // Prompt news of demand; the bin stays open, so that nothing is counted twice.
                if let Some(mut activity) = self.client.activity(gpu, now, false) {
                    activity.waiting = threads.min(1 << 16);
                    if threads > 0 {
                        activity.idle_for = Nanos::ZERO;
                    }
                    self.tell(Input::Activity { client: self.client.id, gpu, activity }).await;
                }
                Ok(())
            }
            ClientMessage::Revoked { gpu, epoch, outcome, drain_ns, moved } => {
                let drain = match outcome {
                    DrainOutcome::Drained => Drain::Done { took: Nanos(drain_ns) },
                    DrainOutcome::TimedOut => Drain::TimedOut,
                    DrainOutcome::Capturing => Drain::Capturing,
                };
                let gpu = self.known(GpuId(gpu))?;
                let client = self.client.id;
                self.tell(Input::Revoked { client, gpu, epoch: Epoch(epoch), drain, moved: Bytes(moved) })
                    .await;
                Ok(())
            }
            ClientMessage::Resumed { gpu, epoch, moved, moved_ns } => {
                let gpu = self.known(GpuId(gpu))?;
                let (client, epoch) = (self.client.id, Epoch(epoch));
                let (moved, took) = (Bytes(moved), Nanos(moved_ns));
                self.tell(Input::Resumed { client, gpu, epoch, moved, took }).await;
                Ok(())
            }
            ClientMessage::Moved { gpu, epoch, direction, moved, moved_ns } => {
                let gpu = self.known(GpuId(gpu))?;
                let moved = Bytes(moved).min(MOVED_MAX);
                let (bytes_in, bytes_out) = match direction {
                    Direction::In => (moved, Bytes::ZERO),
                    Direction::Out => (Bytes::ZERO, moved),
                };
                let (client, epoch, took) = (self.client.id, Epoch(epoch), Nanos(moved_ns));
                self.tell(Input::Moved { client, gpu, epoch, bytes_in, bytes_out, took }).await;
                Ok(())
            }
            ClientMessage::Moves { by } => {
                self.hub.driver.send(Command::Moves(self.client.id, by)).await;
                Ok(())
            }
            ClientMessage::Yield { gpu, epoch } => {
                let gpu = self.known(GpuId(gpu))?;
                self.tell(Input::Yielded { client: self.client.id, gpu, epoch: Epoch(epoch) }).await;
                Ok(())
            }
        }
    }

    async fn tell(&self, input: Input) {
        self.hub.driver.send(Command::Facts(vec![input])).await;
    }

    /// A GPU of which the client said that it uses it.
    fn known(&self, gpu: GpuId) -> Result<GpuId, End> {
        if self.client.is_on(gpu) {
            Ok(gpu)
        } else {
            refuse(RefusalCode::Order, format!("{gpu} was not announced with UseGpu"))
        }
    }

    async fn use_gpu(&self, slot: usize, gpu: GpuId) -> Result<(), End> {
        if slot >= SLOTS {
            return refuse(RefusalCode::Limit, format!("slot {slot}: a page has {SLOTS} GPU slots"));
        }
        if self.client.is_on(gpu) {
            return Ok(());
        }
        if !self.client.uses(gpu, slot) {
            return refuse(RefusalCode::Order, format!("slot {slot} belongs to another GPU"));
        }
        let client: ClientId = self.client.id;
        match self.hub.gpus.seen_by_client(gpu) {
            Ok(news) => {
                tracing::info!(client = %client, %gpu, "client uses this GPU");
                let facts = news.into_iter().chain([Input::ClientUses { client, gpu }]).collect();
                self.hub.driver.send(Command::Facts(facts)).await;
            }
            Err(unknown) => {
                tracing::warn!(client = %client, %gpu, "{unknown}; the client runs there without turns");
            }
        }
        self.track().await;
        Ok(())
    }

    async fn offer(&self, descriptor: OwnedFd) {
        if let Err(reason) = self.hub.counters.verify(&descriptor) {
            self.hub.metrics.rejected_descriptors.inc();
            if let Some(left_out) = self.hub.log_budget.line(clock::now()) {
                tracing::warn!(client = %self.client.id, reason, left_out, "the offered descriptor is not used");
            }
            return;
        }
        if !self.client.offer(descriptor) {
            self.hub.metrics.rejected_descriptors.inc();
        }
        self.track().await;
    }

    /// Opens trackers on a thread that may block: the driver may take long, or hang.
    async fn track(&self) {
        let (hub, client) = (Arc::clone(self.hub), Arc::clone(self.client));
        let opening = tokio::task::spawn_blocking(move || {
            let closed = client.track(|descriptor, gpu| hub.counters.open(descriptor, gpu));
            hub.metrics.rejected_descriptors.inc_by(closed as u64);
        });
        if timeout(PATIENCE, opening).await.is_err() {
            tracing::error!(client = %self.client.id, "the driver does not answer an attempt to open counters");
        }
    }
}

/// The next frame; one that was begun must be finished in time.
async fn next_frame(connection: &mut Connection) -> Result<Option<Frame>, End> {
    if !connection.begin().await? {
        return Ok(None);
    }
    match timeout(PATIENCE, connection.next()).await {
        Ok(next) => Ok(next?),
        Err(_elapsed) => refuse(RefusalCode::Timeout, "a frame was begun and not finished within 5 s"),
    }
}

/// More than any GPU holds: what a client says is added up.
const MOVED_MAX: Bytes = Bytes::gib(4096);

/// Token bucket.
struct Pace {
    tokens: f64,
    at: Instant,
}

impl Pace {
    fn new() -> Self {
        Self { tokens: MESSAGE_BURST, at: Instant::now() }
    }

    /// Takes one token, waiting for it if there is none.
    async fn wait(&mut self) {
        let now = Instant::now();
        let earned = (now - self.at).as_secs_f64() * MESSAGES_PER_SECOND;
        self.tokens = (self.tokens + earned).min(MESSAGE_BURST);
        self.at = now;
        if self.tokens < 1.0 {
            tokio::time::sleep(Duration::from_secs_f64((1.0 - self.tokens) / MESSAGES_PER_SECOND)).await;
        }
        self.tokens -= 1.0;
    }
}
