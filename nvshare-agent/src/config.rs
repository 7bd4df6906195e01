//! The agent's configuration.

pub mod driver;

pub use driver::DriverConfig;
