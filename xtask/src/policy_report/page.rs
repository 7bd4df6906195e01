//! The report as it grows: text, plots, bounds.

use std::fmt::Write as _;

use super::{
    Files, PICTURES, REPORT,
    bound::{self, Bound, Known, Lost, Verdict},
    table::Table,
};

const HEAD: &str = "# What the decisions are worth\n\n\
    Written by `cargo xtask policy-report`; change nothing by hand. Every figure comes from the paging simulator \
    (`cargo xtask simulate`) and is the same on every machine. `--check` fails if a promise is missed that is not listed \
    below, or if this page is out of date.\n\n";

#[derive(Debug, Default)]
pub(super) struct Page {
    text: String,
    pictures: Files,
    pub(super) bounds: Vec<Bound>,
    /// Lost comparisons.
    pub(super) lost: Vec<Lost>,
}

impl Page {
    pub(super) fn heading(&mut self, text: &str) {
        self.paragraph(&format!("## {text}"));
    }

    pub(super) fn paragraph(&mut self, text: &str) {
        self.text.push_str(text);
        self.text.push_str("\n\n");
    }

    pub(super) fn table(&mut self, table: Table) {
        self.text.push_str(&table.finish());
    }

    /// A plot, with what it shows for who cannot see it.
    pub(super) fn picture(&mut self, name: &str, shows: &str, svg: String) {
        let path = format!("{PICTURES}/{name}.svg");
        self.paragraph(&format!("![{shows}]({path})"));
        self.pictures.push((path, svg));
    }

    pub(super) fn verdict(&self, known: &Known) -> Verdict {
        bound::verdict(&self.bounds, &self.lost, known)
    }

    /// All that is written, the report first.
    pub(super) fn files(&self, known: &Known) -> Files {
        let report = format!("{HEAD}{}{}", self.promises(known), self.text.trim_end());
        let mut files = vec![(REPORT.to_owned(), report + "\n")];
        files.extend(self.pictures.iter().cloned());
        files
    }

    fn promises(&self, known: &Known) -> String {
        let missed: Vec<&Bound> = self.bounds.iter().filter(|bound| !bound.met).collect();
        let mut text = format!(
            "## Promises\n\n{} bounds are checked, {} are met, {} are missed.\n\n",
            self.bounds.len(),
            self.bounds.len() - missed.len(),
            missed.len()
        );
        if !missed.is_empty() {
            text.push_str("### Missed\n\n");
            for bound in missed {
                let why = known.missed.get(&bound.key).map_or("**not explained**", String::as_str);
                let _infallible = writeln!(
                    text,
                    "- **{}**: {}; found **{}**. {why}",
                    bound.key, bound.promise, bound.found
                );
            }
            text.push('\n');
        }
        text.push_str("### All\n\nPromises made of every scenario are one line here; those that miss are named above.\n\n");
        let mut table = Table::new(&["bound", "promise", "found"]);
        for (key, promise, found) in self.groups() {
            table.row(&[key, promise, found]);
        }
        text.push_str(&table.finish());
        text
    }

    /// Bounds with one name before the colon are one line.
    fn groups(&self) -> Vec<(String, String, String)> {
        let mut groups: Vec<(String, Vec<&Bound>)> = Vec::new();
        for bound in &self.bounds {
            let name = bound.key.split(": ").next().unwrap_or_default();
            match groups.iter_mut().find(|(other, _)| other == name) {
                Some((_, members)) => members.push(bound),
                None => groups.push((name.to_owned(), vec![bound])),
            }
        }
        let shown = |(name, members): (String, Vec<&Bound>)| {
            let met = members.iter().filter(|bound| bound.met).count();
            let mark = if met == members.len() { "" } else { " **missed**" };
            if let [only] = members[..] {
                return (name, only.promise.clone(), format!("{}{mark}", only.found));
            }
            (name, "as named in its section".to_owned(), format!("{met} of {} met{mark}", members.len()))
        };
        groups.into_iter().map(shown).collect()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    #[test]
    fn a_missed_bound_stands_in_the_report_with_its_reason() {
        let mut page = Page::default();
        page.heading("Regret");
        page.bounds.push(Bound::new("worst: a", "≤ 1", "2".to_owned(), false));
        page.bounds.push(Bound::new("worst: b", "≤ 1", "0".to_owned(), true));
        page.picture("x", "a plot", "<svg/>".to_owned());
        let text = |key: &str, why: &str| BTreeMap::from([(key.to_owned(), why.to_owned())]);
        let known = Known { loss: Vec::new(), missed: text("worst: a", "It is hard.") };
        let files = page.files(&known);
        assert_eq!(files[1], ("pictures/policy-report/x.svg".to_owned(), "<svg/>".to_owned()));
        let report = &files[0].1;
        for line in [
            "- **worst: a**: ≤ 1; found **2**. It is hard.",
            "## Regret",
            "| worst | as named in its section | 1 of 2 met **missed** |",
            "2 bounds are checked, 1 are met, 1 are missed.",
            "![a plot](pictures/policy-report/x.svg)",
        ] {
            assert!(report.contains(line), "{line}\n{report}");
        }
        assert!(page.files(&Known::default())[0].1.contains("**not explained**"));
        assert_eq!(page.verdict(&Known::default()).problems.len(), 1);
    }
}
