//! Who may connect, how often.
//!
//! **Problem.** Everybody may connect. Whoever connects without end, or holds connections without a word, would use
//! up the places and the time of all others.
//!
//! **Approach.** A connection costs its container and its user a token; tokens come back at a fixed rate. The
//! container pays first, so that one of many containers that share a user (mostly root) empties its own purse and
//! not the user's. Places for connections that have not introduced themselves are shared out in the same way.
//!
//! **Invariants.** What is kept of a user or container is forgotten once it is as if it had never been here. There is
//! a bound on how many are kept; beyond it, strangers are refused.

use std::{
    collections::HashMap,
    hash::Hash,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use nvshare_core::Nanos;

use super::{cgroup::Cgroup, identity::Identity};
use crate::config::ListenConfig;

/// Connections without a session that are served at one time, of all and of one user or container.
const GREETING_MAX: usize = 512;
const GREETING_SHARE: usize = 192;
/// Connections at once that are nobody's offence, however few clients are allowed.
const BURST_MIN: usize = 32;
/// Users, and containers, that are kept account of.
const KEPT_MAX: usize = 4096;

/// Which limit turned a connection or a client away. Each is a label of a metric.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Limit {
    /// Connections of one container over time.
    #[error("this container connects too often ([listen] connections_per_second)")]
    CgroupRate,
    /// Connections of one user over time.
    #[error("this user connects too often ([listen] connections_per_second)")]
    UidRate,
    /// Connections that have not introduced themselves.
    #[error("too many connections that have not introduced themselves")]
    Greeting,
    /// Clients at one time, of one container.
    #[error("this container has its limit of {0} clients ([listen] max_clients_per_cgroup)")]
    CgroupClients(usize),
    /// The same of one user.
    #[error("user {0} has its limit of {1} clients ([listen] max_clients_per_uid)")]
    UidClients(u32, usize),
    /// The same of all.
    #[error("the agent serves its limit of {0} clients ([listen] max_clients)")]
    Clients(usize),
    /// A driver hangs.
    #[error("nobody is admitted meanwhile")]
    Emergency,
}

impl Limit {
    /// Every label.
    pub const LABELS: [&str; 7] =
        ["cgroup_rate", "uid_rate", "greeting", "cgroup_clients", "uid_clients", "clients", "emergency"];

    /// The label.
    pub fn label(self) -> &'static str {
        match self {
            Self::CgroupRate => "cgroup_rate",
            Self::UidRate => "uid_rate",
            Self::Greeting => "greeting",
            Self::CgroupClients(_) => "cgroup_clients",
            Self::UidClients(..) => "uid_clients",
            Self::Clients(_) => "clients",
            Self::Emergency => "emergency",
        }
    }
}

/// Keeps account of connections.
#[derive(Debug)]
pub struct Admission {
    accounts: Mutex<Accounts>,
    /// Tokens per second and at most: of a user, and of a container.
    uid_purse: Purse,
    cgroup_purse: Purse,
}

#[derive(Clone, Copy, Debug)]
struct Purse {
    per_second: f64,
    most: f64,
}

#[derive(Debug, Default)]
struct Accounts {
    greeting: usize,
    uids: HashMap<u32, Account>,
    cgroups: HashMap<Cgroup, Account>,
}

#[derive(Debug)]
struct Account {
    tokens: f64,
    at: Nanos,
    greeting: usize,
}

/// A place for a connection that has not introduced itself, until dropped.
#[derive(Debug)]
pub struct Greeting {
    admission: Arc<Admission>,
    uid: u32,
    cgroup: Option<Cgroup>,
}

impl Admission {
    /// Nobody has connected yet.
    pub fn new(config: &ListenConfig) -> Arc<Self> {
        let purse = |most: usize| Purse {
            per_second: f64::from(config.connections_per_second),
            most: most.max(BURST_MIN) as f64,
        };
        Arc::new(Self {
            accounts: Mutex::default(),
            uid_purse: {
                let Purse { per_second, most } = purse(config.max_clients_per_uid);
                Purse { per_second: 2.0 * per_second, most }
            },
            cgroup_purse: purse(config.max_clients_per_cgroup),
        })
    }

    fn lock(&self) -> MutexGuard<'_, Accounts> {
        self.accounts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets a connection in, or says which limit it meets.
    pub fn admit(
        self: &Arc<Self>,
        identity: Identity,
        cgroup: Option<&Cgroup>,
        now: Nanos,
    ) -> Result<Greeting, Limit> {
        let mut accounts = self.lock();
        let Accounts { greeting, uids, cgroups } = &mut *accounts;
        let mut container = match cgroup {
            Some(cgroup) => Some(account(cgroups, cgroup, self.cgroup_purse, now).ok_or(Limit::Greeting)?),
            None => None,
        };
        if let Some(container) = &mut container {
            if !container.pay() {
                return Err(Limit::CgroupRate);
            }
            if container.greeting >= GREETING_SHARE {
                return Err(Limit::Greeting);
            }
        }
        let user = account(uids, &identity.uid, self.uid_purse, now).ok_or(Limit::Greeting)?;
        if !user.pay() {
            return Err(Limit::UidRate);
        }
        if user.greeting >= GREETING_SHARE || *greeting >= GREETING_MAX {
            return Err(Limit::Greeting);
        }
        user.greeting += 1;
        if let Some(container) = container {
            container.greeting += 1;
        }
        *greeting += 1;
        Ok(Greeting { admission: Arc::clone(self), uid: identity.uid, cgroup: cgroup.cloned() })
    }
}

/// The account of somebody, as it stands now; none if there are too many.
fn account<'a, K: Clone + Eq + Hash>(
    accounts: &'a mut HashMap<K, Account>,
    key: &K,
    purse: Purse,
    now: Nanos,
) -> Option<&'a mut Account> {
    if accounts.len() >= KEPT_MAX && !accounts.contains_key(key) {
        accounts.retain(|_, account| {
            account.earn(purse, now);
            account.greeting > 0 || account.tokens < purse.most
        });
        if accounts.len() >= KEPT_MAX {
            return None;
        }
    }
    let fresh = Account { tokens: purse.most, at: now, greeting: 0 };
    let account = accounts.entry(key.clone()).or_insert(fresh);
    account.earn(purse, now);
    Some(account)
}

impl Account {
    fn earn(&mut self, purse: Purse, now: Nanos) {
        let earned = now.since(self.at).as_secs_f64() * purse.per_second;
        self.tokens = (self.tokens + earned).min(purse.most);
        self.at = self.at.max(now);
    }

    fn pay(&mut self) -> bool {
        let can = self.tokens >= 1.0;
        if can {
            self.tokens -= 1.0;
        }
        can
    }
}

impl Drop for Greeting {
    fn drop(&mut self) {
        let mut accounts = self.admission.lock();
        accounts.greeting = accounts.greeting.saturating_sub(1);
        if let Some(user) = accounts.uids.get_mut(&self.uid) {
            user.greeting = user.greeting.saturating_sub(1);
        }
        if let Some(cgroup) = &self.cgroup
            && let Some(container) = accounts.cgroups.get_mut(cgroup)
        {
            container.greeting = container.greeting.saturating_sub(1);
        }
    }
}

/// Lines of the log that strangers may cause, so that none of them fills the disk.
#[derive(Debug, Default)]
pub struct LogBudget(Mutex<(u64, u32, u64)>);

/// Lines of that kind in one second.
const LINES_PER_SECOND: u32 = 10;

impl LogBudget {
    /// Whether one more line may be written; then also how many were left out before it.
    pub fn line(&self, now: Nanos) -> Option<u64> {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let (second, written, left_out) = &mut *state;
        let this = now.0 / Nanos::SECOND.0;
        if *second != this {
            (*second, *written) = (this, 0);
        }
        if *written >= LINES_PER_SECOND {
            *left_out += 1;
            return None;
        }
        *written += 1;
        Some(std::mem::take(left_out))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn admission() -> Arc<Admission> {
        Admission::new(&ListenConfig {
            connections_per_second: 10,
            max_clients_per_cgroup: 40,
            max_clients_per_uid: 50,
            ..ListenConfig::default()
        })
    }

    fn user(uid: u32) -> Identity {
        Identity { pid: 1, uid, gid: uid }
    }

    fn cgroup(name: &str) -> Cgroup {
        Cgroup::named(name)
    }

    #[test]
    fn one_container_cannot_use_up_what_its_user_has_in_others() {
        let admission = admission();
        let connect = |name: &str, at| admission.admit(user(0), Some(&cgroup(name)), at).map(drop);
        let refused = (0..1000).filter(|_| connect("/flood", Nanos::ZERO) == Err(Limit::CgroupRate)).count();
        assert_eq!(refused, 960);
        for _ in 0..10 {
            assert_eq!(connect("/honest", Nanos::ZERO), Ok(()));
        }
        assert_eq!(connect("/flood", Nanos::SECOND), Ok(()), "tokens come back");
    }

    #[test]
    fn one_user_cannot_use_up_the_places_by_containers_without_number() {
        let admission = admission();
        let admitted = (0..1000)
            .filter(|index| {
                admission.admit(user(7), Some(&cgroup(&format!("/c{index}"))), Nanos::ZERO).is_ok()
            })
            .count();
        assert_eq!(admitted, 50);
        assert!(admission.admit(user(8), Some(&cgroup("/other")), Nanos::ZERO).is_ok());
    }

    #[test]
    fn connections_without_a_word_have_a_share_of_the_places() {
        let admission = Admission::new(&ListenConfig::default());
        let silent: Vec<Greeting> = (0..1000)
            .filter_map(|_| admission.admit(user(7), Some(&cgroup("/a")), Nanos::ZERO).ok())
            .collect();
        assert_eq!(silent.len(), GREETING_SHARE);
        assert!(admission.admit(user(8), Some(&cgroup("/b")), Nanos::ZERO).is_ok());
        drop(silent);
        assert!(admission.admit(user(7), Some(&cgroup("/a")), Nanos::SECOND).is_ok());
        assert_eq!(admission.lock().greeting, 0);
    }

    #[test]
    fn what_is_kept_of_strangers_is_bounded_and_forgotten() {
        let admission = admission();
        let connect = |uid: u32, at| admission.admit(user(uid), Some(&cgroup("/a")), at).map(drop);
        let mut at = Nanos::ZERO;
        for uid in 0..20_000 {
            connect(uid, at).ok();
            at += Nanos::millis(100);
        }
        assert!(admission.lock().uids.len() <= KEPT_MAX);
        assert_eq!(connect(77_777, at), Ok(()));
    }

    #[test]
    fn a_flood_of_refusals_writes_few_lines_and_says_how_many_it_left_out() {
        let budget = LogBudget::default();
        let written = (0..1000).filter_map(|_| budget.line(Nanos::ZERO)).count();
        assert_eq!(written, LINES_PER_SECOND as usize);
        assert_eq!(budget.line(Nanos::SECOND), Some(990));
        assert_eq!(budget.line(Nanos::SECOND), Some(0));
    }
}
