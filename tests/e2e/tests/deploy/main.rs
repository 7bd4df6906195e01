//! What is in `deploy/`: rendered, checked against the published schemas, and held against the programs it starts.
#![expect(clippy::expect_used, clippy::unwrap_used, reason = "what fails here fails the test")]

mod chart;
mod helm;
mod packages;
mod systemd;

use std::path::PathBuf;

/// The root of the checkout.
fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../..").canonicalize().expect("a checkout")
}
