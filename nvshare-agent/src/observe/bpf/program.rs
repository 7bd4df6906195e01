//! Programs of the object: loading on first use, and what they cost.

use std::collections::BTreeMap;

use aya::{
    Ebpf,
    programs::{Program, ProgramError},
};
use nvshare_core::Nanos;

use super::reason::reason;

/// What attaching needs of every kind of program.
pub(super) trait Loadable: Sized {
    fn of(program: &mut Program) -> Result<&mut Self, ProgramError>;
    fn is_loaded(&self) -> bool;
    fn load(&mut self) -> Result<(), ProgramError>;
}

macro_rules! loadable {
    ($($kind:ty),+) => {$(
        impl Loadable for $kind {
            fn of(program: &mut Program) -> Result<&mut Self, ProgramError> {
                program.try_into()
            }
            fn is_loaded(&self) -> bool {
                self.fd().is_ok()
            }
            fn load(&mut self) -> Result<(), ProgramError> {
                <$kind>::load(self)
            }
        }
    )+};
}
loadable!(aya::programs::KProbe, aya::programs::UProbe, aya::programs::TracePoint);

/// The program of this name, verified by the kernel.
pub(super) fn loaded<'a, P: Loadable>(ebpf: &'a mut Ebpf, name: &str) -> Result<&'a mut P, String> {
    let program = ebpf.program_mut(name).ok_or_else(|| format!("the BPF object has no program {name}"))?;
    let program = P::of(program).map_err(|error| format!("BPF program {name}: {}", reason(&error)))?;
    if !program.is_loaded() {
        program.load().map_err(|error| format!("BPF program {name}: {}", reason(&error)))?;
    }
    Ok(program)
}

/// What the verifier did for each program, all of which are loaded for it.
pub(super) fn verified_instructions(ebpf: &mut Ebpf) -> Result<BTreeMap<String, u32>, String> {
    let mut counts = BTreeMap::new();
    for (name, program) in ebpf.programs_mut() {
        let loaded = match program {
            Program::KProbe(program) => program.load(),
            Program::UProbe(program) => program.load(),
            Program::TracePoint(program) => program.load(),
            _ => return Err(format!("BPF program {name} is of an unexpected kind")),
        };
        loaded.map_err(|error| format!("BPF program {name}: {}", reason(&error)))?;
        let info = program.info().map_err(|error| format!("BPF program {name}: {}", reason(&error)))?;
        let count = info.verified_instruction_count();
        let count = count.ok_or("this kernel does not say what its verifier did; Linux 5.16 and newer do")?;
        counts.insert(name.to_owned(), count);
    }
    Ok(counts)
}

/// How often the programs ran and how long it took, as the kernel accounts for it while statistics are on.
pub(super) fn cost(ebpf: &Ebpf, names: &[&str]) -> (u64, Nanos) {
    let infos = names.iter().filter_map(|name| ebpf.program(name)?.info().ok());
    infos.fold((0, Nanos::ZERO), |(runs, time), info| {
        (runs + info.run_count(), time + Nanos(info.run_time().as_nanos() as u64))
    })
}

/// Detaches without waiting: the kernel takes tens of milliseconds for each probe, until nobody can be inside it.
pub(super) fn let_go<T: Send + 'static>(links: T) {
    // Without a thread the links are dropped with the closure, here.
    let spawned = std::thread::Builder::new().name("bpf-detach".to_owned()).spawn(move || drop(links));
    if let Err(error) = spawned {
        tracing::debug!("detached in place: {error}");
    }
}
