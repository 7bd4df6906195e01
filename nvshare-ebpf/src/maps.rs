//! The maps. Every one is bounded; an update that a full map refuses is counted in `HEALTH`.

use aya_ebpf::{
    macros::map,
    maps::{Array, HashMap, PerCpuArray, PerCpuHashMap, RingBuf},
};
use nvshare_abi::maps::{
    BLOCK_FIGURES, BlockFigures, Config, CounterKey, Counters, CudaCalls, EvictionKey, Evictor, FaultThread,
    Health, Room, SHADOWS as SHADOW_ENTRIES, Shadow, Space, SpaceId,
};

/// VA spaces alive at one time.
const SPACES_MAX: u32 = 4096;
/// (space, processor) pairs. Each costs its size on every CPU.
const COUNTERS_MAX: u32 = 1024;

#[map]
pub(crate) static CONFIG: Array<Config> = Array::with_max_entries(1, 0);

#[map]
pub(crate) static HEALTH: PerCpuArray<Health> = PerCpuArray::with_max_entries(1, 0);

#[map]
pub(crate) static EVENTS: HashMap<u64, SpaceId> = HashMap::with_max_entries(SPACES_MAX, 0);

/// Counts beginnings and ends of spaces.
#[map]
pub(crate) static GENERATION: Array<u64> = Array::with_max_entries(1, 0);

#[map]
pub(crate) static SPACES: HashMap<SpaceId, Space> = HashMap::with_max_entries(SPACES_MAX, 0);

#[map]
pub(crate) static COUNTERS: PerCpuHashMap<CounterKey, Counters> =
    PerCpuHashMap::with_max_entries(COUNTERS_MAX, 0);

#[map]
pub(crate) static EVICTORS: HashMap<u32, Evictor> = HashMap::with_max_entries(256, 0);

#[map]
pub(crate) static EVICTIONS: HashMap<EvictionKey, u64> = HashMap::with_max_entries(4096, 0);

/// What happened to the blocks of a space on a GPU.
#[map]
pub(crate) static BLOCKS: Array<BlockFigures> = Array::with_max_entries(BLOCK_FIGURES, 0);

/// What the agent says of it; the same index.
#[map]
pub(crate) static ROOM: Array<Room> = Array::with_max_entries(BLOCK_FIGURES, 0);

#[map]
pub(crate) static SHADOWS: Array<Shadow> = Array::with_max_entries(SHADOW_ENTRIES, 0);

#[map]
pub(crate) static FAULT_THREADS: HashMap<u32, FaultThread> = HashMap::with_max_entries(256, 0);

#[map]
pub(crate) static XIDS: RingBuf = RingBuf::with_byte_size(64 * 1024, 0);

#[map]
pub(crate) static CUDA_CALLS: HashMap<u32, CudaCalls> = HashMap::with_max_entries(4096, 0);
