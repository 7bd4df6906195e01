//! The real agent as a process, with scripted clients on its real sockets.

mod bad_input;
mod client;
mod configuration;
mod control;
mod documentation;
mod process;
mod sessions;
mod turns;
