//! `cargo xtask policy-report`: what the decisions are worth, from the simulator alone.
//!
//! **Problem.** Whether the engine decides well is a matter of many scenarios, several policies and a few promises.
//! Figures that are copied by hand into a document are wrong a week later.
//!
//! **Approach.** Every figure and plot of `docs/policy-report.md` is computed here. A promise is a [`Bound`] with a
//! key; those that are known to be missed stand with their reasons in `tests/scenarios/data/policy-report.toml`, as do
//! the explanations of lost comparisons. `--check` fails on a miss or loss that is not there, and on a report that
//! differs from what it would be.
//!
//! **Invariants.** The same sources give the same report, whatever the number of cores. Nothing is kept between runs.

mod arms;
mod bound;
mod calibration;
mod detector;
mod fairness;
mod handover;
mod library;
mod page;
mod plot;
mod pool;
mod ratio;
mod regret;
mod roc;
mod story;
mod table;

use std::{
    path::{Path, PathBuf},
    time::Instant,
};

use anyhow::{Context as _, Result, bail};

use self::{library::Library, page::Page};
use crate::cargo::root;

/// Write docs/policy-report.md and its plots anew: what nvshare's decisions are worth, from the simulator alone.
///
/// Takes a few minutes on two cores. The result does not depend on the machine.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Write nothing; fail if a promise is missed that is not known to be, or if the report is out of date.
    #[arg(long)]
    check: bool,
    /// Folder in which the report is written or checked [default: docs].
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
}

/// The report, and the folder of its plots, below the folder of documents.
const REPORT: &str = "policy-report.md";
const PICTURES: &str = "pictures/policy-report";

pub(crate) fn run(args: &Args) -> Result<()> {
    let began = Instant::now();
    let out = args.out.clone().unwrap_or_else(|| root().join("docs"));
    let library = Library::load(&root().join("tests/scenarios"))?;
    let page = compute(&library)?;
    let verdict = page.verdict(&library.known);
    for note in &verdict.notes {
        eprintln!("note: {note}");
    }
    let mut problems = verdict.problems;
    if args.check {
        problems.extend(drift(&out, &page.files(&library.known))?);
    } else {
        write(&out, &page.files(&library.known))?;
        eprintln!("{} is written", out.join(REPORT).display());
    }
    eprintln!("{} bounds, {:.0} s", page.bounds.len(), began.elapsed().as_secs_f64());
    if problems.is_empty() {
        return Ok(());
    }
    for problem in &problems {
        eprintln!("FAILED: {problem}");
    }
    bail!("{} things are not as promised, named above", problems.len())
}

fn compute(library: &Library) -> Result<Page> {
    let mut page = Page::default();
    calibration::section(&mut page)?;
    let runs = arms::run(library);
    regret::section(&mut page, library, &runs);
    detector::section(&mut page, library, &runs)?;
    fairness::section(&mut page, library)?;
    ratio::section(&mut page)?;
    story::section(&mut page)?;
    handover::section(&mut page)?;
    Ok(page)
}

/// The files of a report: path below the folder of documents, and contents.
type Files = Vec<(String, String)>;

fn write(out: &Path, files: &Files) -> Result<()> {
    let pictures = out.join(PICTURES);
    std::fs::create_dir_all(&pictures).with_context(|| format!("creating {}", pictures.display()))?;
    for stale in strangers(out, files)? {
        std::fs::remove_file(&stale).with_context(|| format!("removing {}", stale.display()))?;
    }
    for (name, text) in files {
        let path = out.join(name);
        std::fs::write(&path, text).with_context(|| format!("writing {}", path.display()))?;
    }
    Ok(())
}

/// Plots that no report refers to any more.
fn strangers(out: &Path, files: &Files) -> Result<Vec<PathBuf>> {
    let Ok(entries) = std::fs::read_dir(out.join(PICTURES)) else { return Ok(Vec::new()) };
    let mut strangers = Vec::new();
    for entry in entries {
        let path = entry?.path();
        if !files.iter().any(|(name, _)| out.join(name) == path) {
            strangers.push(path);
        }
    }
    strangers.sort();
    Ok(strangers)
}

/// Where the files differ from what is in the folder.
fn drift(out: &Path, files: &Files) -> Result<Vec<String>> {
    const REMEDY: &str = "`cargo xtask policy-report` writes it anew";
    let mut problems = Vec::new();
    for (name, text) in files {
        let path = out.join(name);
        let Ok(old) = std::fs::read_to_string(&path) else {
            problems.push(format!("{} cannot be read; {REMEDY}", path.display()));
            continue;
        };
        if let Some(line) = first_difference(&old, text) {
            let there = |text: &str| text.lines().nth(line).map_or("(the end)", |line| line).to_owned();
            problems.push(format!(
                "{}:{}: out of date; {REMEDY}\n  there is:    {}\n  should be:   {}",
                path.display(),
                line + 1,
                there(&old),
                there(text)
            ));
        }
    }
    for stranger in strangers(out, files)? {
        problems.push(format!("{} belongs to no report any more; {REMEDY}", stranger.display()));
    }
    Ok(problems)
}

/// The first line, from 0, in which two texts differ.
fn first_difference(old: &str, new: &str) -> Option<usize> {
    if old == new {
        return None;
    }
    let lines = old.lines().zip(new.lines());
    Some(lines.take_while(|(old, new)| old == new).count())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn drift_names_the_file_and_line_and_writing_cures_it() {
        let dir = tempfile::tempdir().unwrap();
        let files = |middle: &str| -> Files {
            vec![
                (REPORT.to_owned(), format!("a\n{middle}\nc\n")),
                (format!("{PICTURES}/x.svg"), "<svg/>".to_owned()),
            ]
        };
        assert_eq!(drift(dir.path(), &files("b")).unwrap().len(), 2, "nothing is there yet");
        write(dir.path(), &files("b")).unwrap();
        assert!(drift(dir.path(), &files("b")).unwrap().is_empty());
        let problems = drift(dir.path(), &files("B")).unwrap();
        assert_eq!(problems.len(), 1);
        assert!(problems[0].contains("policy-report.md:2: out of date"), "{}", problems[0]);
        std::fs::write(dir.path().join(PICTURES).join("old.svg"), "").unwrap();
        assert!(drift(dir.path(), &files("b")).unwrap()[0].contains("old.svg"));
        write(dir.path(), &files("b")).unwrap();
        assert!(drift(dir.path(), &files("b")).unwrap().is_empty());
    }

    #[test]
    fn texts_differ_where_one_of_them_ends() {
        assert_eq!(first_difference("a\nb\n", "a\nb\n"), None);
        assert_eq!(first_difference("a\nb\n", "a\n"), Some(1));
        assert_eq!(first_difference("a\n", "b\n"), Some(0));
    }
}
