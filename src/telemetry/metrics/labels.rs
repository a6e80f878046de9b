//! Labels: what the series of one family differ in.
//!
//! Each label is a type with a name, and the text of each of its values stands once: beside the value, or, for what comes
//! from outside, in the value. So a series cannot be made with a label of another family, and no two places can spell one
//! value in two ways.

use crate::fleet::{NodeId, Role};

/// One label.
pub(super) trait Label: Clone + Ord + Send + Sync + 'static {
    /// As it is written.
    const NAME: &'static str;

    /// The value, as it is written.
    fn text(&self) -> &str;
}

/// All labels of a family: one, or a pair.
pub(super) trait Labels: Clone + Ord + Send + Sync + 'static {
    /// Their names.
    const NAMES: &'static [&'static str];

    /// Their values, as many as there are names.
    type Texts<'a>: AsRef<[&'a str]>;

    /// The values, in the order of the names.
    fn texts(&self) -> Self::Texts<'_>;
}

impl<A: Label> Labels for A {
    const NAMES: &'static [&'static str] = &[A::NAME];
    type Texts<'a> = [&'a str; 1];

    fn texts(&self) -> [&str; 1] {
        [self.text()]
    }
}

impl<A: Label, B: Label> Labels for (A, B) {
    const NAMES: &'static [&'static str] = &[A::NAME, B::NAME];
    type Texts<'a> = [&'a str; 2];

    fn texts(&self) -> [&str; 2] {
        [self.0.text(), self.1.text()]
    }
}

impl Label for Role {
    const NAME: &'static str = "role";

    fn text(&self) -> &str {
        self.as_str()
    }
}

impl Label for NodeId {
    const NAME: &'static str = "node";

    fn text(&self) -> &str {
        self.as_str()
    }
}

/// Who answered a request; `None`: clearcoat itself.
impl Label for Option<NodeId> {
    const NAME: &'static str = "node";

    fn text(&self) -> &str {
        self.as_ref().map_or("", NodeId::as_str)
    }
}

/// A label that has these values and no others.
macro_rules! values {
    ($(#[$doc:meta])* $vis:vis $label:ident as $name:literal { $($(#[$about:meta])* $value:ident = $text:literal,)+ }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
        $vis enum $label {
            $($(#[$about])* $value,)+
        }

        impl $label {
            /// All of them, in their order.
            $vis const ALL: [$label; [$($text,)+].len()] = [$($label::$value,)+];

            /// As it is written.
            $vis fn as_str(self) -> &'static str {
                match self {
                    $($label::$value => $text,)+
                }
            }
        }

        impl Label for $label {
            const NAME: &'static str = $name;

            fn text(&self) -> &str {
                self.as_str()
            }
        }
    };
}

/// A label whose values are not all known here. Each says why there is a bounded number of them all the same.
macro_rules! open_values {
    ($($(#[$doc:meta])* $label:ident as $name:literal,)+) => {
        $(
            $(#[$doc])*
            #[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
            pub(super) struct $label(pub(super) Box<str>);

            impl Label for $label {
                const NAME: &'static str = $name;

                fn text(&self) -> &str {
                    &self.0
                }
            }
        )+
    };
}

open_values! {
    /// A family of tags: [`crate::attribution`] bounds their number.
    TagFamily as "family",
    /// The address of who purges: [`crate::attribution`] bounds their number.
    Sender as "source",
    /// Everything, or a bare family that Magento has.
    WideTarget as "what",
    /// What a purge names: [`crate::purge::Purge::kind`].
    PurgeKind as "kind",
    /// The file of a certificate, as configured.
    CertificateFile as "cert",
    /// Why a journal began anew: [`crate::telemetry::JournalMetrics`] is told by who knows them all.
    AnewReason as "reason",
    /// Of this program.
    Version as "version",
}

values! {
    /// The first digit of a status code.
    pub(super) CodeClass as "code_class" {
        /// Interim answers.
        Informational = "1xx",
        /// It went well.
        Success = "2xx",
        /// It is elsewhere, or as it was.
        Redirection = "3xx",
        /// The client is at fault.
        ClientError = "4xx",
        /// The server is at fault.
        ServerError = "5xx",
    }
}

impl CodeClass {
    /// That of a status code; of one that is out of bounds, the nearest.
    pub(super) fn of(status: u16) -> Self {
        match status {
            ..200 => CodeClass::Informational,
            200..300 => CodeClass::Success,
            300..400 => CodeClass::Redirection,
            400..500 => CodeClass::ClientError,
            500.. => CodeClass::ServerError,
        }
    }
}

values! {
    /// Why a request was tried again elsewhere.
    pub RetryReason as "reason" {
        /// No connection to the node could be opened.
        Connect = "connect",
        /// The node closed the connection before its answer.
        NoAnswer = "no_answer",
        /// The node went down while its answer was waited for.
        NodeDown = "node_down",
    }
}

values! {
    /// What requests wait for.
    pub(super) AwaitedResource as "waits_for" {
        /// A node with room.
        Node = "node",
        /// A file for a connection to their node.
        File = "file",
    }
}

values! {
    /// Why a request failed, at a client's side, ours or a node's.
    pub FailureReason as "reason" {
        /// The head of the request was malformed.
        BadRequest = "bad_request",
        /// The head of the request had more bytes or fields than it may.
        RequestHeadTooLarge = "request_head_too_large",
        /// The listener does not take the method.
        MethodRefused = "method_refused",
        /// A path of clearcoat's own, with nothing there.
        NotFound = "not_found",
        /// The network of the client is blocked.
        Blocked = "blocked",
        /// The host is not one that the edge answers for.
        UnknownHost = "unknown_host",
        /// It came by plain HTTP, and was sent to https.
        PlainHttp = "plain_http",
        /// The shop is closed.
        Maintenance = "maintenance",
        /// Its client had made too many requests.
        ClientRate = "client_rate",
        /// All clients together had made too many.
        TotalRate = "total_rate",
        /// The frame of the request's body was malformed.
        BadRequestBody = "bad_request_body",
        /// The body of the request was longer than it may be.
        RequestBodyTooLarge = "request_body_too_large",
        /// The client was too slow with its request.
        ClientTimeout = "client_timeout",
        /// The client left before the end of its answer.
        ClientGone = "client_gone",
        /// No node was up.
        NoneUp = "none_up",
        /// Every Varnish missed a purge.
        AllBehind = "all_behind",
        /// All nodes were at their limit, and as many requests waited as may.
        QueueFull = "queue_full",
        /// No node had room for as long as a request may wait.
        QueueTimeout = "queue_timeout",
        /// No file for a connection to a node became free in time.
        NoFiles = "no_files",
        /// There was no port or memory for a connection to a node.
        NoPort = "no_port",
        /// The node took no connection.
        Connect = "connect",
        /// The node closed the connection before its answer.
        NoAnswer = "no_answer",
        /// The node's answer did not begin in time, or its system gave no sign of life.
        Timeout = "timeout",
        /// The answer was older than a purge, and nobody had another one.
        Stale = "stale",
        /// The head of the answer had more bytes or fields than it may.
        AnswerHeadTooLarge = "answer_head_too_large",
        /// The head of the answer was malformed.
        BadAnswerHead = "bad_answer_head",
        /// The frame of the answer's body was malformed.
        BadAnswerBody = "bad_answer_body",
        /// The node broke off in mid-answer.
        Cut = "cut",
        /// The node said nothing more in mid-answer.
        Stalled = "stalled",
        /// The answer to a cache did not end, and a purge waited for it.
        GuardCut = "guard_cut",
        /// Nothing moved through a tunnel for too long.
        IdleTunnel = "idle_tunnel",
        /// The whole request took longer than it may.
        DeadlineExceeded = "deadline_exceeded",
    }
}

values! {
    /// What a node did to a request.
    pub UpstreamFault as "reason" {
        /// It took no connection.
        Connect = "connect",
        /// It closed the connection before its answer.
        NoAnswer = "no_answer",
        /// Its answer did not begin in time, or its system gave no sign of life.
        Timeout = "timeout",
        /// The head of its answer had more bytes or fields than it may.
        HeadTooLarge = "head_too_large",
        /// The head of its answer was malformed.
        BadHead = "bad_head",
        /// The frame of its answer's body was malformed.
        BadBody = "bad_body",
        /// It broke off in mid-answer.
        Cut = "cut",
        /// It said nothing more in mid-answer.
        Stalled = "stalled",
    }
}

values! {
    /// How a cache came by an answer.
    pub CacheResult as "result" {
        /// It had the page.
        Hit = "hit",
        /// It fetched the page, and could store it.
        Miss = "miss",
        /// It fetched the page, and could not store it.
        Pass = "pass",
    }
}

values! {
    /// What the seal of a cache's answer said.
    pub SealVerdict as "verdict" {
        /// No purge concerned it since it was rendered.
        Fresh = "fresh",
        /// It is older than a purge: no client saw it.
        Stale = "stale",
        /// It had none.
        Unsealed = "unsealed",
    }
}

values! {
    /// How a batch of purges ended at a node.
    pub(super) BatchResult as "result" {
        /// It was acknowledged.
        Ok = "ok",
        /// It failed and will be tried again.
        Error = "error",
        /// The node refused it: its VCL or ACL must be changed.
        Refused = "refused",
        /// One request of it is not taken, though others are.
        PassedOver = "passed_over",
    }
}

values! {
    /// How the push of a VCL ended.
    pub(super) PushResult as "result" {
        /// It was compiled, and is in use.
        Compiled = "compiled",
        /// It was loaded still, and is in use again.
        Reused = "reused",
        /// varnishd did not take it.
        Refused = "refused",
        /// The connection broke.
        Failed = "failed",
    }
}

values! {
    /// How a purge request ended.
    pub PurgeResult as "result" {
        /// Every Varnish has it.
        Applied = "applied",
        /// It is seen in the seals of pages: some Varnish gets it later.
        Pending = "pending",
        /// Some Varnish was behind, and fenced.
        Fenced = "fenced",
        /// Some Varnish does not take it, though it takes others.
        RefusedByNode = "refused_by_node",
        /// No node has taken or refused it in time.
        Untaken = "untaken",
        /// It is not a purge, or not one that is understood.
        Refused = "refused",
        /// Its pattern was empty.
        Empty = "empty",
        /// Whoever sent it may not.
        Forbidden = "forbidden",
        /// Too many were under way.
        Overload = "overload",
        /// The journal did not take it.
        NotDurable = "not_durable",
    }
}

values! {
    /// Why everything in etcd was listed.
    pub Resync as "reason" {
        /// It is the first list.
        Start = "start",
        /// etcd has forgotten changes that we have not seen.
        Compacted = "compacted",
        /// etcd's history is another one than before: it was restored from a backup, or is another cluster.
        Restored = "restored",
        /// Too much has changed since.
        FarBehind = "far_behind",
        /// The connection is a new one, and the list is short.
        Reconnected = "reconnected",
    }
}

values! {
    /// What became of a reload of the configuration.
    pub ReloadResult as "result" {
        /// What changed is in force.
        Applied = "applied",
        /// It has errors: the old one goes on.
        Refused = "refused",
        /// There was nothing new in it.
        Unchanged = "unchanged",
    }
}

values! {
    /// What became of renewed certificates.
    pub(super) TlsReloadResult as "result" {
        /// They are served.
        Ok = "ok",
        /// They cannot be used: the old ones go on.
        Failed = "failed",
    }
}

values! {
    /// How a TLS handshake of a client ended.
    pub HandshakeResult as "result" {
        /// There is a session.
        Ok = "ok",
        /// The client left, or both have nothing in common.
        Failed = "failed",
        /// It took too long.
        Late = "late",
    }
}

values! {
    /// What became of a fragment of a page that passed the caches by.
    pub(super) FragmentResult as "result" {
        /// It is in its page.
        Included = "included",
        /// It is missing in its page: the log says why.
        LeftOut = "left_out",
        /// The encoding of the page hides whether there is any: it passed as it is.
        Hidden = "hidden",
    }
}

values! {
    /// What files of the traffic are for.
    pub FileShare as "share" {
        /// Clients of the edge.
        EdgeClients = "edge_clients",
        /// Connections to nodes for them.
        EdgeNodes = "edge_nodes",
        /// Varnish at the origin.
        OriginClients = "origin_clients",
        /// Connections to web nodes for it.
        OriginNodes = "origin_nodes",
    }
}

/// Who wanted a file, a port or memory, and did not get it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum ShortageAt {
    /// Traffic, whose share of the files is used up.
    Share(FileShare),
    /// A listener.
    Accept,
    /// A connection to a node.
    Connect,
    /// A health check.
    Probe,
}

impl ShortageAt {
    /// As it is written.
    pub(super) fn as_str(self) -> &'static str {
        match self {
            ShortageAt::Share(share) => share.as_str(),
            ShortageAt::Accept => "accept",
            ShortageAt::Connect => "connect",
            ShortageAt::Probe => "probe",
        }
    }
}

impl Label for ShortageAt {
    const NAME: &'static str = "at";

    fn text(&self) -> &str {
        self.as_str()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn odd_status_codes_stay_within_the_classes() {
        assert_eq!([99, 204, 999].map(|status| CodeClass::of(status).as_str()), ["1xx", "2xx", "5xx"]);
    }
}
