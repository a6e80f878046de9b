//! The data path that edge and origin share: a connection comes in, its requests go out to nodes.
//!
//! # Shape
//!
//! A worker is one thread with one current-thread runtime, its own `SO_REUSEPORT` listeners and its own upstream
//! connections. Between reading a request and writing its answer there is no lock, no channel and no hop to another
//! task: both sockets of an exchange are driven from the client's task.
//!
//! The request path is two functions in `exchange`: `handle` never fails (it turns any failure into one answer, one
//! count and one log line), `try_handle` is straight code over attempts at nodes (`attempt`). A failure knows its side
//! and whether the request may be tried again.
//!
//! Memory is used only during activity: a worker reads into one large scratch buffer, a request in flight holds a
//! [`Request`](request::Request) from the worker's pool, and an idle connection holds only its socket.
//!
//! The differences between edge and origin (node selection, trust, refused methods) are in a [`Frontend`].

mod access;
mod admission;
mod attempt;
mod bypass;
mod cache_result;
mod client;
mod connection;
mod deadline;
mod error_pages;
mod exchange;
mod failure;
mod freshness;
mod frontend;
mod gate;
mod http2;
mod latency;
mod leave_notice;
mod listener;
mod node_choice;
mod node_permit;
mod notices;
mod request;
mod request_hash;
mod request_queue;
mod retries;
mod rules;
mod second_look;
mod site;
mod span_notes;
mod spans;
mod spin;
mod splice;
mod status_set;
mod store;
mod stream;
mod suspicion;
mod trace;
mod transfer;
mod tunnel;
mod worker;

pub use admission::Admission;
pub use error_pages::{ErrorPageError, ErrorPages};
pub use freshness::{Freshness, Refresh};
pub use frontend::{Frontend, NoNode, NodeChoice, OwnAnswer, OwnAnswers, PastCaches, Select, Trust};
pub use gate::{Gate, RateBuckets};
pub use leave_notice::{LeaveNotice, NOTICED};
pub use listener::{CutRequests, Entrance, IdleWorker, Listener, adopt, bind, local_address};
pub use request_hash::{IgnoredParameters, request_hash};
pub use request_queue::RequestQueue;
pub use retries::RetryBudgets;
pub use rules::TrafficRules;
pub use status_set::FailureStatuses;
pub use store::{NoteTags, StorePolicy};
pub use worker::{Worker, WorkerContext};
