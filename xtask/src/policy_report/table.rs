//! Tables in Markdown.

use std::fmt::Write as _;

/// A table; the first column is text, the others are figures.
#[derive(Debug)]
pub(super) struct Table {
    text: String,
    columns: usize,
}

impl Table {
    pub(super) fn new(heads: &[&str]) -> Self {
        let mut text = format!("| {} |\n|---|", heads.join(" | "));
        text.push_str(&"---:|".repeat(heads.len().saturating_sub(1)));
        text.push('\n');
        Self { text, columns: heads.len() }
    }

    /// Cells that are missing stay empty; there may not be more than columns.
    pub(super) fn row(&mut self, cells: &[String]) {
        debug_assert!(cells.len() <= self.columns, "more cells than columns");
        self.text.push('|');
        for column in 0..self.columns {
            let cell = cells.get(column).map_or("", |cell| cell.as_str());
            let _infallible = write!(self.text, " {cell} |");
        }
        self.text.push('\n');
    }

    pub(super) fn finish(self) -> String {
        self.text + "\n"
    }
}

pub(super) fn percent(share: f64) -> String {
    format!("{:.1} %", share * 100.0)
}

/// A difference, with its sign.
pub(super) fn signed_percent(share: f64) -> String {
    let percent = share * 100.0;
    // No negative zero.
    let percent = if percent.abs() < 0.05 { 0.0 } else { percent };
    format!("{percent:+.1} %")
}

pub(super) fn seconds(value: f64) -> String {
    if value < 10.0 { format!("{value:.2} s") } else { format!("{value:.1} s") }
}

/// What never happens takes infinitely long.
pub(super) fn milliseconds(value: f64) -> String {
    if value.is_infinite() {
        return "never".to_owned();
    }
    format!("{:.0} ms", value * 1e3)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_has_as_many_cells_in_every_line() {
        let mut table = Table::new(&["a", "b", "c"]);
        table.row(&["x".to_owned(), "1".to_owned()]);
        let text = table.finish();
        assert_eq!(text, "| a | b | c |\n|---|---:|---:|\n| x | 1 |  |\n\n");
    }

    #[test]
    fn nothing_lost_is_not_shown_as_a_gain() {
        assert_eq!(signed_percent(-0.0001), "+0.0 %");
        assert_eq!(signed_percent(-0.012), "-1.2 %");
    }
}
