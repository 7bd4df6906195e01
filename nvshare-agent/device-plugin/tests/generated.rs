//! The committed code of the interface is what its description says.

use std::{fs, path::Path};

/// Writes the code anew instead of comparing: `NVSHARE_BLESS=1 cargo test -p nvshare-device-plugin --test generated`.
const BLESS: &str = "NVSHARE_BLESS";

#[test]
fn the_generated_code_is_that_of_the_description() {
    let package = Path::new(env!("CARGO_MANIFEST_DIR"));
    let committed = package.join("src/api/v1beta1.rs");
    let description =
        protox::compile(["deviceplugin.proto"], [package.join("proto")]).expect("a valid description");
    let fresh = tempfile::tempdir().expect("a directory");
    tonic_prost_build::configure()
        .out_dir(fresh.path())
        .build_transport(true)
        .btree_map(".")
        .compile_fds(description)
        .expect("code");
    let code = fs::read_to_string(fresh.path().join("v1beta1.rs")).expect("the code");
    if std::env::var_os(BLESS).is_some() {
        fs::write(&committed, &code).expect("a place for the code");
    }
    let old = fs::read_to_string(&committed).unwrap_or_default();
    assert!(
        old == code,
        "{} is not what proto/deviceplugin.proto says; write it anew with {BLESS}=1",
        committed.display()
    );
}
