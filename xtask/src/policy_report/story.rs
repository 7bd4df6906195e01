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
        BLUE, FAINT, GREEN, INK, ORANGE, PURPLE, SKY, SMALL, VERMILION, picture, placed, put_pixel, text,
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
        "`{FILE}`: two jobs of 14 GiB share a card of 31 GiB (RTX 5090). At 15 s a third one joins, and they begin to evict each \
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

fn draw(scenario: &Scenario, bins: &[Bin], watched: &Watched) -> Result<String> {
    const LEFT: i32 = 96;
    const LANE: i32 = 34;
    const GAP: i32 = 12;
    const TOP: i32 = 96;
    const CURVE: i32 = 150;
    const BOTTOM: i32 = 56;
    let end = watched.end.as_secs_f64();
    let right = SIZE.0 as i32 - 24;
    let x = |at: f64| LEFT + (at / end * f64::from(right - LEFT)) as i32;
    picture(SIZE, "Thrash and recovery", |area| {
        let (base_x, base_y) = area.get_base_pixel();
        let at = |px: i32, py: i32| (px - base_x, py - base_y);
        let bar = |from: f64, to: f64, top: i32, height: i32, color: RGBColor| {
            let corners = [at(x(from), top), at(x(to).max(x(from) + 1), top + height)];
            area.draw(&Rectangle::new(corners, color.filled())).map_err(|error| anyhow!("{error}"))
        };
        let line = |from: (i32, i32), to: (i32, i32), style: ShapeStyle| {
            let path = PathElement::new([at(from.0, from.1), at(to.0, to.1)], style);
            area.draw(&path).map_err(|error| anyhow!("{error}"))
        };
        let name = |words: &str, middle: i32| {
            put_pixel(area, words, (LEFT - 10, middle), &placed(text(14, INK), HPos::Right, VPos::Center))
        };
        // The key.
        let keys = [
            ("computes", BLUE),
            ("waits for memory", VERMILION),
            ("waits for its turn", FAINT),
            ("shared", GREEN),
            ("exclusive", ORANGE),
            ("sets", PURPLE),
        ];
        let used: Vec<Mode> = bins.iter().flat_map(|bin| bin.gpus.iter().map(|gpu| gpu.mode)).collect();
        let mut key_at = LEFT;
        for (words, color) in keys {
            let of_mode = Mode::ALL.into_iter().find(|mode| mode.as_str() == words);
            if of_mode.is_some_and(|mode| !used.contains(&mode)) {
                continue;
            }
            let corners = [at(key_at, 48), at(key_at + 16, 62)];
            area.draw(&Rectangle::new(corners, color.filled())).map_err(|error| anyhow!("{error}"))?;
            put_pixel(area, words, (key_at + 22, 55), &placed(text(SMALL, INK), HPos::Left, VPos::Center))?;
            key_at += 46 + 7 * words.len() as i32;
        }
        // Lanes: the clients, then the mode.
        let mut top = TOP;
        for (index, client) in scenario.clients.iter().enumerate() {
            name(&client.name, top + LANE / 2)?;
            for stretch in doing(bins, index) {
                if let Some(color) = stretch.is.color() {
                    bar(stretch.from, stretch.to, top, LANE, color)?;
                }
            }
            top += LANE + GAP;
        }
        name("mode", top + LANE / 2)?;
        let mut before = 0.0;
        let modes = bins.iter().map(|bin| {
            let (from, to) = (before, bin.at.as_secs_f64());
            before = to;
            (from, to, bin.gpus[0].mode)
        });
        for stretch in stretches(modes) {
            bar(stretch.from, stretch.to, top, LANE, mode_color(stretch.is))?;
        }
        top += LANE + 2 * GAP;
        // Memory that faults brought in.
        let rates = fault_rates(bins);
        let most = rates.iter().map(|(_, rate)| *rate).fold(1.0, f64::max).ceil();
        let y = |rate: f64| top + CURVE - (rate / most * f64::from(CURVE)) as i32;
        for step in 0..=2 {
            let rate = most * f64::from(step) / 2.0;
            line((LEFT, y(rate)), (right, y(rate)), FAINT.into())?;
            put_pixel(
                area,
                &format!("{rate:.1}"),
                (LEFT - 10, y(rate)),
                &placed(text(SMALL, INK), HPos::Right, VPos::Center),
            )?;
        }
        put_pixel(
            area,
            "memory that faults bring in, GB/s",
            (LEFT + 6, top - 4),
            &placed(text(SMALL, INK), HPos::Left, VPos::Bottom),
        )?;
        let points: Vec<(i32, i32)> = rates.iter().map(|&(t, rate)| at(x(t), y(rate))).collect();
        area.draw(&PathElement::new(points, SKY.stroke_width(2))).map_err(|error| anyhow!("{error}"))?;
        // Time.
        let bottom = top + CURVE;
        let every =
            [5.0, 10.0, 20.0, 50.0, 100.0].into_iter().find(|every| end / every <= 12.0).unwrap_or(200.0);
        for step in 0..=(end / every) as u32 {
            let t = f64::from(step) * every;
            line((x(t), bottom), (x(t), bottom + 5), INK.into())?;
            let style = placed(text(SMALL, INK), HPos::Center, VPos::Top);
            put_pixel(area, &format!("{t:.0} s"), (x(t), bottom + 8), &style)?;
        }
        put_pixel(
            area,
            "simulated time; numbers: decisions, named in the table below",
            (i32::midpoint(LEFT, right), bottom + BOTTOM - 24),
            &placed(text(14, INK), HPos::Center, VPos::Top),
        )?;
        // Decisions.
        for (number, switch) in watched.report.mode_switches.iter().enumerate() {
            let px = x(switch.t_s);
            line((px, TOP - 6), (px, bottom), INK.stroke_width(1))?;
            let style = placed(text(14, INK), HPos::Center, VPos::Bottom);
            put_pixel(area, &(number + 1).to_string(), (px, TOP - 8), &style)?;
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
