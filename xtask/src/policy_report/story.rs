//! One story of thrash and recovery, drawn over time.

use std::ops::ControlFlow;

use anyhow::{Result, anyhow};
use nvshare_core::{
    Nanos,
    input::ModeOrder,
    output::Mode,
    sim::{self, Bin, Options, PolicyKind, Scenario, Watched},
};
use plotters::{
    prelude::*,
    style::text_anchor::{HPos, VPos},
};

use super::{
    page::Page,
    plot::{
        Area, BLUE, FAINT, GREEN, INK, ORANGE, PURPLE, SKY, SMALL, VERMILION, picture, placed, put_pixel,
        text,
    },
    table::Table,
};
use crate::{cargo::root, simulate::load};

const FILE: &str = "tests/scenarios/data/policy-report-story.toml";
const SIZE: (u32, u32) = (940, 500);

/// A stretch of time with one value.
#[derive(Clone, Debug, PartialEq)]
struct Stretch<T> {
    from: f64,
    to: f64,
    is: T,
}

/// Neighbouring bins with the same value are one stretch.
fn stretches<T: PartialEq>(bins: impl Iterator<Item = (f64, f64, T)>) -> Vec<Stretch<T>> {
    let mut all: Vec<Stretch<T>> = Vec::new();
    for (from, to, is) in bins {
        match all.last_mut() {
            Some(last) if last.is == is && last.to >= from => last.to = to,
            _ => all.push(Stretch { from, to, is }),
        }
    }
    all
}

/// What a client is doing, as far as it is drawn.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Doing {
    Absent,
    Computes,
    WaitsForMemory,
    WaitsForTurn,
}

impl Doing {
    const fn name(self) -> &'static str {
        match self {
            Self::Absent => "absent",
            Self::Computes => "computes",
            Self::WaitsForMemory => "waits for memory",
            Self::WaitsForTurn => "waits for its turn",
        }
    }

    const fn color(self) -> Option<RGBColor> {
        match self {
            Self::Absent => None,
            Self::Computes => Some(BLUE),
            Self::WaitsForMemory => Some(VERMILION),
            Self::WaitsForTurn => Some(FAINT),
        }
    }
}

/// The share of a bin beyond which a client is said to wait for memory.
const MOSTLY: f64 = 0.5;

fn doing(bins: &[Bin], client: usize) -> Vec<Stretch<Doing>> {
    let mut before = (0.0, Nanos::ZERO);
    let each = bins.iter().map(|bin| {
        let now = bin.clients[client];
        let (from, to) = (before.0, bin.at.as_secs_f64());
        let stalled = now.stalled.since(before.1).as_secs_f64();
        before = (to, now.stalled);
        let is = if !now.alive {
            Doing::Absent
        } else if stalled > MOSTLY * (to - from) {
            Doing::WaitsForMemory
        } else if now.on_gpu {
            Doing::Computes
        } else {
            Doing::WaitsForTurn
        };
        (from, to, is)
    });
    stretches(each)
}

const fn mode_color(mode: Mode) -> RGBColor {
    match mode {
        Mode::Shared => GREEN,
        Mode::Sets => PURPLE,
        Mode::Exclusive => ORANGE,
    }
}

pub(super) fn section(page: &mut Page) -> Result<()> {
    let scenario = load(&root().join(FILE))?;
    let mut bins: Vec<Bin> = Vec::new();
    let watched = sim::watch(&scenario, &Options::new(PolicyKind::Auto), ModeOrder::Auto, &mut |bin| {
        bins.push(bin.clone());
        ControlFlow::Continue(())
    });
    page.heading("A story of thrash and recovery");
    page.paragraph(&format!(
        "`{FILE}`: two jobs of 12 GiB share a card of 31 GiB (RTX 5090). At 15 s a third one joins, and they begin to evict each \
        other. nvshare lets them take turns until the third has ended; then the others share again."
    ));
    page.picture(
        "story",
        "Over time: what each job is doing, the mode, memory that faults bring in, and the decisions",
        draw(&scenario, &bins, &watched)?,
    );
    let mut table = Table::new(&["decision", "at", "what and why"]);
    for (number, switch) in watched.report.mode_switches.iter().enumerate() {
        table.row(&[
            (number + 1).to_string(),
            format!("{:.1} s", switch.t_s),
            format!("{} → {}: {}", switch.from, switch.to, switch.reason),
        ]);
    }
    page.table(table);
    Ok(())
}

const LEFT: i32 = 96;
const RIGHT: i32 = SIZE.0 as i32 - 24;
const LANE: i32 = 34;
const GAP: i32 = 12;
/// Of the lanes, and of the key above them.
const TOP: i32 = 96;
const KEY: i32 = 48;
/// Height of the curve, and how far below it the words on time are.
const CURVE: i32 = 120;
const BELOW: i32 = 30;

/// Draws by pixels of the whole picture and by seconds.
struct Canvas<'a, 'b> {
    area: &'a Area<'b>,
    end: f64,
}

impl Canvas<'_, '_> {
    fn x(&self, seconds: f64) -> i32 {
        LEFT + (seconds / self.end * f64::from(RIGHT - LEFT)) as i32
    }

    fn at(&self, (px, py): (i32, i32)) -> (i32, i32) {
        let (left, top) = self.area.get_base_pixel();
        (px - left, py - top)
    }

    fn bar(&self, from: i32, to: i32, top: i32, height: i32, color: RGBColor) -> Result<()> {
        let corners = [self.at((from, top)), self.at((to.max(from + 1), top + height))];
        self.area.draw(&Rectangle::new(corners, color.filled())).map_err(|error| anyhow!("{error}"))
    }

    fn path(&self, points: &[(i32, i32)], style: ShapeStyle) -> Result<()> {
        let points: Vec<_> = points.iter().map(|&point| self.at(point)).collect();
        self.area.draw(&PathElement::new(points, style)).map_err(|error| anyhow!("{error}"))
    }

    fn words(&self, words: &str, at: (i32, i32), size: u32, to: (HPos, VPos)) -> Result<()> {
        put_pixel(self.area, words, at, &placed(&text(size, INK), to.0, to.1))
    }

    /// What the colours mean; of the modes, those there are.
    fn key(&self, modes: &[Mode]) -> Result<()> {
        let doing = [Doing::Computes, Doing::WaitsForMemory, Doing::WaitsForTurn];
        let doing = doing.into_iter().filter_map(|doing| Some((doing.name(), doing.color()?)));
        let modes = Mode::ALL.into_iter().filter(|mode| modes.contains(mode));
        let mut left = LEFT;
        for (words, color) in doing.chain(modes.map(|mode| (mode.as_str(), mode_color(mode)))) {
            self.bar(left, left + 16, KEY, 14, color)?;
            self.words(words, (left + 22, KEY + 7), SMALL, (HPos::Left, VPos::Center))?;
            left += 46 + 7 * words.len() as i32;
        }
        Ok(())
    }

    fn lane<T>(
        &self,
        name: &str,
        top: i32,
        all: &[Stretch<T>],
        color: impl Fn(&T) -> Option<RGBColor>,
    ) -> Result<()> {
        self.words(name, (LEFT - 10, top + LANE / 2), 14, (HPos::Right, VPos::Center))?;
        for stretch in all {
            if let Some(color) = color(&stretch.is) {
                self.bar(self.x(stretch.from), self.x(stretch.to), top, LANE, color)?;
            }
        }
        Ok(())
    }

    fn curve(&self, name: &str, top: i32, points: &[(f64, f64)]) -> Result<()> {
        let most = points.iter().map(|(_, value)| *value).fold(1.0, f64::max).ceil();
        let y = |value: f64| top + CURVE - (value / most * f64::from(CURVE)) as i32;
        for half in 0..=2 {
            let value = most * f64::from(half) / 2.0;
            self.path(&[(LEFT, y(value)), (RIGHT, y(value))], FAINT.into())?;
            self.words(&format!("{value:.1}"), (LEFT - 10, y(value)), SMALL, (HPos::Right, VPos::Center))?;
        }
        self.words(name, (LEFT + 6, top - 4), SMALL, (HPos::Left, VPos::Bottom))?;
        let points: Vec<(i32, i32)> = points.iter().map(|&(at, value)| (self.x(at), y(value))).collect();
        self.path(&points, SKY.stroke_width(2))
    }

    fn time(&self, top: i32) -> Result<()> {
        let steps = [5.0, 10.0, 20.0, 50.0, 100.0];
        let every = steps.into_iter().find(|every| self.end / every <= 12.0).unwrap_or(200.0);
        for step in 0..=(self.end / every) as u32 {
            let at = f64::from(step) * every;
            self.path(&[(self.x(at), top), (self.x(at), top + 5)], INK.into())?;
            self.words(&format!("{at:.0} s"), (self.x(at), top + 8), SMALL, (HPos::Center, VPos::Top))?;
        }
        let words = "simulated time; numbers: decisions, named in the table below";
        self.words(words, (i32::midpoint(LEFT, RIGHT), top + BELOW), 14, (HPos::Center, VPos::Top))
    }
}

fn draw(scenario: &Scenario, bins: &[Bin], watched: &Watched) -> Result<String> {
    picture(SIZE, "Thrash and recovery", |area| {
        let canvas = Canvas { area, end: watched.end.as_secs_f64() };
        let modes: Vec<Mode> = bins.iter().flat_map(|bin| bin.gpus.iter().map(|gpu| gpu.mode)).collect();
        canvas.key(&modes)?;
        let mut top = TOP;
        for (index, client) in scenario.clients.iter().enumerate() {
            canvas.lane(&client.name, top, &doing(bins, index), |doing| doing.color())?;
            top += LANE + GAP;
        }
        let mut before = 0.0;
        let of_bin = |bin: &Bin| {
            let (from, to) = (before, bin.at.as_secs_f64());
            before = to;
            (from, to, bin.gpus[0].mode)
        };
        canvas.lane("mode", top, &stretches(bins.iter().map(of_bin)), |&mode| Some(mode_color(mode)))?;
        top += LANE + 2 * GAP + 4;
        canvas.curve("memory that faults bring in, GB/s", top, &fault_rates(bins))?;
        let bottom = top + CURVE;
        canvas.time(bottom)?;
        for (number, switch) in watched.report.mode_switches.iter().enumerate() {
            let px = canvas.x(switch.t_s);
            canvas.path(&[(px, TOP - 6), (px, bottom)], INK.stroke_width(1))?;
            canvas.words(&(number + 1).to_string(), (px, TOP - 8), 14, (HPos::Center, VPos::Bottom))?;
        }
        Ok(())
    })
}

/// The mean of so many bins is one point of the curve.
const SMOOTHED: usize = 5;

/// GB/s that faults brought in, over time.
fn fault_rates(bins: &[Bin]) -> Vec<(f64, f64)> {
    let mut before = 0.0;
    let mut rates = Vec::new();
    for chunk in bins.chunks(SMOOTHED) {
        let Some(last) = chunk.last() else { continue };
        let to = last.at.as_secs_f64();
        let bytes: u64 = chunk.iter().flat_map(|bin| &bin.gpus).map(|gpu| gpu.faulted.0).sum();
        rates.push((f64::midpoint(before, to), bytes as f64 / 1e9 / (to - before).max(1e-9)));
        before = to;
    }
    rates
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_with_one_value_are_drawn_as_one_stretch() {
        let bins = [(0.0, 1.0, 'a'), (1.0, 2.0, 'a'), (2.0, 3.0, 'b'), (5.0, 6.0, 'b')];
        let found = stretches(bins.into_iter());
        let stretch = |from, to, is| Stretch { from, to, is };
        assert_eq!(found, [stretch(0.0, 2.0, 'a'), stretch(2.0, 3.0, 'b'), stretch(5.0, 6.0, 'b')]);
    }

    #[test]
    fn the_story_thrashes_takes_turns_and_shares_again_while_two_have_work() {
        let scenario = load(&root().join(FILE)).unwrap();
        let options = Options::new(PolicyKind::Auto);
        let mut two = 0.0f64;
        let watched = sim::watch(&scenario, &options, ModeOrder::Auto, &mut |bin| {
            if bin.clients.iter().filter(|client| client.alive).count() >= 2 {
                two = bin.at.as_secs_f64();
            }
            ControlFlow::Continue(())
        });
        let switches = &watched.report.mode_switches;
        assert_eq!(switches.first().unwrap().from, Mode::Shared);
        let last = switches.last().unwrap();
        assert!(last.to == Mode::Shared && last.t_s < two - 5.0, "{switches:?}");
    }
}
