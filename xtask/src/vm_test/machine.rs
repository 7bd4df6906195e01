//! The virtual machine: started, listened to, and ended.

use std::{
    io::{BufRead as _, BufReader},
    path::Path,
    process::{Child, Command, Stdio},
    sync::mpsc::{self, RecvTimeoutError},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};

use crate::cargo::shown;

/// It takes a sixth of this on two idle cores.
const LIMIT: Duration = Duration::from_mins(4);
/// What the tests say begins with this.
const PREFIX: &str = "vm-test: ";
/// What a kernel says when it is broken.
const BROKEN: [&str; 4] = ["Kernel panic", "Oops:", "BUG:", "general protection fault"];

/// Ends the machine when the caller is done with it, whatever the reason.
struct Machine(Child);

impl Drop for Machine {
    fn drop(&mut self) {
        // Fails only for a machine that has ended by itself.
        let _ended = self.0.kill();
        let _status = self.0.wait();
    }
}

/// Boots the kernel and passes on what its first process says.
pub(super) fn run(kernel: &Path, initramfs: &Path) -> Result<()> {
    let mut command = Command::new("qemu-system-x86_64");
    // Emulated everywhere, so that it needs no KVM and is the same on every machine. One thread emulates both
    // processors in turn: with a thread for each, one can still run the breakpoint that the other has patched away
    // (static keys and kprobes are patched that way), and the kernel dies of an `int3` that it knows nothing of.
    command.args(["-accel", "tcg,thread=single", "-smp", "2", "-m", "1024", "-no-reboot"]);
    // The emulation of the 16-byte compare-and-exchange is wrong in QEMU 7.2, and newer kernels allocate with it.
    command.args(["-cpu", "qemu64,-cx16"]);
    // Two nodes of memory, between which the driver can move pages without a GPU.
    for node in ["0", "1"] {
        command.args(["-object", &format!("memory-backend-ram,id=memory{node},size=512M")]);
        command.args(["-numa", &format!("node,nodeid={node},memdev=memory{node},cpus={node}")]);
    }
    command.args(["-display", "none", "-monitor", "none", "-nic", "none", "-serial", "stdio"]);
    command.arg("-kernel").arg(kernel).arg("-initrd").arg(initramfs);
    command.args(["-append", "console=ttyS0 quiet panic=-1 oops=panic"]);
    eprintln!("+ {}", shown(&command));
    let begin = Instant::now();
    let mut machine = Machine(
        command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().context("starting qemu-system-x86_64")?,
    );
    let output = machine.0.stdout.take().context("the machine has no console")?;
    let (line_tx, line_rx) = mpsc::channel();
    std::thread::spawn(move || {
        for line in BufReader::new(output).split(b'\n').map_while(Result::ok) {
            if line_tx.send(String::from_utf8_lossy(&line).trim_end().to_owned()).is_err() {
                return;
            }
        }
    });
    let mut console = Vec::new();
    let ended = loop {
        match line_rx.recv_timeout(LIMIT.saturating_sub(begin.elapsed())) {
            Ok(line) => {
                // The firmware leaves control codes before the first line.
                if let Some((_, said)) = line.split_once(PREFIX) {
                    println!("{PREFIX}{said}");
                }
                console.push(line);
            }
            Err(RecvTimeoutError::Disconnected) => break "it was switched off".to_owned(),
            Err(RecvTimeoutError::Timeout) => break format!("it did not end in {} s", LIMIT.as_secs()),
        }
    };
    drop(machine);
    verdict(&console).map_err(|problem| {
        let last = console.iter().rev().take(80).rev().cloned().collect::<Vec<_>>().join("\n");
        anyhow::anyhow!(
            "the virtual machine's tests failed: {problem} ({ended}). The end of its console:\n{last}"
        )
    })?;
    println!("the virtual machine took {:.0} s", begin.elapsed().as_secs_f64());
    Ok(())
}

/// A success is a last line that counts at least one test, from a kernel in order.
fn verdict(console: &[String]) -> Result<()> {
    if let Some(line) = console.iter().find(|line| BROKEN.iter().any(|broken| line.contains(broken))) {
        bail!("the kernel broke: {line}");
    }
    let mut said = console.iter().filter_map(|line| Some(line.split_once(PREFIX)?.1));
    let Some(last) = said.next_back() else {
        bail!("its first process said nothing");
    };
    match last.strip_suffix(" passed").map(str::parse::<u32>) {
        Some(Ok(1..)) => Ok(()),
        _ => bail!("the last word is `{last}`"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn console(lines: &[&str]) -> Result<()> {
        verdict(&lines.iter().map(|&line| line.to_owned()).collect::<Vec<_>>())
    }

    #[test]
    fn only_a_count_of_passed_tests_as_the_last_word_is_a_success() {
        console(&["vm-test: ok a", "vm-test: 2 passed", "reboot: Power down"]).unwrap();
        for bad in [
            &["vm-test: ok a"][..],
            &["vm-test: 0 passed"],
            &["vm-test: 2 passed", "vm-test: FAILED to switch off"],
            &["vm-test: FAILED 1 of 2"],
            &["BUG: unable to handle page fault", "vm-test: 2 passed"],
            &[],
        ] {
            console(bad).unwrap_err();
        }
    }
}
