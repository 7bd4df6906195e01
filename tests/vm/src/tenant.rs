//! Other processes that own VA spaces: this program again, which begins a space and ends it when told.

use std::{
    io::{BufRead as _, BufReader, Read as _, Write as _},
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
};

use crate::{driver::Space, stand_in};

const ASKED: &str = "tenant";
/// In the place of a stand-in's space: one of the driver's own.
const OF_DRIVER: &str = "driver";

/// The space that this process is asked to own, if it is a tenant.
pub(crate) fn asked() -> Option<String> {
    let mut words = std::env::args().skip(1);
    (words.next()? == ASKED).then_some(())?;
    words.next()
}

/// The tenant's side: a space, ended on the first line, the process on the end of input.
pub(crate) fn run(asked: &str) {
    if asked == OF_DRIVER {
        let space = Space::begin();
        println!("begun {}", space.events());
        if told() {
            drop(space);
            wait_in_vain();
        }
    } else {
        let events = asked.parse().unwrap();
        let commands = stand_in::commands().unwrap();
        stand_in::begin_space(&commands, events).unwrap();
        println!("begun {events}");
        if told() {
            stand_in::end_space(&commands, events).unwrap();
            drop(commands);
            wait_in_vain();
        }
    }
}

fn told() -> bool {
    std::io::stdin().lock().read_line(&mut String::new()).unwrap() > 0
}

/// Alive until the other side lets go.
fn wait_in_vain() {
    println!("ended");
    std::io::stdin().lock().read_to_end(&mut Vec::new()).unwrap();
}

/// A process with a space.
pub(crate) struct Tenant {
    pub(crate) pid: u32,
    pub(crate) space: u64,
    child: Child,
    commands: ChildStdin,
    answers: BufReader<ChildStdout>,
}

impl Tenant {
    /// With a space of the stand-in.
    pub(crate) fn begin(events: u64) -> Self {
        let tenant = Self::start(&events.to_string());
        assert_eq!(tenant.space, events);
        tenant
    }

    /// With a space of the driver.
    pub(crate) fn begin_driver() -> Self {
        Self::start(OF_DRIVER)
    }

    fn start(space: &str) -> Self {
        let mut child = Command::new("/proc/self/exe")
            .args([ASKED, space])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let (commands, answers) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
        let mut tenant =
            Self { pid: child.id(), space: 0, child, commands, answers: BufReader::new(answers) };
        let answer = tenant.answer();
        tenant.space = answer.strip_prefix("begun ").expect("a space").parse().unwrap();
        tenant
    }

    /// Ends the space; the process lives on.
    pub(crate) fn end(&mut self) {
        writeln!(self.commands, "end").unwrap();
        assert_eq!(self.answer(), "ended");
    }

    fn answer(&mut self) -> String {
        let mut line = String::new();
        self.answers.read_line(&mut line).unwrap();
        line.trim_end().to_owned()
    }
}

impl Drop for Tenant {
    fn drop(&mut self) {
        // Fails only for a process that has ended.
        let _gone = self.child.kill();
        let _status = self.child.wait();
    }
}
