//! Whatever a client writes into its page, what the engine is told of it stays within bounds.

use std::os::fd::AsFd as _;

use nvshare_wire::page::PAGE_LEN;
use rustix::{
    fs::{MemfdFlags, fcntl_add_seals, ftruncate, memfd_create},
    io::pwrite,
};

use super::*;

const GPU: GpuId = GpuId([7; 16]);

fn clamped(activity: &Activity) -> bool {
    activity.managed.0 <= MEMORY_CLAIM_MAX
        && activity.device.0 <= MEMORY_CLAIM_MAX
        && activity.waiting <= THREADS_CLAIM_MAX
        && activity.busy_threads <= 2 * THREADS_CLAIM_MAX
}

#[test]
fn fuzz_the_shared_page() {
    let words: &[&[u8]] = &[b"NVP1", &[0xff; 8], &[0; 64]];
    nvshare_fuzz::fuzz(env!("CARGO_MANIFEST_DIR"), "page", words, |input| {
        let fd = memfd_create("page", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
        // The first byte says how the file is made; the rest fills it.
        let (how, content) = input.split_first().map_or((0, &[][..]), |(how, content)| (*how, content));
        ftruncate(&fd, if how & 1 == 0 { PAGE_LEN as u64 } else { content.len() as u64 }).unwrap();
        pwrite(fd.as_fd(), &content[..content.len().min(PAGE_LEN)], 0).unwrap();
        if how & 2 == 0 {
            fcntl_add_seals(&fd, SealFlags::SHRINK).unwrap();
        }
        let page = match map_page(&fd) {
            Ok(page) => page,
            Err(error) => return nvshare_fuzz::outcome(&error.to_string()),
        };
        let whose = (Identity { pid: 1, uid: 1, gid: 1 }, None);
        let client = Client::new(
            ClientId(1),
            whose,
            "fuzz".to_owned(),
            (Wish::new(1000, 0, 0), Rule::default()),
            Nanos(5),
            page,
        );
        assert!(client.uses(GPU, usize::from(how >> 4)));
        let before = client.activity(GPU, Nanos::SECOND, true);
        // It goes on writing.
        pwrite(fd.as_fd(), &content[content.len() / 2..content.len() / 2 + content.len().min(64) / 2], 64)
            .unwrap();
        let Some(after) = client.activity(GPU, Nanos(7), true) else { return 2 };
        assert!(before.is_some_and(|before| clamped(&before)) && clamped(&after), "{before:?} {after:?}");
        assert!(after.calls <= u64::MAX / 2 && after.idle_for <= Nanos(7));
        4 | u64::from(after.calls > 0) << 3
            | u64::from(after.waiting > 0) << 4
            | u64::from(after.idle_for == Nanos::ZERO) << 5
    });
}
