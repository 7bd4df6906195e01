//! The stream functions of the driver's interface.

use std::{ffi::c_void, sync::Arc};

use crate::{
    abi::{
        Handle, HostFn, INVALID_VALUE, NOT_READY, Out, Outcome, STREAM_CAPTURE_UNSUPPORTED, StreamCallback,
    },
    context,
    entry::{driver_api, stream_api},
    launch::{Callback, Operation},
    memory,
    registry::handle_of,
    stream::{Flavour, Kind, NON_BLOCKING, STREAMS, Stream, resolve},
};

fn create(out: Out<Handle>, flags: u32, priority: i32) -> Outcome {
    let context = context::current()?;
    if out.is_null() || flags & !NON_BLOCKING != 0 {
        return Err(INVALID_VALUE);
    }
    out.set(STREAMS.insert(context.add_stream(Kind::Created, flags, priority.clamp(-5, 0))))
}

fn destroy(handle: Handle) -> Outcome {
    let stream = STREAMS.remove(handle)?;
    if let Some(capture) = stream.capture() {
        capture.stream_destroyed(&stream);
    }
    // As in the driver: what is queued still runs.
    stream.close();
    Ok(())
}

/// Refuses to look into a stream that is capturing, which ends the capture in error.
fn not_capturing(stream: &Stream) -> Outcome {
    match stream.capture() {
        Some(capture) => {
            capture.invalidate();
            Err(STREAM_CAPTURE_UNSUPPORTED)
        }
        None => Ok(()),
    }
}

fn write_value(stream: Handle, flavour: Flavour, address: u64, value: u64, bytes: u8) -> Outcome {
    memory::check_device_range(address, u64::from(bytes))?;
    resolve(stream, flavour)?.add(Operation::WriteValue { address, value, bytes }).map(drop)
}

fn wait_value(stream: Handle, flavour: Flavour, address: u64, value: u64, flags: u32, bytes: u8) -> Outcome {
    memory::check_device_range(address, u64::from(bytes))?;
    resolve(stream, flavour)?.add(Operation::WaitValue { address, value, flags, bytes }).map(drop)
}

driver_api! {
    fn cuStreamCreate(out: Out<Handle>, flags: u32) {
        create(out, flags, 0)
    }

    fn cuStreamCreateWithPriority(out: Out<Handle>, flags: u32, priority: i32) {
        create(out, flags, priority)
    }

    fn cuStreamDestroy(stream: Handle) {
        destroy(stream)
    }

    fn cuStreamDestroy_v2(stream: Handle) {
        destroy(stream)
    }
}

stream_api! {
    fn cuStreamSynchronize | cuStreamSynchronize_ptsz(flavour; stream: Handle) {
        let stream = resolve(stream, flavour)?;
        not_capturing(&stream)?;
        if stream.kind == Kind::Legacy {
            // The legacy stream stands for every blocking stream: an empty operation waits for all of them.
            stream.submit(Operation::Nothing, Vec::new())?.wait();
        } else {
            stream.wait_idle();
        }
        stream.context()?.check()
    }

    fn cuStreamQuery | cuStreamQuery_ptsz(flavour; stream: Handle) {
        let stream = resolve(stream, flavour)?;
        not_capturing(&stream)?;
        if stream.is_idle() { stream.context()?.check() } else { Err(NOT_READY) }
    }

    fn cuStreamGetPriority | cuStreamGetPriority_ptsz(flavour; stream: Handle, priority: Out<i32>) {
        priority.set(resolve(stream, flavour)?.priority)
    }

    fn cuStreamGetFlags | cuStreamGetFlags_ptsz(flavour; stream: Handle, flags: Out<u32>) {
        flags.set(resolve(stream, flavour)?.flags)
    }

    fn cuStreamGetId | cuStreamGetId_ptsz(flavour; stream: Handle, id: Out<u64>) {
        id.set(handle_of(&resolve(stream, flavour)?) as u64)
    }

    fn cuStreamGetCtx | cuStreamGetCtx_ptsz(flavour; stream: Handle, out: Out<Handle>) {
        out.set(handle_of(&resolve(stream, flavour)?.context()?))
    }

    fn cuStreamGetCtx_v2 | cuStreamGetCtx_v2_ptsz(flavour; stream: Handle, out: Out<Handle>, green: Out<Handle>) {
        green.set_optional(0);
        out.set(handle_of(&resolve(stream, flavour)?.context()?))
    }

    fn cuStreamGetDevice | cuStreamGetDevice_ptsz(flavour; stream: Handle, device: Out<i32>) {
        device.set(resolve(stream, flavour)?.gpu as i32)
    }

    fn cuLaunchHostFunc | cuLaunchHostFunc_ptsz(flavour; stream: Handle, function: Option<HostFn>, argument: *mut c_void) {
        let function = function.ok_or(INVALID_VALUE)?;
        let call = Callback::host(function, argument);
        resolve(stream, flavour)?.add(Operation::Call(call)).map(drop)
    }

    fn cuStreamAddCallback | cuStreamAddCallback_ptsz(
        flavour; handle: Handle, callback: Option<StreamCallback>, argument: *mut c_void, _flags: u32,
    ) {
        let callback = callback.ok_or(INVALID_VALUE)?;
        let stream = resolve(handle, flavour)?;
        not_capturing(&stream)?;
        stream.submit(Operation::Call(Callback::stream(callback, handle, argument)), Vec::new()).map(drop)
    }

    fn cuStreamAttachMemAsync | cuStreamAttachMemAsync_ptsz(
        flavour; stream: Handle, _address: u64, _len: usize, _flags: u32,
    ) {
        // With concurrent managed access, attachment is only a hint.
        resolve(stream, flavour).map(drop)
    }

    fn cuStreamWriteValue32 | cuStreamWriteValue32_ptsz(flavour; stream: Handle, address: u64, value: u32, _flags: u32) {
        write_value(stream, flavour, address, u64::from(value), 4)
    }

    fn cuStreamWriteValue32_v2 | cuStreamWriteValue32_v2_ptsz(flavour; stream: Handle, address: u64, value: u32, _flags: u32) {
        write_value(stream, flavour, address, u64::from(value), 4)
    }

    fn cuStreamWriteValue64 | cuStreamWriteValue64_ptsz(flavour; stream: Handle, address: u64, value: u64, _flags: u32) {
        write_value(stream, flavour, address, value, 8)
    }

    fn cuStreamWriteValue64_v2 | cuStreamWriteValue64_v2_ptsz(flavour; stream: Handle, address: u64, value: u64, _flags: u32) {
        write_value(stream, flavour, address, value, 8)
    }

    fn cuStreamWaitValue32 | cuStreamWaitValue32_ptsz(flavour; stream: Handle, address: u64, value: u32, flags: u32) {
        wait_value(stream, flavour, address, u64::from(value), flags, 4)
    }

    fn cuStreamWaitValue32_v2 | cuStreamWaitValue32_v2_ptsz(flavour; stream: Handle, address: u64, value: u32, flags: u32) {
        wait_value(stream, flavour, address, u64::from(value), flags, 4)
    }

    fn cuStreamWaitValue64 | cuStreamWaitValue64_ptsz(flavour; stream: Handle, address: u64, value: u64, flags: u32) {
        wait_value(stream, flavour, address, value, flags, 8)
    }

    fn cuStreamWaitValue64_v2 | cuStreamWaitValue64_v2_ptsz(flavour; stream: Handle, address: u64, value: u64, flags: u32) {
        wait_value(stream, flavour, address, value, flags, 8)
    }

    fn cuStreamCopyAttributes | cuStreamCopyAttributes_ptsz(flavour; to: Handle, from: Handle) {
        let _streams: (Arc<Stream>, Arc<Stream>) = (resolve(to, flavour)?, resolve(from, flavour)?);
        Ok(())
    }

    fn cuStreamSetAttribute | cuStreamSetAttribute_ptsz(flavour; stream: Handle, _attribute: u32, _value: usize) {
        // Access policy windows and synchronisation hints have no effect on the simulated card.
        resolve(stream, flavour).map(drop)
    }
}
