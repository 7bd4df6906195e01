//! The socket: frames out, frames in, and why it ended.

use std::{
    fmt, io, mem,
    os::{
        fd::{FromRawFd, OwnedFd, RawFd},
        unix::ffi::OsStrExt,
    },
    path::Path,
};

use nvshare_wire::{
    AgentMessage, ClientMessage, FRAME_MAX, FrameError, HEADER_LEN, Header, Label, MessageError, RefusalCode,
};

use super::held::{Held, Shown};

/// The agent's socket in the run directory.
pub(super) const SOCKET: &str = "clients.sock";
/// How long the agent may leave its end of the socket full.
const SEND_MS: libc::c_int = 1000;

/// Why a session ended or did not begin.
#[derive(Debug)]
pub(super) enum Ended {
    /// The socket failed.
    Io(io::Error),
    /// The agent closed it.
    Closed,
    /// The program closed our end of it.
    Taken,
    /// The agent did not greet in time.
    Greeting,
    /// The agent holds work back and was not heard for longer than it announced.
    Silent,
    /// The agent refused this client.
    Refused(RefusalCode, Box<Label>),
    /// The agent's bytes make no frame.
    Frame(FrameError),
    /// The agent's frame makes no message.
    Message(MessageError),
}

impl fmt::Display for Ended {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Io(error) => error.fmt(f),
            Self::Closed => f.write_str("the agent closed the connection"),
            Self::Taken => f.write_str("this program closed the connection"),
            Self::Silent => f.write_str("the agent has been silent for too long"),
            Self::Greeting => f.write_str("the agent did not answer"),
            Self::Refused(code, detail) => write!(f, "the agent refused: {code:?}, {}", detail.as_str()),
            Self::Frame(error) => error.fmt(f),
            Self::Message(error) => error.fmt(f),
        }
    }
}

impl From<io::Error> for Ended {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

/// A connected socket and what has arrived on it.
#[derive(Debug)]
pub(super) struct Link {
    socket: Held,
    inbound: Vec<u8>,
    /// Whether the agent has greeted.
    pub(super) welcomed: bool,
}

impl Link {
    /// The socket's number, if it still is ours.
    pub(super) fn number(&self) -> Result<RawFd, Ended> {
        self.socket.number().ok_or(Ended::Taken)
    }

    /// Connects without blocking: a unix socket accepts at once or not now. The socket is shown before it is connected,
    /// so that a child forked meanwhile closes it.
    pub(super) fn connect(run_dir: &Path, shown: &Shown) -> Result<Self, Ended> {
        let path = run_dir.join(SOCKET);
        let bytes = path.as_os_str().as_bytes();
        // SAFETY: all-zero is a valid address.
        let mut address: libc::sockaddr_un = unsafe { mem::zeroed() };
        if bytes.len() >= address.sun_path.len() {
            return Err(
                io::Error::new(io::ErrorKind::InvalidInput, "the path is too long for a socket").into()
            );
        }
        address.sun_family = libc::AF_UNIX as libc::sa_family_t;
        for (place, &byte) in address.sun_path.iter_mut().zip(bytes) {
            *place = byte as libc::c_char;
        }
        // SAFETY: the call takes no pointers; a descriptor that it gives is fresh.
        let socket = unsafe {
            let kind = libc::SOCK_STREAM | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC;
            let fd = libc::socket(libc::AF_UNIX, kind, 0);
            if fd < 0 {
                return Err(io::Error::last_os_error().into());
            }
            Held::new(OwnedFd::from_raw_fd(fd))?
        };
        shown.show(Some(&socket));
        let number = socket.number().ok_or(Ended::Taken)?;
        let len = size_of::<libc::sockaddr_un>() as libc::socklen_t;
        // SAFETY: the address is a live local of the given length.
        if unsafe { libc::connect(number, (&raw const address).cast(), len) } != 0 {
            return Err(io::Error::last_os_error().into());
        }
        Ok(Self { socket, inbound: Vec::with_capacity(FRAME_MAX), welcomed: false })
    }

    /// Sends a message, with the descriptor that belongs to it.
    pub(super) fn send(&mut self, message: &ClientMessage, descriptor: Option<RawFd>) -> Result<(), Ended> {
        debug_assert_eq!(message.carries_descriptor(), descriptor.is_some());
        let frame = message.encode();
        let mut rest = frame.as_bytes();
        let mut descriptor = descriptor;
        while !rest.is_empty() {
            match send_some(self.number()?, rest, descriptor) {
                Ok(sent) => {
                    rest = rest.get(sent..).unwrap_or_default();
                    // It went with the first byte.
                    descriptor = None;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.wait_writable()?,
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    fn wait_writable(&self) -> Result<(), Ended> {
        let mut entry = libc::pollfd { fd: self.number()?, events: libc::POLLOUT, revents: 0 };
        // SAFETY: one live entry.
        match unsafe { libc::poll(&raw mut entry, 1, SEND_MS) } {
            0 => Err(io::Error::new(io::ErrorKind::TimedOut, "the agent does not read").into()),
            _ => Ok(()),
        }
    }

    /// Takes in what has arrived.
    pub(super) fn receive(&mut self) -> Result<(), Ended> {
        let mut buffer = [0u8; 4096];
        let socket = self.number()?;
        // SAFETY: a live buffer of that length.
        let got = unsafe { libc::recv(socket, buffer.as_mut_ptr().cast(), buffer.len(), libc::MSG_DONTWAIT) };
        match usize::try_from(got) {
            Ok(0) => Err(Ended::Closed),
            Ok(got) => {
                self.inbound.extend_from_slice(&buffer[..got]);
                Ok(())
            }
            Err(_) => match io::Error::last_os_error() {
                error if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {
                    Ok(())
                }
                error => Err(error.into()),
            },
        }
    }

    /// The next whole message; unknown kinds are skipped.
    pub(super) fn next_message(&mut self) -> Result<Option<AgentMessage>, Ended> {
        loop {
            let Some((bytes, rest)) = self.inbound.split_first_chunk::<HEADER_LEN>() else { return Ok(None) };
            let header = Header::decode(bytes).map_err(Ended::Frame)?;
            let Some(payload) = rest.get(..header.len as usize) else { return Ok(None) };
            let decoded = AgentMessage::decode(header.kind, payload);
            self.inbound.drain(..HEADER_LEN + header.len as usize);
            match decoded {
                Ok(message) => return Ok(Some(message)),
                Err(MessageError::UnknownKind(_)) => {}
                Err(error) => return Err(Ended::Message(error)),
            }
        }
    }
}

fn send_some(socket: RawFd, bytes: &[u8], descriptor: Option<RawFd>) -> io::Result<usize> {
    #[repr(align(8))]
    struct Control([u8; 64]);
    let mut control = Control([0; 64]);
    let mut part = libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() };
    // SAFETY: every pointer is to a live local; the control buffer is aligned and large enough for one
    // header with one descriptor.
    let sent = unsafe {
        let mut header: libc::msghdr = mem::zeroed();
        header.msg_iov = &raw mut part;
        header.msg_iovlen = 1;
        if let Some(fd) = descriptor {
            let payload = size_of::<RawFd>() as u32;
            header.msg_control = control.0.as_mut_ptr().cast();
            header.msg_controllen = libc::CMSG_SPACE(payload) as _;
            let first = libc::CMSG_FIRSTHDR(&raw const header);
            (*first).cmsg_level = libc::SOL_SOCKET;
            (*first).cmsg_type = libc::SCM_RIGHTS;
            (*first).cmsg_len = libc::CMSG_LEN(payload) as _;
            libc::CMSG_DATA(first).cast::<RawFd>().write_unaligned(fd);
        }
        libc::sendmsg(socket, &raw const header, libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT)
    };
    usize::try_from(sent).map_err(|_negative| io::Error::last_os_error())
}
