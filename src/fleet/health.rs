//! Health thresholds: check results in, transitions out.

use serde::Serialize;

/// The health of a node.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Health {
    /// Not checked often enough yet.
    #[default]
    Unknown,
    /// Passed `rise` checks in a row (the first pass is enough for a node of unknown health).
    Up,
    /// Failed `fall` checks in a row.
    Down,
}

/// The number of consecutive results that change a verdict.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Thresholds {
    /// Passes that bring a node up again.
    pub rise: u32,
    /// Failures that take a node down.
    pub fall: u32,
}

/// The health of one node, derived from its check results.
#[derive(Clone, Debug, Default)]
pub struct HealthState {
    health: Health,
    streak: u32,
}

impl HealthState {
    /// The current health.
    pub fn health(&self) -> Health {
        self.health
    }

    /// Whether the last results say that it is of another health, and are too few to change that.
    pub fn is_in_doubt(&self) -> bool {
        self.streak > 0
    }

    /// Counts one result; returns the new health if it changed.
    ///
    /// A node of unknown health comes up with its first pass (a starting fleet should not wait for `rise` intervals)
    /// and goes down with its first failure (it has no traffic yet).
    pub fn record(&mut self, passed: bool, thresholds: Thresholds) -> Option<Health> {
        let (target, needed) = match (self.health, passed) {
            (Health::Unknown, true) => (Health::Up, 1),
            (Health::Unknown, false) => (Health::Down, 1),
            (Health::Up, true) | (Health::Down, false) => {
                self.streak = 0;
                return None;
            }
            (Health::Up, false) => (Health::Down, thresholds.fall),
            (Health::Down, true) => (Health::Up, thresholds.rise),
        };
        self.streak += 1;
        if self.streak < needed {
            return None;
        }
        self.streak = 0;
        self.health = target;
        Some(target)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const THRESHOLDS: Thresholds = Thresholds { rise: 2, fall: 3 };

    fn run(results: &str) -> Vec<Option<Health>> {
        let mut state = HealthState::default();
        results.chars().map(|c| state.record(c == '+', THRESHOLDS)).collect()
    }

    #[test]
    fn a_new_node_follows_its_first_result() {
        assert_eq!(run("+"), [Some(Health::Up)]);
        assert_eq!(run("-"), [Some(Health::Down)]);
    }

    #[test]
    fn fall_failures_in_a_row_take_a_node_down_and_rise_passes_bring_it_back() {
        assert_eq!(run("+---++"), [Some(Health::Up), None, None, Some(Health::Down), None, Some(Health::Up)]);
    }

    #[test]
    fn a_pass_between_failures_starts_the_count_again() {
        assert_eq!(run("+--+--"), [Some(Health::Up), None, None, None, None, None]);
    }
}
