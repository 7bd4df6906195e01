//! Scenarios like a given one: the same story at other moments.

use crate::{
    sim::{rng::Rng, scenario::Scenario},
    units::Nanos,
};

/// Clients start up to this much later.
const LATER_MS: u32 = 10_000;
/// Bursts and sweeps become longer or shorter by up to so many thousandths.
const LENGTH_MILLI: u32 = 100;

impl Scenario {
    /// The scenario with other starts, bursts and sweeps, drawn from a seed. Memory, work and events stay.
    #[must_use]
    pub fn varied(&self, seed: u64) -> Self {
        let mut varied = self.clone();
        let mut rng = Rng::new(seed);
        for client in &mut varied.clients {
            client.start += Nanos::millis(u64::from(rng.below(LATER_MS)));
            let milli = u64::from(1000 - LENGTH_MILLI + rng.below(2 * LENGTH_MILLI + 1));
            let scaled = |time: Nanos| Nanos((time.0 / 1000 * milli).max(1));
            client.burst = scaled(client.burst);
            for phase in &mut client.phases {
                phase.sweep = scaled(phase.sweep);
            }
        }
        varied
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_gives_the_same_variation_again_and_another_one_another() {
        let text = "[[client]]\nname = \"a\"\ncount = 2\nallocated = \"1 GiB\"\ngpu_work = \"1 s\"\nburst = \"50 ms\"\n";
        let scenario = Scenario::parse("test", text).unwrap();
        let first = scenario.varied(1);
        assert_eq!(first, scenario.varied(1));
        assert_ne!(first, scenario.varied(2));
        assert_ne!(first.clients[0].start, first.clients[1].start);
        for client in &first.clients {
            assert!((Nanos::millis(45)..=Nanos::millis(55)).contains(&client.burst));
            assert_eq!(client.gpu_work, scenario.clients[0].gpu_work);
        }
    }
}
