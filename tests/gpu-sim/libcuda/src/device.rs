//! Devices: enumeration and attributes of a card of compute capability 9.0.

use std::ffi::c_char;

use crate::{
    abi::{Device, INVALID_DEVICE, INVALID_VALUE, Out, Outcome, PEER_ACCESS_UNSUPPORTED, Text, Uuid},
    entry::driver_api,
    process::{driver, gpu_index},
};

/// `CU_DEVICE_ATTRIBUTE_*` as an H100 gives them, where they are not 0; what depends on the card is in [`attribute`].
static ATTRIBUTES: &[(u32, i32)] = &[
    (1, 1024),
    (2, 1024),
    (3, 1024),
    (4, 64),
    (5, i32::MAX),
    (6, 65535),
    (7, 65535),
    (8, 49152),
    (9, 65536),
    (10, 32),
    (11, i32::MAX),
    (12, 65536),
    (13, 1_980_000),
    (14, 512),
    (15, 1),
    (19, 1),
    (21, 131_072),
    (22, 131_072),
    (23, 65536),
    (24, 16384),
    (25, 16384),
    (26, 16384),
    (27, 32768),
    (28, 32768),
    (29, 2048),
    (30, 512),
    (31, 1),
    (32, 1),
    (36, 2_619_000),
    (37, 5120),
    (38, 52_428_800),
    (39, 2048),
    (40, 3),
    (41, 1),
    (42, 32768),
    (43, 2048),
    (51, 32),
    (52, 32768),
    (69, 268_435_456),
    (70, 131_072),
    (71, 65000),
    (72, 2_097_120),
    (73, 32768),
    (74, 32768),
    (77, 32768),
    (78, 1),
    (79, 1),
    (80, 1),
    (81, 233_472),
    (82, 65536),
    (83, 1),
    (86, 0),
    (87, 2),
    (89, 1),
    (90, 1),
    (91, 1),
    (92, 1),
    (93, 1),
    (94, 1),
    (95, 1),
    (96, 1),
    (97, 232_448),
    (98, 1),
    (99, 1),
    (106, 32),
    (108, 32_768_000),
    (109, 134_217_728),
    (111, 1024),
    (113, 1),
    (115, 1),
    (119, 1),
    (120, 1),
    (122, 1),
    (123, 1),
    (126, 4),
    (134, -1),
];

fn attribute(which: u32, gpu: usize) -> Outcome<i32> {
    let info = &driver()?.gpus[gpu];
    Ok(match which {
        0 | 162.. => return Err(INVALID_VALUE),
        16 => info.sms as i32,
        33 => info.pci.1 as i32,
        34 => info.pci.2 as i32,
        50 => info.pci.0 as i32,
        75 => info.capability.0 as i32,
        76 => info.capability.1 as i32,
        _ => ATTRIBUTES.iter().find(|row| row.0 == which).map_or(0, |row| row.1),
    })
}

/// Copies a string with its NUL, cut to the room given.
fn store(out: Out<c_char>, room: i32, text: &str) -> Outcome {
    let room = usize::try_from(room).map_err(|_negative| INVALID_VALUE)?;
    let last = room.checked_sub(1).ok_or(INVALID_VALUE)?;
    let bytes = text.as_bytes();
    let kept = &bytes[..bytes.len().min(last)];
    for (index, &byte) in kept.iter().chain(&[0]).enumerate() {
        out.set_at(index, byte.cast_signed())?;
    }
    Ok(())
}

/// `CUdevprop`.
#[repr(C)]
pub(crate) struct Properties {
    threads_per_block: i32,
    block: [i32; 3],
    grid: [i32; 3],
    shared_per_block: i32,
    constant: i32,
    warp: i32,
    pitch: i32,
    registers_per_block: i32,
    clock_khz: i32,
    texture_alignment: i32,
}

driver_api! {
    fn cuDeviceGet(device: Out<Device>, ordinal: i32) {
        device.set(gpu_index(ordinal)? as Device)
    }

    fn cuDeviceGetCount(count: Out<i32>) {
        count.set(driver()?.gpus.len() as i32)
    }

    fn cuDeviceGetName(name: Out<c_char>, room: i32, device: Device) {
        store(name, room, &driver()?.gpus[gpu_index(device)?].name)
    }

    fn cuDeviceGetUuid(uuid: Out<Uuid>, device: Device) {
        uuid.set(Uuid(driver()?.gpus[gpu_index(device)?].uuid))
    }

    fn cuDeviceGetUuid_v2(uuid: Out<Uuid>, device: Device) {
        uuid.set(Uuid(driver()?.gpus[gpu_index(device)?].uuid))
    }

    fn cuDeviceTotalMem_v2(bytes: Out<usize>, device: Device) {
        bytes.set(driver()?.gpus[gpu_index(device)?].total_bytes as usize)
    }

    fn cuDeviceGetAttribute(value: Out<i32>, which: u32, device: Device) {
        value.set(attribute(which, gpu_index(device)?)?)
    }

    fn cuDeviceComputeCapability(major: Out<i32>, minor: Out<i32>, device: Device) {
        let (first, second) = driver()?.gpus[gpu_index(device)?].capability;
        major.set(first as i32)?;
        minor.set(second as i32)
    }

    fn cuDeviceGetProperties(properties: Out<Properties>, device: Device) {
        let gpu = gpu_index(device)?;
        let get = |which| attribute(which, gpu);
        properties.set(Properties {
            threads_per_block: get(1)?,
            block: [get(2)?, get(3)?, get(4)?],
            grid: [get(5)?, get(6)?, get(7)?],
            shared_per_block: get(8)?,
            constant: get(9)?,
            warp: get(10)?,
            pitch: get(11)?,
            registers_per_block: get(12)?,
            clock_khz: get(13)?,
            texture_alignment: get(14)?,
        })
    }

    fn cuDeviceGetPCIBusId(text: Out<c_char>, room: i32, device: Device) {
        let (domain, bus, slot) = driver()?.gpus[gpu_index(device)?].pci;
        store(text, room, &format!("{domain:04x}:{bus:02x}:{slot:02x}.0"))
    }

    fn cuDeviceGetByPCIBusId(device: Out<Device>, text: Text) {
        let wanted = text.get()?.to_ascii_lowercase();
        let gpu = driver()?.gpus.iter().position(|gpu| {
            let (domain, bus, slot) = gpu.pci;
            let short = format!("{bus:02x}:{slot:02x}");
            wanted.trim_end_matches(".0").ends_with(&short) && (wanted.len() < 10 || wanted.starts_with(&format!("{domain:04x}")))
        });
        device.set(gpu.ok_or(INVALID_DEVICE)? as Device)
    }

    fn cuDeviceCanAccessPeer(can: Out<i32>, device: Device, peer: Device) {
        gpu_index(device)?;
        gpu_index(peer)?;
        can.set(0)
    }

    fn cuDeviceGetP2PAttribute(value: Out<i32>, _which: u32, device: Device, peer: Device) {
        if gpu_index(device)? == gpu_index(peer)? {
            return Err(PEER_ACCESS_UNSUPPORTED);
        }
        value.set(0)
    }

    fn cuDeviceGetTexture1DLinearMaxWidth(width: Out<usize>, _format: u32, _channels: u32, device: Device) {
        gpu_index(device)?;
        width.set(268_435_456)
    }

    fn cuProfilerStart() {
        Ok(())
    }

    fn cuProfilerStop() {
        Ok(())
    }
}
