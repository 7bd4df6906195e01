//! The agent's daemon.

fn main() {}
