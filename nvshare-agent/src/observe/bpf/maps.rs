//! The maps, with the types of the shared crate around the byte arrays of the map library.

use std::collections::BTreeMap;

use aya::{
    Ebpf,
    maps::{Array, HashMap, MapData, PerCpuArray, PerCpuHashMap, RingBuf},
};
use bytemuck::Pod;
use nvshare_abi::maps::{
    BlockFigures, Config, CounterKey, Counters, CudaCalls, EvictionKey, Evictor, FaultThread, Health, Room,
    Space, SpaceId, XidRecord, figures_index, name,
};

use super::reason::reason;

type Bytes<const N: usize> = [u8; N];
type HashOf<const K: usize, const V: usize> = HashMap<MapData, Bytes<K>, Bytes<V>>;

/// Every map of the object. Readers see each value whole, but not all values at one instant.
pub(super) struct Maps {
    config: Array<MapData, Bytes<{ size_of::<Config>() }>>,
    health: PerCpuArray<MapData, Bytes<{ size_of::<Health>() }>>,
    events: HashOf<8, 8>,
    spaces: HashOf<8, { size_of::<Space>() }>,
    counters: PerCpuHashMap<MapData, Bytes<{ size_of::<CounterKey>() }>, Bytes<{ size_of::<Counters>() }>>,
    evictors: HashOf<4, { size_of::<Evictor>() }>,
    evictions: HashOf<{ size_of::<EvictionKey>() }, 8>,
    fault_threads: HashOf<4, { size_of::<FaultThread>() }>,
    blocks: Array<MapData, Bytes<{ size_of::<BlockFigures>() }>>,
    room: Array<MapData, Bytes<{ size_of::<Room>() }>>,
    xids: RingBuf<MapData>,
    cuda_calls: HashOf<4, { size_of::<CudaCalls>() }>,
}

impl Maps {
    /// Takes the maps out of a loaded object.
    pub(super) fn take(ebpf: &mut Ebpf) -> Result<Self, String> {
        macro_rules! take {
            ($name:expr) => {
                ebpf.take_map($name)
                    .ok_or_else(|| format!("the BPF object has no map {}", $name))?
                    .try_into()
                    .map_err(|error| format!("map {} of the BPF object: {}", $name, reason(&error)))?
            };
        }
        Ok(Self {
            config: take!(name::CONFIG),
            health: take!(name::HEALTH),
            events: take!(name::EVENTS),
            spaces: take!(name::SPACES),
            counters: take!(name::COUNTERS),
            evictors: take!(name::EVICTORS),
            evictions: take!(name::EVICTIONS),
            fault_threads: take!(name::FAULT_THREADS),
            blocks: take!(name::BLOCKS),
            room: take!(name::ROOM),
            xids: take!(name::XIDS),
            cuda_calls: take!(name::CUDA_CALLS),
        })
    }

    pub(super) fn configure(&mut self, config: &Config) -> Result<(), String> {
        self.config.set(0, bytes_of(config), 0).map_err(|error| reason(&error))
    }

    pub(super) fn health(&self) -> Health {
        let Ok(values) = self.health.get(&0, 0) else {
            return Health::default();
        };
        let mut sum = Health::default();
        for value in values.iter().map(value_of::<Health, _>) {
            let Health { notifications, insane, unreadable, lost } = value;
            sum.notifications += notifications;
            sum.insane += insane;
            sum.unreadable += unreadable;
            sum.lost += lost;
        }
        sum
    }

    pub(super) fn spaces(&self) -> BTreeMap<SpaceId, Space> {
        self.spaces.iter().flatten().map(|(key, value)| (value_of(&key), value_of(&value))).collect()
    }

    /// Counters, summed over the CPUs.
    pub(super) fn counters(&self) -> BTreeMap<CounterKey, Counters> {
        let sum = |mut sum: Counters, one: Counters| {
            let Counters {
                gpu_faults,
                gpu_fault_instances,
                cpu_faults,
                evicted_by_others,
                bytes_in,
                bytes_out,
                first_ns,
                last_ns,
            } = one;
            sum.gpu_faults += gpu_faults;
            sum.gpu_fault_instances += gpu_fault_instances;
            sum.cpu_faults += cpu_faults;
            sum.evicted_by_others += evicted_by_others;
            for (sum, bytes) in sum.bytes_in.iter_mut().zip(bytes_in) {
                *sum += bytes;
            }
            for (sum, bytes) in sum.bytes_out.iter_mut().zip(bytes_out) {
                *sum += bytes;
            }
            if first_ns != 0 && (sum.first_ns == 0 || first_ns < sum.first_ns) {
                sum.first_ns = first_ns;
            }
            sum.last_ns = sum.last_ns.max(last_ns);
            sum
        };
        let values = self.counters.iter().flatten();
        values
            .map(|(key, per_cpu)| {
                (value_of(&key), per_cpu.iter().map(value_of).fold(Counters::default(), sum))
            })
            .collect()
    }

    pub(super) fn evictions(&self) -> BTreeMap<EvictionKey, u64> {
        self.evictions
            .iter()
            .flatten()
            .map(|(key, value)| (value_of(&key), u64::from_ne_bytes(value)))
            .collect()
    }

    /// What happened to the blocks of a space on a GPU; `None` if nothing did, or another one's are counted in its place.
    pub(super) fn blocks(&self, key: CounterKey) -> Option<BlockFigures> {
        let CounterKey { space, processor, reserved: _ } = key;
        let figures = self.blocks.get(&figures_index(space, processor), 0).ok()?;
        let figures: BlockFigures = value_of(&figures);
        (figures.space == space.0 && figures.processor == processor).then_some(figures)
    }

    /// Says what a GPU can hold, less what the owner of a space allocated there; `None` if nobody knows.
    pub(super) fn set_room(&mut self, key: CounterKey, bytes: Option<i64>) {
        let CounterKey { space, processor, reserved: _ } = key;
        let room =
            Room { space: space.0, bytes: bytes.unwrap_or(0), known: bytes.is_some().into(), reserved: 0 };
        let index = figures_index(space, processor);
        // An array refuses nothing within its bounds.
        self.room.set(index, bytes_of(&room), 0).ok();
    }

    /// Forgets a space that has ended, and its counters on these processors.
    pub(super) fn forget_space(&mut self, space: SpaceId, processors: impl IntoIterator<Item = u32>) {
        for processor in processors {
            // Absent is as good as removed.
            let key = CounterKey { space, processor, reserved: 0 };
            self.counters.remove(&bytes_of(&key)).ok();
            if self.blocks(key).is_some() {
                let index = figures_index(space, processor);
                self.blocks.set(index, bytes_of(&BlockFigures::default()), 0).ok();
            }
        }
        self.spaces.remove(&bytes_of(&space)).ok();
    }

    pub(super) fn forget_eviction(&mut self, key: EvictionKey) {
        self.evictions.remove(&bytes_of(&key)).ok();
    }

    /// Forgets all that hangs on addresses and threads of a driver that is gone.
    pub(super) fn forget_driver(&mut self) {
        for key in self.events.keys().flatten().collect::<Vec<_>>() {
            self.events.remove(&key).ok();
        }
        for key in self.evictors.keys().flatten().collect::<Vec<_>>() {
            self.evictors.remove(&key).ok();
        }
    }

    /// Starts to watch a thread; one that is already watched keeps its time.
    pub(super) fn watch_thread(&mut self, tid: u32) -> Result<(), String> {
        /// `BPF_NOEXIST` of the kernel's interface.
        const NEW_ONLY: u64 = 1;
        match self.fault_threads.insert(tid.to_ne_bytes(), bytes_of(&FaultThread::default()), NEW_ONLY) {
            Ok(()) => Ok(()),
            Err(_) if self.thread(tid).is_some() => Ok(()),
            Err(error) => Err(reason(&error)),
        }
    }

    pub(super) fn thread(&self, tid: u32) -> Option<FaultThread> {
        self.fault_threads.get(&tid.to_ne_bytes(), 0).ok().map(|value| value_of(&value))
    }

    pub(super) fn forget_thread(&mut self, tid: u32) {
        self.fault_threads.remove(&tid.to_ne_bytes()).ok();
    }

    /// The next Xid that was not taken yet.
    pub(super) fn next_xid(&mut self) -> Option<XidRecord> {
        let item = self.xids.next()?;
        let bytes: &Bytes<{ size_of::<XidRecord>() }> = item.first_chunk()?;
        Some(value_of(bytes))
    }

    pub(super) fn cuda_calls(&self) -> BTreeMap<u32, CudaCalls> {
        self.cuda_calls
            .iter()
            .flatten()
            .map(|(key, value)| (u32::from_ne_bytes(key), value_of(&value)))
            .collect()
    }

    pub(super) fn forget_process(&mut self, tgid: u32) {
        self.cuda_calls.remove(&tgid.to_ne_bytes()).ok();
    }
}

/// A value of the shared crate from a map's bytes, whatever their alignment.
fn value_of<T: Pod, const N: usize>(bytes: &Bytes<N>) -> T {
    const { assert!(size_of::<T>() == N) };
    bytemuck::pod_read_unaligned(bytes)
}

/// The bytes of a value of the shared crate.
fn bytes_of<T: Pod, const N: usize>(value: &T) -> Bytes<N> {
    const { assert!(size_of::<T>() == N) };
    let mut bytes = [0; N];
    bytes.copy_from_slice(bytemuck::bytes_of(value));
    bytes
}
