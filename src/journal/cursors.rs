//! The last saved cursor of each Varnish.

use std::collections::HashMap;

use parking_lot::Mutex;

use super::{Cursor, Limits};
use crate::fleet::NodeId;

#[derive(Clone, Debug)]
pub(super) struct SavedCursor {
    pub(super) cursor: Cursor,
    /// When it was saved, in milliseconds since 1970.
    pub(super) at_ms: u64,
}

/// The saved cursors of all nodes. A cursor is kept for [`Limits::retention`] after its node has left, because a Varnish
/// that returns within that time can be replayed instead of flushed.
pub(super) struct Cursors {
    limits: Limits,
    saved: Mutex<HashMap<NodeId, SavedCursor>>,
}

impl Cursors {
    /// A value with the cursors of an earlier process.
    pub(super) fn new(limits: Limits, saved: HashMap<NodeId, SavedCursor>) -> Self {
        Cursors { limits, saved: Mutex::new(saved) }
    }

    pub(super) fn all(&self) -> HashMap<NodeId, Cursor> {
        let saved = self.saved.lock();
        saved.iter().map(|(node, saved)| (node.clone(), saved.cursor.clone())).collect()
    }

    /// Saves cursors, and forgets those that were not saved within the retention.
    pub(super) fn save(&self, cursors: impl IntoIterator<Item = (NodeId, Cursor)>, now_ms: u64) {
        let mut saved = self.saved.lock();
        saved.extend(cursors.into_iter().map(|(node, cursor)| (node, SavedCursor { cursor, at_ms: now_ms })));
        saved.retain(|_, saved| !self.limits.retires(saved.at_ms, now_ms));
    }
}
