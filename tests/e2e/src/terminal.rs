//! A real terminal: a program on a pseudo-terminal, and what it has drawn.

use std::{
    fmt::Write as _,
    fs::File,
    io::{Read as _, Write as _},
    num::NonZeroU16,
    os::{
        fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
        unix::process::CommandExt as _,
    },
    process::{Child, Command, ExitStatus},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, bail};

use crate::process::wait_until;

/// A program on a terminal of its own; dropped, it is killed.
pub struct Terminal {
    child: Child,
    keyboard: File,
    /// The program's side, kept to look at its settings when the program has ended.
    settings: OwnedFd,
    before: Settings,
    screen: Arc<Mutex<vt100::Parser>>,
}

/// What a program may change about a terminal and must put back: input, output and line flags.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Settings {
    flags: [libc::tcflag_t; 3],
}

impl Settings {
    fn of(terminal: &OwnedFd) -> Result<Self> {
        // SAFETY: an all-zero termios is a value to be written over.
        let mut now: libc::termios = unsafe { std::mem::zeroed() };
        // SAFETY: `now` is valid for writes.
        if unsafe { libc::tcgetattr(terminal.as_raw_fd(), &raw mut now) } != 0 {
            bail!("tcgetattr: {}", std::io::Error::last_os_error());
        }
        Ok(Self { flags: [now.c_iflag, now.c_oflag, now.c_lflag] })
    }
}

/// Rows and columns, of which there must be some.
fn size(columns: u16, rows: u16) -> Result<(NonZeroU16, NonZeroU16)> {
    NonZeroU16::new(rows).zip(NonZeroU16::new(columns)).context("a terminal without a size")
}

fn open(columns: u16, rows: u16) -> Result<(OwnedFd, OwnedFd)> {
    let (mut ours, mut theirs) = (-1, -1);
    let size = libc::winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: both descriptors are valid for writes, the size is read, and no name or settings are asked for.
    let code = unsafe {
        libc::openpty(&raw mut ours, &raw mut theirs, std::ptr::null_mut(), std::ptr::null(), &raw const size)
    };
    if code != 0 {
        bail!("openpty: {}", std::io::Error::last_os_error());
    }
    // SAFETY: both were just opened and belong to nobody else.
    let (ours, theirs) = unsafe { (OwnedFd::from_raw_fd(ours), OwnedFd::from_raw_fd(theirs)) };
    for fd in [&ours, &theirs] {
        // SAFETY: sets a flag of an open descriptor.
        unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETFD, libc::FD_CLOEXEC) };
    }
    Ok((ours, theirs))
}

impl Terminal {
    /// Starts `command` with a terminal of this size as its controlling terminal.
    pub fn start(command: &mut Command, columns: u16, rows: u16) -> Result<Self> {
        let (ours, theirs) = open(columns, rows)?;
        let before = Settings::of(&theirs)?;
        command.stdin(theirs.try_clone()?).stdout(theirs.try_clone()?).stderr(theirs.try_clone()?);
        command.env("TERM", "xterm-256color");
        // SAFETY: only async-signal-safe calls between fork and exec.
        unsafe {
            command.pre_exec(|| {
                if libc::setsid() < 0 || libc::ioctl(0, libc::TIOCSCTTY, 0) < 0 {
                    return Err(std::io::Error::last_os_error());
                }
                Ok(())
            });
        }
        let child =
            command.spawn().with_context(|| format!("starting {}", command.get_program().display()))?;
        let (high, wide) = size(columns, rows)?;
        let screen = Arc::new(Mutex::new(vt100::Parser::new(high, wide, 0)));
        let mut output = File::from(ours.try_clone()?);
        let parser = Arc::clone(&screen);
        thread::spawn(move || {
            let mut bytes = [0; 4096];
            while let Ok(count @ 1..) = output.read(&mut bytes) {
                parser.lock().unwrap_or_else(PoisonError::into_inner).process(&bytes[..count]);
            }
        });
        Ok(Self { child, keyboard: File::from(ours), settings: theirs, before, screen })
    }

    fn lock(&self) -> MutexGuard<'_, vt100::Parser> {
        self.screen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What is on the screen.
    pub fn screen(&self) -> vt100::Screen {
        self.lock().screen().clone()
    }

    /// The screen's text.
    pub fn text(&self) -> String {
        self.screen().contents()
    }

    /// Waits until the screen's text is as wanted.
    pub fn wait_for(&self, what: &str, within: Duration, wanted: impl Fn(&str) -> bool) -> Result<String> {
        wait_until(what, within, || {
            let text = self.text();
            Ok(wanted(&text).then_some(text))
        })
        .with_context(|| format!("the screen:\n{}", self.text()))
    }

    /// Presses keys.
    pub fn press(&mut self, keys: &str) -> Result<()> {
        self.keyboard.write_all(keys.as_bytes()).context("typing")
    }

    /// Changes the size, as a user who drags the window.
    pub fn resize(&mut self, columns: u16, rows: u16) -> Result<()> {
        let (high, wide) = size(columns, rows)?;
        self.lock().screen_mut().set_size(high, wide);
        let size = libc::winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
        // SAFETY: the size is read.
        if unsafe { libc::ioctl(self.keyboard.as_raw_fd(), libc::TIOCSWINSZ, &raw const size) } != 0 {
            bail!("TIOCSWINSZ: {}", std::io::Error::last_os_error());
        }
        Ok(())
    }

    /// Sends a signal to the program.
    pub fn signal(&self, signal: libc::c_int) {
        // SAFETY: the child is not reaped while this handle lives.
        unsafe { libc::kill(self.child.id() as libc::pid_t, signal) };
    }

    /// Waits for the end.
    pub fn wait(&mut self, within: Duration) -> Result<ExitStatus> {
        let child = &mut self.child;
        wait_until("the program to end", within, || Ok(child.try_wait()?))
    }

    /// Whether the terminal is as it was before the program: its settings, its screen, its cursor.
    pub fn is_restored(&self) -> Result<bool> {
        let screen = self.screen();
        Ok(Settings::of(&self.settings)? == self.before
            && !screen.alternate_screen()
            && !screen.hide_cursor())
    }

    /// Waits until it is: the last of what the program wrote may come after its end.
    pub fn wait_until_restored(&self, within: Duration) -> Result<()> {
        wait_until("the terminal to be given back", within, || Ok(self.is_restored()?.then_some(())))
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        // It may have ended already.
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

/// The screen as a picture: one `text` element for each run of cells of one style.
pub fn to_svg(screen: &vt100::Screen) -> String {
    const CELL: (f64, f64) = (8.4, 18.0);
    const EDGE: f64 = 12.0;
    let (rows, columns) = screen.size();
    let (rows, columns) = (rows.get(), columns.get());
    let (width, height) = (f64::from(columns) * CELL.0 + 2.0 * EDGE, f64::from(rows) * CELL.1 + 2.0 * EDGE);
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width:.0}\" height=\"{height:.0}\" \
         font-family=\"'DejaVu Sans Mono', monospace\" font-size=\"14\">\
         <rect width=\"100%\" height=\"100%\" rx=\"8\" fill=\"#14181d\"/>"
    );
    let style = |row, column| {
        screen.cell(row, column).map(|cell| (cell.bold(), cell.inverse(), cell.underline(), cell.dim()))
    };
    for row in 0..rows {
        let mut column = 0;
        while column < columns {
            let begin = column;
            let of = style(row, begin);
            let mut text = String::new();
            while column < columns && style(row, column) == of {
                match screen.cell(row, column).filter(|cell| cell.has_contents()) {
                    Some(cell) => text.push_str(cell.contents()),
                    None => text.push(' '),
                }
                column += 1;
            }
            let (bold, inverse, underline, dim) = of.unwrap_or_default();
            let (x, y) = (EDGE + f64::from(begin) * CELL.0, EDGE + f64::from(row) * CELL.1);
            let length = f64::from(column - begin) * CELL.0;
            if inverse {
                let _ = write!(
                    svg,
                    "<rect x=\"{x:.1}\" y=\"{y:.1}\" width=\"{length:.1}\" height=\"{}\" fill=\"#dfe5ec\"/>",
                    CELL.1
                );
            }
            if underline {
                let below = y + CELL.1 - 1.0;
                let _ = write!(
                    svg,
                    "<path d=\"M{x:.1} {below:.1}h{length:.1}\" stroke=\"#8b97a5\" stroke-width=\"1\"/>"
                );
            }
            if text.trim().is_empty() {
                continue;
            }
            let escaped = text.replace('&', "&amp;").replace('<', "&lt;");
            let _ = write!(
                svg,
                "<text x=\"{x:.1}\" y=\"{:.1}\" xml:space=\"preserve\" textLength=\"{length:.1}\" \
                 lengthAdjust=\"spacingAndGlyphs\" fill=\"{}\"{}>{escaped}</text>",
                y + 13.5,
                if inverse {
                    "#14181d"
                } else if dim {
                    "#8b97a5"
                } else {
                    "#dfe5ec"
                },
                if bold { " font-weight=\"bold\"" } else { "" },
            );
        }
    }
    svg + "</svg>"
}
