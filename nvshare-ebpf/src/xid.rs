//! Xid errors, from the driver's own tracepoint `nvidia:nvidia_dev_xid`.

use aya_ebpf::{
    EbpfContext as _,
    helpers::{bpf_probe_read_kernel_str_bytes, generated::bpf_ktime_get_ns},
    macros::tracepoint,
    programs::TracePointContext,
};
use nvshare_abi::maps::XidRecord;

use crate::{health, maps::XIDS};

/// Offsets in the record: two strings (position in the low half of a word) around the code. The agent compares
/// them with the kernel's own description before it attaches.
mod offset {
    pub(super) const DEVICE: usize = 8;
    pub(super) const CODE: usize = 12;
    pub(super) const MESSAGE: usize = 16;
}

#[tracepoint]
pub(crate) fn nvidia_dev_xid(ctx: TracePointContext) -> u32 {
    let _ignored = report(&ctx);
    0
}

#[inline(always)]
fn report(ctx: &TracePointContext) -> Result<(), i32> {
    // SAFETY: the offsets lie in the record; the helper checks the read.
    let (device, code, message) = unsafe {
        (
            ctx.read_at::<u32>(offset::DEVICE)?,
            ctx.read_at::<u32>(offset::CODE)?,
            ctx.read_at::<u32>(offset::MESSAGE)?,
        )
    };
    let Some(mut entry) = XIDS.reserve::<XidRecord>(0) else {
        health::lost();
        return Ok(());
    };
    let record = entry.as_mut_ptr();
    // SAFETY: the reserved entry is as large as the record and is plain memory, initialised or not mattering only
    // behind the zero that ends each text; the texts lie in the tracepoint's record at the positions it names, and
    // the helper checks the reads.
    unsafe {
        (*record).at_ns = bpf_ktime_get_ns();
        (*record).code = code;
        (*record).reserved = 0;
        (*record).device[0] = 0;
        (*record).message[0] = 0;
        let base = ctx.as_ptr().cast::<u8>();
        let _cut =
            bpf_probe_read_kernel_str_bytes(base.add((device & 0xffff) as usize), &mut (*record).device);
        let _cut =
            bpf_probe_read_kernel_str_bytes(base.add((message & 0xffff) as usize), &mut (*record).message);
    }
    entry.submit(0);
    Ok(())
}
