//! A program that means harm: everything that a process without privileges can do to the agent's sockets.
//!
//! It never checks that it was refused; whoever runs it looks at the agent. What it does follows from its seed.

use std::{
    io::{self, IoSlice, Read as _, Write as _},
    os::{
        fd::{AsRawFd as _, FromRawFd as _, OwnedFd, RawFd},
        unix::net::UnixStream,
    },
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use clap::{Args, ValueEnum};
use nvshare_wire::{
    ClientMessage, DrainOutcome, GpuUuid, Label,
    page::{PAGE_LEN, PAGE_MAGIC},
};

use crate::quantity;

/// Options of `hostile`.
#[derive(Debug, Args)]
pub(crate) struct Options {
    /// The agent's run directory.
    #[arg(long)]
    run_dir: PathBuf,
    /// What to do.
    #[arg(long, value_enum)]
    kind: Kind,
    /// For how long.
    #[arg(long = "for", value_parser = quantity::time)]
    lasting: Duration,
    /// Where chance begins.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// UUID of a GPU, 32 hexadecimal digits with or without `GPU-` and dashes.
    #[arg(long, value_parser = gpu, default_value = "00000000000000000000000000000000")]
    gpu: GpuUuid,
}

/// A way to misbehave.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Kind {
    /// Connect and close, as fast as possible.
    ConnectClose,
    /// Bytes that are no frames, and frames with random content.
    Garbage,
    /// Many connections, each with half a frame.
    HalfFrames,
    /// A session that sends without end and never reads.
    Deaf,
    /// Descriptors by the hundred, of every kind but the right one.
    Descriptors,
    /// As many connections as the system gives, held.
    Hoard,
    /// A session that claims demand and memory, confirms what was not granted and ignores every revocation.
    Liar,
    /// Such sessions one after the other.
    Liars,
    /// Requests on the control socket.
    Control,
}

fn gpu(text: &str) -> Result<GpuUuid, String> {
    let digits: String = text.trim_start_matches("GPU-").chars().filter(|&c| c != '-').collect();
    let number = u128::from_str_radix(&digits, 16).map_err(|error| error.to_string())?;
    if digits.len() == 32 { Ok(number.to_be_bytes()) } else { Err("not 32 digits".to_owned()) }
}

/// SplitMix64.
struct Dice(u64);

impl Dice {
    fn roll(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    fn below(&mut self, bound: usize) -> usize {
        (self.roll() % bound.max(1) as u64) as usize
    }

    fn bytes(&mut self, count: usize) -> Vec<u8> {
        (0..count).map(|_| self.roll() as u8).collect()
    }
}

/// A page as `Hello` carries one, full of ones apart from its mark.
fn page() -> io::Result<OwnedFd> {
    // SAFETY: a constant name; a descriptor that it gives is fresh and nobody else's.
    let page = unsafe {
        let fd = libc::memfd_create(c"page".as_ptr(), libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING);
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        OwnedFd::from_raw_fd(fd)
    };
    let mut content = vec![0xff; PAGE_LEN];
    content[..4].copy_from_slice(&PAGE_MAGIC.to_ne_bytes());
    std::fs::File::from(page.try_clone()?).write_all(&content)?;
    // SAFETY: takes numbers only.
    if unsafe { libc::fcntl(page.as_raw_fd(), libc::F_ADD_SEALS, libc::F_SEAL_SHRINK) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(page)
}

/// Sends bytes with descriptors beside them; at most 64.
fn send_with(stream: &UnixStream, bytes: &[u8], descriptors: &[RawFd]) -> io::Result<()> {
    #[repr(align(8))]
    struct Control([u8; 512]);
    let mut control = Control([0; 512]);
    let part = IoSlice::new(bytes);
    let payload = size_of_val(descriptors) as u32;
    // SAFETY: every pointer is to a live local; 64 descriptors fit the control buffer.
    let sent = unsafe {
        let mut header: libc::msghdr = std::mem::zeroed();
        header.msg_iov = (&raw const part).cast_mut().cast();
        header.msg_iovlen = 1;
        header.msg_control = control.0.as_mut_ptr().cast();
        header.msg_controllen = libc::CMSG_SPACE(payload) as _;
        let first = libc::CMSG_FIRSTHDR(&raw const header);
        (*first).cmsg_level = libc::SOL_SOCKET;
        (*first).cmsg_type = libc::SCM_RIGHTS;
        (*first).cmsg_len = libc::CMSG_LEN(payload) as _;
        for (index, &fd) in descriptors.iter().enumerate() {
            libc::CMSG_DATA(first)
                .add(index * size_of::<RawFd>())
                .copy_from(fd.to_ne_bytes().as_ptr(), size_of::<RawFd>());
        }
        libc::sendmsg(stream.as_raw_fd(), &raw const header, libc::MSG_NOSIGNAL)
    };
    if sent < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn connect(path: &Path) -> Option<UnixStream> {
    let stream = UnixStream::connect(path).ok();
    if stream.is_none() {
        // The agent may be between two lives.
        std::thread::sleep(Duration::from_millis(5));
    }
    stream
}

struct Attack {
    clients: PathBuf,
    control: PathBuf,
    gpu: GpuUuid,
    dice: Dice,
    until: Instant,
}

impl Attack {
    fn goes_on(&self) -> bool {
        Instant::now() < self.until
    }

    /// A session on the GPU, as an honest client begins it.
    fn join(&self) -> Option<UnixStream> {
        let stream = connect(&self.clients)?;
        let name = Label::new("<b>\u{202e}evil\u{2028}\"\\n");
        let hello =
            ClientMessage::Hello { weight_milli: u32::MAX, priority: i32::MAX, memory_limit: u64::MAX, name };
        let page = page().ok()?;
        send_with(&stream, hello.encode().as_bytes(), &[page.as_raw_fd()]).ok()?;
        let use_gpu = ClientMessage::UseGpu { slot: 0, gpu: self.gpu };
        (&stream).write_all(use_gpu.encode().as_bytes()).ok()?;
        Some(stream)
    }

    /// A message of some kind with content of some kind.
    fn message(&mut self) -> Vec<u8> {
        let gpu = if self.dice.below(4) == 0 { [0xee; 16] } else { self.gpu };
        let epoch = if self.dice.below(2) == 0 { self.dice.roll() } else { self.dice.roll() % 64 };
        let outcome = [DrainOutcome::Drained, DrainOutcome::TimedOut, DrainOutcome::Capturing];
        let message = match self.dice.below(5) {
            0 => ClientMessage::Waiting { gpu, threads: self.dice.roll() as u32 },
            1 => ClientMessage::Revoked {
                gpu,
                epoch,
                outcome: outcome[self.dice.below(3)],
                drain_ns: self.dice.roll(),
                moved: self.dice.roll(),
            },
            2 => ClientMessage::Resumed { gpu, epoch, moved: self.dice.roll(), moved_ns: self.dice.roll() },
            3 => ClientMessage::Yield { gpu, epoch },
            _ => ClientMessage::UseGpu { slot: self.dice.roll() as u32 % 32, gpu },
        };
        message.encode().as_bytes().to_vec()
    }

    fn garbage(&mut self) {
        let joined = self.dice.below(2) == 0;
        let stream = if joined { self.join() } else { connect(&self.clients) };
        let Some(mut stream) = stream else { return };
        for _ in 0..=self.dice.below(20) {
            let mut bytes = match self.dice.below(3) {
                0 => {
                    let count = self.dice.below(2000);
                    self.dice.bytes(count)
                }
                1 => self.message(),
                // Nearly a message.
                _ => {
                    let mut bytes = self.message();
                    let at = self.dice.below(bytes.len());
                    bytes[at] ^= 1 << self.dice.below(8);
                    bytes
                }
            };
            if self.dice.below(8) == 0 {
                bytes.truncate(self.dice.below(bytes.len() + 1));
            }
            if stream.write_all(&bytes).is_err() {
                return;
            }
        }
    }

    fn half_frames(&mut self) -> Vec<UnixStream> {
        let hello = ClientMessage::Waiting { gpu: self.gpu, threads: 1 }.encode();
        let mut held = Vec::new();
        for _ in 0..400 {
            let Some(mut stream) = connect(&self.clients) else { break };
            let part = self.dice.below(hello.as_bytes().len());
            if stream.write_all(&hello.as_bytes()[..part]).is_ok() {
                held.push(stream);
            }
        }
        held
    }

    fn deaf(&mut self) {
        let Some(mut stream) = self.join() else { return };
        stream.set_write_timeout(Some(Duration::from_millis(50))).ok();
        while self.goes_on() {
            let message = ClientMessage::Waiting { gpu: self.gpu, threads: self.dice.roll() as u32 };
            match stream.write_all(message.encode().as_bytes()) {
                Err(error) if error.kind() != io::ErrorKind::WouldBlock => return,
                // Half a frame may have gone; the agent takes what follows for garbage, which is as well.
                Ok(()) | Err(_) => {}
            }
        }
    }

    fn descriptors(&mut self) {
        let Some(stream) = self.join() else { return };
        let Ok(null) = std::fs::File::open("/dev/null") else { return };
        let Ok((one, other)) = UnixStream::pair() else { return };
        for _ in 0..50 {
            let many: Vec<RawFd> = (0..=self.dice.below(60))
                .map(|_| [null.as_raw_fd(), one.as_raw_fd(), other.as_raw_fd()][self.dice.below(3)])
                .collect();
            let offer = ClientMessage::UvmDescriptor.encode();
            if send_with(&stream, offer.as_bytes(), &many).is_err() {
                return;
            }
        }
    }

    fn hoard(&self) -> Vec<UnixStream> {
        let mut held = Vec::new();
        while held.len() < 1500
            && let Some(stream) = connect(&self.clients)
        {
            held.push(stream);
        }
        held
    }

    fn liar(&mut self, patience: Duration) {
        let Some(mut stream) = self.join() else { return };
        stream.set_read_timeout(Some(Duration::from_millis(20))).ok();
        let end = self.until.min(Instant::now() + patience);
        let mut heard = [0; 4096];
        while Instant::now() < end {
            let lie = match self.dice.below(3) {
                0 => ClientMessage::Waiting { gpu: self.gpu, threads: 9 },
                1 => ClientMessage::Resumed {
                    gpu: self.gpu,
                    epoch: self.dice.roll() % 64,
                    moved: u64::MAX,
                    moved_ns: u64::MAX,
                },
                _ => ClientMessage::Yield { gpu: self.gpu, epoch: self.dice.roll() % 64 },
            };
            if stream.write_all(lie.encode().as_bytes()).is_err() {
                return;
            }
            // What is heard is not heeded.
            if let Ok(0) = stream.read(&mut heard) {
                return;
            }
        }
    }

    fn control(&mut self) {
        let Some(mut stream) = connect(&self.control) else { return };
        for _ in 0..=self.dice.below(30) {
            let line = match self.dice.below(4) {
                0 => b"{\"request\":\"set_mode\",\"mode\":\"turbo\"}\n".to_vec(),
                1 => {
                    let mut deep = vec![b'['; 4000];
                    deep.push(b'\n');
                    deep
                }
                2 => self.dice.bytes(9000),
                _ => b"{\"request\":\"status\"}\n".to_vec(),
            };
            if stream.write_all(&line).is_err() {
                return;
            }
        }
    }
}

/// Misbehaves until the time is over.
pub(crate) fn run(options: &Options) -> Result<()> {
    let clients = options.run_dir.join("clients.sock");
    let control = options.run_dir.join("control.sock");
    let until = Instant::now() + options.lasting;
    let mut attack = Attack { clients, control, gpu: options.gpu, dice: Dice(options.seed), until };
    let mut rounds = 0_u64;
    while attack.goes_on() {
        rounds += 1;
        match options.kind {
            Kind::ConnectClose => drop(connect(&attack.clients)),
            Kind::Garbage => attack.garbage(),
            Kind::Deaf => attack.deaf(),
            Kind::Descriptors => attack.descriptors(),
            Kind::Liar => attack.liar(options.lasting),
            Kind::Liars => attack.liar(Duration::from_millis(300)),
            Kind::Control => attack.control(),
            Kind::HalfFrames | Kind::Hoard => {
                let held = if options.kind == Kind::Hoard { attack.hoard() } else { attack.half_frames() };
                std::thread::sleep(
                    attack.until.saturating_duration_since(Instant::now()).min(Duration::from_secs(1)),
                );
                drop(held);
            }
        }
    }
    let mut out = io::stdout().lock();
    writeln!(out, "{}", serde_json::json!({"rounds": rounds})).context("printing the result")?;
    Ok(())
}
