//! What is wrong between us and a node: of which kind, and in words.
//!
//! Whoever meets a fault knows its kind: the system says that nothing listens, a status that a VCL refuses. The words are for
//! people, name what was seen, and may change with every release. So the two are handed on together, and what to do about it
//! ([`crate::admin`]) is chosen by the kind.

use std::fmt;
use std::io;
use std::sync::Arc;

use serde::{Serialize, Serializer};

/// The kind of a fault. The kinds differ in what an operator has to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FaultKind {
    /// Its machine says that nothing listens at its address.
    NotListening,
    /// There is no way to its address.
    Unreachable,
    /// Nothing is answered in time.
    Silent,
    /// Purges are not answered in time, though other requests are.
    SilentToPurges,
    /// The connection ends before an answer.
    Disconnects,
    /// It answers with a status below 500 that was not wanted.
    Refuses,
    /// It answers with a status from 500 on.
    Fails,
    /// Its answer is not HTTP/1.1.
    Malformed,
    /// It carries purges out, but does not drop pages without tags when it is told to drop everything.
    FlushesInPart,
    /// It has acknowledged purges whose pages it still has.
    KeepsPages,
    /// It has to be flushed first: what it has was kept in order by seals, which are not judged any more.
    OwesFlush,
    /// A page is on its way to it that was purged: no fault of the node.
    PageUnderWay,
    /// We lack files, ports, memory or a permission: no fault of the node.
    OurShortage,
    /// What it is to be asked with cannot be had (the file with the key that its VCL wants, say): no fault of the node.
    OurSettings,
}

impl FaultKind {
    /// Every kind.
    pub const ALL: [FaultKind; 14] = [
        FaultKind::NotListening,
        FaultKind::Unreachable,
        FaultKind::Silent,
        FaultKind::SilentToPurges,
        FaultKind::Disconnects,
        FaultKind::Refuses,
        FaultKind::Fails,
        FaultKind::Malformed,
        FaultKind::FlushesInPart,
        FaultKind::KeepsPages,
        FaultKind::OwesFlush,
        FaultKind::PageUnderWay,
        FaultKind::OurShortage,
        FaultKind::OurSettings,
    ];

    /// As it is written in the log, in spans and in the API.
    pub fn as_str(self) -> &'static str {
        match self {
            FaultKind::NotListening => "not-listening",
            FaultKind::Unreachable => "unreachable",
            FaultKind::Silent => "silent",
            FaultKind::SilentToPurges => "silent-to-purges",
            FaultKind::Disconnects => "disconnects",
            FaultKind::Refuses => "refuses",
            FaultKind::Fails => "fails",
            FaultKind::Malformed => "malformed",
            FaultKind::FlushesInPart => "flushes-in-part",
            FaultKind::KeepsPages => "keeps-pages",
            FaultKind::OwesFlush => "owes-flush",
            FaultKind::PageUnderWay => "page-under-way",
            FaultKind::OurShortage => "our-shortage",
            FaultKind::OurSettings => "our-settings",
        }
    }

    /// Of a connection that broke, or was not made, through no fault of ours. What a firewall answers in place of the node
    /// (`EHOSTUNREACH`, `ENETUNREACH`; RFC 1812 section 5.2.7.1) is told from what its machine answers.
    pub fn of_connection(error: &io::Error) -> Self {
        use io::ErrorKind::{
            BrokenPipe, ConnectionAborted, ConnectionRefused, ConnectionReset, NotConnected, TimedOut, UnexpectedEof,
            WriteZero,
        };
        match error.kind() {
            ConnectionRefused => FaultKind::NotListening,
            TimedOut => FaultKind::Silent,
            BrokenPipe | ConnectionAborted | ConnectionReset | NotConnected | UnexpectedEof | WriteZero => {
                FaultKind::Disconnects
            }
            _ => FaultKind::Unreachable,
        }
    }

    /// Of an answer with this status, where another one was wanted.
    pub fn of_status(status: u16) -> Self {
        if status >= 500 { FaultKind::Fails } else { FaultKind::Refuses }
    }
}

impl fmt::Display for FaultKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl Serialize for FaultKind {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.as_str())
    }
}

/// A fault as it was met.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeFault {
    /// What decides what to do.
    pub kind: FaultKind,
    /// What was seen, for people; never empty.
    pub text: Arc<str>,
}

impl NodeFault {
    /// A fault of this kind.
    pub fn new(kind: FaultKind, text: impl Into<Arc<str>>) -> Self {
        NodeFault { kind, text: text.into() }
    }
}

impl fmt::Display for NodeFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_description_of_the_api_names_every_kind() {
        let document: serde_json::Value = serde_json::from_str(include_str!("../../docs/openapi.json")).unwrap();
        let named = document.pointer("/components/schemas/Node/properties/fault/enum").unwrap();
        assert_eq!(*named, serde_json::to_value(FaultKind::ALL).unwrap());
    }

    #[test]
    fn what_a_connection_meets_is_of_the_kind_that_the_system_says() {
        use rustix::io::Errno;
        for (errno, kind) in [
            (Errno::CONNREFUSED, FaultKind::NotListening),
            (Errno::HOSTUNREACH, FaultKind::Unreachable),
            (Errno::NETUNREACH, FaultKind::Unreachable),
            (Errno::TIMEDOUT, FaultKind::Silent),
            (Errno::CONNRESET, FaultKind::Disconnects),
            (Errno::PIPE, FaultKind::Disconnects),
        ] {
            assert_eq!(FaultKind::of_connection(&errno.into()), kind, "{errno}");
        }
    }
}
