//! How `libnvshare.so` is linked.

fn main() {
    // Its threads and the pointers that it has given to programs outlive any `dlclose`.
    println!("cargo::rustc-cdylib-link-arg=-Wl,-z,nodelete");
    println!("cargo::rerun-if-changed=build.rs");
}
