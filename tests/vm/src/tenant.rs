//! Other processes that own VA spaces: this program again, which begins a space and ends it when told.

use std::{
    io::{BufRead as _, BufReader, Read as _, Write as _},
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
};

use crate::module;

const ASKED: &str = "tenant";

/// The space that this process is asked to own, if it is a tenant.
pub(crate) fn asked() -> Option<u64> {
    let mut words = std::env::args().skip(1);
    (words.next()? == ASKED).then_some(())?;
    words.next()?.parse().ok()
}

/// The tenant's side: a space, ended on the first line, the process on the end of input.
pub(crate) fn run(events: u64) {
    let commands = module::commands().unwrap();
    module::begin_space(&commands, events).unwrap();
    println!("begun");
    let mut line = String::new();
    if std::io::stdin().lock().read_line(&mut line).unwrap() > 0 {
        module::end_space(&commands, events).unwrap();
        drop(commands);
        println!("ended");
        // Alive until the other side lets go.
        std::io::stdin().lock().read_to_end(&mut Vec::new()).unwrap();
    }
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
    pub(crate) fn begin(events: u64) -> Self {
        let mut child = Command::new("/proc/self/exe")
            .args([ASKED, &events.to_string()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let (commands, answers) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
        let mut tenant =
            Self { pid: child.id(), space: events, child, commands, answers: BufReader::new(answers) };
        tenant.expect("begun");
        tenant
    }

    /// Ends the space; the process lives on.
    pub(crate) fn end(&mut self) {
        writeln!(self.commands, "end").unwrap();
        self.expect("ended");
    }

    fn expect(&mut self, answer: &str) {
        let mut line = String::new();
        self.answers.read_line(&mut line).unwrap();
        assert_eq!(line.trim_end(), answer);
    }
}

impl Drop for Tenant {
    fn drop(&mut self) {
        // Fails only for a process that has ended.
        let _gone = self.child.kill();
        let _status = self.child.wait();
    }
}
