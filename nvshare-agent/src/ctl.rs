//! What `nvsharectl` is made of: its command line, its connection to the agent, and the way it shows answers.

pub mod cli;
pub mod connection;
pub mod record;
pub mod set;
pub mod show;
pub mod top;
