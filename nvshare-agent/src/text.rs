//! Figures and names as people read them, short enough for a table.

/// A text of somebody else's that can be printed anywhere: what moves the cursor, turns the direction of writing or
/// takes no room becomes `?`.
pub fn clean(text: &str) -> String {
    let hidden = |c: char| {
        c.is_control()
            || matches!(c, '\u{ad}' | '\u{61c}' | '\u{180e}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}'
                | '\u{2060}'..='\u{206f}' | '\u{fe00}'..='\u{fe0f}' | '\u{feff}' | '\u{fff9}'..='\u{fffb}'
                | '\u{e0000}'..='\u{e0fff}')
    };
    text.chars().map(|c| if hidden(c) { '?' } else { c }).collect()
}

/// Bytes in three or four digits.
pub fn bytes(count: f64) -> String {
    const UNITS: [(&str, f64); 4] =
        [("TiB", 1_099_511_627_776.0), ("GiB", 1_073_741_824.0), ("MiB", 1_048_576.0), ("KiB", 1024.0)];
    for (unit, size) in UNITS {
        let value = count / size;
        if value >= 0.9995 {
            return if value < 9.95 { format!("{value:.1} {unit}") } else { format!("{value:.0} {unit}") };
        }
    }
    format!("{count:.0} B")
}

/// Bytes per second.
pub fn rate(per_second: f64) -> String {
    format!("{}/s", bytes(per_second))
}

/// A time span in three or four digits.
pub fn seconds(seconds: f64) -> String {
    match seconds {
        ..0.0995 => format!("{:.0} ms", seconds.max(0.0) * 1e3),
        ..9.95 => format!("{seconds:.1} s"),
        ..120.0 => format!("{seconds:.0} s"),
        ..7200.0 => format!("{:.0} min", seconds / 60.0),
        ..172_800.0 => format!("{:.0} h", seconds / 3600.0),
        _ => format!("{:.0} d", seconds / 86_400.0),
    }
}

/// A share in percent.
pub fn percent(share: f64) -> String {
    format!("{:.0} %", share * 100.0)
}

/// The text of a figure, or a dash for one that nobody knows.
pub fn or_dash(value: Option<f64>, text: fn(f64) -> String) -> String {
    value.map_or_else(|| "-".to_owned(), text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_short_and_keep_their_unit_at_its_border() {
        let mib = f64::from(1 << 20);
        let texts = [0.0, 1023.0, 1024.0, mib, 9.94 * mib, 9.96 * mib, 1023.9 * mib, 1536.0 * mib].map(bytes);
        assert_eq!(texts, ["0 B", "1023 B", "1.0 KiB", "1.0 MiB", "9.9 MiB", "10 MiB", "1.0 GiB", "1.5 GiB"]);
        let texts = [0.0, 0.05, 0.0996, 9.94, 9.96, 119.0, 121.0, 7300.0, 200_000.0].map(seconds);
        assert_eq!(texts, ["0 ms", "50 ms", "0.1 s", "9.9 s", "10 s", "119 s", "2 min", "2 h", "2 d"]);
    }

    #[test]
    fn a_name_cannot_move_the_cursor_or_turn_the_line() {
        assert_eq!(clean("a\u{1b}[2Jb\u{202e}c\u{200b}"), "a?[2Jb?c?");
        assert_eq!(clean("größe 模型"), "größe 模型");
    }
}
