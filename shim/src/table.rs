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
    hooks,
    loader::{CUDA, Library},
};

/// The driver's own function behind a wrapper.
#[derive(Debug)]
pub(crate) struct Real {
    library: &'static Library,
    symbol: &'static CStr,
    address: AtomicPtr<c_void>,
}

impl Real {
    /// A function of the CUDA driver.
    pub(crate) const fn new(symbol: &'static CStr) -> Self {
        Self::of(&CUDA, symbol)
    }

    /// A function of a library.
    pub(crate) const fn of(library: &'static Library, symbol: &'static CStr) -> Self {
        Self { library, symbol, address: AtomicPtr::new(ptr::null_mut()) }
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
        let found = self.library.symbol(self.symbol);
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
    /// The types of its arguments as the wrapper declares them.
    #[cfg(test)]
    pub(crate) arguments: &'static [&'static str],
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

/// Rows by the names under which a program may ask for them: the driver's ELF name and, if it is another one, the
/// name for `cuGetProcAddress`. Sorted by name, because runtimes look hundreds of names up when they start.
struct Index(Vec<(&'static CStr, &'static Row)>);

impl Index {
    fn new() -> Self {
        let mut names: Vec<_> = rows().map(|row| (row.symbol, row)).collect();
        names.extend(rows().filter(|row| row.name != row.symbol).map(|row| (row.name, row)));
        names.sort_unstable_by_key(|(name, _)| *name);
        Self(names)
    }

    /// This process's index, made by whoever needs it first; without a lock, because a child may be forked meanwhile.
    fn get() -> &'static Self {
        static INDEX: AtomicPtr<Index> = AtomicPtr::new(ptr::null_mut());
        let index = INDEX.load(Ordering::Acquire);
        // SAFETY: a stored index is never freed.
        if let Some(index) = unsafe { index.as_ref() } {
            return index;
        }
        let new = Box::into_raw(Box::new(Self::new()));
        match INDEX.compare_exchange(ptr::null_mut(), new, Ordering::AcqRel, Ordering::Acquire) {
            // SAFETY: just made, never freed.
            Ok(_) => unsafe { &*new },
            Err(other) => {
                // SAFETY: nobody else has seen `new`; `other` is the index that won.
                unsafe {
                    drop(Box::from_raw(new));
                    &*other
                }
            }
        }
    }

    /// The rows of a name.
    fn of(&self, name: &CStr) -> impl Iterator<Item = &'static Row> + Clone {
        let begin = self.0.partition_point(|(other, _)| *other < name);
        let end = self.0.partition_point(|(other, _)| *other <= name);
        self.0[begin..end].iter().map(|(_, row)| *row)
    }
}

/// The row of an ELF symbol.
pub(crate) fn by_symbol(symbol: &CStr) -> Option<&'static Row> {
    Index::get().of(symbol).find(|row| row.symbol == symbol)
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
    let rows = Index::get().of(name);
    // The flavour that was asked for comes first: a driver may have one function for both.
    let row = [true, false].into_iter().find_map(|wished| {
        let mut rows = rows.clone().filter(|row| (row.flavour == wanted) == wished);
        // Nearly always the answer is the function that the driver exports; only if not is the driver asked again.
        let exported = rows.clone().find(|row| row.real().get() == Some(answer));
        exported.or_else(|| rows.find(|row| ask(row.name, row.from, row.flags()) == answer))
    })?;
    row.real().remember(answer);
    Some(row)
}

#[cfg(test)]
mod tests;
