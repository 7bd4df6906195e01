//! What operators see and may order: the control socket, the metrics and the status page.

pub mod control;
pub mod http;
pub mod inventory;
pub mod protocol;
pub mod report;
