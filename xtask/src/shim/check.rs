//! What must be true of a library that is loaded into every process of a container.

use std::{collections::BTreeSet, fmt, fs, path::Path};

use anyhow::{Context as _, Result};
use object::{
    Endianness,
    elf::{
        DF_1_NOW, DF_TEXTREL, DT_FLAGS, DT_FLAGS_1, DT_NEEDED, DT_RPATH, DT_RUNPATH, DT_TEXTREL,
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
    flaws: BTreeSet<Flaw>,
}

/// What a library should be without.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Flaw {
    BoundLate,
    WritableData,
    WritableCode,
    ExecutableStack,
    TextRelocations,
    SearchPath,
    SymbolTable,
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

    /// The newest glibc whose symbols it needs.
    pub(super) fn newest_glibc(&self) -> Option<(u32, u32)> {
        self.imports.iter().filter_map(|import| numbers(import.version.as_deref()?)).max()
    }

    fn parse(data: &[u8]) -> Result<Self> {
        let header = FileHeader64::<Endianness>::parse(data)?;
        let endian = header.endian()?;
        let mut library = Self { bytes: data.len(), ..Self::default() };
        // These hold until something in the file takes them back; without a PT_GNU_STACK the stack is executable.
        library.flaws = BTreeSet::from([Flaw::BoundLate, Flaw::WritableData, Flaw::ExecutableStack]);
        for segment in header.program_headers(endian, data)? {
            let flags = segment.p_flags(endian);
            match segment.p_type(endian) {
                PT_GNU_STACK if flags & PF_X == 0 => {
                    library.flaws.retain(|flaw| *flaw != Flaw::ExecutableStack);
                }
                PT_GNU_RELRO => library.flaws.retain(|flaw| *flaw != Flaw::WritableData),
                PT_LOAD if flags & PF_W != 0 && flags & PF_X != 0 => {
                    library.flaws.extend([Flaw::WritableCode]);
                }
                PT_TLS => library.thread_local = segment.p_memsz(endian),
                _ => {}
            }
        }
        let sections = header.sections(endian, data)?;
        if sections.iter().any(|section| section.sh_type(endian) == SHT_SYMTAB) {
            library.flaws.extend([Flaw::SymbolTable]);
        }
        let symbols = sections.symbols(endian, data, object::elf::SHT_DYNSYM)?;
        if let Some((entries, _)) = sections.dynamic(endian, data)? {
            for entry in entries {
                let value = entry.d_val(endian);
                match entry.d_tag(endian) {
                    DT_NEEDED => library.needed.push(text(entry.string(endian, symbols.strings())?)),
                    DT_RPATH | DT_RUNPATH => library.flaws.extend([Flaw::SearchPath]),
                    DT_TEXTREL => library.flaws.extend([Flaw::TextRelocations]),
                    DT_FLAGS if value & u64::from(DF_TEXTREL) != 0 => {
                        library.flaws.extend([Flaw::TextRelocations]);
                    }
                    DT_FLAGS_1 if value & u64::from(DF_1_NOW) != 0 => {
                        library.flaws.retain(|flaw| *flaw != Flaw::BoundLate);
                    }
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
        found.extend(self.flaws.iter().map(Flaw::to_string));
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
    matches!(name, "dlsym" | "dlvsym" | "nvmlDeviceGetMemoryInfo" | "nvmlDeviceGetMemoryInfo_v2")
        || name
            .strip_prefix("cu")
            .is_some_and(|rest| rest.starts_with(|first: char| first.is_ascii_uppercase()))
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

impl fmt::Display for Flaw {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::BoundLate => "its symbols are not bound at the start",
            Self::WritableData => "its relocated data stays writable",
            Self::WritableCode => "its code is writable",
            Self::ExecutableStack => "it makes the stack executable",
            Self::TextRelocations => "its code has relocations",
            Self::SearchPath => "it has a search path for libraries",
            Self::SymbolTable => "it is not stripped",
        })
    }
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
        for name in ["_Unwind_Resume", "curl_easy_init"] {
            assert_eq!(complaint(|l| l.exports.extend([name.to_owned()])), format!("it exports {name}"));
        }
        assert_eq!(complaint(|l| l.exports.retain(|name| name != "dlvsym")), "it does not export dlvsym");
        assert!(complaint(|l| l.bytes = MAX_BYTES).starts_with("it has 1048576 bytes"));
        assert!(complaint(|l| l.thread_local = 4096).starts_with("each thread pays 4096 bytes"));
        assert_eq!(complaint(|l| l.flaws.extend([Flaw::SearchPath])), "it has a search path for libraries");
    }

    #[test]
    fn what_a_linker_can_do_wrong_is_seen_in_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let source = dir.path().join("source.s");
        // An address within code, and no note about the stack.
        fs::write(&source, ".text\n.globl here\nhere: .quad here\n").unwrap();
        let flaws = |options: &[&str]| {
            let library = dir.path().join("library.so");
            let mut command = std::process::Command::new("cc");
            command.args(["-shared", "-nostdlib", "-o"]).arg(&library).arg(&source).args(options);
            assert!(command.status().unwrap().success(), "cc (gcc) is needed");
            Library::read(&library).unwrap().flaws
        };
        let careless = ["-Wl,-z,notext,-z,lazy,-z,norelro,-z,execstack,--omagic,-rpath,/opt"];
        let expected = [
            Flaw::BoundLate,
            Flaw::WritableData,
            Flaw::WritableCode,
            Flaw::ExecutableStack,
            Flaw::SearchPath,
            Flaw::SymbolTable,
        ];
        assert_eq!(flaws(&careless), BTreeSet::from(expected));
        let careful = ["-Wl,-z,notext,-z,now,-z,relro,-z,noexecstack,--strip-all"];
        assert_eq!(flaws(&careful), BTreeSet::from([Flaw::TextRelocations]));
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
