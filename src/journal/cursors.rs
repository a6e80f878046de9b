//! How far each Varnish had come when it was last saved.

use std::collections::HashMap;

use parking_lot::Mutex;

use super::{Cursor, Limits};
use crate::fleet::NodeId;

/// A cursor as it was saved.
#[derive(Clone, Debug)]
pub(super) struct SavedCursor {
    /// The cursor.
    pub(super) cursor: Cursor,
    /// When it was saved, in milliseconds since 1970.
    pub(super) at_ms: u64,
}

/// The saved cursors of all nodes. Those of nodes that left are kept for [`Limits::retention`], because a Varnish
/// that comes back within that time can be replayed instead of emptied.
pub(super) struct Cursors {
    limits: Limits,
    saved: Mutex<HashMap<NodeId, SavedCursor>>,
}

impl Cursors {
    /// Cursors that start with what was saved before.
    pub(super) fn new(limits: Limits, saved: HashMap<NodeId, SavedCursor>) -> Self {
        Cursors { limits, saved: Mutex::new(saved) }
    }

    /// The cursors by node.
    pub(super) fn all(&self) -> HashMap<NodeId, Cursor> {
        let saved = self.saved.lock();
        saved.iter().map(|(node, saved)| (node.clone(), saved.cursor.clone())).collect()
    }

    /// Saves cursors and forgets those that were not saved for too long.
    pub(super) fn save(&self, cursors: impl IntoIterator<Item = (NodeId, Cursor)>, now_ms: u64) {
        let mut saved = self.saved.lock();
        saved.extend(cursors.into_iter().map(|(node, cursor)| (node, SavedCursor { cursor, at_ms: now_ms })));
        saved.retain(|_, saved| !self.limits.retires(saved.at_ms, now_ms));
    }
}
