//! What the annotations of a pod mean for its clients.

use std::collections::BTreeMap;

use nvshare_core::{Bytes, quantity::parse_size};

use crate::config::overrides::Rule;

/// What all our annotations begin with.
pub const PREFIX: &str = "nvshare.com/";
/// The pod's share of GPU time; 1 is the default.
pub const WEIGHT: &str = "nvshare.com/weight";
/// A higher class runs first; 0 is the default.
pub const PRIORITY: &str = "nvshare.com/priority";
/// What each of its clients may hold on each GPU.
pub const MEMORY_LIMIT: &str = "nvshare.com/memory-limit";

/// How far an annotation may raise a share: whoever makes a pod writes on it what he likes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bounds {
    /// The largest weight, in thousandths of the default.
    pub weight_milli: u32,
    /// The highest class.
    pub priority: i32,
}

/// What is written on a pod; `None` where nothing is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Terms {
    /// Share in thousandths of the default.
    pub weight_milli: Option<u32>,
    /// Class.
    pub priority: Option<i32>,
    /// Bytes that a client may hold on each GPU.
    pub memory_limit: Option<Bytes>,
}

impl Terms {
    /// Reads annotations. What is wrong or beyond the bounds comes back as lines for the log.
    pub fn of(annotations: &BTreeMap<String, String>, bounds: Bounds) -> (Self, Vec<String>) {
        let mut terms = Self::default();
        let mut complaints = Vec::new();
        for (name, text) in annotations.iter().filter(|(name, _)| name.starts_with(PREFIX)) {
            let text = text.trim();
            let ignored =
                |expected: &str| format!("annotation {name}: {text:?} is ignored: expected {expected}");
            match name.as_str() {
                WEIGHT => {
                    match text.parse::<f64>().map(|weight| weight * 1000.0) {
                        Ok(milli) if (1.0..=1e6).contains(&milli) => {
                            let milli = milli.round() as u32;
                            if milli > bounds.weight_milli {
                                let most = f64::from(bounds.weight_milli) / 1000.0;
                                complaints.push(format!("annotation {name}: {text} is cut to {most}, the configuration's weight_max"));
                            }
                            terms.weight_milli = Some(milli.min(bounds.weight_milli));
                        }
                        Ok(_) | Err(_) => complaints.push(ignored("a number from 0.001 to 1000")),
                    }
                }
                PRIORITY => {
                    match text.parse::<i32>() {
                        Ok(priority) => {
                            if priority > bounds.priority {
                                let most = bounds.priority;
                                complaints.push(format!("annotation {name}: {text} is cut to {most}, the configuration's priority_max"));
                            }
                            terms.priority = Some(priority.min(bounds.priority));
                        }
                        Err(_) => complaints.push(ignored("a whole number")),
                    }
                }
                // Kubernetes writes Gi where we write GiB.
                MEMORY_LIMIT => match parse_size(text).or_else(|_| parse_size(&format!("{text}B"))) {
                    Ok(limit) => terms.memory_limit = Some(limit),
                    Err(_) => complaints.push(ignored("a size, as in 16Gi")),
                },
                _ => complaints.push(format!(
                    "annotation {name} is not known; there are {WEIGHT}, {PRIORITY} and {MEMORY_LIMIT}"
                )),
            }
        }
        (terms, complaints)
    }

    /// The same as a rule: what a client asks for lowers it further.
    pub fn rule(&self) -> Rule {
        Rule { weight: self.weight_milli, priority: self.priority, memory_limit: self.memory_limit }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BOUNDS: Bounds = Bounds { weight_milli: 2000, priority: 1 };

    fn read(pairs: &[(&str, &str)]) -> (Terms, Vec<String>) {
        let annotations =
            pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        Terms::of(&annotations, BOUNDS)
    }

    #[test]
    fn annotations_are_read_and_those_of_others_are_not() {
        let (terms, complaints) = read(&[
            (WEIGHT, "1.5"),
            (PRIORITY, "-2"),
            (MEMORY_LIMIT, "16Gi"),
            ("kubernetes.io/config.source", "api"),
        ]);
        assert_eq!(complaints, Vec::<String>::new());
        assert_eq!(
            terms,
            Terms { weight_milli: Some(1500), priority: Some(-2), memory_limit: Some(Bytes::gib(16)) }
        );
        for (text, bytes) in
            [("512Mi", Bytes::mib(512)), ("8 GiB", Bytes::gib(8)), ("2G", Bytes(2_000_000_000))]
        {
            assert_eq!(read(&[(MEMORY_LIMIT, text)]).0.memory_limit, Some(bytes), "{text}");
        }
        assert_eq!(read(&[]), (Terms::default(), vec![]));
    }

    #[test]
    fn a_pod_gets_no_more_than_the_administrator_allows() {
        let (terms, complaints) = read(&[(WEIGHT, "100"), (PRIORITY, "9")]);
        assert_eq!((terms.weight_milli, terms.priority), (Some(2000), Some(1)));
        assert!(complaints.iter().any(|line| line.contains("weight_max")), "{complaints:?}");
        assert!(complaints.iter().any(|line| line.contains("priority_max")), "{complaints:?}");
    }

    #[test]
    fn nonsense_is_named_and_changes_nothing() {
        for (name, text) in [
            (WEIGHT, "0"),
            (WEIGHT, "-1"),
            (WEIGHT, "NaN"),
            (WEIGHT, "inf"),
            (WEIGHT, "much"),
            (PRIORITY, "1.5"),
            (MEMORY_LIMIT, "0"),
            (MEMORY_LIMIT, "16"),
            (MEMORY_LIMIT, "-1Gi"),
            ("nvshare.com/wieght", "1"),
        ] {
            let (terms, complaints) = read(&[(name, text)]);
            assert_eq!(terms, Terms::default(), "{name}: {text}");
            assert_eq!(complaints.len(), 1, "{name}: {text}");
            assert!(complaints[0].contains(name));
        }
    }

    #[test]
    fn a_clients_own_wish_lowers_what_its_pod_has() {
        let (terms, _) = read(&[(WEIGHT, "2"), (PRIORITY, "1")]);
        assert_eq!(
            (terms.rule().weight_milli(1000), terms.rule().weight_milli(250), terms.rule().weight_milli(0)),
            (2000, 500, 1)
        );
        assert_eq!((terms.rule().priority(0), terms.rule().priority(-3)), (1, -2));
        assert_eq!(
            (Terms::default().rule().weight_milli(400), Terms::default().rule().priority(-1)),
            (400, -1)
        );
        let low = Terms { priority: Some(i32::MIN), ..Terms::default() };
        assert_eq!(low.rule().priority(-1), i32::MIN);
    }
}
