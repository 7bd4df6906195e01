//! The plugin as a process, before a kubelet that speaks the published interface byte for byte.
#![expect(clippy::expect_used, reason = "what fails here fails the test")]

mod client;
mod kubelet;
mod requests;
mod restarts;
mod scene;
mod wire;
