//! A row of bars, one character each.

const BARS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];

/// The last `width` values against `top`; a value that nobody knows is a blank. Zero and more is the lowest bar, so
/// that a quiet second looks different from a missing one.
pub(super) fn line(values: impl DoubleEndedIterator<Item = Option<f64>>, top: f64, width: usize) -> String {
    let mut bars: Vec<char> = values
        .rev()
        .take(width)
        .map(|value| value.map_or(' ', |value| BARS[((value / top * 8.0) as usize).min(7)]))
        .collect();
    bars.resize(width, ' ');
    bars.iter().rev().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bars_rise_with_the_value_and_the_newest_is_on_the_right() {
        let values = [Some(9.0), Some(0.0), Some(0.5), None, Some(1.0), Some(7.0)];
        assert_eq!(line(values.into_iter(), 1.0, 5), "▁▅ ██");
        assert_eq!(line([Some(0.2)].into_iter(), 1.0, 3), "  ▂");
    }
}
