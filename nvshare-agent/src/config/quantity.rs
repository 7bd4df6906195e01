//! Quantities as people write them: `30 s`, `15.5 GiB`, `0.05`.

use nvshare_core::{Bytes, Nanos};
use serde::{Deserialize, Deserializer, de::Error as _};

/// Why a text is not a quantity.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum QuantityError {
    /// No unit, or one that is not known.
    #[error("`{text}` needs a number and a unit ({units}), as in \"{example}\"")]
    Form {
        /// What was written.
        text: String,
        /// The units there are.
        units: &'static str,
        /// One that is right.
        example: &'static str,
    },
    /// Too small or too large.
    #[error("`{text}` is out of range; expected {range}")]
    Range {
        /// What was written.
        text: String,
        /// The range.
        range: &'static str,
    },
}

/// A duration: a number and `ms`, `s`, `min` or `h`; from 1 ms to 24 h.
pub fn parse_duration(text: &str) -> Result<Nanos, QuantityError> {
    const UNITS: [(&str, f64); 4] = [("ms", 1e6), ("s", 1e9), ("min", 60e9), ("h", 3600e9)];
    let nanos = scaled(text, &UNITS).ok_or_else(|| QuantityError::Form {
        text: text.to_owned(),
        units: "ms, s, min, h",
        example: "30 s",
    })?;
    if !(1e6..=86_400e9).contains(&nanos) {
        return Err(QuantityError::Range { text: text.to_owned(), range: "1 ms to 24 h" });
    }
    Ok(Nanos(nanos as u64))
}

/// A size: a number and `MiB`, `GiB`, `MB` or `GB`; from 1 MiB to 1 PiB.
pub fn parse_size(text: &str) -> Result<Bytes, QuantityError> {
    const UNITS: [(&str, f64); 4] =
        [("MiB", 1_048_576.0), ("GiB", 1_073_741_824.0), ("MB", 1e6), ("GB", 1e9)];
    let bytes = scaled(text, &UNITS).ok_or_else(|| QuantityError::Form {
        text: text.to_owned(),
        units: "MiB, GiB, MB, GB",
        example: "15.5 GiB",
    })?;
    if !(1_048_576.0..=1_125_899_906_842_624.0).contains(&bytes) {
        return Err(QuantityError::Range { text: text.to_owned(), range: "1 MiB to 1 PiB" });
    }
    Ok(Bytes(bytes as u64))
}

fn scaled(text: &str, units: &[(&str, f64)]) -> Option<f64> {
    let text = text.trim();
    let split = text.find(|c: char| c.is_ascii_alphabetic())?;
    let (number, unit) = text.split_at(split);
    let number: f64 = number.trim().parse().ok()?;
    let (_, factor) = units.iter().find(|(name, _)| *name == unit)?;
    number.is_finite().then_some(number * factor)
}

pub(super) fn duration<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Nanos, D::Error> {
    parse_duration(&String::deserialize(deserializer)?).map_err(D::Error::custom)
}

pub(super) fn optional_size<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Bytes>, D::Error> {
    parse_size(&String::deserialize(deserializer)?).map(Some).map_err(D::Error::custom)
}

/// A share of 1, kept in thousandths.
pub(super) fn ratio_milli<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u32, D::Error> {
    let ratio = f64::deserialize(deserializer)?;
    if !(0.001..=0.9).contains(&ratio) {
        return Err(D::Error::custom(format!(
            "{ratio} is out of range; expected a share between 0.001 and 0.9"
        )));
    }
    Ok((ratio * 1000.0).round() as u32)
}

/// A weight, kept in thousandths.
pub(super) fn weight_milli<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u32, D::Error> {
    let weight = f64::deserialize(deserializer)?;
    if !(0.001..=1000.0).contains(&weight) {
        return Err(D::Error::custom(format!(
            "{weight} is out of range; expected a weight between 0.001 and 1000"
        )));
    }
    Ok((weight * 1000.0).round() as u32)
}

/// The one of `known` that a typing error away from `word` suggests.
pub fn nearest<'a>(word: &str, known: &[&'a str]) -> Option<&'a str> {
    known
        .iter()
        .map(|candidate| (distance(word, candidate), *candidate))
        .filter(|(distance, candidate)| *distance <= candidate.len().max(word.len()) / 3 + 1)
        .min()
        .map(|(_, candidate)| candidate)
}

/// Levenshtein distance in bytes.
fn distance(a: &str, b: &str) -> usize {
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.bytes().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, y) in b.bytes().enumerate() {
            let substituted = diagonal + usize::from(x != y);
            diagonal = row[j + 1];
            row[j + 1] = substituted.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_and_sizes_are_read_with_their_units() {
        assert_eq!(parse_duration("30 s"), Ok(Nanos::seconds(30)));
        assert_eq!(parse_duration("250ms"), Ok(Nanos::millis(250)));
        assert_eq!(parse_duration("1.5 min"), Ok(Nanos::seconds(90)));
        assert_eq!(parse_size("2 GiB"), Ok(Bytes::gib(2)));
        assert_eq!(parse_size("1.5 GB"), Ok(Bytes(1_500_000_000)));
    }

    #[test]
    fn nonsense_quantities_are_refused() {
        for text in ["", "5", "s", "5 parsecs", "1e 5", "NaN s"] {
            assert!(parse_duration(text).is_err(), "{text}");
        }
        for text in ["-5 s", "0 s", "4294967297 s", "1e400 s"] {
            assert!(parse_duration(text).is_err(), "{text}");
        }
        assert!(parse_size("-1 GiB").is_err());
    }

    #[test]
    fn a_typing_error_is_recognised_and_a_different_word_is_not() {
        assert_eq!(nearest("quantun_max", &["overhead", "quantum_max"]), Some("quantum_max"));
        assert_eq!(nearest("zzzzzzzz", &["overhead", "quantum_max"]), None);
    }
}
