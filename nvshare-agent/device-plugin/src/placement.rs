//! Which shares to take: the advice that the kubelet asks for before it gives devices to a container.
//!
//! Greedy, one share after the other. Each time the GPU that is best by the key below gives its lowest free share, so
//! the advice is the same for the same question.

use std::collections::{BTreeMap, BTreeSet};

use nvshare_core::GpuId;

use crate::share::Share;

/// Which GPUs new containers go to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Placement {
    /// The GPU with the fewest shares given away.
    Spread,
    /// The GPU with the most shares given away that has one left; others stay free for what needs a whole GPU.
    Pack,
}

/// What several shares of one container mean.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Several {
    /// As many different GPUs, as with nvidia.com/gpu.
    Apart,
    /// Shares of one GPU, if one has as many left.
    Together,
}

/// What is known of a GPU beyond its free shares.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Advice {
    /// Whether its clients evict each other's memory, or take turns so that they do not.
    pub thrashing: bool,
    /// Managed memory in thousandths of what there is room for.
    pub committed_milli: u64,
}

/// What the kubelet asks for one container.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wish {
    /// Shares that nobody has.
    pub available: BTreeSet<Share>,
    /// Shares that must be among the chosen.
    pub must_include: BTreeSet<Share>,
    /// How many to choose.
    pub size: usize,
}

/// A wish that cannot be granted.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum ImpossibleWish {
    /// More than there are.
    #[error("{size} devices are to be chosen from {available} available ones")]
    TooMany {
        /// To choose.
        size: usize,
        /// There are.
        available: usize,
    },
    /// More must be included than are wanted.
    #[error("{must} devices must be included, but only {size} are to be chosen")]
    TooFew {
        /// Must be included.
        must: usize,
        /// To choose.
        size: usize,
    },
    /// Must be included and is not there.
    #[error("device {0} must be included, but is not among the available ones")]
    NotAvailable(Share),
}

/// A GPU while shares are chosen.
#[derive(Debug, Default)]
struct Candidate {
    free: BTreeSet<Share>,
    mine: usize,
    advice: Advice,
}

/// The shares to take. `shares` is how many each GPU has in all.
pub fn choose(
    wish: &Wish,
    shares: u32,
    placement: Placement,
    several: Several,
    advice: impl Fn(GpuId) -> Advice,
) -> Result<BTreeSet<Share>, ImpossibleWish> {
    let Wish { available, must_include, size } = wish;
    if *size > available.len() {
        return Err(ImpossibleWish::TooMany { size: *size, available: available.len() });
    }
    if must_include.len() > *size {
        return Err(ImpossibleWish::TooFew { must: must_include.len(), size: *size });
    }
    if let Some(&missing) = must_include.difference(available).next() {
        return Err(ImpossibleWish::NotAvailable(missing));
    }
    let mut candidates: BTreeMap<GpuId, Candidate> = BTreeMap::new();
    for &share in available {
        let candidate = candidates
            .entry(share.gpu)
            .or_insert_with(|| Candidate { advice: advice(share.gpu), ..Candidate::default() });
        if must_include.contains(&share) {
            candidate.mine += 1;
        } else {
            candidate.free.insert(share);
        }
    }
    let mut chosen = must_include.clone();
    while chosen.len() < *size {
        let missing = size - chosen.len();
        let best = candidates.iter_mut().filter(|(_, candidate)| !candidate.free.is_empty()).min_by_key(
            |(gpu, Candidate { free, mine, advice })| {
                let belonging = match several {
                    Several::Apart => (*mine, false),
                    Several::Together => (usize::from(*mine == 0), free.len() < missing),
                };
                let given_away = (shares as usize).saturating_sub(free.len());
                let order = match placement {
                    Placement::Spread => given_away,
                    Placement::Pack => free.len(),
                };
                (belonging, advice.thrashing, order, advice.committed_milli, **gpu)
            },
        );
        let Some((_, best)) = best else { break };
        best.mine += 1;
        chosen.extend(best.free.pop_first());
    }
    Ok(chosen)
}

#[cfg(test)]
mod tests;
