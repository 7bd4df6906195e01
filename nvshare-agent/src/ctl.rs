//! What `nvsharectl` is made of: its connection to the agent and the way it shows answers.

pub mod connection;
pub mod show;
