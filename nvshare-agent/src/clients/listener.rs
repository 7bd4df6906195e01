//! Accepting clients.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use nvshare_wire::{AgentMessage, Label, RefusalCode};
use tokio::net::{UnixListener, UnixStream};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::session::{self, Hub};

/// Connections without a session yet that are served at one time; more are refused at once.
const GREETING_MAX: usize = 256;
/// After an accept that failed for want of descriptors or memory.
const BACK_OFF: Duration = Duration::from_millis(100);

/// Serves clients until cancelled, then waits for their sessions to end.
pub async fn serve(listener: UnixListener, hub: Arc<Hub>, shutdown: CancellationToken) {
    let sessions = TaskTracker::new();
    let greeting = Arc::new(AtomicUsize::new(0));
    loop {
        let accepted = tokio::select! {
            () = shutdown.cancelled() => break,
            accepted = listener.accept() => accepted,
        };
        match accepted {
            Ok((stream, _)) => {
                if greeting.fetch_add(1, Ordering::Relaxed) >= GREETING_MAX {
                    greeting.fetch_sub(1, Ordering::Relaxed);
                    turn_away(&hub, &stream);
                    continue;
                }
                let guard = Greeting(Arc::clone(&greeting));
                sessions.spawn(session::run(stream, Arc::clone(&hub), guard, shutdown.clone()));
            }
            Err(error) => {
                tracing::warn!(%error, "cannot accept a client; trying again");
                tokio::time::sleep(BACK_OFF).await;
            }
        }
    }
    drop(listener);
    sessions.close();
    sessions.wait().await;
}

/// Counts a connection as one that has not introduced itself, until dropped.
#[derive(Debug)]
pub struct Greeting(Arc<AtomicUsize>);

impl Drop for Greeting {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

fn turn_away(hub: &Hub, stream: &UnixStream) {
    hub.metrics.refused.with_label_values(&["limit"]).inc();
    let detail = Label::new("too many connections that have not introduced themselves");
    let refusal = AgentMessage::Refused { code: RefusalCode::Limit, detail }.encode();
    // A fresh socket has room for one frame; if not, the client sees the connection close.
    stream.try_write(refusal.as_bytes()).ok();
}
