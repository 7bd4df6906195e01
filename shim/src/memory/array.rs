//! The size of arrays, which the driver does not tell. It rounds up by tiles, so these are lower bounds.

use crate::abi::CUarray3DDescriptor;

/// Bits of one channel of a texel. Block-compressed and video formats pack several texels: they count with the
/// average.
fn bits_of(format: u32) -> u64 {
    match format {
        // Unsigned and signed 8 bit, and their normalised forms.
        0x01 | 0x08 | 0xc0..=0xc2 | 0xc6..=0xc8 => 8,
        // 16 bit, half, and their normalised forms.
        0x02 | 0x09 | 0x10 | 0xc3..=0xc5 | 0xc9..=0xcb => 16,
        // BC1 to BC7: 64 or 128 bits for 16 texels, over the channels that the format has.
        0x91 | 0x92 => 1,
        0x93..=0x96 | 0x9d | 0x9e => 2,
        0x97..=0x9a => 4,
        0x9b | 0x9c => 3,
        // 32 bit; and video, and whatever newer drivers add.
        _ => 32,
    }
}

/// Bytes of an array. A dimension of zero is one that the array does not have.
pub(crate) fn bytes_of_array(array: &CUarray3DDescriptor) -> u64 {
    bytes_of_level(array, 0)
}

/// Bytes of an array with this many levels, each of half the size of the one before.
pub(crate) fn bytes_of_mipmaps(array: &CUarray3DDescriptor, levels: u32) -> u64 {
    (0..levels.min(32)).map(|level| bytes_of_level(array, level)).fold(0, u64::saturating_add)
}

fn bytes_of_level(array: &CUarray3DDescriptor, level: u32) -> u64 {
    let [width, height, depth] =
        [array.width, array.height, array.depth].map(|extent| (extent as u64 >> level).max(1));
    let texels = width.saturating_mul(height).saturating_mul(depth);
    texels.saturating_mul(u64::from(array.channels.max(1))).saturating_mul(bits_of(array.format)).div_ceil(8)
}

#[cfg(test)]
mod tests {
    use super::*;

    const FLOAT: u32 = 0x20;

    #[test]
    fn an_array_takes_its_texels_and_its_levels() {
        let array =
            CUarray3DDescriptor { width: 64, height: 32, depth: 0, format: FLOAT, channels: 4, flags: 0 };
        assert_eq!(bytes_of_array(&array), 64 * 32 * 16);
        assert_eq!(bytes_of_mipmaps(&array, 1), bytes_of_array(&array));
        assert_eq!(bytes_of_mipmaps(&array, 3), (64 * 32 + 32 * 16 + 16 * 8) * 16);
        assert_eq!(bytes_of_array(&CUarray3DDescriptor { format: 0x01, channels: 1, ..array }), 64 * 32);
    }

    #[test]
    fn a_nonsensical_array_is_large_and_not_a_panic() {
        let array = CUarray3DDescriptor {
            width: usize::MAX,
            height: usize::MAX,
            depth: usize::MAX,
            format: u32::MAX,
            channels: u32::MAX,
            flags: 0,
        };
        assert!(bytes_of_mipmaps(&array, u32::MAX) > u64::MAX / 16);
    }
}
