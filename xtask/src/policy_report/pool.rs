//! Many runs, on all cores, with a sign of life.

use std::{
    sync::{
        Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

/// Nobody waits longer than this without a sign of life.
const QUIET: Duration = Duration::from_secs(2);

/// Does the work for every item, in any order; the results are in the order of the items.
pub(super) fn all<T: Sync, R: Send>(what: &str, items: &[T], work: impl Fn(&T) -> R + Sync) -> Vec<R> {
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let next = AtomicUsize::new(0);
    let done: Mutex<(Vec<(usize, R)>, Instant)> = Mutex::new((Vec::new(), Instant::now()));
    let began = Instant::now();
    std::thread::scope(|scope| {
        for _ in 0..cores.min(items.len()) {
            scope.spawn(|| {
                while let index = next.fetch_add(1, Ordering::Relaxed)
                    && let Some(item) = items.get(index)
                {
                    let result = work(item);
                    let mut done = done.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
                    done.0.push((index, result));
                    if done.1.elapsed() >= QUIET {
                        done.1 = Instant::now();
                        let seconds = began.elapsed().as_secs_f64();
                        eprintln!("{what}: {} of {} runs, {seconds:.0} s", done.0.len(), items.len());
                    }
                }
            });
        }
    });
    let (mut results, _) = done.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
    eprintln!("{what}: {} runs, {:.0} s", results.len(), began.elapsed().as_secs_f64());
    results.sort_by_key(|(index, _)| *index);
    results.into_iter().map(|(_, result)| result).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_are_in_the_order_of_the_items_whoever_is_done_first() {
        let items: Vec<usize> = (0..100).collect();
        let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        let others = AtomicUsize::new(0);
        let results = all("test", &items, |&item| {
            // With a second core the first item is done after some others.
            while item == 0 && cores > 1 && others.load(Ordering::Relaxed) < 10 {
                std::thread::yield_now();
            }
            others.fetch_add(1, Ordering::Relaxed);
            item * 2
        });
        assert_eq!(results, items.iter().map(|item| item * 2).collect::<Vec<_>>());
        assert!(all("none", &[] as &[usize], |&item| item).is_empty());
    }
}
