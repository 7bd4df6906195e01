//! A program on the simulated GPU: this very test executable, started again, doing as it is told line by line.

use std::{
    ffi::c_void,
    io::{BufRead as _, BufReader, Write as _},
    path::PathBuf,
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
    sync::atomic::{AtomicU64, Ordering},
};

use nvshare_abi::uvm::{Epoch, EventLayout};
use nvshare_gpu_sim_model::client::{Access, BLOCK_BYTES, EntryPoints, Location, Session, Work};

use crate::simulator::Simulator;

/// Names the simulator's directory to the program; its absence tells an ordinary test run.
const ROLE: &str = "NVSHARE_GPU_SIM_TEST_CLIENT";
/// Where the program's managed memory is; nothing needs to be there.
const BASE: u64 = 0x7000_0000_0000;

pub(crate) struct Client {
    process: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl Client {
    pub(crate) fn start(simulator: &Simulator) -> Self {
        let mut process = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "client::program", "--ignored", "--nocapture", "--quiet"])
            .env(ROLE, simulator.dir())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let input = process.stdin.take().unwrap();
        let output = BufReader::new(process.stdout.take().unwrap());
        let mut client = Self { process, input, output };
        assert_eq!(client.answer(), "connected");
        client
    }

    pub(crate) fn pid(&self) -> u32 {
        self.process.id()
    }

    /// Sends a command and waits for its answer.
    pub(crate) fn ask(&mut self, command: &str) -> String {
        self.say(command);
        self.answer()
    }

    /// Sends a command.
    pub(crate) fn say(&mut self, command: &str) {
        writeln!(self.input, "{command}").unwrap();
    }

    fn answer(&mut self) -> String {
        loop {
            let mut line = String::new();
            assert_ne!(self.output.read_line(&mut line).unwrap(), 0, "the program ended");
            // The test harness prints lines of its own.
            if let Some((_, answer)) = line.trim_end().split_once("> ") {
                return answer.to_owned();
            }
        }
    }

    pub(crate) fn stop(&self) {
        // SAFETY: takes numbers; the child has not been waited for.
        assert_eq!(unsafe { libc::kill(self.process.id() as i32, libc::SIGSTOP) }, 0);
    }

    pub(crate) fn kill(&mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        drop(self.process.kill());
        drop(self.process.wait());
    }
}

static MIGRATIONS: AtomicU64 = AtomicU64::new(0);
static FAULTS: AtomicU64 = AtomicU64::new(0);
static SPACES: AtomicU64 = AtomicU64::new(0);

extern "C" fn init_va_space_events(_va_space: *const c_void, _events: *const c_void) {
    SPACES.fetch_add(1, Ordering::Relaxed);
}

extern "C" fn event_notify(_events: *const c_void, event_id: u32, _data: *const c_void) {
    let layout = EventLayout::of_epoch(Epoch::E580);
    let counter = if event_id == layout.migration_id { &MIGRATIONS } else { &FAULTS };
    counter.fetch_add(1, Ordering::Relaxed);
}

#[test]
#[ignore = "the program that other tests start"]
fn program() {
    let Some(dir) = std::env::var_os(ROLE).map(PathBuf::from) else { return };
    let session = Session::connect_in(&dir, EntryPoints { init_va_space_events, event_notify }).unwrap();
    assert_eq!(SPACES.load(Ordering::Relaxed), 1);
    println!("> connected");
    let mut len = 0;
    for line in std::io::stdin().lines() {
        let line = line.unwrap();
        let (command, number) = line.split_once(' ').unwrap_or((&line, "0"));
        let number: u64 = number.parse().unwrap();
        let sweep = Work { ranges: vec![Access { base: BASE, len, write: true }], compute_ns: number * 1000 };
        match command {
            "managed" => {
                len = number * BLOCK_BYTES;
                session.register_managed(BASE, len).unwrap();
            }
            "sweep" => session.run_kernel(0, &sweep).unwrap(),
            "loop" => loop {
                session.run_kernel(0, &sweep).unwrap();
            },
            "push-out" => session.prefetch(BASE, len, Location::Cpu).unwrap(),
            "touch" => session.touch_cpu(BASE, len).unwrap(),
            _ => panic!("unknown command {line}"),
        }
        let (migrations, faults) = (MIGRATIONS.load(Ordering::Relaxed), FAULTS.load(Ordering::Relaxed));
        println!("> {migrations} migrations {faults} faults");
    }
}
