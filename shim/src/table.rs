//! Which driver functions are hooked, and how an answer of the driver is turned into a wrapper.
//!
//! **Problem.** One name stands for several functions: `cuGetProcAddress("cuMemPrefetchAsync")` gives a
//! function of other arguments to a program built for CUDA 12.2 than to one built for 8.0, and another one
//! again with per-thread default streams.
//!
//! **Approach.** Every [`Row`] describes one function: its ELF name, the name and the version at which
//! `cuGetProcAddress` knows it, its stream flavour, and its wrapper. The wrapper is chosen by *identity*: the
//! driver is asked first, and its answer is compared with what the driver itself gives for each row. What
//! matches no row is newer than this table and goes to the program as it is.
//!
//! **Invariants.** A wrapper only ever calls the function of its own row. A row's range of versions ends where
//! the driver begins to answer with another function, so it is never written down and cannot be wrong.

use std::{
    ffi::{CStr, c_void},
    ptr,
    sync::atomic::{AtomicPtr, Ordering},
};

use crate::{
    abi::{Flavour, PER_THREAD_STREAM, Ptr},
    hooks, loader,
};

/// The driver's own function behind a wrapper.
#[derive(Debug)]
pub(crate) struct Real {
    symbol: &'static CStr,
    address: AtomicPtr<c_void>,
}

impl Real {
    pub(crate) const fn new(symbol: &'static CStr) -> Self {
        Self { symbol, address: AtomicPtr::new(ptr::null_mut()) }
    }

    pub(crate) const fn symbol(&self) -> &'static CStr {
        self.symbol
    }

    /// The function, looked up in the driver's library unless a look-up of the program gave it already.
    #[inline]
    pub(crate) fn get(&self) -> Option<Ptr> {
        let address = self.address.load(Ordering::Relaxed);
        if address.is_null() { self.find() } else { Some(address) }
    }

    #[cold]
    fn find(&self) -> Option<Ptr> {
        let found = loader::driver_symbol(self.symbol);
        self.remember(found);
        Some(found).filter(|found| !found.is_null())
    }

    /// Keeps the first address that is offered: two addresses of one function do the same.
    pub(crate) fn remember(&self, address: Ptr) {
        let _ = self.address.compare_exchange(ptr::null_mut(), address, Ordering::Relaxed, Ordering::Relaxed);
    }
}

/// One hooked function.
#[derive(Debug)]
pub(crate) struct Row {
    /// Name in the driver's ELF symbol table.
    pub(crate) symbol: &'static CStr,
    /// Name for `cuGetProcAddress`.
    pub(crate) name: &'static CStr,
    /// First version (1000·major + 10·minor) at which `cuGetProcAddress` gives this function.
    pub(crate) from: i32,
    /// Which default stream it uses.
    pub(crate) flavour: Flavour,
    /// Our function in its place.
    pub(crate) wrapper: fn() -> Ptr,
    /// The driver's function.
    pub(crate) real: &'static Real,
}

impl Row {
    pub(crate) fn wrapper(&self) -> Ptr {
        (self.wrapper)()
    }

    pub(crate) fn real(&self) -> &'static Real {
        self.real
    }

    /// The flags with which `cuGetProcAddress` gives this row.
    fn flags(&self) -> u64 {
        match self.flavour {
            Flavour::Legacy => 0,
            Flavour::PerThread => PER_THREAD_STREAM,
        }
    }
}

/// Every hooked function.
pub(crate) fn rows() -> impl Iterator<Item = &'static Row> {
    [
        hooks::proc_address::ROWS,
        hooks::launch::flavoured::ROWS,
        hooks::launch::single::ROWS,
        hooks::copy::blocked::ROWS,
        hooks::copy::queued::ROWS,
        hooks::array::blocked::ROWS,
        hooks::array::queued::ROWS,
        hooks::narrow::blocked::ROWS,
        hooks::narrow::queued::ROWS,
        hooks::fill::ROWS,
hooks::residency::queued::ROWS,
        hooks::residency::advice::ROWS,
        hooks::stream::ROWS,
        hooks::context::ROWS,
        hooks::capture::beginning::ROWS,
        hooks::capture::ending::ROWS,
        hooks::wait::ROWS,
    ]
    .into_iter()
    .chain(hooks::memory::ROWS)
    .flatten()
}

/// The row of an ELF symbol.
pub(crate) fn by_symbol(symbol: &CStr) -> Option<&'static Row> {
    rows().find(|row| row.symbol == symbol)
}

/// The wrapper for what the driver answered to a look-up of `name` with `flags`; `None` leaves the answer.
/// `ask` is the driver's own `cuGetProcAddress`: name, version and flags to address, null if it has none.
pub(crate) fn by_answer(
    name: &CStr,
    flags: u64,
    answer: Ptr,
    ask: impl Fn(&CStr, i32, u64) -> Ptr,
) -> Option<&'static Row> {
    let wanted = if flags & PER_THREAD_STREAM == 0 { Flavour::Legacy } else { Flavour::PerThread };
    let is_answer =
        |row: &&Row| row.real().get() == Some(answer) || ask(row.name, row.from, row.flags()) == answer;
    let of_name = |flavour| {
        rows()
            .filter(move |row| (row.name == name || row.symbol == name) && (row.flavour == wanted) == flavour)
    };
    let row = of_name(true).find(is_answer).or_else(|| of_name(false).find(is_answer))?;
    row.real().remember(answer);
    Some(row)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn every_row_is_one_function_and_one_answer_of_the_driver() {
        let symbols: BTreeSet<_> = rows().map(|row| row.symbol).collect();
        let keys: BTreeSet<_> = rows().map(|row| (row.name, row.from, row.flags())).collect();
        let wrappers: BTreeSet<_> = rows().map(|row| row.wrapper() as usize).collect();
        assert_eq!(symbols.len(), rows().count(), "two rows share an ELF name");
        assert_eq!(keys.len(), rows().count(), "two rows share name, version and flavour");
        assert_eq!(wrappers.len(), rows().count(), "two rows share a wrapper");
    }

    #[test]
    fn elf_names_follow_from_name_and_flavour() {
        for row in rows() {
            let (symbol, name) = (row.symbol.to_str().unwrap(), row.name.to_str().unwrap());
            let rest = symbol.strip_prefix(name).unwrap_or_else(|| panic!("{symbol} is not a {name}"));
            let per_thread = rest.ends_with("_ptds") || rest.ends_with("_ptsz");
            assert_eq!(per_thread, row.flavour == Flavour::PerThread, "{symbol}");
            let version = rest.trim_end_matches("_ptds").trim_end_matches("_ptsz");
            assert!(matches!(version, "" | "_v2" | "_v3" | "_v4"), "{symbol}");
        }
    }

    #[test]
    fn an_answer_that_no_row_explains_stays_unwrapped() {
        let newer = 0x1000 as Ptr;
        let old = 0x2000 as Ptr;
        assert!(by_answer(c"cuMemPrefetchAsync", 0, newer, |_, _, _| old).is_none());
        assert!(by_answer(c"cuSomethingElse", 0, newer, |_, _, _| newer).is_none());
    }
}
