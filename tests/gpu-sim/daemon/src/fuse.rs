//! `SIM/dev`: the driver's device files, served over FUSE.
//!
//! The driver's ioctls are bare numbers without a size, so the kernel passes only the pointer on; the simulator reads and
//! writes the caller's memory itself. That needs nothing of libfuse, and so the kernel's protocol is spoken directly.
//!
//! Invariants: the thread that reads requests never waits for another request. Whatever does has a thread of its own.

mod protocol;

use std::{
    ffi::CString,
    fs::File,
    io::{self, Read as _, Write as _},
    os::{fd::AsRawFd as _, unix::ffi::OsStrExt as _, unix::fs::MetadataExt as _},
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
};

use nvshare_abi::uvm::DriverVersion;
use protocol::{BUFFER, Body, Opcode, Request, attributes, init, reply};

use crate::{
    remote,
    tools::{self, Call, Device},
    world::{FileHandle, World},
};

const ROOT: u64 = 1;
const UVM: u64 = 2;
const TOOLS: u64 = 3;
/// The names in the directory.
const NAMES: [(&str, u64); 2] = [("nvidia-uvm", UVM), ("nvidia-uvm-tools", TOOLS)];
/// The kernel may keep names and attributes for good.
const FOREVER: u64 = 1 << 30;

/// The mounted directory; unmounted on drop.
#[derive(Debug)]
pub(crate) struct Mount(PathBuf);

impl Drop for Mount {
    fn drop(&mut self) {
        detach(&self.0);
    }
}

/// Unmounts what is mounted there, at once or when its last user goes. False if nothing was.
pub(crate) fn detach(dir: &Path) -> bool {
    let Ok(path) = CString::new(dir.as_os_str().as_bytes()) else { return false };
    // SAFETY: takes a string.
    unsafe { libc::umount2(path.as_ptr(), libc::MNT_DETACH) == 0 }
}

/// Mounts the device files on `dir` and serves them until the process ends.
pub(crate) fn mount(dir: &Path, world: Arc<Mutex<World>>, driver: DriverVersion) -> io::Result<Mount> {
    let device = File::options().read(true).write(true).open("/dev/fuse")?;
    // SAFETY: takes no arguments, cannot fail.
    let (uid, gid) = unsafe { (libc::geteuid(), libc::getegid()) };
    let options = format!(
        "fd={},rootmode=40755,user_id={uid},group_id={gid},allow_other,default_permissions",
        device.as_raw_fd()
    );
    let (path, options) = (CString::new(dir.as_os_str().as_bytes())?, CString::new(options)?);
    // SAFETY: four strings that live until the call returns; FUSE's data is a string.
    let mounted = unsafe {
        libc::mount(
            c"nvshare-gpu-sim".as_ptr(),
            path.as_ptr(),
            c"fuse".as_ptr(),
            libc::MS_NOSUID | libc::MS_NODEV,
            options.as_ptr().cast(),
        )
    };
    if mounted != 0 {
        return Err(io::Error::last_os_error());
    }
    let mount = Mount(dir.to_owned());
    let server = Server { fuse: Arc::new(device), world, driver, owner: (uid, gid), device: Arc::default() };
    let reader = server.clone();
    std::thread::Builder::new().name("fuse".to_owned()).spawn(move || reader.serve())?;
    // The device number tells our files from others'; asking for it is a request that the thread answers.
    let number = std::fs::metadata(dir)?.dev();
    server.device.store(number, std::sync::atomic::Ordering::Release);
    Ok(mount)
}

#[derive(Clone, Debug)]
struct Server {
    fuse: Arc<File>,
    world: Arc<Mutex<World>>,
    driver: DriverVersion,
    owner: (u32, u32),
    /// Number of the mounted filesystem, 0 until known.
    device: Arc<std::sync::atomic::AtomicU64>,
}

impl Server {
    fn serve(self) {
        let mut buffer = vec![0; BUFFER];
        let mut opened = 0;
        loop {
            let length = match (&*self.fuse).read(&mut buffer) {
                Ok(0) => return,
                Ok(length) => length,
                Err(error)
                    if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::EINTR | libc::EAGAIN)) =>
                {
                    continue;
                }
                // Unmounted.
                Err(_) => return,
            };
            if let Some(request) = Request::parse(&buffer[..length]) {
                self.handle(&request, &mut opened);
            }
        }
    }

    fn send(&self, unique: u64, answer: Result<Vec<u8>, i32>) {
        let bytes = match answer {
            Ok(body) => reply(unique, 0, &body),
            Err(error) => reply(unique, -error, &[]),
        };
        // A caller that was killed meanwhile takes no answer.
        drop((&*self.fuse).write(&bytes));
    }

    fn handle(&self, request: &Request<'_>, opened: &mut u64) {
        let answer = match request.opcode {
            Opcode::Forget | Opcode::BatchForget | Opcode::Interrupt => return,
            Opcode::Init => Ok(init()),
            Opcode::Lookup => self.lookup(request.name()),
            Opcode::GetAttr => Ok(self.get_attributes(request.node)),
            Opcode::Open => match device_of(request.node) {
                Some(_) => {
                    *opened += 1;
                    // Direct I/O: there are no pages to cache.
                    Ok(Body::default().u64(*opened).u32(1).u32(0).0)
                }
                None => Err(libc::EISDIR),
            },
            Opcode::OpenDir => Ok(Body::default().u64(0).u32(0).u32(0).0),
            Opcode::ReadDir => Ok(read_directory(request.u64(8))),
            Opcode::StatFs => Ok(vec![0; 80]),
            Opcode::Release => {
                if let Some(device) = device_of(request.node) {
                    tools::release(&self.world, device, FileHandle(request.u64(0)));
                }
                Ok(Vec::new())
            }
            Opcode::ReleaseDir | Opcode::Destroy => Ok(Vec::new()),
            Opcode::Ioctl => return self.ioctl(request),
            Opcode::Read => Err(libc::EINVAL),
            Opcode::Other => Err(libc::ENOSYS),
        };
        self.send(request.unique, answer);
    }

    fn lookup(&self, name: &[u8]) -> Result<Vec<u8>, i32> {
        let &(_, node) = NAMES.iter().find(|(known, _)| known.as_bytes() == name).ok_or(libc::ENOENT)?;
        let entry = Body::default().u64(node).u64(0).u64(FOREVER).u64(FOREVER).u32(0).u32(0);
        Ok(entry.bytes(&self.attributes(node)).0)
    }

    fn get_attributes(&self, node: u64) -> Vec<u8> {
        Body::default().u64(FOREVER).u32(0).u32(0).bytes(&self.attributes(node)).0
    }

    fn attributes(&self, node: u64) -> Vec<u8> {
        let mode = if node == ROOT { libc::S_IFDIR | 0o755 } else { libc::S_IFREG | 0o666 };
        attributes(node, mode, self.owner)
    }

    fn ioctl(&self, request: &Request<'_>) {
        let unique = request.unique;
        let (Some(device), Some(pid)) = (device_of(request.node), remote::process_of_thread(request.tid))
        else {
            return self.send(unique, Err(libc::ENOTTY));
        };
        let call = Call {
            device,
            file: FileHandle(request.u64(0)),
            pid,
            number: request.u32(12),
            argument: request.u64(16),
        };
        if !tools::waits_for_files(&call) {
            return self.finish_ioctl(unique, &call);
        }
        let server = self.clone();
        let spawned = std::thread::Builder::new()
            .name("ioctl".to_owned())
            .spawn(move || server.finish_ioctl(unique, &call));
        if spawned.is_err() {
            self.send(unique, Err(libc::EAGAIN));
        }
    }

    fn finish_ioctl(&self, unique: u64, call: &Call) {
        let device = self.device.load(std::sync::atomic::Ordering::Acquire);
        match tools::answer(&self.world, self.driver, device, call) {
            0 => self.send(unique, Ok(vec![0; 16])),
            error => self.send(unique, Err(-error)),
        }
    }
}

fn device_of(node: u64) -> Option<Device> {
    match node {
        UVM => Some(Device::Uvm),
        TOOLS => Some(Device::Tools),
        _ => None,
    }
}

fn read_directory(offset: u64) -> Vec<u8> {
    let mut body = Body::default();
    for (index, (name, node)) in NAMES.iter().enumerate().skip(offset as usize) {
        let padding = name.len().next_multiple_of(8) - name.len();
        body = body
            .u64(*node)
            .u64(index as u64 + 1)
            .u32(name.len() as u32)
            .u32(u32::from(libc::DT_REG))
            .bytes(name.as_bytes())
            .bytes(&vec![0; padding]);
    }
    body.0
}
