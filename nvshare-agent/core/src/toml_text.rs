//! What to tell a person whose TOML file is wrong: where, and what would have been right.

use crate::quantity::nearest;

/// Line and column, from 1, of the byte at `at`.
pub fn place(text: &str, at: usize) -> (usize, usize) {
    let before = text.get(..at).unwrap_or(text);
    let line = before.matches('\n').count() + 1;
    let column = before.rsplit('\n').next().map_or(0, |rest| rest.chars().count()) + 1;
    (line, column)
}

/// The parser's message about the byte at `at`; if it is about an unknown key, says which one was meant.
pub fn explain(text: &str, at: usize, message: &str) -> String {
    let mut quoted = message.split('`').skip(1).step_by(2);
    let Some(unknown) = message.starts_with("unknown field").then(|| quoted.next()).flatten() else {
        return message.to_owned();
    };
    let known: Vec<&str> = quoted.collect();
    let place = table_at(text, at).map(|table| format!(" in {table}")).unwrap_or_default();
    let guess = nearest(unknown, &known).map(|near| format!("; did you mean `{near}`?")).unwrap_or_default();
    format!("unknown key `{unknown}`{place}{guess} (known: {})", known.join(", "))
}

/// The table header above `at`.
fn table_at(text: &str, at: usize) -> Option<&str> {
    text.get(..at)?
        .lines()
        .rev()
        .map(str::trim)
        .find(|line| line.starts_with('['))
        .map(|line| line.split('#').next().unwrap_or(line).trim())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unknown_key_is_placed_in_its_table_even_in_an_array_of_tables() {
        let text = "[gpu]\na = 1\n[[client]] # first\nstrat = 2\n";
        let at = text.find("strat").unwrap();
        let message = explain(text, at, "unknown field `strat`, expected one of `name`, `start`");
        assert_eq!(message, "unknown key `strat` in [[client]]; did you mean `start`? (known: name, start)");
        assert_eq!(place(text, at), (4, 1));
    }
}
