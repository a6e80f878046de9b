//! At most one line a second.

/// The time between two lines, in milliseconds.
const PAUSE_MS: u64 = 1000;

/// Passes one line a second, and counts the others.
#[derive(Debug, Default)]
pub struct Throttle {
    /// When the last line passed.
    last_ms: Option<u64>,
    left_out: u64,
}

impl Throttle {
    /// Whether this line passes: if so, the number of suppressed lines since the last one. After a clock was set back,
    /// a line passes.
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
