//! Xid errors from the driver's tracepoint.

use std::path::Path;

use aya::{
    Ebpf,
    programs::{TracePoint, trace_point::TracePointLink},
};

use super::{
    maps::Maps,
    program::{let_go, loaded},
    reason::reason,
    tracefs::{Field, check_record, with_tracefs},
    uvm::file_identity,
};
use crate::observe::source::{SensorState, Xid};

/// The name of the program, which is also that of the tracepoint.
pub(super) const PROGRAMS: [&str; 1] = ["nvidia_dev_xid"];

const FIELDS: &[Field] = &[("dev", 8, 4), ("error_code", 12, 4), ("msg", 16, 4)];
/// The module that has the tracepoint.
const MODULE: &str = "/sys/module/nvidia";
/// Xids taken in one reading; the rest waits for the next.
const PER_READING: usize = 256;

pub(super) struct XidProbe {
    state: SensorState,
    link: Option<TracePointLink>,
    module: Option<(u64, u64)>,
}

impl XidProbe {
    pub(super) fn attach(ebpf: &mut Ebpf) -> Self {
        let module = file_identity(Path::new(MODULE));
        let (state, link) = match attach(ebpf) {
            Ok(link) => (SensorState::Attached("tracepoint nvidia:nvidia_dev_xid".to_owned()), Some(link)),
            Err(reason) => (SensorState::Unavailable(reason), None),
        };
        Self { state, link, module }
    }

    pub(super) fn state(&self) -> &SensorState {
        &self.state
    }

    /// Attaches when the module has come or was replaced.
    pub(super) fn refresh(&mut self, ebpf: &mut Ebpf) {
        if file_identity(Path::new(MODULE)) != self.module {
            let_go(self.link.take());
            *self = Self::attach(ebpf);
        }
    }

    pub(super) fn read(maps: &mut Maps) -> Vec<Xid> {
        let records = std::iter::from_fn(|| maps.next_xid()).take(PER_READING);
        records
            .map(|record| Xid {
                device: text(&record.device),
                code: record.code,
                message: text(&record.message),
            })
            .collect()
    }
}

fn attach(ebpf: &mut Ebpf) -> Result<TracePointLink, String> {
    let [name] = PROGRAMS;
    with_tracefs(|| {
        if !check_record("nvidia", name, FIELDS)? {
            return Err(if Path::new(MODULE).exists() {
                "the loaded nvidia module has no Xid tracepoint (open kernel modules from 575.51.02 on have it)"
            } else {
                "the module nvidia is not loaded"
            }
            .to_owned());
        }
        let program: &mut TracePoint = loaded(ebpf, name)?;
        let link = program.attach("nvidia", name).and_then(|id| program.take_link(id));
        link.map_err(|error| format!("tracepoint nvidia:{name}: {}", reason(&error)))
    })
}

fn text(bytes: &[u8]) -> String {
    let end = bytes.iter().position(|&byte| byte == 0).unwrap_or(bytes.len());
    String::from_utf8_lossy(&bytes[..end]).into_owned()
}
