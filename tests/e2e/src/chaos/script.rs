//! What will go wrong, and when: all of it is chosen before the run begins, from the seed alone.

use std::{fmt, time::Duration};

use super::{CARDS, dice::Dice};

/// Something that happens to a program, the agent, a card, or is done by somebody who means harm.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fault {
    /// A program is killed; another takes its place.
    Kill {
        /// The program's place.
        place: usize,
    },
    /// A program is stopped, and goes on later.
    Stop {
        /// The program's place.
        place: usize,
        /// For how long.
        lasting: Duration,
    },
    /// The agent is killed, or asked to end, and started again.
    Restart {
        /// Without notice.
        kill: bool,
        /// How long nobody serves.
        absent: Duration,
    },
    /// A process without privileges misbehaves towards the agent.
    Attack {
        /// As `nvshare-workload hostile --kind` takes it.
        kind: &'static str,
        /// On which card it claims to work.
        card: usize,
        /// For how long.
        lasting: Duration,
        /// Its own seed.
        seed: u64,
    },
    /// The operator orders something.
    Order {
        /// Arguments of `nvsharectl`.
        words: Vec<String>,
    },
    /// A card's link has errors.
    Link {
        /// Which card.
        card: usize,
        /// What gets through meanwhile, GB/s.
        rate: &'static str,
        /// For how long.
        lasting: Duration,
    },
    /// A card falls off the bus, and comes back.
    Lost {
        /// Which card.
        card: usize,
        /// For how long.
        lasting: Duration,
    },
}

impl Fault {
    /// What sort of fault this is, for counts.
    pub fn sort(&self) -> String {
        match self {
            Self::Kill { .. } => "program killed".to_owned(),
            Self::Stop { .. } => "program stopped".to_owned(),
            Self::Restart { kill: true, .. } => "agent killed".to_owned(),
            Self::Restart { kill: false, .. } => "agent asked to end".to_owned(),
            Self::Attack { kind, .. } => format!("attack: {kind}"),
            Self::Order { .. } => "order".to_owned(),
            Self::Link { .. } => "link errors".to_owned(),
            Self::Lost { .. } => "card lost".to_owned(),
        }
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Kill { place } => write!(f, "kill program {place}"),
            Self::Stop { place, lasting } => write!(f, "stop program {place} for {lasting:?}"),
            Self::Restart { kill: true, absent } => write!(f, "kill the agent, absent for {absent:?}"),
            Self::Restart { kill: false, absent } => write!(f, "end the agent, absent for {absent:?}"),
            Self::Attack { kind, card, lasting, seed } => {
                write!(f, "attack {kind} on card {card} for {lasting:?}, seed {seed}")
            }
            Self::Order { words } => write!(f, "order {}", words.join(" ")),
            Self::Link { card, rate, lasting } => write!(f, "card {card}: {rate} GB/s for {lasting:?}"),
            Self::Lost { card, lasting } => write!(f, "card {card} lost for {lasting:?}"),
        }
    }
}

/// Ways of `nvshare-workload hostile`.
const ATTACKS: [&str; 9] =
    ["connect-close", "garbage", "half-frames", "deaf", "descriptors", "hoard", "liar", "liars", "control"];

/// The faults of a run of `lasting` with so many programs, in the order of their times. The agent is restarted in
/// the first half only, so that the second shows what one agent's memory does over time.
pub fn write(seed: u64, lasting: Duration, programs: usize) -> Vec<(Duration, Fault)> {
    let end = lasting.as_millis() as u64;
    let ms = Duration::from_millis;
    let mut script = Vec::new();
    let mut dice = Dice::new(seed);
    let mut at = 500;
    while at < end {
        script.push((ms(at), one(&mut dice, programs)));
        at += dice.between(20, 480);
    }
    let mut dice = Dice::new(seed ^ 0x0a9e_7700);
    let mut at = dice.between(1500, 3500);
    while at < end / 2 {
        let kill = dice.roll().is_multiple_of(2);
        script.push((ms(at), Fault::Restart { kill, absent: ms(dice.between(0, 700)) }));
        at += dice.between(2000, 6000);
    }
    let mut dice = Dice::new(seed ^ 0x1057);
    let mut at = dice.between(end / 4, end / 3);
    while at < end {
        let card = dice.between(0, CARDS as u64 - 1) as usize;
        script.push((ms(at), Fault::Lost { card, lasting: ms(dice.between(200, 1500)) }));
        at += dice.between(30_000, 90_000);
    }
    script.sort_by_key(|(at, _)| *at);
    script
}

fn one(dice: &mut Dice, programs: usize) -> Fault {
    let place = dice.between(0, programs as u64 - 1) as usize;
    let card = dice.between(0, CARDS as u64 - 1) as usize;
    let ms = Duration::from_millis;
    match dice.between(0, 99) {
        0..=34 => Fault::Kill { place },
        35..=59 => Fault::Stop { place, lasting: ms(dice.between(10, 3000)) },
        60..=79 => {
            let kind = dice.pick(&ATTACKS);
            Fault::Attack { kind, card, lasting: ms(dice.between(100, 3000)), seed: dice.roll() }
        }
        80..=94 => {
            let words: &[&str] = match dice.between(0, 9) {
                0..=3 => &["set", "mode", "exclusive"],
                4..=5 => &["set", "mode", "auto"],
                6 => &["set", "mode", "shared"],
                7 => &["set", "quantum", "20ms"],
                8 => &["set", "quantum", "200ms"],
                _ => &["set", "quantum", "auto"],
            };
            Fault::Order { words: words.iter().map(|&word| word.to_owned()).collect() }
        }
        _ => {
            let rate = dice.pick(&["0.01", "0.1", "1"]);
            Fault::Link { card, rate, lasting: ms(dice.between(100, 2000)) }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_names_one_script_and_another_seed_another() {
        let minute = Duration::from_mins(1);
        assert_eq!(write(7, minute, 50), write(7, minute, 50));
        assert_ne!(write(7, minute, 50), write(8, minute, 50));
    }

    #[test]
    fn two_minutes_hold_every_sort_of_fault_in_order_and_no_restart_in_the_second_half() {
        let script = write(1, Duration::from_mins(2), 50);
        assert!(script.is_sorted_by_key(|(at, _)| *at));
        let sorts: std::collections::BTreeSet<String> =
            script.iter().map(|(_, fault)| fault.sort()).collect();
        assert_eq!(sorts.len(), 7 + ATTACKS.len(), "{sorts:?}");
        let late = script.iter().filter(|(at, _)| *at >= Duration::from_mins(1));
        assert!(!late.clone().any(|(_, fault)| matches!(fault, Fault::Restart { .. })));
        assert!(late.count() > 100);
    }
}
