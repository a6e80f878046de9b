//! Finds keys that are no longer written, by our own clock, because their dates are by those of other machines.

use std::collections::HashMap;
use std::time::{Duration, Instant};

/// The time since which each key has not changed, as far as observed.
#[derive(Debug, Default)]
pub(super) struct Unchanged(HashMap<Vec<u8>, (i64, Instant)>);

impl Unchanged {
    /// Records the current keys with their revisions. Returns those that have not changed for this long.
    pub(super) fn look<'k>(
        &mut self,
        keys: impl Iterator<Item = (&'k [u8], i64)>,
        long: Duration,
        now: Instant,
    ) -> Vec<&'k [u8]> {
        let before = std::mem::take(&mut self.0);
        let mut found = Vec::new();
        for (key, revision) in keys {
            let since = before.get(key).filter(|(known, _)| *known == revision).map_or(now, |(_, since)| *since);
            if now.saturating_duration_since(since) > long {
                found.push(key);
            }
            self.0.insert(key.to_owned(), (revision, since));
        }
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_has_changed_or_is_new_to_us_is_young_whatever_its_own_date_is() {
        let (mut unchanged, now, long) = (Unchanged::default(), Instant::now(), Duration::from_secs(10));
        let after = |seconds| now + Duration::from_secs(seconds);
        let mut look = |keys: &[(&'static str, i64)], at| {
            let keys = keys.iter().map(|&(key, revision)| (key.as_bytes(), revision));
            unchanged.look(keys, long, at).into_iter().map(<[u8]>::to_vec).collect::<Vec<_>>()
        };
        assert!(look(&[("a", 1), ("b", 2)], now).is_empty());
        assert!(look(&[("a", 1), ("b", 5), ("c", 3)], after(10)).is_empty());
        assert_eq!(look(&[("a", 1), ("b", 5), ("c", 3)], after(11)), [b"a"]);
        // A key that was deleted in between counts as new.
        assert!(look(&[("c", 3)], after(12)).is_empty());
        assert_eq!(look(&[("a", 1), ("c", 3)], after(40)), [b"c"]);
    }
}
