//! Handing the agent this process's descriptors of `/dev/nvidia-uvm`, on which it can count faults.
//!
//! The driver opens the device on its own, perhaps late, perhaps more than once, and nothing says which descriptor
//! carries the address space. So every one is offered, and the agent keeps what works.

use std::os::fd::RawFd;

use nvshare_wire::ClientMessage;

use super::link::{Ended, Link};

/// File name of the device. The directory differs in tests and in some containers.
const DEVICE: &str = "nvidia-uvm";
/// How often to look again after a GPU came into use: from 50 ms on, and up to some seconds later.
const LOOKS: u8 = 12;

/// What was sent in this session.
#[derive(Debug, Default)]
pub(super) struct Sent {
    descriptors: Vec<RawFd>,
    looks_left: u8,
}

impl Sent {
    /// Begins to look for further descriptors.
    pub(super) fn look_again(&mut self) {
        self.looks_left = LOOKS;
    }

    /// Sends what is there and was not sent yet.
    pub(super) fn send_new(&mut self, link: &mut Link) -> Result<(), Ended> {
        let Some(left) = self.looks_left.checked_sub(1) else { return Ok(()) };
        self.looks_left = left;
        let open = find();
        self.descriptors.retain(|descriptor| open.contains(descriptor));
        for descriptor in open {
            if self.descriptors.contains(&descriptor) {
                continue;
            }
            match link.send(&ClientMessage::UvmDescriptor, Some(descriptor)) {
                Ok(()) => self.descriptors.push(descriptor),
                // Closed by the program since it was found.
                Err(Ended::Io(error)) if error.raw_os_error() == Some(libc::EBADF) => {}
                Err(ended) => return Err(ended),
            }
        }
        Ok(())
    }
}

fn find() -> Vec<RawFd> {
    let Ok(entries) = std::fs::read_dir("/proc/self/fd") else { return Vec::new() };
    entries
        .flatten()
        .filter(|entry| {
            std::fs::read_link(entry.path())
                .is_ok_and(|target| target.file_name().is_some_and(|name| name == DEVICE))
        })
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .collect()
}
