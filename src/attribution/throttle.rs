//! One line a second.

/// The time between two that pass, in milliseconds.
const PAUSE_MS: u64 = 1000;

/// Lets one through a second, and counts the others.
#[derive(Debug, Default)]
pub struct Throttle {
    /// When the last one passed.
    last_ms: Option<u64>,
    left_out: u64,
}

impl Throttle {
    /// Whether this one passes: then with the number of those that did not since the last one. A clock that was set
    /// back lets one pass.
    pub fn pass(&mut self, now_ms: u64) -> Option<u64> {
        if self.last_ms.is_some_and(|last| (last..last.saturating_add(PAUSE_MS)).contains(&now_ms)) {
            self.left_out += 1;
            return None;
        }
        self.last_ms = Some(now_ms);
        Some(std::mem::take(&mut self.left_out))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_a_second_passes_with_the_number_of_those_that_did_not() {
        let mut throttle = Throttle::default();
        let passed = [5000, 5000, 5999, 6000, 7000, 7500, 3000].map(|now| throttle.pass(now));
        assert_eq!(passed, [Some(0), None, None, Some(2), Some(0), None, Some(1)]);
    }
}
