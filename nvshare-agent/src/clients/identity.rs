//! Who is at the other end of a socket, by the kernel's word.

use std::os::fd::{AsFd, OwnedFd};

use rustix::process::{Pid, PidfdFlags, pidfd_open};
use tokio::{io::unix::AsyncFd, net::unix::UCred};

use crate::sys;

/// A peer at the time it connected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    /// Its process id in the agent's namespace.
    pub pid: u32,
    /// Its user.
    pub uid: u32,
    /// Its group.
    pub gid: u32,
}

impl From<UCred> for Identity {
    fn from(credentials: UCred) -> Self {
        // A peer whose namespace the agent cannot see has no number here; 0 matches no process.
        let pid = credentials.pid().map_or(0, i32::unsigned_abs);
        Self { pid, uid: credentials.uid(), gid: credentials.gid() }
    }
}

/// Tells when a process ends.
#[derive(Debug)]
pub struct Death {
    pidfd: Option<AsyncFd<OwnedFd>>,
}

impl Death {
    /// Watches the peer of a socket. Without a pidfd (a kernel before 6.5 and a peer in a foreign namespace)
    /// only the end of the connection will tell.
    pub fn of(socket: impl AsFd, identity: Identity) -> Self {
        let pidfd = sys::peer_pidfd(socket).ok().or_else(|| {
            let pid = Pid::from_raw(identity.pid as i32)?;
            pidfd_open(pid, PidfdFlags::empty()).ok()
        });
        let pidfd = pidfd.and_then(|fd| sys::wait_readable(fd).ok());
        if pidfd.is_none() {
            tracing::warn!(
                pid = identity.pid,
                "no pidfd of this client; its end shows only when its socket closes"
            );
        }
        Self { pidfd }
    }

    /// Waits for the end of the process.
    pub async fn wait(&self) {
        match &self.pidfd {
            Some(pidfd) => {
                if pidfd.readable().await.is_err() {
                    std::future::pending::<()>().await;
                }
            }
            None => std::future::pending().await,
        }
    }
}
