//! What an attempt says of how quick its node is ([`crate::fleet::PeakLatency`]), where the listener's policy asks for that.
//!
//! An answer of 5xx is a failure: a web node whose database is away, or whose PHP is full, gives it at once. Where the shop
//! itself fails, on every node alike, all cost the same. 429 is none: in a shop it is said to a client, not of a node.

use std::io;
use std::time::{Duration, Instant};

use super::failure::Failure;
use super::request::Request;
use super::worker::Worker;
use crate::fleet::Node;

/// Notes that the node is asked.
pub(super) fn begin(request: &mut Request, is_noted: bool) {
    request.asked_node = is_noted.then(Instant::now);
}

/// Notes the head of its answer. The first time counts.
pub(super) fn note_answer(worker: &Worker, request: &mut Request, node: &Node) {
    let Some(asked) = request.asked_node.take() else { return };
    let now = Instant::now();
    let (at, took) = (worker.latency_time(now), (now - asked).saturating_sub(request.trace.waited));
    if request.response.status >= 500 {
        node.live.latency.record_failure(at, took);
    } else {
        node.live.latency.record_answer(at, took);
    }
}

/// Notes that the attempt has failed. `reused`: on a connection that the node may have closed before.
pub(super) fn note_failure(worker: &Worker, request: &mut Request, node: &Node, failure: &Failure, reused: bool) {
    let asked = request.asked_node.take();
    let now = Instant::now();
    let at = worker.latency_time(now);
    let took = asked.map_or(Duration::ZERO, |asked| (now - asked).saturating_sub(request.trace.waited));
    match failure {
        Failure::NoFiles | Failure::NoPort(_) => {}
        // Not a word about the node: it is asked again.
        Failure::NoAnswer(error) if reused && error.kind() != io::ErrorKind::TimedOut => {}
        // Also in the middle of an answer that began in time.
        failure if failure.blames_node() => node.live.latency.record_failure(at, took),
        // The client did not wait any longer, say.
        _ => node.live.latency.record_at_least(at, took),
    }
}
