//! Puts the driver's function names into the program's dynamic symbols, where probes find them even after stripping.

fn main() {
    println!("cargo::rustc-link-arg-bins=-rdynamic");
}
