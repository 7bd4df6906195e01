//! What paired rounds say.
//!
//! All bounds are one-sided, at 95 %. With `d` the logarithms of the ratios of `n` pairs, `m` their mean and `s` their standard
//! deviation:
//! - **mean**: `exp(m ± t(n−1) · s / √n)`, the bound of the geometric mean (Student's t);
//! - **median**: the `k`-th smallest ratio, `k` being the least with `P(Binomial(n, ½) ≤ k−1) ≥ 0.95`: no assumption about the
//!   distribution, and a few disturbed rounds do not move it;
//! - **instances**: the same question with processes instead of rounds as the sample. With `A` and `B` the means of the logarithms in
//!   each process of an arm and of the base, `exp(Ā − B̄ + t(ν) · √(s²_A / a + s²_B / b))` (Welch). It is wide, as
//!   processes are few, and honest about what differs from one start to the next.

use std::collections::BTreeMap;

/// One value of a round.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sample {
    pub(super) round: usize,
    pub(super) instance: usize,
    pub(super) value: f64,
}

/// An arm against the base.
#[derive(Clone, Debug, serde::Serialize)]
pub(super) struct Comparison {
    pub(super) pairs: usize,
    pub(super) base_median: f64,
    pub(super) median: f64,
    /// Median of the ratios of the pairs.
    pub(super) ratio_median: f64,
    /// Geometric mean of the ratios of the pairs.
    pub(super) ratio_mean: f64,
    /// Bounds of the mean, from rounds.
    pub(super) ratio_lower95: Option<f64>,
    pub(super) ratio_upper95: Option<f64>,
    /// Upper bound of the median.
    pub(super) ratio_median_upper95: Option<f64>,
    /// Upper bound of the mean, from processes.
    pub(super) ratio_instances_upper95: Option<f64>,
    /// Median of the differences of the pairs, and the upper bound of their mean.
    pub(super) difference_median: f64,
    pub(super) difference_upper95: Option<f64>,
}

/// Student's t at 95 %, one-sided, for degrees of freedom 1 to 30.
const T95: [f64; 30] = [
    6.314, 2.920, 2.353, 2.132, 2.015, 1.943, 1.895, 1.860, 1.833, 1.812, 1.796, 1.782, 1.771, 1.761, 1.753,
    1.746, 1.740, 1.734, 1.729, 1.725, 1.721, 1.717, 1.714, 1.711, 1.708, 1.706, 1.703, 1.701, 1.699, 1.697,
];

/// The quantile for `degrees` of freedom, never too small; `None` without any.
fn t95(degrees: f64) -> Option<f64> {
    match degrees as usize {
        0 => None,
        n @ 1..=30 => T95.get(n - 1).copied(),
        31..40 => Some(1.697),
        40..60 => Some(1.684),
        60..120 => Some(1.671),
        _ => Some(1.658),
    }
}

fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len() as f64
}

/// Of the sample.
fn variance(values: &[f64]) -> f64 {
    let middle = mean(values);
    values.iter().map(|value| (value - middle).powi(2)).sum::<f64>() / (values.len() as f64 - 1.0)
}

/// The middle value; of an even number, the mean of the two middle ones. NaN of none.
pub(crate) fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let half = sorted.len() / 2;
    match (sorted.len(), sorted.get(half)) {
        (0, _) | (_, None) => f64::NAN,
        (n, Some(&upper)) if n % 2 == 1 => upper,
        (_, Some(&upper)) => f64::midpoint(sorted[half - 1], upper),
    }
}

/// `t · s / √n` of a sample.
fn margin(values: &[f64]) -> Option<f64> {
    let n = values.len() as f64;
    Some(t95(n - 1.0)? * (variance(values) / n).sqrt())
}

/// Upper bound of the median, by order statistics.
fn median_upper(values: &[f64]) -> Option<f64> {
    let n = values.len();
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    // P(Binomial(n, ½) ≤ k−1), summed up from the terms; by their logarithms, as the first are too small for a number.
    let mut term = n as f64 * 0.5_f64.ln();
    let mut sum = 0.0;
    for (below, &value) in sorted.iter().enumerate() {
        sum += term.exp();
        if sum >= 0.95 {
            return Some(value);
        }
        term += ((n - below) as f64 / (below as f64 + 1.0)).ln();
    }
    None
}

/// Means of the logarithms in each process.
fn by_instance(samples: &[Sample]) -> Vec<f64> {
    let mut logs: BTreeMap<usize, Vec<f64>> = BTreeMap::new();
    for sample in samples {
        logs.entry(sample.instance).or_default().push(sample.value.ln());
    }
    logs.values().map(|values| mean(values)).collect()
}

fn instances_upper(base: &[Sample], arm: &[Sample]) -> Option<f64> {
    let (base, arm) = (by_instance(base), by_instance(arm));
    if base.len() < 2 || arm.len() < 2 {
        return None;
    }
    let part = |values: &[f64]| variance(values) / values.len() as f64;
    let (of_base, of_arm) = (part(&base), part(&arm));
    let sum = of_base + of_arm;
    let degrees = if sum > 0.0 {
        sum.powi(2)
            / (of_base.powi(2) / (base.len() as f64 - 1.0) + of_arm.powi(2) / (arm.len() as f64 - 1.0))
    } else {
        (base.len() + arm.len() - 2) as f64
    };
    Some((mean(&arm) - mean(&base) + t95(degrees)? * sum.sqrt()).exp())
}

/// Compares the rounds that both have; `None` if there is no such round.
pub(super) fn compare(base: &[Sample], arm: &[Sample]) -> Option<Comparison> {
    let of_round: BTreeMap<usize, f64> = base.iter().map(|sample| (sample.round, sample.value)).collect();
    let pairs: Vec<(f64, f64)> = arm
        .iter()
        .filter_map(|sample| Some((*of_round.get(&sample.round)?, sample.value)))
        .filter(|&(base, arm)| base > 0.0 && arm > 0.0)
        .collect();
    if pairs.is_empty() {
        return None;
    }
    let ratios: Vec<f64> = pairs.iter().map(|(base, arm)| arm / base).collect();
    let logs: Vec<f64> = ratios.iter().map(|ratio| ratio.ln()).collect();
    let differences: Vec<f64> = pairs.iter().map(|(base, arm)| arm - base).collect();
    let bases: Vec<f64> = pairs.iter().map(|pair| pair.0).collect();
    let arms: Vec<f64> = pairs.iter().map(|pair| pair.1).collect();
    let middle = mean(&logs);
    Some(Comparison {
        pairs: pairs.len(),
        base_median: median(&bases),
        median: median(&arms),
        ratio_median: median(&ratios),
        ratio_mean: middle.exp(),
        ratio_lower95: margin(&logs).map(|margin| (middle - margin).exp()),
        ratio_upper95: margin(&logs).map(|margin| (middle + margin).exp()),
        ratio_median_upper95: median_upper(&ratios),
        ratio_instances_upper95: instances_upper(base, arm),
        difference_median: median(&differences),
        difference_upper95: margin(&differences).map(|margin| mean(&differences) + margin),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn samples(values: &[f64], instances: usize) -> Vec<Sample> {
        let with_rounds = values.iter().enumerate();
        with_rounds.map(|(round, &value)| Sample { round, instance: round % instances, value }).collect()
    }

    fn near(a: Option<f64>, b: f64) -> bool {
        a.is_some_and(|a| (a - b).abs() < 1e-3)
    }

    #[test]
    fn bounds_agree_with_the_textbook() {
        // Mean 2, variance 1, n = 3: 2.920 · 1 / √3.
        assert!(near(margin(&[1.0, 2.0, 3.0]), 1.6859));
        // Of 30 values the twentieth bounds the median; of 5 the fifth; of 4 none does.
        let thirty: Vec<f64> = (1..=30).map(f64::from).collect();
        assert_eq!(median_upper(&thirty), Some(20.0));
        assert_eq!(median_upper(&[1.0, 2.0, 3.0, 4.0, 5.0]), Some(5.0));
        assert_eq!(median_upper(&[1.0, 2.0, 3.0, 4.0]), None);
        // 600 and 1.645 standard deviations of 17.3: more terms than a number can hold the first of.
        let many: Vec<f64> = (1..=1200).map(f64::from).collect();
        assert_eq!(median_upper(&many), Some(629.0));
    }

    #[test]
    fn equal_arms_are_equal_and_a_constant_factor_is_found_exactly() {
        let base = samples(&[10.0, 12.0, 9.0, 11.0, 10.5, 9.5], 3);
        let slower: Vec<Sample> =
            base.iter().map(|sample| Sample { value: sample.value * 1.2, ..*sample }).collect();
        let same = compare(&base, &base).expect("pairs");
        assert_eq!((same.ratio_median, same.ratio_upper95), (1.0, Some(1.0)));
        let found = compare(&base, &slower).expect("pairs");
        assert!(near(found.ratio_upper95, 1.2) && near(Some(found.ratio_median), 1.2));
        // The processes of the base differ, so from processes alone less can be said.
        assert!(found.ratio_instances_upper95.is_some_and(|bound| bound > 1.2));
    }

    #[test]
    fn rounds_are_paired_by_their_number_whatever_is_missing() {
        let base = samples(&[1.0, 100.0, 1.0], 1);
        let mut arm = samples(&[2.0, 200.0, 2.0], 1);
        arm.remove(0);
        let found = compare(&base, &arm).expect("pairs");
        assert_eq!((found.pairs, found.ratio_median), (2, 2.0));
        assert!(compare(&base, &[]).is_none());
    }

    #[test]
    fn one_disturbed_round_moves_the_mean_and_not_the_median() {
        let base = samples(&[1.0; 30], 3);
        let mut values = [1.0; 30];
        values[7] = 50.0;
        let found = compare(&base, &samples(&values, 3)).expect("pairs");
        assert_eq!(found.ratio_median_upper95, Some(1.0));
        assert!(found.ratio_upper95.is_some_and(|bound| bound > 1.2));
    }

    #[test]
    fn processes_that_differ_widen_the_bound_from_processes() {
        let base = samples(&[1.0, 1.0, 1.0, 1.0, 1.0, 1.0], 3);
        let arm = samples(&[1.0, 1.1, 1.2, 1.0, 1.1, 1.2], 3);
        let bound = compare(&base, &arm).and_then(|found| found.ratio_instances_upper95);
        // Means 0, ln 1.1, ln 1.2: 0.0925 + 2.920 · 0.0914 / √3.
        assert!(near(bound, (0.0925_f64 + 2.920 * 0.09138 / 3.0_f64.sqrt()).exp()), "{bound:?}");
    }
}
