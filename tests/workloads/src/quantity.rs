//! Sizes and times as the command line takes them: `400MiB`, `1.5 GiB`, `20ms`, `4s`.

use std::time::Duration;

fn split(text: &str) -> Result<(f64, &str), String> {
    let text = text.trim();
    let end = text.find(|c: char| !(c.is_ascii_digit() || c == '.')).unwrap_or(text.len());
    let number: f64 =
        text[..end].parse().map_err(|_unreadable| format!("`{text}` does not start with a number"))?;
    Ok((number, text[end..].trim()))
}

/// Bytes.
pub(crate) fn size(text: &str) -> Result<u64, String> {
    let (number, unit) = split(text)?;
    let scale = match unit {
        "B" | "" => 1.0,
        "KiB" => 1024.0,
        "MiB" => f64::from(1 << 20),
        "GiB" => f64::from(1 << 30),
        "MB" => 1e6,
        "GB" => 1e9,
        _ => return Err(format!("`{unit}` is not B, KiB, MiB, GiB, MB or GB")),
    };
    Ok((number * scale) as u64)
}

/// A length of time.
pub(crate) fn time(text: &str) -> Result<Duration, String> {
    let (number, unit) = split(text)?;
    let scale = match unit {
        "us" => 1e-6,
        "ms" => 1e-3,
        "s" => 1.0,
        "min" => 60.0,
        _ => return Err(format!("`{unit}` is not us, ms, s or min: write for example 20ms")),
    };
    Ok(Duration::from_secs_f64(number * scale))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_and_times_are_read_with_their_units() {
        assert_eq!(size("400MiB"), Ok(400 << 20));
        assert_eq!(size("1.5 GiB"), Ok(3 << 29));
        assert_eq!(time("20ms"), Ok(Duration::from_millis(20)));
        assert_eq!(time("4s"), Ok(Duration::from_secs(4)));
    }

    #[test]
    fn a_time_without_a_unit_is_refused() {
        assert!(time("20").is_err());
        assert!(size("many").is_err());
    }
}
