//! Generates the lookup table of the simulated driver from `data/driver-api.txt`, and a stub for every exported name
//! that no source file implements, so that each name a CUDA runtime may ask for resolves.

use std::{
    collections::{BTreeMap, BTreeSet},
    env,
    error::Error,
    fmt::Write as _,
    fs,
    path::Path,
};

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=data/driver-api.txt");
    println!("cargo::rerun-if-changed=src");
    println!("cargo::rustc-cdylib-link-arg=-Wl,-soname,libcuda.so.1");
    // A preloaded library that exports the same names must not capture the driver's references to itself.
    println!("cargo::rustc-cdylib-link-arg=-Wl,-Bsymbolic");

    let implemented = implemented(Path::new("src"))?;
    let mut table = String::new();
    let mut stubs = BTreeSet::new();
    for line in fs::read_to_string("data/driver-api.txt")?.lines().filter(|line| !line.starts_with('#')) {
        let [base, version, flavour, elf] = line.split_whitespace().collect::<Vec<_>>()[..] else {
            return Err(format!("data/driver-api.txt: not four columns: {line}").into());
        };
        let path = if let Some(module) = implemented.get(elf) {
            format!("crate::{module}::{elf}")
        } else {
            stubs.insert(elf.to_owned());
            format!("stubs::{elf}")
        };
        let thread = flavour == "thread";
        writeln!(
            table,
            "    Entry {{ base: \"{base}\", version: {version}, thread: {thread}, function: Address({path} as *const ()) }},"
        )?;
    }

    let mut code = String::from("pub(crate) static ENTRIES: &[Entry] = &[\n");
    code.push_str(&table);
    code.push_str("];\n\nmod stubs {\n");
    for name in &stubs {
        writeln!(
            code,
            "    #[unsafe(no_mangle)]\n    pub(super) extern \"C\" fn {name}() -> u32 {{ crate::lookup::unsupported(\"{name}\") }}"
        )?;
    }
    code.push_str("}\n");
    fs::write(Path::new(&env::var("OUT_DIR")?).join("driver_api.rs"), code)?;
    Ok(())
}

/// Driver function name → module path, found as `fn cuName(` or `fn cuName | cuName_ptsz(` in the sources.
fn implemented(directory: &Path) -> Result<BTreeMap<String, String>, Box<dyn Error>> {
    let mut found = BTreeMap::new();
    for entry in fs::read_dir(directory)? {
        let path = entry?.path();
        if path.is_dir() {
            found.extend(implemented(&path)?);
            continue;
        }
        if path.extension().is_none_or(|extension| extension != "rs") {
            continue;
        }
        let module = path
            .with_extension("")
            .iter()
            .skip(1)
            .map(|part| part.to_string_lossy().into_owned())
            .collect::<Vec<_>>()
            .join("::");
        for line in fs::read_to_string(&path)?.lines() {
            let Some(rest) = line.trim_start().strip_prefix("fn cu") else { continue };
            let names = rest.split(['(', '<']).next().unwrap_or_default();
            for name in format!("cu{names}").split('|') {
                found.insert(name.trim().to_owned(), module.clone());
            }
        }
    }
    Ok(found)
}
