//! The table against the classification, NVIDIA's headers, and itself.

use std::collections::{BTreeMap, BTreeSet};

use nvshare_tests::{
    api::{EntryPoint, entry_points, functions},
    headers, pypi, runtime,
};

use super::*;

fn text(name: &CStr) -> &str {
    name.to_str().unwrap()
}

fn is_per_thread(row: &Row) -> bool {
    row.flavour == Flavour::PerThread
}

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
fn every_row_is_an_entry_point_of_the_driver_with_its_version_and_stream() {
    let known: BTreeSet<_> = entry_points().into_iter().collect();
    for row in rows() {
        let (name, symbol) = (text(row.name), text(row.symbol));
        let row = EntryPoint { name, version: row.from, per_thread: is_per_thread(row), symbol };
        let like: Vec<_> =
            known.iter().filter(|point| point.name == name || point.symbol == symbol).collect();
        assert!(known.contains(&row), "{row:?} is none of {like:?}");
    }
}

/// The letter of an argument's type in the classification.
fn letter(rust: &str) -> char {
    match rust.replace(' ', "").as_str() {
        "CUdeviceptr" => 'd',
        "usize" => 'z',
        "c_ulonglong" => 'q',
        "c_uint" | "c_int" | "CUdevice" => 'u',
        "c_ushort" => 'h',
        "c_uchar" => 'b',
        "CUmemLocation" => 'l',
        "CUipcMemHandle" => 'i',
        "*constCUlaunchConfig" => 'c',
        pointer if pointer == "Ptr" || pointer.starts_with('*') => 'p',
        other => panic!("which kind of argument is {other}?"),
    }
}

#[test]
fn the_classification_names_exactly_the_hooked_functions_and_their_arguments() {
    let ours: BTreeMap<_, String> =
        rows().map(|row| (text(row.symbol), row.arguments.iter().copied().map(letter).collect())).collect();
    // A stream is a pointer to a wrapper.
    let data: BTreeMap<_, String> = functions()
        .iter()
        .filter(|function| function.hooked)
        .map(|function| (function.symbol, function.arguments.replace('s', "p")))
        .collect();
    let only = |one: &BTreeMap<&'static str, String>, other: &BTreeMap<&'static str, String>| {
        let missing = one.iter().filter(|(symbol, _)| !other.contains_key(*symbol));
        missing.map(|(symbol, arguments)| format!("{symbol} {arguments}")).collect::<Vec<_>>()
    };
    assert_eq!(only(&ours, &data), [""; 0], "hooked, but not in shim/data/driver-functions.txt");
    assert_eq!(only(&data, &ours), [""; 0], "hooked only in shim/data/driver-functions.txt");
    for (symbol, arguments) in &ours {
        assert_eq!(arguments, &data[symbol], "the arguments of {symbol}");
    }
}

#[test]
fn every_driver_function_is_classified_once() {
    let functions = functions();
    let classified: BTreeSet<_> = functions.iter().map(|function| function.symbol).collect();
    assert_eq!(classified.len(), functions.len(), "a function is classified twice");
    let exported: BTreeSet<_> = entry_points().iter().map(|point| point.symbol).collect();
    let unknown: Vec<_> = exported.difference(&classified).collect();
    let hooked = functions.iter().filter(|function| function.hooked).count();
    println!(
        "{} driver functions: {hooked} hooked, {} passed, {} unknown",
        exported.len(),
        functions.len() - hooked,
        unknown.len()
    );
    assert_eq!(unknown, [&""; 0], "not in shim/data/driver-functions.txt");
    assert_eq!(classified.difference(&exported).collect::<Vec<_>>(), [&""; 0], "no driver exports these");
}

#[test]
fn work_is_hooked_in_every_version_and_for_both_default_streams() {
    let work: BTreeSet<_> =
        functions().iter().filter(|function| function.is_work()).map(|function| function.symbol).collect();
    let points = entry_points();
    let names: BTreeSet<_> =
        points.iter().filter(|point| work.contains(point.symbol)).map(|point| point.name).collect();
    assert!(names.len() > 50, "{names:?}");
    for point in points.iter().filter(|point| names.contains(point.name)) {
        assert!(work.contains(point.symbol), "{point:?} is not gated, other functions of its name are");
    }
}

#[test]
fn wrappers_take_the_arguments_of_nvidias_headers_and_no_function_there_is_unknown() {
    let mut signatures: BTreeMap<headers::Key, String> = BTreeMap::new();
    for package in runtime::PACKAGES {
        let Some(folder) = pypi::fetched(package) else { return };
        for (key, letters) in headers::signatures(&folder) {
            if let Some(before) = signatures.insert(key.clone(), letters.clone()) {
                assert_eq!(before, letters, "{key:?} differs between versions of CUDA");
            }
        }
    }
    let known: BTreeSet<headers::Key> =
        entry_points().iter().map(|point| (point.name.to_owned(), point.version, point.per_thread)).collect();
    let unknown: Vec<_> = signatures.keys().filter(|key| !known.contains(*key)).collect();
    assert!(
        unknown.is_empty(),
        "CUDA has new functions; name them in driver-api.txt and driver-functions.txt: {unknown:?}"
    );
    let arguments: BTreeMap<_, _> =
        functions().iter().map(|function| (function.symbol, function.arguments)).collect();
    for row in rows() {
        let key = (text(row.name).to_owned(), row.from, is_per_thread(row));
        let header = signatures.get(&key).unwrap_or_else(|| panic!("no header has {key:?}"));
        // A launch configuration is a pointer, of which the shim knows more than that.
        assert_eq!(arguments[text(row.symbol)].replace('c', "p"), *header, "{key:?} in the headers");
    }
}

#[test]
fn a_look_up_by_either_name_finds_what_a_walk_over_all_rows_finds() {
    for row in rows() {
        assert!(ptr::eq(by_symbol(row.symbol).unwrap(), row), "{:?}", row.symbol);
        for name in [row.symbol, row.name] {
            let found: BTreeSet<_> = Index::get().of(name).map(|row| row.symbol).collect();
            let walk: BTreeSet<_> =
                rows().filter(|row| row.name == name || row.symbol == name).map(|row| row.symbol).collect();
            assert_eq!(found, walk, "{name:?}");
        }
    }
    assert!(by_symbol(c"cuInit").is_none() && by_symbol(c"").is_none() && by_symbol(c"zzz").is_none());
}

#[test]
fn an_answer_that_no_row_explains_stays_unwrapped() {
    let newer = 0x1000 as Ptr;
    let old = 0x2000 as Ptr;
    assert!(by_answer(c"cuMemPrefetchAsync", 0, newer, |_, _, _| old).is_none());
    assert!(by_answer(c"cuSomethingElse", 0, newer, |_, _, _| newer).is_none());
}

#[test]
fn where_a_driver_has_one_function_for_both_default_streams_the_flavour_asked_for_counts() {
    let one_for_both = 0x3000 as Ptr;
    let of = |flags| by_answer(c"cuGraphUpload", flags, one_for_both, |_, _, _| one_for_both).unwrap();
    assert_eq!(of(0).symbol, c"cuGraphUpload");
    assert_eq!(of(PER_THREAD_STREAM).symbol, c"cuGraphUpload_ptsz");
}
