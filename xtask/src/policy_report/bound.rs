//! What was promised, and what is known to be missed.

use std::collections::BTreeMap;

use serde::Deserialize;

/// A promise and what became of it.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Bound {
    /// Names it in the list of known misses.
    pub(super) key: String,
    /// What was promised.
    pub(super) promise: String,
    /// What was found.
    pub(super) found: String,
    pub(super) met: bool,
}

impl Bound {
    pub(super) fn new(key: impl Into<String>, promise: impl Into<String>, found: String, met: bool) -> Self {
        Self { key: key.into(), promise: promise.into(), found, met }
    }

    /// `value` may be at most `limit`; both are shown in the same way. What is no number misses.
    pub(super) fn at_most(
        key: impl Into<String>,
        what: &str,
        value: f64,
        limit: f64,
        show: impl Fn(f64) -> String,
    ) -> Self {
        Self::new(key, format!("{what} ≤ {}", show(limit)), show(value), value <= limit)
    }
}

/// `tests/scenarios/data/policy-report.toml`.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Known {
    /// Why other policies are faster.
    #[serde(default)]
    pub(super) loss: Vec<Explained>,
    /// By key, why a bound is missed.
    #[serde(default)]
    pub(super) missed: BTreeMap<String, String>,
}

/// Why these policies are faster than auto in these scenarios.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Explained {
    pub(super) why: String,
    pub(super) scenarios: Vec<String>,
    pub(super) against: Vec<String>,
}

/// A policy that is faster than auto in a scenario.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Lost {
    pub(super) scenario: String,
    pub(super) policy: String,
}

impl Known {
    /// The numbers, from 1, of what explains a loss.
    pub(super) fn reasons(&self, lost: &Lost) -> Vec<usize> {
        let fits = |known: &Explained| {
            known.scenarios.contains(&lost.scenario) && known.against.contains(&lost.policy)
        };
        (1..).zip(&self.loss).filter(|(_, known)| fits(known)).map(|(number, _)| number).collect()
    }
}

/// What `--check` has to say.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Verdict {
    pub(super) problems: Vec<String>,
    pub(super) notes: Vec<String>,
}

/// Bounds and lost comparisons against what is known: a new miss or loss is a problem, one that is over is worth a note.
pub(super) fn verdict(bounds: &[Bound], lost: &[Lost], known: &Known) -> Verdict {
    let mut verdict = Verdict::default();
    for bound in bounds.iter().filter(|bound| !bound.met && !known.missed.contains_key(&bound.key)) {
        verdict.problems.push(format!(
            "`{}`: {}; found {} (if this has to be, say why under [missed])",
            bound.key, bound.promise, bound.found
        ));
    }
    for Lost { scenario, policy } in lost.iter().filter(|lost| known.reasons(lost).is_empty()) {
        verdict
            .problems
            .push(format!("{policy} is faster than auto in `{scenario}`; say why under [[loss]]"));
    }
    for key in known.missed.keys() {
        match bounds.iter().find(|bound| bound.key == *key) {
            None => verdict.problems.push(format!("[missed] names `{key}`, which is no bound")),
            Some(bound) if bound.met => {
                verdict.notes.push(format!("`{key}` is met ({}): take it out of [missed]", bound.found));
            }
            Some(_) => {}
        }
    }
    for known in &known.loss {
        for scenario in &known.scenarios {
            let still = |lost: &&Lost| lost.scenario == *scenario && known.against.contains(&lost.policy);
            if !lost.iter().any(|lost| still(&lost)) {
                let against = known.against.join(", ");
                verdict.notes.push(format!(
                    "`{scenario}` loses nothing to {against} any more: take it out of [[loss]]"
                ));
            }
        }
    }
    verdict
}

#[cfg(test)]
mod tests {
    use super::*;

    fn percent(value: f64) -> String {
        format!("{value:.0} %")
    }

    #[test]
    fn a_bound_is_met_at_its_limit_and_missed_beyond_it_and_by_what_is_no_number() {
        assert!(Bound::at_most("k", "error", 5.0, 5.0, percent).met);
        let missed = Bound::at_most("k", "error", 5.1, 5.0, percent);
        assert!(!missed.met);
        assert_eq!((missed.promise.as_str(), missed.found.as_str()), ("error ≤ 5 %", "5 %"));
        assert!(!Bound::at_most("k", "error", f64::NAN, 5.0, percent).met);
    }

    #[test]
    fn only_a_miss_and_a_loss_that_nobody_explained_are_problems() {
        let bounds = [
            Bound::at_most("met", "x", 1.0, 2.0, percent),
            Bound::at_most("known", "x", 3.0, 2.0, percent),
            Bound::at_most("new", "x", 3.0, 2.0, percent),
        ];
        let text = |key: &str| (key.to_owned(), "because".to_owned());
        let lost =
            |scenario: &str, policy: &str| Lost { scenario: scenario.to_owned(), policy: policy.to_owned() };
        let told = Explained {
            why: "because".to_owned(),
            scenarios: vec!["told".to_owned(), "over".to_owned()],
            against: vec!["nixie".to_owned()],
        };
        let known = Known {
            loss: vec![told],
            missed: BTreeMap::from([text("known"), text("met"), text("misspelt")]),
        };
        let losses = [lost("told", "nixie"), lost("told", "shared"), lost("untold", "nixie")];
        let verdict = verdict(&bounds, &losses, &known);
        let has = |list: &[String], word: &str| list.iter().filter(|line| line.contains(word)).count();
        assert_eq!(verdict.problems.len(), 4, "{:?}", verdict.problems);
        for word in [
            "`new`",
            "shared is faster than auto in `told`",
            "nixie is faster than auto in `untold`",
            "`misspelt`",
        ] {
            assert_eq!(has(&verdict.problems, word), 1, "{word}");
        }
        assert_eq!(verdict.notes.len(), 2, "{:?}", verdict.notes);
        assert_eq!((has(&verdict.notes, "`met`"), has(&verdict.notes, "`over`")), (1, 1));
    }
}
