//! Quantities as people write them: `30 s`, `15.5 GiB`, `0.05`.

use serde::{Deserialize, Deserializer, de::Error as _};

use crate::units::{Bytes, Nanos};

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
    let nanos = parse_time(text)?;
    if !(Nanos::MILLI..=Nanos::seconds(86_400)).contains(&nanos) {
        return Err(QuantityError::Range { text: text.to_owned(), range: "1 ms to 24 h" });
    }
    Ok(nanos)
}

/// A point in time or a span: a number and `ms`, `s`, `min` or `h`; from 0 to 1000 h.
pub fn parse_time(text: &str) -> Result<Nanos, QuantityError> {
    const UNITS: [(&str, f64); 4] = [("ms", 1e6), ("s", 1e9), ("min", 60e9), ("h", 3600e9)];
    let nanos = scaled(text, &UNITS).ok_or_else(|| QuantityError::Form {
        text: text.to_owned(),
        units: "ms, s, min, h",
        example: "30 s",
    })?;
    if !(0.0..=3_600_000e9).contains(&nanos) {
        return Err(QuantityError::Range { text: text.to_owned(), range: "0 to 1000 h" });
    }
    Ok(Nanos(nanos.round() as u64))
}

/// A rate in bytes per second: a number and `GB/s`; from 0.001 to 100,000.
pub fn parse_rate(text: &str) -> Result<Bytes, QuantityError> {
    let rate = scaled(text, &[("GB/s", 1e9)]).ok_or_else(|| QuantityError::Form {
        text: text.to_owned(),
        units: "GB/s",
        example: "12.5 GB/s",
    })?;
    if !(1e6..=1e14).contains(&rate) {
        return Err(QuantityError::Range { text: text.to_owned(), range: "0.001 GB/s to 100000 GB/s" });
    }
    Ok(Bytes(rate.round() as u64))
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
    Ok(Bytes(bytes.round() as u64))
}

fn scaled(text: &str, units: &[(&str, f64)]) -> Option<f64> {
    let text = text.trim();
    let split = text.find(|c: char| c.is_ascii_alphabetic())?;
    let (number, unit) = text.split_at(split);
    let number: f64 = number.trim().parse().ok()?;
    let (_, factor) = units.iter().find(|(name, _)| *name == unit)?;
    number.is_finite().then_some(number * factor)
}

/// Reads a duration ([`parse_duration`]).
pub fn duration<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Nanos, D::Error> {
    parse_duration(&String::deserialize(deserializer)?).map_err(D::Error::custom)
}

/// Reads a size ([`parse_size`]).
pub fn optional_size<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Bytes>, D::Error> {
    parse_size(&String::deserialize(deserializer)?).map(Some).map_err(D::Error::custom)
}

/// A share of 1, kept in thousandths.
pub fn ratio_milli<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u32, D::Error> {
    ratio(f64::deserialize(deserializer)?).map_err(D::Error::custom)
}

/// Thousandths of a share that leaves something to either side.
pub fn ratio(share: f64) -> Result<u32, QuantityError> {
    if !(0.001..=0.9).contains(&share) {
        return Err(QuantityError::Range { text: share.to_string(), range: "a share between 0.001 and 0.9" });
    }
    Ok((share * 1000.0).round() as u32)
}

/// Thousandths of a number between 0.001 and 1000.
pub fn milli(number: f64) -> Result<u32, QuantityError> {
    if !(0.001..=1000.0).contains(&number) {
        return Err(QuantityError::Range { text: number.to_string(), range: "a number from 0.001 to 1000" });
    }
    Ok((number * 1000.0).round() as u32)
}

/// A weight, kept in thousandths.
pub fn weight_milli<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u32, D::Error> {
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
        for text in ["5", "5 GiB/s", "0 GB/s", "-1 GB/s", "inf GB/s"] {
            assert!(parse_rate(text).is_err(), "{text}");
        }
    }

    #[test]
    fn times_may_be_zero_and_long_and_rates_have_their_unit() {
        assert_eq!(parse_time("0 s"), Ok(Nanos::ZERO));
        assert_eq!(parse_time("48 h"), Ok(Nanos::seconds(48 * 3600)));
        assert!(parse_time("-1 s").is_err());
        assert_eq!(parse_rate("12.5 GB/s"), Ok(Bytes(12_500_000_000)));
    }

    #[test]
    fn a_typing_error_is_recognised_and_a_different_word_is_not() {
        assert_eq!(nearest("quantun_max", &["overhead", "quantum_max"]), Some("quantum_max"));
        assert_eq!(nearest("zzzzzzzz", &["overhead", "quantum_max"]), None);
    }
}
