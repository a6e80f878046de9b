//! Who listens to `/api/v1/events`.
//!
//! An event is written once and given to each listener. Nobody waits for any of them: one that is so slow that its
//! queue is full is dropped, and its browser connects again by itself. Their number is bounded.

use hyper::body::Bytes;
use parking_lot::Mutex;
use serde::Serialize;
use tokio::sync::mpsc;

/// The most listeners at once: a team has tens of open pages.
pub(super) const MOST: usize = 32;

/// The events that a listener may be behind.
const QUEUE: usize = 16;

/// The listeners; `None` once the process is about to end.
#[derive(Debug)]
pub(super) struct Listeners(Mutex<Option<Audience>>);

#[derive(Debug, Default)]
struct Audience {
    senders: Vec<mpsc::Sender<Bytes>>,
    /// One has joined since this was last asked.
    has_joined: bool,
}

impl Default for Listeners {
    fn default() -> Self {
        Listeners(Mutex::new(Some(Audience::default())))
    }
}

impl Listeners {
    /// Adds a listener, which gets these events first. `None` if there are too many, or the process is about to end.
    pub(super) fn add(&self, first: Vec<Bytes>) -> Option<mpsc::Receiver<Bytes>> {
        let mut audience = self.0.lock();
        let Audience { senders, has_joined } = audience.as_mut()?;
        senders.retain(|listener| !listener.is_closed());
        if senders.len() == MOST || first.len() > QUEUE {
            return None;
        }
        let (sender, receiver) = mpsc::channel(QUEUE);
        // There is room for all of them.
        first.into_iter().for_each(|event| _ = sender.try_send(event));
        senders.push(sender);
        *has_joined = true;
        Some(receiver)
    }

    /// Gives an event to all of them, and drops those that are gone or too slow.
    pub(super) fn send(&self, event: &Bytes) {
        if let Some(audience) = self.0.lock().as_mut() {
            audience.senders.retain(|listener| listener.try_send(event.clone()).is_ok());
        }
    }

    /// Whether one has joined since the last call: what the others were told last, it may never have heard.
    pub(super) fn take_joined(&self) -> bool {
        self.0.lock().as_mut().is_some_and(|audience| std::mem::take(&mut audience.has_joined))
    }

    /// Whether nobody listens.
    pub(super) fn is_empty(&self) -> bool {
        self.0.lock().as_ref().is_none_or(|audience| audience.senders.is_empty())
    }

    /// Ends all streams.
    pub(super) fn close(&self) {
        self.0.lock().take();
    }
}

/// An event on the wire (the HTML standard, "Server-sent events").
pub(super) fn event(name: &str, data: &impl Serialize) -> serde_json::Result<Bytes> {
    // JSON has no line breaks of its own.
    serde_json::to_string(data).map(|data| format!("event: {name}\ndata: {data}\n\n").into())
}

/// A comment: shows who is gone.
pub(super) const KEEP_ALIVE: Bytes = Bytes::from_static(b":\n\n");

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_listener_that_reads_nothing_is_dropped_and_the_others_hear_on() {
        let listeners = Listeners::default();
        let slow = listeners.add(Vec::new()).unwrap();
        let mut quick = listeners.add(vec![Bytes::from_static(b"first")]).unwrap();
        for _ in 0..=QUEUE {
            listeners.send(&Bytes::from_static(b"next"));
            while quick.try_recv().is_ok() {}
        }
        assert!(slow.is_closed() || slow.sender_strong_count() == 0, "its sender is gone");
        listeners.send(&Bytes::from_static(b"last"));
        assert_eq!(quick.try_recv().unwrap(), "last");
    }

    #[test]
    fn there_are_so_many_and_no_more_and_who_left_makes_room() {
        let listeners = Listeners::default();
        let mut all: Vec<_> = (0..MOST).map(|_| listeners.add(Vec::new()).unwrap()).collect();
        assert!(listeners.add(Vec::new()).is_none());
        all.pop();
        assert!(listeners.add(Vec::new()).is_some());
        listeners.close();
        assert!(listeners.is_empty() && listeners.add(Vec::new()).is_none());
    }

    #[test]
    fn each_that_joins_is_noticed_once() {
        let listeners = Listeners::default();
        assert!(!listeners.take_joined());
        let _first = listeners.add(Vec::new()).unwrap();
        assert!(listeners.take_joined() && !listeners.take_joined());
        let _second = listeners.add(Vec::new()).unwrap();
        assert!(listeners.take_joined());
        listeners.close();
        assert!(!listeners.take_joined());
    }

    #[test]
    fn an_event_is_one_line_whatever_is_in_it() {
        let text = event("fleet", &"a\nb\r\n\ndata: c").unwrap();
        assert_eq!(text, "event: fleet\ndata: \"a\\nb\\r\\n\\ndata: c\"\n\n");
    }
}
