//! `nvsharectl top`: the live picture in a terminal.
//!
//! What is drawn is a function of a [`model::Model`] alone; this file asks the agent, reads keys, and gives the
//! terminal back in whatever way it ends.

pub mod draw;
pub mod model;
mod spark;

use std::{
    io::{self, IsTerminal as _, Write as _},
    path::Path,
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use nvshare_core::Nanos;
use ratatui::crossterm::event::{self, Event, KeyCode, KeyEvent, KeyEventKind, KeyModifiers};

use self::model::{Action, Link, Model};
use super::{
    cli::TopArgs,
    connection::{Connection, CtlError},
};
use crate::{clock, operator::protocol::Request};

/// How soon a signal is noticed.
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// Columns of a picture that goes to a pipe, unless COLUMNS says otherwise.
const PIPE_WIDTH: u16 = 100;

/// Why there is no picture.
#[derive(Debug, thiserror::Error)]
pub enum TopError {
    /// The agent cannot be reached.
    #[error(transparent)]
    Ctl(#[from] CtlError),
    /// Another version.
    #[error(transparent)]
    Answer(#[from] serde_json::Error),
    /// The terminal.
    #[error("cannot draw: {0}")]
    Print(#[from] io::Error),
    /// There is no terminal.
    #[error("top needs a terminal; for a pipe there is `nvsharectl top --once`, or --json")]
    NoTerminal,
}

/// Shows the picture until the user, or a signal, ends it.
pub fn run(mut agent: Connection, run_dir: &Path, args: &TopArgs, stop: &AtomicBool) -> Result<(), TopError> {
    if args.format.json {
        return print_json(&mut agent, args, stop);
    }
    let mut model = Model::new(args.sort);
    model.see(serde_json::from_value(agent.ask(&Request::Overview {})?)?);
    if args.once {
        let width = std::env::var("COLUMNS").ok().and_then(|text| text.parse().ok()).unwrap_or(PIPE_WIDTH);
        io::stdout().lock().write_all(draw::plain(&model, width).as_bytes())?;
        return Ok(());
    }
    if !io::stdout().is_terminal() || !io::stdin().is_terminal() {
        return Err(TopError::NoTerminal);
    }
    // Also on a panic the terminal is given back, before its message is printed.
    let mut terminal = ratatui::try_init()?;
    let ended = live(&mut terminal, Some(agent), run_dir, model, args, stop);
    ratatui::try_restore()?;
    ended
}

fn print_json(agent: &mut Connection, args: &TopArgs, stop: &AtomicBool) -> Result<(), TopError> {
    loop {
        let overview = agent.ask(&Request::Overview {})?;
        let mut out = io::stdout().lock();
        writeln!(out, "{overview}")?;
        out.flush()?;
        drop(out);
        let next = clock::now() + args.every;
        while !args.once && !stop.load(Ordering::Relaxed) && clock::now() < next {
            std::thread::sleep(LOOK_EVERY.min(Duration::from_nanos(next.since(clock::now()).0)));
        }
        if args.once || stop.load(Ordering::Relaxed) {
            return Ok(());
        }
    }
}

fn live(
    terminal: &mut ratatui::DefaultTerminal,
    mut agent: Option<Connection>,
    run_dir: &Path,
    mut model: Model,
    args: &TopArgs,
    stop: &AtomicBool,
) -> Result<(), TopError> {
    let mut next = clock::now() + args.every;
    loop {
        terminal.draw(|frame| {
            let area = frame.area();
            draw::screen(&mut model, area, frame.buffer_mut());
        })?;
        loop {
            if stop.load(Ordering::Relaxed) {
                return Ok(());
            }
            let left = Duration::from_nanos(next.since(clock::now()).0);
            if event::poll(left.min(LOOK_EVERY))? {
                match event::read()? {
                    Event::Key(key) if key.kind != KeyEventKind::Release => match model.act(action(key)) {
                        model::Wants::Quit => return Ok(()),
                        model::Wants::Draw => break,
                        model::Wants::Nothing => {}
                    },
                    Event::Resize(..) => break,
                    _ => {}
                }
            } else if left.is_zero() {
                next = (next + args.every).max(clock::now() + Nanos::millis(50));
                if !model.is_paused() {
                    look(&mut agent, run_dir, &mut model)?;
                    break;
                }
            }
        }
    }
}

/// Asks the agent; one that has gone is looked for again.
fn look(agent: &mut Option<Connection>, run_dir: &Path, model: &mut Model) -> Result<(), TopError> {
    let asked = match agent {
        Some(connection) => connection.ask(&Request::Overview {}),
        None => Connection::open(run_dir).and_then(|mut connection| {
            let answer = connection.ask(&Request::Overview {});
            *agent = Some(connection);
            answer
        }),
    };
    match asked {
        Ok(answer) => model.see(serde_json::from_value(answer)?),
        Err(error) => {
            *agent = None;
            model.lose(Link::Lost(error.to_string()));
        }
    }
    Ok(())
}

fn action(key: KeyEvent) -> Action {
    match key.code {
        KeyCode::Char('c' | 'd') if key.modifiers.contains(KeyModifiers::CONTROL) => Action::Quit,
        KeyCode::Char('q') | KeyCode::Esc => Action::Quit,
        KeyCode::Char('?' | 'h') | KeyCode::F(1) => Action::Help,
        KeyCode::Char('s') => Action::Sort,
        KeyCode::Char('p' | ' ') => Action::Pause,
        KeyCode::Down | KeyCode::Char('j') => Action::Scroll(1),
        KeyCode::Up | KeyCode::Char('k') => Action::Scroll(-1),
        KeyCode::PageDown => Action::Scroll(10),
        KeyCode::PageUp => Action::Scroll(-10),
        KeyCode::Home => Action::Scroll(i32::MIN),
        KeyCode::End => Action::Scroll(i32::MAX),
        _ => Action::Nothing,
    }
}
