//! The agent's end of the protocol under a test's control, one client at a time.
#![expect(clippy::unwrap_used, reason = "what fails here fails the test")]

use std::{
    io::{self, Read as _, Write as _},
    os::{
        fd::{AsRawFd, FromRawFd, OwnedFd},
        unix::net::{UnixListener, UnixStream},
    },
    path::{Path, PathBuf},
    time::Duration,
};

use nvshare_wire::{
    AgentMessage, ClientMessage, DrainOutcome, GpuUuid, HEADER_LEN, Header,
    page::{PAGE_LEN, Page},
};

/// A listening agent.
#[derive(Debug)]
pub struct ScriptedAgent {
    dir: PathBuf,
    listener: UnixListener,
    client: Option<UnixStream>,
    page: Option<&'static Page>,
    epoch: u64,
}

/// How long a message may take before the test has failed.
const PATIENCE: Duration = Duration::from_secs(30);
/// Milliseconds of silence after which a client may help itself, where a test does not mean to be silent.
const NEVER_SILENT_MS: u32 = 600_000;
/// Milliseconds for a drain, where a test does not mean it to fail.
const DRAIN_MS: u32 = 20_000;

impl ScriptedAgent {
    /// Listens in a directory of its own.
    pub fn new(parent: &Path, name: &str) -> Self {
        let dir = parent.join(name);
        std::fs::create_dir_all(&dir).unwrap();
        let listener = UnixListener::bind(dir.join("clients.sock")).unwrap();
        Self { dir, listener, client: None, page: None, epoch: 0 }
    }

    /// The run directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Takes a client; its first message, and whether a descriptor came with it.
    pub fn accept(&mut self) -> (ClientMessage, bool) {
        self.connect();
        // Reading with plain `read` would drop the descriptor unseen.
        let mut control = [0u64; 8];
        let mut first = [0u8; 1];
        let mut part = libc::iovec { iov_base: first.as_mut_ptr().cast(), iov_len: 1 };
        let client = self.client.as_ref().unwrap();
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
        (self.receive(), descriptor.is_some())
    }

    /// The page of the client that was accepted last.
    pub fn page(&self) -> &'static Page {
        self.page.unwrap()
    }

    /// Takes a client that has not said anything yet.
    pub fn connect(&mut self) {
        // A listener has no read timeout of its own.
        let mut entry = libc::pollfd { fd: self.listener.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        // SAFETY: one live entry.
        let ready = unsafe { libc::poll(&raw mut entry, 1, PATIENCE.as_millis() as i32) };
        assert_eq!(ready, 1, "no client came");
        let (client, _) = self.listener.accept().unwrap();
        client.set_read_timeout(Some(PATIENCE)).unwrap();
        self.client = Some(client);
    }

    /// Takes a client, welcomes it and hears of its first GPU. It may be silent for `silence_ms`.
    pub fn greet_for(&mut self, silence_ms: u32) -> GpuUuid {
        let (hello, descriptor) = self.accept();
        assert!(matches!(hello, ClientMessage::Hello { weight_milli: 1000, .. }), "{hello:?}");
        assert!(descriptor, "no page came with the greeting");
        self.send(&AgentMessage::Welcome { client: 1, silence_ms });
        match self.receive() {
            ClientMessage::UseGpu { slot: 0, gpu } => gpu,
            other => panic!("{other:?} instead of a GPU"),
        }
    }

    /// The same with an agent that may be silent for as long as the test takes.
    pub fn greet(&mut self) -> GpuUuid {
        self.greet_for(NEVER_SILENT_MS)
    }

    /// The next message, past descriptors and how memory is moved: they tell of the driver, not of the shim.
    pub fn receive(&mut self) -> ClientMessage {
        self.try_receive().unwrap()
    }

    /// The same, or why none came in time.
    pub fn try_receive(&mut self) -> io::Result<ClientMessage> {
        loop {
            match self.next_message()? {
                ClientMessage::UvmDescriptor | ClientMessage::Moves { .. } => {}
                message => return Ok(message),
            }
        }
    }

    fn next_message(&mut self) -> io::Result<ClientMessage> {
        let client = self.client.as_mut().unwrap();
        let mut header = [0u8; HEADER_LEN];
        client.read_exact(&mut header)?;
        let header = Header::decode(&header).unwrap();
        let mut payload = vec![0u8; header.len as usize];
        client.read_exact(&mut payload)?;
        Ok(ClientMessage::decode(header.kind, &payload).unwrap())
    }

    /// The next message for which `wanted` has an answer, past all others.
    pub fn await_message<T>(&mut self, wanted: impl Fn(&ClientMessage) -> Option<T>) -> T {
        loop {
            if let Some(answer) = wanted(&self.next_message().unwrap()) {
                return answer;
            }
        }
    }

    /// Sends a message.
    pub fn send(&mut self, message: &AgentMessage) {
        self.client.as_mut().unwrap().write_all(message.encode().as_bytes()).unwrap();
    }

    /// Revokes a GPU and leaves it at that.
    pub fn revoke(&mut self, gpu: GpuUuid, drain_ms: u32) {
        self.epoch += 1;
        self.send(&AgentMessage::Revoke { gpu, epoch: self.epoch, drain_ms, shortfall: 0 });
    }

    /// Revokes a GPU so that at most `shortfall` bytes leave it, and leaves it at that; the epoch.
    pub fn revoke_memory(&mut self, gpu: GpuUuid, shortfall: u64) -> u64 {
        self.epoch += 1;
        let epoch = self.epoch;
        self.send(&AgentMessage::Revoke { gpu, epoch, drain_ms: DRAIN_MS, shortfall });
        epoch
    }

    /// Grants a GPU with at most `prefetch` bytes to bring back, and leaves it at that; the epoch.
    pub fn grant_memory(&mut self, gpu: GpuUuid, prefetch: u64) -> u64 {
        self.epoch += 1;
        let epoch = self.epoch;
        self.send(&AgentMessage::Grant { gpu, epoch, prefetch });
        epoch
    }

    /// What came of the last revocation.
    pub fn outcome(&mut self) -> DrainOutcome {
        let last = self.epoch;
        self.await_message(|message| match message {
            ClientMessage::Revoked { epoch, outcome, .. } if *epoch == last => Some(*outcome),
            _ => None,
        })
    }

    /// Takes a GPU away.
    pub fn take(&mut self, gpu: GpuUuid) -> DrainOutcome {
        self.revoke(gpu, DRAIN_MS);
        self.outcome()
    }

    /// Grants a GPU and leaves it at that.
    pub fn grant(&mut self, gpu: GpuUuid) {
        self.epoch += 1;
        self.send(&AgentMessage::Grant { gpu, epoch: self.epoch, prefetch: 0 });
    }

    /// Gives a GPU back and waits until the program runs again.
    pub fn give(&mut self, gpu: GpuUuid) {
        self.grant(gpu);
        let last = self.epoch;
        self.await_message(|message| match message {
            ClientMessage::Resumed { epoch, .. } if *epoch == last => Some(()),
            _ => None,
        });
    }

    /// Waits until so many threads wait at the gate.
    pub fn await_waiting(&mut self, count: u32) {
        self.await_message(|message| match message {
            ClientMessage::Waiting { threads, .. } if *threads == count => Some(()),
            _ => None,
        });
    }

    /// Reads until the client has ended the session; `false` if it does not.
    pub fn is_hung_up(&mut self) -> bool {
        let client = self.client.as_mut().unwrap();
        let mut rest = [0u8; 1024];
        loop {
            match client.read(&mut rest) {
                Ok(0) => return true,
                Ok(_) => {}
                Err(error) => return error.kind() == io::ErrorKind::ConnectionReset,
            }
        }
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
