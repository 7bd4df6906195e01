//! The real agent as a process, with scripted clients on its real sockets.
#![expect(clippy::unwrap_used, reason = "helpers of tests fail the test")]
#![expect(clippy::float_cmp, reason = "metrics that count are whole numbers")]

mod bad_input;
mod client;
mod configuration;
mod control;
mod documentation;
mod limits;
mod moves;
mod process;
mod sessions;
mod settings;
mod turns;
