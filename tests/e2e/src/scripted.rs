//! The agent's end of the protocol for one client at a time, as a test dictates it.
#![expect(clippy::unwrap_used, clippy::missing_panics_doc, reason = "what fails here fails the test")]

use std::{
    io::{self, Read, Write},
    os::{
        fd::{AsRawFd, FromRawFd, OwnedFd},
        unix::net::{UnixListener, UnixStream},
    },
    path::{Path, PathBuf},
    time::Duration,
};

use nvshare_wire::{
    AgentMessage, ClientMessage, HEADER_LEN, Header,
    page::{PAGE_LEN, Page},
};

/// A listening agent.
#[derive(Debug)]
pub struct ScriptedAgent {
    dir: PathBuf,
    listener: UnixListener,
    client: Option<UnixStream>,
    page: Option<&'static Page>,
}

/// How long a message may take before the test has failed.
const PATIENCE: Duration = Duration::from_secs(30);

impl ScriptedAgent {
    /// Listens in a directory of its own.
    pub fn new(parent: &Path, name: &str) -> Self {
        let dir = parent.join(name);
        std::fs::create_dir_all(&dir).unwrap();
        let listener = UnixListener::bind(dir.join("clients.sock")).unwrap();
        Self { dir, listener, client: None, page: None }
    }

    /// The run directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Takes a client; its first message, and whether a descriptor came with it.
    pub fn accept(&mut self) -> (ClientMessage, bool) {
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
        self.page = descriptor.as_ref().map(map);
        self.client = Some(client);
        (self.receive(), descriptor.is_some())
    }

    /// The page of the client that was accepted last.
    pub fn page(&self) -> &'static Page {
        self.page.unwrap()
    }

    /// The next message.
    pub fn receive(&mut self) -> ClientMessage {
        self.try_receive().unwrap()
    }

    /// The next message, or why none came in time.
    pub fn try_receive(&mut self) -> io::Result<ClientMessage> {
        let client = self.client.as_mut().unwrap();
        let mut header = [0u8; HEADER_LEN];
        client.read_exact(&mut header)?;
        let header = Header::decode(&header).unwrap();
        let mut payload = vec![0u8; header.len as usize];
        client.read_exact(&mut payload)?;
        Ok(ClientMessage::decode(header.kind, &payload).unwrap())
    }

    /// Sends a message.
    pub fn send(&mut self, message: &AgentMessage) {
        self.client.as_mut().unwrap().write_all(message.encode().as_bytes()).unwrap();
    }

    /// Ends the session.
    pub fn hang_up(&mut self) {
        self.client = None;
    }
}

fn map(descriptor: &OwnedFd) -> &'static Page {
    // SAFETY: a fresh shared mapping of a whole page, which stays for the rest of the test; its fields are atomic.
    unsafe {
        let (prot, shared) = (libc::PROT_READ, libc::MAP_SHARED);
        let page = libc::mmap(std::ptr::null_mut(), PAGE_LEN, prot, shared, descriptor.as_raw_fd(), 0);
        assert_ne!(page, libc::MAP_FAILED);
        &*page.cast::<Page>()
    }
}
