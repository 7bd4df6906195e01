//! The agent's end of the protocol, one client at a time, as far as a test needs it.

use std::{
    io::{Read, Write},
    os::{
        fd::{AsRawFd, FromRawFd, OwnedFd},
        unix::net::{UnixListener, UnixStream},
    },
    path::{Path, PathBuf},
    time::Duration,
};

use nvshare_wire::{AgentMessage, ClientMessage, HEADER_LEN, Header};

/// A listening agent.
pub(crate) struct Agent {
    dir: PathBuf,
    listener: UnixListener,
    client: Option<UnixStream>,
}

/// How long a message may take before the test has failed.
const PATIENCE: Duration = Duration::from_secs(30);

impl Agent {
    /// Listens in a directory of its own.
    pub(crate) fn new(parent: &Path, name: &str) -> Self {
        let dir = parent.join(name);
        std::fs::create_dir_all(&dir).unwrap();
        let listener = UnixListener::bind(dir.join("clients.sock")).unwrap();
        Self { dir, listener, client: None }
    }

    /// The run directory.
    pub(crate) fn dir(&self) -> &Path {
        &self.dir
    }

    /// Takes a client; its first message, and whether a descriptor came with it.
    pub(crate) fn accept(&mut self) -> (ClientMessage, bool) {
        let (client, _) = self.listener.accept().unwrap();
        client.set_read_timeout(Some(PATIENCE)).unwrap();
        // Reading with plain `read` would drop the descriptor unseen.
        let mut control = [0u64; 8];
        let mut first = [0u8; 1];
        let mut part = libc::iovec { iov_base: first.as_mut_ptr().cast(), iov_len: 1 };
        // SAFETY: every pointer is to a live local; the message peeks at one byte.
        let descriptor = unsafe {
            let mut header: libc::msghdr = std::mem::zeroed();
            header.msg_iov = &raw mut part;
            header.msg_iovlen = 1;
            header.msg_control = control.as_mut_ptr().cast();
            header.msg_controllen = size_of_val(&control) as _;
            assert_eq!(
                libc::recvmsg(client.as_raw_fd(), &raw mut header, libc::MSG_PEEK | libc::MSG_CMSG_CLOEXEC),
                1
            );
            let first = libc::CMSG_FIRSTHDR(&raw const header);
            (!first.is_null())
                .then(|| OwnedFd::from_raw_fd(libc::CMSG_DATA(first).cast::<i32>().read_unaligned()))
        };
        self.client = Some(client);
        (self.receive(), descriptor.is_some())
    }

    /// The next message.
    pub(crate) fn receive(&mut self) -> ClientMessage {
        let client = self.client.as_mut().unwrap();
        let mut header = [0u8; HEADER_LEN];
        client.read_exact(&mut header).unwrap();
        let header = Header::decode(&header).unwrap();
        let mut payload = vec![0u8; header.len as usize];
        client.read_exact(&mut payload).unwrap();
        ClientMessage::decode(header.kind, &payload).unwrap()
    }

    /// Sends a message.
    pub(crate) fn send(&mut self, message: &AgentMessage) {
        self.client.as_mut().unwrap().write_all(message.encode().as_bytes()).unwrap();
    }

    /// Ends the session.
    pub(crate) fn hang_up(&mut self) {
        self.client = None;
    }
}
