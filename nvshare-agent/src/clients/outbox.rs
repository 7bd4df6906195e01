//! What the agent sends to one client: a bounded queue and the task that writes it out.

use std::{io, sync::Arc, time::Duration};

use nvshare_wire::{AgentMessage, Encoded};
use tokio::{net::UnixStream, sync::mpsc, task::JoinHandle, time::timeout};
use tokio_util::sync::CancellationToken;

/// Frames that may wait for a client that does not read, beyond what its socket holds.
const CAPACITY: usize = 256;

/// The sending side, for whoever has something to say to the client. Never waits.
#[derive(Clone, Debug)]
pub struct Outbox {
    frame_tx: mpsc::Sender<Encoded>,
    /// Cancelled when the queue is full: the client has stopped reading.
    overflow: CancellationToken,
}

/// The writing side, owned by the session.
#[derive(Debug)]
pub struct Writer {
    task: JoinHandle<()>,
    overflow: CancellationToken,
}

/// A queue to the client at the other end of `stream`.
pub fn outbox(stream: Arc<UnixStream>) -> (Outbox, Writer) {
    let (frame_tx, mut frame_rx) = mpsc::channel::<Encoded>(CAPACITY);
    let overflow = CancellationToken::new();
    let task = tokio::spawn(async move {
        while let Some(frame) = frame_rx.recv().await {
            if write_all(&stream, frame.as_bytes()).await.is_err() {
                // The reading side sees the end of the connection and ends the session.
                return;
            }
        }
    });
    (Outbox { frame_tx, overflow: overflow.clone() }, Writer { task, overflow })
}

impl Outbox {
    /// Queues a message. If the queue is full, the session ends.
    pub fn send(&self, message: &AgentMessage) {
        match self.frame_tx.try_send(message.encode()) {
            Ok(()) | Err(mpsc::error::TrySendError::Closed(_)) => {}
            Err(mpsc::error::TrySendError::Full(_)) => self.overflow.cancel(),
        }
    }
}

impl Writer {
    /// Waits until the client has fallen so far behind that it must be dropped.
    pub async fn overflowed(&self) {
        self.overflow.cancelled().await;
    }

    /// Writes out what is queued, for at most `within`, once every [`Outbox`] is dropped; then gives up.
    pub async fn finish(mut self, within: Duration) {
        if timeout(within, &mut self.task).await.is_err() {
            self.task.abort();
        }
    }
}

async fn write_all(stream: &UnixStream, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        stream.writable().await?;
        match stream.try_write(bytes) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(count) => bytes = &bytes[count..],
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// More than the queue and the socket together hold.
    const TOO_MANY: usize = 100_000;

    #[tokio::test]
    async fn a_client_that_does_not_read_overflows_at_a_bound_and_not_before() {
        let (agent, client) = UnixStream::pair().unwrap();
        let (outbox, writer) = outbox(Arc::new(agent));
        for _ in 0..CAPACITY {
            outbox.send(&AgentMessage::Alive);
        }
        assert!(!outbox.overflow.is_cancelled(), "a slow reader is kept");
        for _ in 0..TOO_MANY {
            outbox.send(&AgentMessage::Alive);
            tokio::task::yield_now().await;
        }
        timeout(Duration::from_secs(30), writer.overflowed()).await.unwrap();
        drop(client);
    }

    #[tokio::test]
    async fn what_is_queued_when_a_session_ends_is_still_written() {
        let (agent, client) = UnixStream::pair().unwrap();
        let (outbox, writer) = outbox(Arc::new(agent));
        outbox.send(&AgentMessage::Alive);
        drop(outbox);
        writer.finish(Duration::from_secs(30)).await;
        let mut frame = [0; 64];
        client.readable().await.unwrap();
        let count = client.try_read(&mut frame).unwrap();
        assert_eq!(&frame[..count], AgentMessage::Alive.encode().as_bytes());
    }
}
