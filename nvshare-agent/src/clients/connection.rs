//! Framing: bytes and descriptors of a unix socket in, whole messages out.

use std::{
    collections::VecDeque,
    io::{self, IoSliceMut},
    mem::MaybeUninit,
    os::fd::OwnedFd,
    sync::Arc,
};

use nvshare_wire::{
    ClientMessage, FRAME_MAX, FrameError, HEADER_LEN, Header, MAX_PAYLOAD, MessageError, RefusalCode,
};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use tokio::{io::Interest, net::UnixStream};

/// Descriptors taken with one read; the kernel closes those beyond.
const DESCRIPTORS: usize = 4;

/// One frame from a client.
#[derive(Debug)]
pub struct Frame {
    /// The message, or why it is none.
    pub message: Result<ClientMessage, MessageError>,
    /// The descriptors that came with it.
    pub descriptors: VecDeque<OwnedFd>,
}

/// Why a connection cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum ConnectionError {
    /// The socket.
    #[error("the connection broke: {0}")]
    Io(#[from] io::Error),
    /// The stream is not one of frames.
    #[error("{0}")]
    Frame(FrameError),
    /// The peer closed in the middle of a frame.
    #[error("the connection ended inside a frame, after {0} bytes of it")]
    Cut(usize),
}

impl ConnectionError {
    /// What to tell the client, if it can still be told.
    pub fn refusal(&self) -> Option<RefusalCode> {
        match self {
            Self::Io(_) => None,
            Self::Frame(FrameError::Version(_)) => Some(RefusalCode::Version),
            Self::Frame(FrameError::Magic(_) | FrameError::Length(_) | FrameError::Reserved(_))
            | Self::Cut(_) => Some(RefusalCode::Malformed),
        }
    }
}

/// The reading half of a client's socket.
///
/// It reads exactly one frame at a time, so descriptors that arrive with bytes of a frame belong to that frame.
#[derive(Debug)]
pub struct Connection {
    stream: Arc<UnixStream>,
    buffer: [u8; FRAME_MAX],
    filled: usize,
    descriptors: VecDeque<OwnedFd>,
}

impl Connection {
    /// Reads from this socket.
    pub fn new(stream: Arc<UnixStream>) -> Self {
        Self { stream, buffer: [0; FRAME_MAX], filled: 0, descriptors: VecDeque::new() }
    }

    /// The next frame; `None` if the peer closed between frames. Nothing is lost if the future is dropped.
    pub async fn next(&mut self) -> Result<Option<Frame>, ConnectionError> {
        let header = loop {
            if let Some(header) = self.buffer[..self.filled].first_chunk::<HEADER_LEN>() {
                break Header::decode(header).map_err(ConnectionError::Frame)?;
            }
            if !self.fill(HEADER_LEN).await? {
                return if self.filled == 0 { Ok(None) } else { Err(ConnectionError::Cut(self.filled)) };
            }
        };
        let len = (header.len as usize).min(MAX_PAYLOAD);
        while self.filled < HEADER_LEN + len {
            if !self.fill(HEADER_LEN + len).await? {
                return Err(ConnectionError::Cut(self.filled));
            }
        }
        let message = ClientMessage::decode(header.kind, &self.buffer[HEADER_LEN..HEADER_LEN + len]);
        self.filled = 0;
        Ok(Some(Frame { message, descriptors: std::mem::take(&mut self.descriptors) }))
    }

    /// Waits for the first bytes of a frame, however long that takes; false at the end of the stream.
    pub async fn begin(&mut self) -> Result<bool, ConnectionError> {
        Ok(self.filled > 0 || self.fill(HEADER_LEN).await?)
    }

    /// Reads until at most `upto` bytes are in the buffer; false at the end of the stream.
    async fn fill(&mut self, upto: usize) -> io::Result<bool> {
        let Self { stream, buffer, filled, descriptors } = self;
        let room = &mut buffer[*filled..upto];
        let socket: &UnixStream = stream;
        let count = stream
            .async_io(Interest::READABLE, || {
                let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS))];
                let mut control = RecvAncillaryBuffer::new(&mut space);
                let received =
                    recvmsg(socket, &mut [IoSliceMut::new(room)], &mut control, RecvFlags::CMSG_CLOEXEC)?;
                for message in control.drain() {
                    if let RecvAncillaryMessage::ScmRights(rights) = message {
                        descriptors.extend(rights);
                    }
                }
                Ok(received.bytes)
            })
            .await?;
        *filled += count;
        Ok(count > 0)
    }
}
