//! Deliveries to a node that missed purges which the journal no longer holds.

use super::*;
use crate::delivery::walk::{Sources, Walk};

#[tokio::test]
async fn a_floor_that_moves_on_during_a_flush_makes_no_second_one() {
    let guard = Arc::new(Guard::new(long_ago()));
    let limits = Limits { max_entries: 1, ..Limits::default() };
    let journal: Arc<dyn Journal> = Arc::new(Memory::new(limits, noted_by(&guard)));
    let append = || journal.append(Purge { targets: vec![Target::Tags(["a"].into_iter().collect())], soft: false });
    for _ in 0..3 {
        append().await.unwrap();
    }
    let (journal, address) = (Arc::clone(&journal), ([127, 0, 0, 1], 1).into());
    let sources = Sources { journal, guard, address, settings: VarnishSettings::default() };
    let mut walk = Walk::new(Some(0), 3, Vec::new());
    let first = walk.next(&sources).unwrap();
    assert!(first.is_flush);
    assert_eq!(first.gap, Some((0, 2)));
    walk.advance(&first);
    for _ in 0..2 {
        append().await.unwrap();
    }
    let second = walk.next(&sources).unwrap();
    assert!(!second.is_flush && second.left.is_empty(), "{second:?}");
    // The decision whether the flush was enough must include these.
    assert_eq!(second.gap, Some((2, 3)));
    walk.advance(&second);
    assert!(walk.next(&sources).is_none());
}
