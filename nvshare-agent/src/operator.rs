//! What operators see and may order: the control socket, the metrics and the status page.

pub mod control;
pub mod history;
pub mod http;
pub mod inventory;
mod orders;
pub mod overview;
pub mod page;
pub mod protocol;
pub mod report;
pub mod settings;
