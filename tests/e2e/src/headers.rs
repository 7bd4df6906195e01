//! Signatures of driver functions, read from NVIDIA's headers: `cudaTypedefs.h` has one function type for each name,
//! version and default stream.
#![expect(clippy::missing_panics_doc, reason = "a header that cannot be read fails the test")]

use std::{collections::BTreeMap, fs, path::Path};

use crate::pypi::find;

/// (name, version, per-thread default stream).
pub type Key = (String, i32, bool);

/// Letters of the arguments, as `shim/data/driver-functions.txt` explains them, of every function type in a package
/// of headers; `?` is a type that the shim's classification has no letter for.
pub fn signatures(package: &Path) -> BTreeMap<Key, String> {
    let cuda = find(package, "cuda.h");
    let read = |name: &str| {
        let path = cuda.with_file_name(name);
        without_comments(
            &fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display())),
        )
    };
    let types = read("cuda.h");
    let mut found = BTreeMap::new();
    for header in [
        "cudaTypedefs.h",
        "cudaGLTypedefs.h",
        "cudaEGLTypedefs.h",
        "cudaVDPAUTypedefs.h",
        "cudaProfilerTypedefs.h",
    ] {
        for statement in read(header).split(';') {
            let Some((_, rest)) = statement.split_once("*PFN_") else { continue };
            let Some((name, arguments)) = rest.split_once(')') else { continue };
            // A name without a version is an alias for the newest one.
            let Some((name, version)) = name.rsplit_once("_v") else { continue };
            let (version, stream) = version.split_once('_').unwrap_or((version, ""));
            let version = version.parse().unwrap_or_else(|_| panic!("no version: {statement}"));
            let arguments = arguments.trim().trim_start_matches('(').trim_end_matches(')');
            found.insert((name.to_owned(), version, !stream.is_empty()), letters(arguments, &types));
        }
    }
    assert!(found.len() > 400, "only {} function types in {}", found.len(), package.display());
    found
}

fn without_comments(text: &str) -> String {
    let mut parts = text.split("/*");
    let mut clean = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        clean.push_str(part.split_once("*/").map_or("", |(_, after)| after));
    }
    clean.lines().map(|line| line.split("//").next().unwrap_or_default()).collect::<Vec<_>>().join("\n")
}

fn letters(arguments: &str, types: &str) -> String {
    let words = |argument: &str| argument.split_whitespace().map(str::to_owned).collect::<Vec<_>>().join(" ");
    arguments
        .split(',')
        .map(words)
        .filter(|argument| !argument.is_empty() && argument != "void")
        .map(|argument| letter(&argument, types))
        .collect()
}

/// The letter of one declaration, such as `const void *srcHost`.
fn letter(declaration: &str, types: &str) -> char {
    if declaration.contains(['*', '[']) {
        return 'p';
    }
    let declaration = declaration.trim_start_matches("const ");
    // The last word is the argument's name.
    let name = declaration.rsplit_once(' ').map_or(declaration, |(kind, _)| kind);
    match name {
        "CUstream" => 's',
        "CUdeviceptr" | "CUdeviceptr_v2" => 'd',
        "size_t" => 'z',
        "unsigned long long"
        | "cuuint64_t"
        | "CUmemGenericAllocationHandle"
        | "CUmemGenericAllocationHandle_v1" => 'q',
        "int" | "unsigned int" | "cuuint32_t" | "CUdevice" | "CUdevice_v1" | "CUdeviceptr_v1"
        | "VdpDevice" => 'u',
        "unsigned short" => 'h',
        "unsigned char" => 'b',
        "CUmemLocation" | "CUmemLocation_v1" => 'l',
        "CUipcMemHandle" | "CUipcMemHandle_v1" => 'i',
        _ if types.contains(&format!("*{name};")) || types.contains(&format!("*{name})")) => 'p',
        _ if types.contains(&format!("typedef enum {name}_enum")) => 'u',
        _ => '?',
    }
}
