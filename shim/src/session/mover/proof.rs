//! Which way of moving memory is right and fast with this driver: tried out on a few MiB of our own.
//!
//! The driver's two passes (transfer, then map every page) and the refusal of the second where the processor may not
//! write stand in the published source from 525 on. They are no promise: a driver in which protected memory does not arrive whole, or not
//! sooner than otherwise, is not asked to move it.

use std::fmt;

use nvshare_wire::Mover;

use crate::{
    abi::{CUdevice, CUdeviceptr, CUresult, HOST, Ptr},
    driver, sys,
};

const WORDS: usize = 1 << 20;
const BYTES: usize = WORDS * size_of::<u32>();
/// The best of so many counts: other programs of the machine take their time, too.
const TRIES: usize = 3;

/// What was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Proof {
    /// Every word was right after each way out and back.
    plain_is_right: bool,
    protected_is_right: bool,
    /// The processor may write to it afterwards.
    is_lifted: bool,
    plain_ns: u64,
    protected_ns: u64,
}

impl Proof {
    pub(super) fn best(&self) -> Mover {
        if !self.plain_is_right {
            Mover::Demand
        } else if self.protected_is_right && self.is_lifted && self.protected_ns <= self.plain_ns {
            Mover::Protected
        } else {
            Mover::Plain
        }
    }
}

impl fmt::Display for Proof {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let right = |is: bool| if is { "right" } else { "wrong" };
        write!(
            f,
            "{} MiB out in {} us ({}), protected in {} us ({}, {})",
            BYTES >> 20,
            self.plain_ns / 1000,
            right(self.plain_is_right),
            self.protected_ns / 1000,
            right(self.protected_is_right),
            if self.is_lifted { "writable afterwards" } else { "not writable afterwards" },
        )
    }
}

/// Memory to try it on; dropping it frees it.
struct Scratch(CUdeviceptr);

impl Drop for Scratch {
    fn drop(&mut self) {
        sys::protect(self.0, BYTES as u64, true);
        // What cannot be freed goes with the context.
        let _kept = driver::free_managed(self.0);
    }
}

/// Words that tell where they belong, and of which round they are.
fn words(round: u32) -> Vec<u32> {
    (0..WORDS as u32).map(|at| at.wrapping_mul(0x9e37_79b9).wrapping_add(round)).collect()
}

impl Scratch {
    fn prefetch(&self, to: CUdevice, stream: Ptr) -> Result<(), CUresult> {
        driver::prefetch_to(to, self.0, BYTES, stream)?;
        driver::wait_for(stream)
    }

    fn fill(&self, round: u32, stream: Ptr) -> Result<(), CUresult> {
        let words = words(round);
        driver::copy_in(self.0, &words, stream)?;
        driver::wait_for(stream)
    }

    fn holds(&self, round: u32, stream: Ptr) -> Result<bool, CUresult> {
        let mut found = vec![0; WORDS];
        driver::copy_out(&mut found, self.0, stream)?;
        driver::wait_for(stream)?;
        Ok(found == words(round))
    }

    /// Out and back several times: the shortest time out, and whether all was right afterwards.
    fn out_and_back(
        &self,
        device: CUdevice,
        stream: Ptr,
        round: u32,
        is_protected: bool,
    ) -> Result<(u64, bool), CUresult> {
        self.fill(round, stream)?;
        let mut best = u64::MAX;
        for _ in 0..TRIES {
            let begin = sys::now_ns();
            if is_protected && !sys::protect(self.0, BYTES as u64, false) {
                return Ok((u64::MAX, false));
            }
            let outcome = self.prefetch(HOST, stream);
            if is_protected {
                sys::protect(self.0, BYTES as u64, true);
            }
            best = best.min(sys::now_ns() - begin);
            outcome?;
            self.prefetch(device, stream)?;
        }
        Ok((best, self.holds(round, stream)?))
    }
}

/// Tries both ways, in a context that is the calling thread's current one.
pub(super) fn prove(device: CUdevice, stream: Ptr) -> Result<Proof, CUresult> {
    let scratch = Scratch(driver::allocate_managed(BYTES)?);
    // The first way out pays for the host's pages.
    scratch.fill(0, stream)?;
    scratch.prefetch(HOST, stream)?;
    scratch.prefetch(device, stream)?;
    let (plain_ns, plain_is_right) = scratch.out_and_back(device, stream, 1, false)?;
    let (protected_ns, protected_is_right) = scratch.out_and_back(device, stream, 2, true)?;
    let is_lifted = sys::may_be_written(scratch.0);
    Ok(Proof { plain_is_right, protected_is_right, is_lifted, plain_ns, protected_ns })
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: Proof = Proof {
        plain_is_right: true,
        protected_is_right: true,
        is_lifted: true,
        plain_ns: 300,
        protected_ns: 90,
    };

    #[test]
    fn protected_moves_are_for_drivers_that_do_them_right_and_faster_and_any_for_those_that_do_them_right() {
        assert_eq!(GOOD.best(), Mover::Protected);
        for lesser in [
            Proof { protected_is_right: false, ..GOOD },
            Proof { is_lifted: false, ..GOOD },
            Proof { protected_ns: 301, ..GOOD },
        ] {
            assert_eq!(lesser.best(), Mover::Plain, "{lesser}");
        }
        assert_eq!(Proof { plain_is_right: false, ..GOOD }.best(), Mover::Demand);
    }

    #[test]
    fn the_words_of_two_rounds_are_all_different() {
        assert!(words(1).iter().zip(words(2)).all(|(&one, two)| one != two));
    }
}
