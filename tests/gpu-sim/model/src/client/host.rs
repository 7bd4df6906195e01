//! The cards as whoever looks at them sees them, and what can be made to happen to them.

use std::{
    ffi::{CStr, OsStr},
    os::unix::ffi::OsStrExt as _,
    path::{Path, PathBuf},
    sync::atomic::Ordering,
};

use nvshare_abi::uvm::DriverVersion;

use super::{ConnectError, GpuInfo, ProcessInfo};
use crate::shared::{CardSlot, Mapped, State};

/// The simulated host's cards in the shared file; takes no part in the simulation.
#[derive(Clone, Copy, Debug)]
pub struct Host {
    state: Mapped,
}

/// The directory that NVSHARE_SIM_DIR names, else the one in whose `lib` folder this library was loaded.
pub(super) fn directory() -> Result<PathBuf, ConnectError> {
    std::env::var_os("NVSHARE_SIM_DIR")
        .filter(|dir| !dir.is_empty())
        .map(PathBuf::from)
        .or_else(around_this_library)
        .ok_or(ConnectError::NoDirectory)
}

/// A program that was told the path of a driver library, as the agent is, finds its host by that path alone.
fn around_this_library() -> Option<PathBuf> {
    let mut info = std::mem::MaybeUninit::<libc::Dl_info>::zeroed();
    let here = around_this_library as fn() -> Option<PathBuf> as *const libc::c_void;
    // SAFETY: `info` is valid to write to, and all zeros is a valid Dl_info (null pointers).
    let info = unsafe {
        libc::dladdr(here, info.as_mut_ptr());
        info.assume_init()
    };
    if info.dli_fname.is_null() {
        return None;
    }
    // SAFETY: the loader's name of a loaded object is a C string that lives as long as the object.
    let path = unsafe { CStr::from_ptr(info.dli_fname) };
    let dir = Path::new(OsStr::from_bytes(path.to_bytes())).parent()?.parent()?;
    dir.join("state").exists().then(|| dir.to_owned())
}

pub(super) fn unreachable(dir: &Path, what: &'static str) -> impl FnOnce(std::io::Error) -> ConnectError {
    let dir = dir.display().to_string();
    move |error| ConnectError::Unreachable { dir, what, error }
}

impl Host {
    /// Opens the host that NVSHARE_SIM_DIR names.
    pub fn open() -> Result<Self, ConnectError> {
        Self::open_in(&directory()?)
    }

    /// Opens the host whose files are in `dir`.
    pub fn open_in(dir: &Path) -> Result<Self, ConnectError> {
        let state = Mapped::open(&dir.join("state")).map_err(unreachable(dir, "mapping its state"))?;
        Ok(Self { state })
    }

    pub(super) fn state(self) -> Mapped {
        self.state
    }

    pub(super) fn state_ref(&self) -> &State {
        &self.state
    }

    fn card(&self, gpu: usize) -> Option<&CardSlot> {
        self.state.cards.get(gpu).filter(|_| gpu < self.count())
    }

    fn count(self) -> usize {
        self.state.cards_used.load(Ordering::Relaxed) as usize
    }

    /// The cards, by index.
    pub fn gpus(&self) -> Vec<GpuInfo> {
        (0..self.count()).filter_map(|index| self.card(index).map(|card| info(index, card))).collect()
    }

    /// (free, total) bytes as the driver counts: plain allocations and populated managed memory are used. Zeros for a
    /// card that does not exist.
    pub fn mem_info(&self, gpu: usize) -> (u64, u64) {
        self.card(gpu).map_or((0, 0), |card| (card.free(), card.total.load(Ordering::Relaxed)))
    }

    /// Processes that use the card. Every connected program has a context on every card.
    pub fn processes(&self, gpu: usize) -> Vec<ProcessInfo> {
        if gpu >= self.count() {
            return Vec::new();
        }
        self.state
            .clients
            .iter()
            .filter_map(|client| {
                let pid = client.pid.load(Ordering::Acquire);
                let plain_bytes = client.plain[gpu].load(Ordering::Relaxed);
                (pid != 0).then_some(ProcessInfo { pid, plain_bytes })
            })
            .collect()
    }

    /// Whether the card has fallen off the bus.
    pub fn is_lost(&self, gpu: usize) -> bool {
        self.card(gpu).is_some_and(CardSlot::is_lost)
    }

    /// Takes a card off the bus, or puts it back. False if there is no such card.
    pub fn set_lost(&self, gpu: usize, lost: bool) -> bool {
        self.card(gpu).inspect(|card| card.lost.store(lost.into(), Ordering::Relaxed)).is_some()
    }

    /// Lets the fault-service thread of a card spin, or work again. False if there is no such card.
    pub fn set_hanging(&self, gpu: usize, hangs: bool) -> bool {
        self.card(gpu).inspect(|card| card.hangs.store(hangs.into(), Ordering::Relaxed)).is_some()
    }

    /// Changes the rate of a card's link, as repeated transfers after errors do. False if there is no such card.
    pub fn set_link_rate(&self, gpu: usize, bytes_per_second: u64) -> bool {
        let set = |card: &&CardSlot| card.link_rate.store(bytes_per_second.max(1), Ordering::Relaxed);
        self.card(gpu).inspect(set).is_some()
    }

    /// Nanoseconds during which the card has computed since it was started; differences give its utilisation.
    pub fn busy_ns(&self, gpu: usize) -> u64 {
        self.card(gpu).map_or(0, |card| card.busy_ns.load(Ordering::Relaxed))
    }

    /// Bytes moved over the link since the start: (in, out).
    pub fn link_bytes(&self, gpu: usize) -> (u64, u64) {
        self.card(gpu).map_or((0, 0), |card| {
            (card.link_bytes[0].load(Ordering::Relaxed), card.link_bytes[1].load(Ordering::Relaxed))
        })
    }

    /// The driver version that the simulator plays.
    pub fn driver(&self) -> DriverVersion {
        let part = |index: usize| self.state.driver[index].load(Ordering::Relaxed) as u16;
        DriverVersion::new(part(0), part(1), part(2))
    }

    /// The same as text, such as `580.126.20`.
    pub fn driver_version(&self) -> String {
        self.driver().to_string()
    }
}

fn info(index: usize, card: &CardSlot) -> GpuInfo {
    let mut uuid = [0; 16];
    for (half, word) in uuid.chunks_exact_mut(8).zip(&card.uuid) {
        half.copy_from_slice(&word.load(Ordering::Relaxed).to_ne_bytes());
    }
    let name: Vec<u8> =
        card.name.iter().map(|byte| byte.load(Ordering::Relaxed)).take_while(|&byte| byte != 0).collect();
    let capability = card.capability.load(Ordering::Relaxed);
    GpuInfo {
        index,
        uuid,
        name: String::from_utf8_lossy(&name).into_owned(),
        total_bytes: card.total.load(Ordering::Relaxed),
        sms: card.sms.load(Ordering::Relaxed),
        capability: (capability >> 4, capability & 15),
        pci: (0, card.pci_bus.load(Ordering::Relaxed), 0),
    }
}
