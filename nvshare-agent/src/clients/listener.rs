//! Accepting clients.

use std::{sync::Arc, time::Duration};

use nvshare_wire::{AgentMessage, Label, RefusalCode};
use tokio::net::{UnixListener, UnixStream};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::{
    cgroup::Cgroup,
    identity::Identity,
    session::{self, Hub},
};
use crate::clock;

/// After an accept that failed for want of descriptors or memory.
const BACK_OFF: Duration = Duration::from_millis(100);

/// Serves clients until cancelled, then waits for their sessions to end.
pub async fn serve(listener: UnixListener, hub: Arc<Hub>, shutdown: CancellationToken) {
    let sessions = TaskTracker::new();
    loop {
        let accepted = tokio::select! {
            () = shutdown.cancelled() => break,
            accepted = listener.accept() => accepted,
        };
        match accepted {
            Ok((stream, _)) => {
                let identity = match stream.peer_cred() {
                    Ok(credentials) => Identity::from(credentials),
                    Err(error) => {
                        tracing::warn!(%error, "a client without credentials was turned away");
                        continue;
                    }
                };
                let cgroup = Cgroup::of_process(identity.pid);
                match hub.admission.admit(identity, cgroup.as_ref(), clock::now()) {
                    Ok(greeting) => {
                        let who = (identity, cgroup, greeting);
                        sessions.spawn(session::run(stream, Arc::clone(&hub), who, shutdown.clone()));
                    }
                    Err(limit) => {
                        let detail = limit.to_string();
                        hub.note_refusal(identity, RefusalCode::Limit, &detail, Some(limit));
                        turn_away(&stream, &detail);
                    }
                }
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

fn turn_away(stream: &UnixStream, detail: &str) {
    let refusal = AgentMessage::Refused { code: RefusalCode::Limit, detail: Label::new(detail) }.encode();
    // A fresh socket has room for one frame; if not, the client sees the connection close.
    stream.try_write(refusal.as_bytes()).ok();
}
