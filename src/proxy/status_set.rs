//! The statuses that count as failures of a node: a few words, looked at by each answer from 500 on.

use crate::config::HealthChecks;
use crate::fleet::Role;

/// The first status that can be in a set.
const FIRST: u16 = 500;

/// Some of the statuses from 500 to 599.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StatusSet(u128);

impl StatusSet {
    /// Whether this status is in it.
    pub fn contains(self, status: u16) -> bool {
        bit(status).is_some_and(|bit| self.0 & bit != 0)
    }
}

impl FromIterator<u16> for StatusSet {
    fn from_iter<I: IntoIterator<Item = u16>>(statuses: I) -> Self {
        StatusSet(statuses.into_iter().filter_map(bit).fold(0, |set, bit| set | bit))
    }
}

fn bit(status: u16) -> Option<u128> {
    1_u128.checked_shl(u32::from(status.checked_sub(FIRST)?))
}

/// The statuses of each role.
#[derive(Clone, Copy, Debug, Default)]
pub struct FailureStatuses {
    web: StatusSet,
    varnish: StatusSet,
}

impl FailureStatuses {
    /// As configured.
    pub fn new(checks: &HealthChecks) -> Self {
        let set = |statuses: &[u16]| statuses.iter().copied().collect();
        FailureStatuses { web: set(&checks.web.eject_statuses), varnish: set(&checks.varnish.eject_statuses) }
    }

    /// Those of this role.
    pub fn of(self, role: Role) -> StatusSet {
        match role {
            Role::Web => self.web,
            Role::Varnish => self.varnish,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_set_has_what_was_put_into_it() {
        let set: StatusSet = [500, 503, 599].into_iter().collect();
        let had: Vec<u16> = (0..=u16::MAX).filter(|&status| set.contains(status)).collect();
        assert_eq!(had, [500, 503, 599]);
        assert!(!StatusSet::default().contains(503));
    }
}
