//! The segments that PyTorch's caching allocator asks the driver for: 2 MiB for all that is at most 1 MiB, 20 MiB for what is
//! below 10 MiB, and above that the size itself rounded up to 2 MiB.

/// How often each segment is filled again after its first touch.
pub(crate) const REUSES: u32 = 20;

const MIB: u64 = 1 << 20;

/// Sizes of segments, in the order in which they are asked for, that come to at most `bytes`.
///
/// Of ten requests, four find no small segment with room, four no large one, and two are large tensors of
/// 10 to 128 MiB: few, as in training, where most requests find room and never reach the driver.
pub(crate) fn segments(seed: u64, bytes: u64) -> Vec<u64> {
    let mut state = seed;
    let mut sizes = Vec::new();
    let mut left = bytes;
    loop {
        // A linear congruential generator with Knuth's constants; the upper bits are the good ones.
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let draw = state >> 33;
        let size = match draw % 10 {
            0..4 => 2 * MIB,
            4..8 => 20 * MIB,
            _ => (10 + draw / 10 % 119).next_multiple_of(2) * MIB,
        };
        let Some(rest) = left.checked_sub(size) else { return sizes };
        left = rest;
        sizes.push(size);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn segments_are_of_the_allocators_sizes_and_stay_within_what_is_allowed() {
        let sizes = segments(1, 4 << 30);
        let sum: u64 = sizes.iter().sum();
        assert!(sum <= 4 << 30 && sum > (4 << 30) - 128 * MIB, "{sum}");
        assert!(sizes.iter().all(|size| size.is_multiple_of(2 * MIB) && *size <= 128 * MIB));
        for size in [2 * MIB, 20 * MIB] {
            assert!(sizes.iter().filter(|&&other| other == size).count() * 5 > sizes.len());
        }
        assert!(sizes.iter().any(|&size| size > 20 * MIB));
    }

    #[test]
    fn a_seed_names_one_sequence() {
        assert_eq!(segments(7, 1 << 30), segments(7, 1 << 30));
        assert_ne!(segments(7, 1 << 30), segments(8, 1 << 30));
    }
}
