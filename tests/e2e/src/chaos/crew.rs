//! The programs: real processes under the real shim, which check every word of their result.

use std::{
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::Result;
use serde::Serialize;

use super::{CARDS, dice::Dice};
use crate::{Binaries, Simulator, Workload, WorkloadOptions};

/// Programs that live as long as the run: what the shim holds must not grow in them.
const VETERANS: usize = 2;

/// How the programs fared.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Tally {
    /// Processes started.
    pub started: u64,
    /// Ended by themselves with every word right.
    pub right: u64,
    /// Killed by the script.
    pub killed: u64,
    /// Ended with the driver's own error after their card was lost.
    pub lost_with_card: u64,
    /// The longest that a program went without finishing a sweep while nobody held it, in seconds.
    pub longest_gap_s: f64,
}

/// A place that a program has, and its successor after it.
struct Place {
    program: Option<Workload>,
    generation: u64,
    started: Instant,
    killed: bool,
    stopped_until: Option<Instant>,
    /// Length of the progress file, and since when; time in which something held the program does not count.
    progress: (u64, Instant),
    is_veteran: bool,
}

/// All programs.
pub(super) struct Crew<'a> {
    binaries: &'a Binaries,
    simulator: &'a Simulator,
    run_dir: PathBuf,
    dir: PathBuf,
    seed: u64,
    /// The longest that a program may go without progress.
    bound: Duration,
    places: Vec<Place>,
    /// When each card was lost, and when it was back.
    losses: Vec<(usize, Instant, Option<Instant>)>,
    /// Until when each card's link has errors.
    slow_until: [Instant; CARDS],
    looked: Instant,
    /// Wrong results, foreign errors and hangs.
    pub(super) violations: Vec<String>,
    pub(super) tally: Tally,
}

impl<'a> Crew<'a> {
    pub(super) fn new(
        (binaries, simulator): (&'a Binaries, &'a Simulator),
        (dir, run_dir): (&Path, &Path),
        (seed, programs, bound): (u64, usize, Duration),
    ) -> Self {
        let place = |index| Place {
            program: None,
            generation: 0,
            started: Instant::now(),
            killed: false,
            stopped_until: None,
            progress: (0, Instant::now()),
            is_veteran: index < VETERANS,
        };
        Self {
            binaries,
            simulator,
            run_dir: run_dir.to_owned(),
            dir: dir.to_owned(),
            seed,
            bound,
            places: (0..programs).map(place).collect(),
            losses: Vec::new(),
            slow_until: [Instant::now(); CARDS],
            looked: Instant::now(),
            violations: Vec::new(),
            tally: Tally::default(),
        }
    }

    fn stop_file(&self) -> PathBuf {
        self.dir.join("stop")
    }

    /// Starts a program at each empty place.
    pub(super) fn fill(&mut self) -> Result<()> {
        for index in 0..self.places.len() {
            // What starts on a lost card ends at once.
            let is_lost = self.losses.iter().any(|loss| loss.0 == index % CARDS && loss.2.is_none());
            if self.places[index].program.is_none() && !is_lost {
                self.start(index)?;
            }
        }
        Ok(())
    }

    fn start(&mut self, index: usize) -> Result<()> {
        let place = &mut self.places[index];
        place.generation += 1;
        let mut dice = Dice::new(self.seed ^ (index as u64) << 32 ^ place.generation);
        let work = if place.is_veteran { 3_600_000 } else { dice.between(100, 1500) };
        let options = WorkloadOptions {
            name: format!("p{index:02}-{}", place.generation),
            memory: format!("{}MiB", dice.between(4, 12)),
            gpu_work: format!("{work}ms"),
            sweep_time: format!("{}ms", dice.between(2, 6)),
            extra: vec![
                "--gpu".to_owned(),
                (index % CARDS).to_string(),
                "--duty".to_owned(),
                dice.pick(&["0.3", "0.7", "1"]).to_string(),
                "--stop-file".to_owned(),
                self.dir.join("stop").display().to_string(),
            ],
        };
        let program =
            Workload::start(self.binaries, self.simulator, Some(&self.run_dir), &self.dir, &options)?;
        place.program = Some(program);
        place.started = Instant::now();
        place.killed = false;
        place.stopped_until = None;
        place.progress = (0, Instant::now());
        self.tally.started += 1;
        Ok(())
    }

    /// Kills the program at a place. Veterans are spared.
    pub(super) fn kill(&mut self, index: usize) {
        let place = &mut self.places[index];
        if let Some(program) = place.program.as_mut().filter(|_| !place.is_veteran) {
            place.killed = true;
            program.process().signal(libc::SIGKILL);
        }
    }

    /// Stops the program at a place.
    pub(super) fn stop(&mut self, index: usize, until: Instant) {
        let place = &mut self.places[index];
        if let Some(program) = &mut place.program {
            program.process().signal(libc::SIGSTOP);
            place.stopped_until = Some(place.stopped_until.map_or(until, |earlier| earlier.max(until)));
        }
    }

    /// A card is lost, or is back.
    pub(super) fn card_lost(&mut self, card: usize, lost: bool) {
        if lost {
            self.losses.push((card, Instant::now(), None));
        } else if let Some(loss) = self.losses.iter_mut().rev().find(|loss| loss.0 == card) {
            loss.2.get_or_insert(Instant::now());
        }
    }

    /// A card's link has errors.
    pub(super) fn link_slow(&mut self, card: usize, until: Instant) {
        self.slow_until[card] = self.slow_until[card].max(until);
    }

    /// Whether the card was lost at some time since `since`.
    fn was_lost(&self, card: usize, since: Instant) -> bool {
        self.losses.iter().any(|&(lost, _, back)| lost == card && back.is_none_or(|back| back >= since))
    }

    /// Process ids of the programs that live as long as the run.
    pub(super) fn veterans(&mut self) -> Vec<u32> {
        let veterans = self.places.iter_mut().filter(|place| place.is_veteran);
        veterans.filter_map(|place| Some(place.program.as_mut()?.process().id())).collect()
    }

    /// Lets those go on whose time has come, takes note of ends and of progress.
    pub(super) fn look(&mut self) {
        let now = Instant::now();
        let passed = now.duration_since(std::mem::replace(&mut self.looked, now));
        for index in 0..self.places.len() {
            self.look_at(index, passed);
        }
    }

    fn look_at(&mut self, index: usize, passed: Duration) {
        let (now, card) = (Instant::now(), index % CARDS);
        let is_lost = self.losses.iter().any(|loss| loss.0 == card && loss.2.is_none());
        let is_disturbed = is_lost || now < self.slow_until[card];
        let place = &mut self.places[index];
        let Some(program) = &mut place.program else { return };
        if place.stopped_until.is_some() || is_disturbed {
            place.progress.1 += passed;
        }
        if place.stopped_until.is_some_and(|until| now >= until) {
            program.process().signal(libc::SIGCONT);
            place.stopped_until = None;
        }
        match program.process().finished() {
            Ok(None) => self.note_progress(index),
            Ok(Some(_)) => self.ended(index),
            Err(error) => self.violations.push(format!("program {index}: {error:#}")),
        }
    }

    fn note_progress(&mut self, index: usize) {
        let place = &mut self.places[index];
        let gap = Instant::now().saturating_duration_since(place.progress.1);
        let Some(program) = &mut place.program else { return };
        let length = std::fs::metadata(program.progress_file()).map_or(0, |data| data.len());
        self.tally.longest_gap_s = self.tally.longest_gap_s.max(gap.as_secs_f64());
        if length != place.progress.0 {
            place.progress = (length, Instant::now());
        } else if gap > self.bound {
            let name = program.name().to_owned();
            let log = why(&program.process().log());
            self.violations.push(format!("{name} made no progress for {:?}: {log}", self.bound));
            place.killed = true;
            program.process().signal(libc::SIGKILL);
        }
    }

    fn ended(&mut self, index: usize) {
        let started = self.places[index].started;
        let was_lost = self.was_lost(index % CARDS, started);
        let place = &mut self.places[index];
        let killed = place.killed;
        let Some(mut program) = place.program.take() else { return };
        match program.finish(Duration::ZERO) {
            Ok(result) if result["verified"] == true => self.tally.right += 1,
            Ok(result) => self.violations.push(format!("{} verified nothing: {result}", program.name())),
            Err(_) if killed => self.tally.killed += 1,
            Err(_) if was_lost && is_drivers_own(&program.process().log()) => {
                self.tally.lost_with_card += 1;
            }
            Err(_) => {
                let status = program.process().finished();
                let why = why(&program.process().log());
                self.violations.push(format!("{} ended with {status:?}: {why}", program.name()));
                return;
            }
        }
        // Thousands of them would fill the disk; those of a failure stay.
        std::fs::remove_file(program.progress_file()).ok();
        std::fs::remove_file(self.dir.join(format!("{}.log", program.name()))).ok();
    }

    /// Lets all programs end as soon as they can, and waits for it.
    pub(super) fn finish(&mut self) -> Result<()> {
        for place in &mut self.places {
            if let Some(program) = &mut place.program {
                program.process().signal(libc::SIGCONT);
                place.stopped_until = None;
                place.progress.1 = Instant::now();
            }
        }
        std::fs::write(self.stop_file(), "")?;
        while self.places.iter().any(|place| place.program.is_some()) {
            self.look();
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }
}

/// What a program said before it ended, without a trace of calls.
fn why(log: &str) -> String {
    let lines = log.lines().take_while(|line| !line.starts_with("Stack backtrace"));
    lines.collect::<Vec<_>>().join("; ")
}

/// Whether a program failed by what the driver says when a card falls off the bus.
fn is_drivers_own(log: &str) -> bool {
    log.contains("(999)") && !log.contains("wrong result")
}
