//! Small programs and libraries that a test needs beside the product, compiled when it runs.
#![expect(clippy::missing_panics_doc, reason = "what does not compile fails the test")]

use std::{path::Path, process::Command};

fn run(command: &mut Command) {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    assert!(output.status.success(), "{command:?}:\n{}", String::from_utf8_lossy(&output.stderr));
}

/// A Rust program, or with `--crate-type=cdylib` among the arguments a library.
pub fn rustc(source: &Path, output: &Path, more: &[&str]) {
    let arguments = ["--edition=2024", "-O", "-Anon_snake_case"];
    run(Command::new("rustc").args(arguments).arg("-o").arg(output).arg(source).args(more));
}

/// A C program or library, from its text.
pub fn gcc(text: &str, output: &Path, more: &[&str]) {
    let source = output.with_extension("c");
    std::fs::write(&source, text).unwrap_or_else(|error| panic!("{}: {error}", source.display()));
    run(Command::new("gcc").args(["-O1", "-o"]).arg(output).arg(&source).args(more));
}
