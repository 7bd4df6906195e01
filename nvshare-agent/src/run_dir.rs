//! The run directory: a lock that one agent holds, and the two sockets.

use std::{
    fs::{File, OpenOptions, Permissions},
    io,
    os::unix::fs::{PermissionsExt as _, chown},
    path::{Path, PathBuf},
};

use rustix::fs::{FlockOperation, flock};
use tokio::net::UnixListener;

/// Who besides root may operate the agent.
const GROUP: &str = "nvshare";

/// The claimed directory. Dropped, the sockets are gone and another agent may claim it.
#[derive(Debug)]
pub struct RunDir {
    path: PathBuf,
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
    #[error("{what} {path}: {source}; choose a directory you may write to with --run-dir or NVSHARE_RUN_DIR")]
    System {
        /// What was tried.
        what: &'static str,
        /// On what.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
}

fn system(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> RunDirError {
    let path = path.to_owned();
    move |source| RunDirError::System { what, path, source }
}

impl RunDir {
    /// Creates the directory if needed and takes its lock.
    pub fn claim(path: &Path) -> Result<Self, RunDirError> {
        if !path.is_dir() {
            std::fs::create_dir_all(path).map_err(system("cannot create", path))?;
            std::fs::set_permissions(path, Permissions::from_mode(0o755))
                .map_err(system("cannot set the mode of", path))?;
        }
        let file = path.join("agent.lock");
        let lock = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&file)
            .map_err(system("cannot open", &file))?;
        match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(Self { path: path.to_owned(), _lock: lock }),
            Err(rustix::io::Errno::WOULDBLOCK) => Err(RunDirError::Taken(path.to_owned())),
            Err(error) => Err(system("cannot lock", &file)(error.into())),
        }
    }

    /// The socket of clients, open to everybody.
    pub fn clients(&self) -> Result<UnixListener, RunDirError> {
        self.listen("clients.sock", 0o666)
    }

    /// The socket of operators, for root and the group `nvshare`.
    pub fn control(&self) -> Result<UnixListener, RunDirError> {
        let listener = self.listen("control.sock", 0o660)?;
        let path = self.path.join("control.sock");
        let groups = std::fs::read_to_string("/etc/group").unwrap_or_default();
        if let Some(group) = group_id(&groups, GROUP)
            && let Err(error) = chown(&path, None, Some(group))
        {
            tracing::warn!(%error, "cannot give {} to the group {GROUP}", path.display());
        }
        Ok(listener)
    }

    fn listen(&self, name: &str, mode: u32) -> Result<UnixListener, RunDirError> {
        let path = self.path.join(name);
        // The lock is ours, so a socket that is there was left behind by an agent that was killed.
        remove(&path).map_err(system("cannot remove the old", &path))?;
        let listener = UnixListener::bind(&path).map_err(system("cannot listen at", &path))?;
        std::fs::set_permissions(&path, Permissions::from_mode(mode))
            .map_err(system("cannot set the mode of", &path))?;
        Ok(listener)
    }
}

impl Drop for RunDir {
    fn drop(&mut self) {
        for name in ["clients.sock", "control.sock"] {
            if let Err(error) = remove(&self.path.join(name)) {
                tracing::warn!(%error, name, "a socket stays behind; the next agent removes it");
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

    #[test]
    fn a_group_is_found_by_its_whole_name() {
        let groups = "root:x:0:\nnvshare2:x:7:\nnvshare:x:990:alice,bob\n";
        assert_eq!(group_id(groups, "nvshare"), Some(990));
        assert_eq!(group_id(groups, "nobody"), None);
    }
}
