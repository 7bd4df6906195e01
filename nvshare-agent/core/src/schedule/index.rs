//! Which jobs wait where: kept up to date with each change, so that nobody has to look for them.

use super::Engine;
use crate::id::{GpuId, JobId};

impl Engine {
    /// Brings the indices of a job's GPUs in line with its state, and touches those where it changed.
    pub(crate) fn reindex(&mut self, job: JobId) {
        let Some(gpus) = self.jobs.get(&job) else { return };
        let (mut wants, mut able, mut exempt) = (false, true, false);
        let mut gang = false;
        for gpu in gpus.iter().filter_map(|id| self.gpus.get(id)).filter(|gpu| gpu.plan.takes_turns()) {
            gang = true;
            for (_, member) in gpu.of_job(job) {
                wants |= member.demand();
                exempt |= member.lease.not_revocable();
                able &= member.lease.may_take_turns();
            }
        }
        if !gang {
            return;
        }
        let gpus: Vec<GpuId> = gpus.iter().copied().collect();
        let mut holds_lower = true;
        for id in gpus {
            let Some(gpu) = self.gpus.get_mut(&id).filter(|gpu| gpu.plan.takes_turns()) else { continue };
            let here = wants && able && holds_lower;
            let began = if here { gpu.wanting.insert(job) } else { false };
            let ended = !here && gpu.wanting.remove(&job);
            let verdict = if exempt { gpu.exempt.insert(job) } else { gpu.exempt.remove(&job) };
            if verdict && !exempt {
                gpu.give_set(job);
            }
            holds_lower &= gpu.turn.as_ref().is_some_and(|turn| turn.jobs.contains(&job));
            if began || ended || verdict {
                self.touched.insert(id);
            }
            if began {
                self.press(id, job);
            }
        }
    }

    /// The same for those of the jobs that are on several GPUs.
    pub(crate) fn reindex_gangs(&mut self, jobs: &[JobId]) {
        for &job in jobs {
            if self.jobs.get(&job).is_some_and(|gpus| gpus.len() > 1) {
                self.reindex(job);
            }
        }
    }

    /// Lets a job on several GPUs that take turns take its turns alone.
    pub(crate) fn isolate_gang(&mut self, job: JobId) {
        let gang = self.gang(job);
        if gang.len() > 1 {
            for id in gang {
                if let Some(gpu) = self.gpus.get_mut(&id) {
                    gpu.isolate(job);
                    self.touched.insert(id);
                }
            }
        }
    }
}
