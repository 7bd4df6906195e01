//! The run directory: a lock that one agent holds, and the two sockets.
//!
//! Where clients see the directory as root, as containers do, what is meant for operators belongs into another one: root may
//! use the control socket, and whoever may open the lock may hold it.

use std::{
    fs::{File, OpenOptions, Permissions},
    io,
    os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _, chown},
    path::{Path, PathBuf},
};

use rustix::fs::{FlockOperation, flock};
use tokio::net::UnixListener;

/// Who besides root may operate the agent.
const GROUP: &str = "nvshare";

/// The claimed directories. Dropped, the sockets are gone and another agent may claim them.
#[derive(Debug)]
pub struct RunDir {
    clients: PathBuf,
    control: PathBuf,
    _lock: File,
}

/// Why the directory cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum RunDirError {
    /// Another agent has it.
    #[error(
        "another nvshare-agent already serves {0}; stop it, or give this one a directory of its own with --run-dir"
    )]
    Taken(PathBuf),
    /// The system.
    #[error("{what} {path}: {why}; choose a directory you may write to with --run-dir or NVSHARE_RUN_DIR")]
    System {
        /// What was tried.
        what: &'static str,
        /// On what.
        path: PathBuf,
        /// Why it failed.
        why: io::Error,
    },
}

fn system(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> RunDirError {
    let path = path.to_owned();
    move |why| RunDirError::System { what, path, why }
}

impl RunDir {
    /// Creates the directories if needed and takes the lock, which is where the control socket is: in `control`, or in
    /// the same directory as the clients' socket.
    pub fn claim(clients: &Path, control: Option<&Path>) -> Result<Self, RunDirError> {
        let control = control.unwrap_or(clients);
        for path in [clients, control] {
            if !path.is_dir() {
                std::fs::create_dir_all(path).map_err(system("cannot create", path))?;
                std::fs::set_permissions(path, Permissions::from_mode(0o755))
                    .map_err(system("cannot set the mode of", path))?;
            }
        }
        let file = control.join("agent.lock");
        let lock = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            // Even a reader could hold it, and keep the next agent from starting.
            .mode(0o600)
            .open(&file)
            .map_err(system("cannot open", &file))?;
        match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(Self { clients: clients.to_owned(), control: control.to_owned(), _lock: lock }),
            Err(rustix::io::Errno::WOULDBLOCK) => Err(RunDirError::Taken(control.to_owned())),
            Err(error) => Err(system("cannot lock", &file)(error.into())),
        }
    }

    /// The socket of clients, open to everybody.
    pub fn clients(&self) -> Result<UnixListener, RunDirError> {
        listen(&self.clients.join("clients.sock"), 0o666)
    }

    /// The socket of operators, for root and the group `nvshare`.
    pub fn control(&self) -> Result<UnixListener, RunDirError> {
        let path = self.control.join("control.sock");
        let listener = listen(&path, 0o660)?;
        let groups = std::fs::read_to_string("/etc/group").unwrap_or_default();
        if let Some(group) = group_id(&groups, GROUP)
            && let Err(error) = chown(&path, None, Some(group))
        {
            tracing::warn!(%error, "cannot give {} to the group {GROUP}", path.display());
        }
        Ok(listener)
    }
}

fn listen(path: &Path, mode: u32) -> Result<UnixListener, RunDirError> {
    // The lock is ours, so a socket that is there was left behind by an agent that was killed.
    remove(path).map_err(system("cannot remove the old", path))?;
    let listener = UnixListener::bind(path).map_err(system("cannot listen at", path))?;
    std::fs::set_permissions(path, Permissions::from_mode(mode))
        .map_err(system("cannot set the mode of", path))?;
    Ok(listener)
}

impl Drop for RunDir {
    fn drop(&mut self) {
        for path in [self.clients.join("clients.sock"), self.control.join("control.sock")] {
            if let Err(error) = remove(&path) {
                tracing::warn!(%error, path = %path.display(), "a socket stays behind; the next agent removes it");
            }
        }
    }
}

fn remove(path: &Path) -> io::Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        Ok(()) | Err(_) => Ok(()),
    }
}

/// The number of a group in the text of /etc/group.
fn group_id(groups: &str, name: &str) -> Option<u32> {
    groups.lines().find_map(|line| {
        let mut fields = line.split(':');
        (fields.next() == Some(name)).then(|| fields.nth(1)?.parse().ok())?
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_is_for_operators_is_not_where_clients_look() {
        let dir = tempfile::tempdir().unwrap();
        let (clients, control) = (dir.path().join("clients"), dir.path().join("control"));
        let run_dir = RunDir::claim(&clients, Some(&control)).unwrap();
        let sockets = (run_dir.clients().unwrap(), run_dir.control().unwrap());
        let names = |dir: &Path| {
            let mut names: Vec<_> = dir.read_dir().unwrap().map(|entry| entry.unwrap().file_name()).collect();
            names.sort();
            names
        };
        assert_eq!(names(&clients), ["clients.sock"]);
        assert_eq!(names(&control), ["agent.lock", "control.sock"]);
        drop((sockets, run_dir));
        assert_eq!(names(&clients).len() + names(&control).len(), 1);
    }

    #[test]
    fn only_the_owner_may_open_the_lock() {
        let dir = tempfile::tempdir().unwrap();
        let _run_dir = RunDir::claim(dir.path(), None).unwrap();
        assert_eq!(dir.path().join("agent.lock").metadata().unwrap().permissions().mode() & 0o077, 0);
        assert!(matches!(RunDir::claim(dir.path(), None), Err(RunDirError::Taken(_))));
    }

    #[test]
    fn a_group_is_found_by_its_whole_name() {
        let groups = "root:x:0:\nnvshare2:x:7:\nnvshare:x:990:alice,bob\n";
        assert_eq!(group_id(groups, "nvshare"), Some(990));
        assert_eq!(group_id(groups, "nobody"), None);
    }
}
