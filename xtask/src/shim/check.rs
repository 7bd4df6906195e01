//! What must be true of a library that is loaded into every process of a container.

use std::{collections::BTreeSet, fmt, fs, path::Path};

use anyhow::{Context as _, Result};
use object::{
    Endianness,
    elf::{
        DF_1_NOW, DF_BIND_NOW, DF_TEXTREL, DT_FLAGS, DT_FLAGS_1, DT_NEEDED, DT_RPATH, DT_RUNPATH, DT_TEXTREL,
        FileHeader64, PF_W, PF_X, PT_GNU_RELRO, PT_GNU_STACK, PT_LOAD, PT_TLS, SHT_SYMTAB, STB_WEAK,
    },
    read::elf::{Dyn as _, FileHeader as _, ProgramHeader as _, SectionHeader as _, Sym as _},
};

use super::glibc;

/// Bytes that a container's page cache can spare.
const MAX_BYTES: usize = 1 << 20;
/// Each thread's block has a small reserve for libraries that are loaded late; stay far below it.
const MAX_THREAD_LOCAL: u64 = 512;

/// A shared library as the dynamic linker sees it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Library {
    bytes: usize,
    needed: Vec<String>,
    imports: Vec<Import>,
    exports: BTreeSet<String>,
    thread_local: u64,
    bind_now: bool,
    read_only_after_start: bool,
    executable_stack: bool,
    writable_code: bool,
    text_relocations: bool,
    search_path: bool,
    symbol_table: bool,
}

/// A symbol that others must provide.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Import {
    name: String,
    version: Option<String>,
    weak: bool,
}

impl Library {
    pub(super) fn read(path: &Path) -> Result<Self> {
        let data = fs::read(path).with_context(|| format!("reading {}", path.display()))?;
        Self::parse(&data).with_context(|| format!("in {}", path.display()))
    }

    fn parse(data: &[u8]) -> Result<Self> {
        let header = FileHeader64::<Endianness>::parse(data)?;
        let endian = header.endian()?;
        // Without a PT_GNU_STACK the kernel makes the stack executable.
        let mut library = Self { bytes: data.len(), executable_stack: true, ..Self::default() };
        for segment in header.program_headers(endian, data)? {
            let flags = segment.p_flags(endian);
            match segment.p_type(endian) {
                PT_GNU_STACK => library.executable_stack = flags & PF_X != 0,
                PT_GNU_RELRO => library.read_only_after_start = true,
                PT_LOAD => library.writable_code |= flags & PF_W != 0 && flags & PF_X != 0,
                PT_TLS => library.thread_local = segment.p_memsz(endian),
                _ => {}
            }
        }
        let sections = header.sections(endian, data)?;
        library.symbol_table = sections.iter().any(|section| section.sh_type(endian) == SHT_SYMTAB);
        let symbols = sections.symbols(endian, data, object::elf::SHT_DYNSYM)?;
        if let Some((entries, _)) = sections.dynamic(endian, data)? {
            for entry in entries {
                let value = entry.d_val(endian);
                match entry.d_tag(endian) {
                    DT_NEEDED => library.needed.push(text(entry.string(endian, symbols.strings())?)),
                    DT_RPATH | DT_RUNPATH => library.search_path = true,
                    DT_TEXTREL => library.text_relocations = true,
                    DT_FLAGS => {
                        library.bind_now |= value & u64::from(DF_BIND_NOW) != 0;
                        library.text_relocations |= value & u64::from(DF_TEXTREL) != 0;
                    }
                    DT_FLAGS_1 => library.bind_now |= value & u64::from(DF_1_NOW) != 0,
                    _ => {}
                }
            }
        }
        let versions = sections.versions(endian, data)?;
        for (index, symbol) in symbols.enumerate() {
            let name = text(symbol.name(endian, symbols.strings())?);
            if name.is_empty() || symbol.st_bind() == object::elf::STB_LOCAL {
                continue;
            }
            if !symbol.is_undefined(endian) {
                library.exports.insert(name);
                continue;
            }
            let version = match &versions {
                Some(table) => {
                    table.version(table.version_index(endian, index))?.map(|version| text(version.name()))
                }
                None => None,
            };
            library.imports.push(Import { name, version, weak: symbol.st_bind() == STB_WEAK });
        }
        Ok(library)
    }

    /// Why it must not ship; empty if it may.
    pub(super) fn complaints(&self) -> Vec<String> {
        let mut found = Vec::new();
        let mut wrong = |is_wrong: bool, what: String| {
            if is_wrong {
                found.push(what);
            }
        };
        for library in &self.needed {
            wrong(!glibc::sonames().any(|known| known == library), format!("it needs {library}"));
        }
        for import in &self.imports {
            wrong(!import.is_old(), format!("it needs {import}"));
        }
        for name in &self.exports {
            wrong(!is_ours_to_export(name), format!("it exports {name}"));
        }
        for name in ["dlsym", "dlvsym", "cuGetProcAddress_v2", "cuLaunchKernel"] {
            wrong(!self.exports.contains(name), format!("it does not export {name}"));
        }
        wrong(self.bytes >= MAX_BYTES, format!("it has {} bytes, the bound is {MAX_BYTES}", self.bytes));
        wrong(
            self.thread_local > MAX_THREAD_LOCAL,
            format!("each thread pays {} bytes for it, the bound is {MAX_THREAD_LOCAL}", self.thread_local),
        );
        wrong(!self.bind_now, "its symbols are not bound at the start".into());
        wrong(!self.read_only_after_start, "its relocated data stays writable".into());
        wrong(self.executable_stack, "it makes the stack executable".into());
        wrong(self.writable_code, "its code is writable".into());
        wrong(self.text_relocations, "its code has relocations".into());
        wrong(self.search_path, "it has a search path for libraries".into());
        wrong(self.symbol_table, "it is not stripped".into());
        found
    }
}

impl Import {
    /// Whether glibc 2.17 has it, or the library does without.
    fn is_old(&self) -> bool {
        match &self.version {
            Some(version) => numbers(version).is_some_and(|numbers| numbers <= glibc::NEWEST),
            None => self.weak,
        }
    }
}

/// `GLIBC_2.2.5` as (2, 2): the third number distinguishes nothing here.
fn numbers(version: &str) -> Option<(u32, u32)> {
    let mut numbers = version.strip_prefix("GLIBC_")?.split('.').map(str::parse);
    Some((numbers.next()?.ok()?, numbers.next()?.ok()?))
}

fn is_ours_to_export(name: &str) -> bool {
    matches!(name, "dlsym" | "dlvsym")
        || name
            .strip_prefix("cu")
            .is_some_and(|rest| rest.starts_with(|first: char| first.is_ascii_uppercase()))
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

impl fmt::Display for Import {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.version {
            Some(version) => write!(f, "{}@{version}", self.name),
            None => write!(f, "{} of any version", self.name),
        }
    }
}

impl fmt::Display for Library {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let newest = self.imports.iter().filter_map(|import| numbers(import.version.as_deref()?)).max();
        let (major, minor) = newest.unwrap_or_default();
        write!(
            f,
            "{} bytes, needs {} with symbols up to GLIBC_{major}.{minor} ({} imports), exports {} names, {} bytes in each thread",
            self.bytes,
            self.needed.join(" "),
            self.imports.len(),
            self.exports.len(),
            self.thread_local,
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn good() -> Library {
        let exports = ["dlsym", "dlvsym", "cuGetProcAddress_v2", "cuLaunchKernel"].map(str::to_owned).into();
        let import = |name: &str, version: Option<&str>, weak| Import {
            name: name.into(),
            version: version.map(str::to_owned),
            weak,
        };
        Library {
            bytes: 300_000,
            needed: vec!["libc.so.6".into(), "libdl.so.2".into()],
            imports: vec![import("memcpy", Some("GLIBC_2.14"), false), import("gettid", None, true)],
            exports,
            bind_now: true,
            read_only_after_start: true,
            ..Library::default()
        }
    }

    fn complaint(spoil: impl FnOnce(&mut Library)) -> String {
        let mut library = good();
        spoil(&mut library);
        library.complaints().join("; ")
    }

    #[test]
    fn a_library_is_refused_for_each_thing_that_may_keep_a_program_from_starting() {
        assert_eq!(complaint(|_| {}), "");
        assert_eq!(complaint(|l| l.needed.push("libgcc_s.so.1".into())), "it needs libgcc_s.so.1");
        assert_eq!(
            complaint(|l| l.imports[0].version = Some("GLIBC_2.18".into())),
            "it needs memcpy@GLIBC_2.18"
        );
        assert_eq!(complaint(|l| l.imports[0].version = Some("GCC_3.0".into())), "it needs memcpy@GCC_3.0");
        assert_eq!(complaint(|l| l.imports[1].weak = false), "it needs gettid of any version");
        assert_eq!(
            complaint(|l| drop(l.exports.insert("_Unwind_Resume".into()))),
            "it exports _Unwind_Resume"
        );
        assert_eq!(
            complaint(|l| drop(l.exports.insert("curl_easy_init".into()))),
            "it exports curl_easy_init"
        );
        assert_eq!(complaint(|l| drop(l.exports.remove("dlvsym"))), "it does not export dlvsym");
        for (spoil, part) in [
            ((|l: &mut Library| l.bytes = MAX_BYTES) as fn(&mut Library), "bytes"),
            (|l| l.thread_local = 4096, "each thread"),
            (|l| l.bind_now = false, "bound"),
            (|l| l.read_only_after_start = false, "writable"),
            (|l| l.executable_stack = true, "stack"),
            (|l| l.writable_code = true, "writable"),
            (|l| l.text_relocations = true, "relocations"),
            (|l| l.search_path = true, "search path"),
            (|l| l.symbol_table = true, "stripped"),
        ] {
            let said = complaint(spoil);
            assert!(said.contains(part) && !said.contains(';'), "{said:?} does not say {part:?} alone");
        }
    }

    #[test]
    fn a_program_of_this_machine_is_no_portable_library() {
        let said = Library::read(&std::env::current_exe().unwrap()).unwrap().complaints().join("; ");
        // What the reader must find in any test program: std's own needs and no exports.
        for part in
            ["it needs libgcc_s.so.1", "@GCC_3.0", "@GLIBC_2.3", "does not export dlsym", "not stripped"]
        {
            assert!(said.contains(part), "nothing about {part:?} in: {said}");
        }
        assert!(!said.contains("malloc@"), "an old symbol is refused: {said}");
    }
}
