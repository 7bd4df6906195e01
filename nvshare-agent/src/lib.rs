//! The agent: senses the driver, decides, and drives the clients.

pub mod config;
pub mod observe;
