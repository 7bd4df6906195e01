//! What the agent sees of the driver. One file per source; each source may be absent.

pub mod source;
