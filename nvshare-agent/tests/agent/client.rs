//! A scripted client: speaks the protocol, or breaks it, exactly as a test says.

use std::{
    io::{IoSlice, Read as _, Write as _},
    mem::MaybeUninit,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::net::UnixStream,
    },
    sync::atomic::Ordering,
};

use nvshare_wire::{
    AgentMessage, ClientMessage, DrainOutcome, FRAME_MAX, HEADER_LEN, Header, Label,
    page::{GpuSlot, PAGE_LEN, PAGE_MAGIC, Page},
};
use rustix::{
    fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create},
    mm::{MapFlags, ProtFlags, mmap},
    net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg},
};

use crate::process::{Agent, PATIENCE};

pub(crate) const GPU: [u8; 16] = [0x11; 16];

/// The memory that a client shares with the agent. It stays mapped until the test ends.
#[derive(Clone, Copy)]
pub(crate) struct SharedPage(&'static Page);

pub(crate) struct ScriptedClient {
    stream: UnixStream,
    pub(crate) page: SharedPage,
    pub(crate) id: u64,
}

/// A memfd of this many bytes.
pub(crate) fn memfd(len: u64, seals: SealFlags) -> OwnedFd {
    let fd = memfd_create("page", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
    ftruncate(&fd, len).unwrap();
    fcntl_add_seals(&fd, seals).unwrap();
    fd
}

impl SharedPage {
    fn new() -> (Self, OwnedFd) {
        let fd = memfd(PAGE_LEN as u64, SealFlags::SHRINK | SealFlags::GROW);
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a fresh mapping at an address of the kernel's choice, never unmapped.
        let base =
            unsafe { mmap(std::ptr::null_mut(), PAGE_LEN, protection, MapFlags::SHARED, &fd, 0).unwrap() };
        // SAFETY: aligned, large enough, all values valid, mapped for ever.
        let page = unsafe { &*base.cast::<Page>() };
        page.magic.store(PAGE_MAGIC, Ordering::Relaxed);
        (Self(page), fd)
    }

    /// The figures of the only GPU.
    pub(crate) fn gpu(self) -> &'static GpuSlot {
        &self.0.gpu[0]
    }
}

pub(crate) fn hello() -> ClientMessage {
    ClientMessage::Hello { weight_milli: 1000, priority: 0, memory_limit: 0, name: Label::new("scripted") }
}

/// Sends bytes with descriptors beside them. An agent that has refused the connection before need not take them; what it
/// answered is still there.
pub(crate) fn send_with(stream: &UnixStream, bytes: &[u8], descriptors: &[BorrowedFd<'_>]) {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() {
        assert!(control.push(SendAncillaryMessage::ScmRights(descriptors)));
    }
    match sendmsg(stream, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL) {
        Err(rustix::io::Errno::PIPE) => {}
        sent => assert_eq!(sent, Ok(bytes.len())),
    }
}

pub(crate) fn connect(agent: &Agent) -> UnixStream {
    let stream = UnixStream::connect(agent.run_dir().join("clients.sock")).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream
}

/// The next message from the agent; `None` at the end of the connection.
pub(crate) fn receive(mut stream: &UnixStream) -> Option<AgentMessage> {
    let mut frame = [0; FRAME_MAX];
    let (header, payload) = frame.split_at_mut(HEADER_LEN);
    if let Err(error) = stream.read_exact(header) {
        let kind = error.kind();
        assert!(
            matches!(kind, std::io::ErrorKind::UnexpectedEof | std::io::ErrorKind::ConnectionReset),
            "{error}"
        );
        return None;
    }
    let header = Header::decode(header.first_chunk().unwrap()).unwrap();
    let payload = &mut payload[..header.len as usize];
    stream.read_exact(payload).unwrap();
    Some(AgentMessage::decode(header.kind, payload).unwrap())
}

impl ScriptedClient {
    /// A client with a session.
    pub(crate) fn join(agent: &Agent) -> Self {
        Self::join_on(connect(agent))
    }

    pub(crate) fn join_on(stream: UnixStream) -> Self {
        let (page, fd) = SharedPage::new();
        send_with(&stream, hello().encode().as_bytes(), &[fd.as_fd()]);
        match receive(&stream) {
            Some(AgentMessage::Welcome { client, silence_ms }) => {
                assert!(silence_ms >= 2000, "a client must not give up between two signs of life");
                Self { stream, page, id: client }
            }
            other => panic!("expected Welcome, got {other:?}"),
        }
    }

    /// A client that works on the GPU.
    pub(crate) fn working(agent: &Agent) -> Self {
        let client = Self::join(agent);
        client.begin_work();
        client
    }

    /// Begins to work on the GPU.
    pub(crate) fn begin_work(&self) {
        self.page.gpu().contexts.store(1, Ordering::Relaxed);
        self.page.gpu().inside.store(1, Ordering::Relaxed);
        self.page.gpu().managed.store(100 << 20, Ordering::Relaxed);
        self.page.0.slots.store(1, Ordering::Relaxed);
        self.say(&ClientMessage::UseGpu { slot: 0, gpu: GPU });
    }

    /// Sends a message. The agent may have ended the session meanwhile: the next `receive` says so.
    pub(crate) fn say(&self, message: &ClientMessage) {
        match (&self.stream).write_all(message.encode().as_bytes()) {
            Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => {}
            sent => sent.unwrap(),
        }
    }

    pub(crate) fn stream(&self) -> &UnixStream {
        &self.stream
    }

    /// The next message that is not advice about memory.
    pub(crate) fn receive(&self) -> Option<AgentMessage> {
        loop {
            match receive(&self.stream)? {
                AgentMessage::Room { .. } => {}
                other => return Some(other),
            }
        }
    }

    /// The next advice about memory: bytes of managed memory that this client may hold.
    pub(crate) fn host_room(&self) -> u64 {
        loop {
            match receive(&self.stream) {
                Some(AgentMessage::Room { host, .. }) => return host,
                Some(_) => {}
                None => panic!("the agent ended the session"),
            }
        }
    }

    /// The next grant or revocation.
    pub(crate) fn next_order(&self) -> Option<AgentMessage> {
        loop {
            match self.receive()? {
                AgentMessage::Alive => {}
                other => return Some(other),
            }
        }
    }

    /// Answers a revocation as a well-behaved client does, with work left.
    pub(crate) fn drain(&self, epoch: u64) {
        let gpu = self.page.gpu();
        gpu.inside.store(0, Ordering::Relaxed);
        gpu.waiting.store(1, Ordering::Relaxed);
        self.say(&ClientMessage::Revoked {
            gpu: GPU,
            epoch,
            outcome: DrainOutcome::Drained,
            drain_ns: 1_000_000,
            moved: 0,
        });
        self.say(&ClientMessage::Waiting { gpu: GPU, threads: 1 });
    }

    /// Answers a grant.
    pub(crate) fn resume(&self, epoch: u64) {
        let gpu = self.page.gpu();
        gpu.waiting.store(0, Ordering::Relaxed);
        gpu.inside.store(1, Ordering::Relaxed);
        self.say(&ClientMessage::Resumed { gpu: GPU, epoch, moved: 0, moved_ns: 0 });
    }

    /// Nothing came but advice about memory, and the session still stands.
    pub(crate) fn noticed_nothing(&self, agent: &Agent) {
        let mut byte = [0];
        loop {
            self.stream.set_nonblocking(true).unwrap();
            let peeked = rustix::net::recv(&self.stream, &mut byte[..], rustix::net::RecvFlags::PEEK);
            self.stream.set_nonblocking(false).unwrap();
            match peeked {
                Err(rustix::io::Errno::WOULDBLOCK) => break,
                Ok(_) => match receive(&self.stream) {
                    Some(AgentMessage::Room { .. }) => {}
                    other => panic!("the healthy client was told something: {other:?}"),
                },
                Err(error) => panic!("{error}"),
            }
        }
        assert!(
            agent.clients().iter().any(|client| client["client"] == self.id),
            "the healthy client lost its session"
        );
    }
}
