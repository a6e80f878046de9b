//! A client: writes its requests and reads its answers concurrently, and compares every byte.

mod listeners;
mod progress;

use std::rc::Rc;
use std::time::Duration;

use fastrand::Rng;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;

use super::expect::{self, Outcome};
use super::generate;
use super::ledger::{Run, Violation};
use super::message::{Conversation, Exchange, Exit, Expect, Framing, Interim, Leave, Mishap, Side, Version};
use super::pace::Pace;
use super::parse::{BodyCheck, Ending, Head, Incoming, Trouble, shown};
pub use listeners::Listeners;
use progress::Progress;

/// Runs a conversation, on as many connections as needed.
pub async fn converse(run: &Run, number: u32, listeners: Listeners) -> Result<(), Violation> {
    let conversation = run.conversation(number);
    let mut random = generate::random(run.seed, number, 1);
    let mut rest = &conversation.exchanges[..];
    while let Some(first) = rest.first() {
        let violation = |what| Violation { number: Some(first.number), seen_by: "the client", what };
        let mut stream = listeners
            .connect(&conversation)
            .await
            .map_err(|error| violation(format!("clearcoat accepts no connection: {error}")))?;
        run.count("client connections");
        let progress = Progress::default();
        let connection = Connection { run, conversation: &conversation, exchanges: rest, progress: &progress };
        let exit = connection.converse(&mut stream, &mut random).await?;
        if exit == Exit::Reset {
            socket2::SockRef::from(&stream)
                .set_linger(Some(Duration::ZERO))
                .map_err(|error| violation(format!("the socket cannot be reset: {error}")))?;
        }
        let settled = progress.answered.get();
        assert!(settled > 0, "a connection that settled nothing is a violation: {first}");
        rest = &rest[settled..];
    }
    Ok(())
}

/// How the reader leaves a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Read {
    /// Everything was answered, and the connection could carry more.
    Kept,
    /// The last answer announced the end.
    Closed,
    /// It was aborted, or the client has read as much as planned.
    Over,
}

/// How the writer leaves it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wrote {
    /// It wrote as much as clearcoat took; the reader evaluates that.
    Enough,
    /// The client leaves now.
    Leaves(Exit),
}

/// One connection of a conversation, and the remaining exchanges.
struct Connection<'c> {
    run: &'c Run,
    conversation: &'c Conversation,
    exchanges: &'c [Exchange],
    progress: &'c Progress,
}

impl Connection<'_> {
    /// Returns how to leave the connection.
    async fn converse(&self, stream: &mut TcpStream, random: &mut Rng) -> Result<Exit, Violation> {
        let (source, mut sink) = stream.split();
        let mut incoming = Incoming::new(source, Pace::new(random));
        incoming.write_failed = Rc::clone(&self.progress.write_failed);
        let (mut reading, mut writing) = (random.fork(), random.fork());
        let read = {
            let mut reader = std::pin::pin!(self.read(&mut incoming, &mut reading));
            let mut writer = std::pin::pin!(self.write(&mut sink, &mut writing));
            tokio::select! {
                read = &mut reader => {
                    self.progress.set(&self.progress.over, true);
                    if self.conversation.stubborn && read.is_ok() {
                        writer.await;
                    }
                    read?
                }
                wrote = &mut writer => match wrote {
                    Wrote::Leaves(exit @ (Exit::Close | Exit::Reset)) => {
                        self.settle(self.progress.answered.get(), Outcome::Left)?;
                        return Ok(exit);
                    }
                    Wrote::Leaves(Exit::HalfClose) | Wrote::Enough => reader.await?,
                }
            }
        };
        match (read, self.exchanges[self.progress.answered.get() - 1].mishap) {
            (_, Some(Mishap::ClientLeaves { exit, .. })) => return Ok(exit),
            (Read::Over, _) => return Ok(Exit::Close),
            (Read::Kept, _) if self.conversation.hurries => return Ok(Exit::Close),
            // This fails if clearcoat closed at the same moment; the data before that counts.
            (Read::Kept, _) => _ = sink.shutdown().await,
            (Read::Closed, _) => {}
        }
        let last = self.progress.answered.get() - 1;
        match incoming.some(usize::MAX).await {
            Err(Trouble::Ended(Ending::Clean)) => Ok(Exit::Close),
            // A client must not send a request after a `close` (RFC 9112 section 9.6). After a short answer it may find
            // the connection closed; the complete answer has arrived, which is sufficient.
            Err(Trouble::Ended(Ending::Reset)) if self.sends_behind_a_close(last) => Ok(Exit::Close),
            Err(trouble) => Err(self.violation(last, format!("behind the last answer: {trouble:?}"))),
            Ok(bytes) => Err(self.violation(last, format!("behind the last answer came {}", shown(bytes)))),
        }
    }

    /// Whether this request announces that it is the last one, but is not.
    fn sends_behind_a_close(&self, index: usize) -> bool {
        !self.exchanges[index].request.keep_alive && self.exchanges.get(index + 1).is_some_and(|next| next.pipelined)
    }

    fn violation(&self, index: usize, what: String) -> Violation {
        Violation { number: Some(self.exchanges[index].number), seen_by: "the client", what }
    }

    fn settle(&self, index: usize, outcome: Outcome) -> Result<(), Violation> {
        self.run.settle(&self.exchanges[index], self.conversation.side, outcome)?;
        self.progress.set(&self.progress.answered, index + 1);
        Ok(())
    }

    async fn write<W: AsyncWrite + Unpin>(&self, sink: &mut W, random: &mut Rng) -> Wrote {
        let Progress { answered, continued, .. } = self.progress;
        let mut batch = Vec::new();
        for (index, exchange) in self.exchanges.iter().enumerate() {
            if index > 0 && !exchange.pipelined {
                if !self.send(sink, random, &mut batch).await {
                    return Wrote::Enough;
                }
                self.progress.wait(|| answered.get() >= index).await;
                if self.progress.over.get() {
                    return Wrote::Enough;
                }
            }
            let (head, body) = (&exchange.request.head, &exchange.request.body.wire);
            if let Some(Mishap::ClientLeaves { at: at @ (Leave::Head(_) | Leave::Body(_)), exit }) = exchange.mishap {
                let (of_head, of_body) = match at {
                    Leave::Head(at) | Leave::Answer(at) => (at, 0),
                    Leave::Body(at) => (head.len(), at),
                };
                batch.extend_from_slice(&head[..of_head]);
                batch.extend_from_slice(&body[..of_body]);
                if !self.send(sink, random, &mut batch).await {
                    return Wrote::Enough;
                }
                if exit == Exit::HalfClose && sink.shutdown().await.is_err() {
                    return Wrote::Enough;
                }
                return Wrote::Leaves(exit);
            }
            batch.extend_from_slice(head);
            if exchange.request.expect == Expect::Waits {
                if !self.send(sink, random, &mut batch).await {
                    return Wrote::Enough;
                }
                self.progress.wait(|| continued.get() > index || answered.get() > index).await;
                if continued.get() <= index {
                    return Wrote::Enough;
                }
            }
            batch.extend_from_slice(body);
        }
        if self.send(sink, random, &mut batch).await && self.conversation.half_closes {
            // An error means that the connection has ended already.
            _ = sink.shutdown().await;
        }
        Wrote::Enough
    }

    /// Writes the batch. False if clearcoat takes no more: it has answered before, or aborted, and the reader sees
    /// which.
    async fn send<W: AsyncWrite + Unpin>(&self, sink: &mut W, random: &mut Rng, batch: &mut Vec<u8>) -> bool {
        let sent = Pace::new(random).write(sink, batch, 0).await.is_ok();
        batch.clear();
        if !sent {
            self.progress.write_failed.set(true);
        }
        sent
    }

    async fn read<R: AsyncRead + Unpin>(
        &self,
        incoming: &mut Incoming<R>,
        random: &mut Rng,
    ) -> Result<Read, Violation> {
        for (index, exchange) in self.exchanges.iter().enumerate() {
            incoming.set_pace(Pace::new(random));
            if let Some(Mishap::ClientLeaves { at: Leave::Answer(at), .. }) = exchange.mishap {
                incoming.allowance = Some(at);
            }
            let answer = self.answer(index, exchange, incoming).await;
            let (outcome, read) = match answer {
                Ok((outcome, true)) => (outcome, Read::Kept),
                Ok((outcome, false)) => (outcome, Read::Closed),
                Err(Trouble::Left) => (Outcome::Left, Read::Over),
                Err(Trouble::Ended(_)) if exchange.is_left() => (Outcome::Left, Read::Over),
                Err(Trouble::Ended(ending)) => (Outcome::Cut(ending), Read::Over),
                Err(Trouble::Wrong(what)) => return Err(self.violation(index, what)),
            };
            self.settle(index, outcome)?;
            if read != Read::Kept {
                return Ok(read);
            }
        }
        Ok(Read::Kept)
    }

    /// Reads one answer. Returns how it ended, and whether another may follow.
    async fn answer<R: AsyncRead + Unpin>(
        &self,
        index: usize,
        exchange: &Exchange,
        incoming: &mut Incoming<R>,
    ) -> Result<(Outcome, bool), Trouble> {
        let head = self.final_head(index, exchange, incoming).await?;
        if head.first_line == "HTTP/1.1 502 Bad Gateway" {
            return bad_gateway(&head, exchange, incoming).await;
        }
        let kept = expect::check_answer(&head, exchange).map_err(Trouble::Wrong)?;
        let mut body = BodyCheck::new(exchange.framing_for_client(), &exchange.answer.body.content);
        body.advance(incoming, usize::MAX).await?;
        Ok((Outcome::Whole, kept))
    }

    /// Reads the interim answers, which must be those of the node: again from the first one if the request was retried.
    async fn final_head<R: AsyncRead + Unpin>(
        &self,
        index: usize,
        exchange: &Exchange,
        incoming: &mut Incoming<R>,
    ) -> Result<Head, Trouble> {
        // From a web node, only an expected 100 is forwarded.
        let (side, request) = (self.conversation.side, &exchange.request);
        let passes = |interim: &&Interim| {
            let is_awaited = request.expect != Expect::No && interim.status == 100;
            request.version == Version::Http11 && (side == Side::Edge || is_awaited)
        };
        let interim: Vec<_> = exchange.answer.interim.iter().filter(passes).collect();
        let again = matches!(exchange.mishap, Some(Mishap::NodeCuts { .. }));
        let mut passed = 0;
        loop {
            let head = incoming.head().await?;
            if !head.first_line.starts_with("HTTP/1.1 1") {
                if passed < interim.len() && !head.first_line.starts_with("HTTP/1.1 502 ") {
                    let what = format!("{passed} of {} interim answers before {}", interim.len(), head.first_line);
                    return Err(Trouble::Wrong(what));
                }
                return Ok(head);
            }
            let check = |at: usize| match interim.get(at) {
                Some(interim) => expect::check_interim(&head, interim).map(|()| at + 1),
                None => Err(format!("an interim answer that no node sent: {}", head.first_line)),
            };
            passed = match check(passed) {
                Err(_) if again => check(0).map_err(Trouble::Wrong)?,
                checked => checked.map_err(Trouble::Wrong)?,
            };
            if head.first_line.starts_with("HTTP/1.1 100 ") {
                self.progress.set(&self.progress.continued, index + 1);
            }
        }
    }
}

/// Reads clearcoat's own answer, whose text is not checked, and which ends the connection.
async fn bad_gateway<R: AsyncRead + Unpin>(
    head: &Head,
    exchange: &Exchange,
    incoming: &mut Incoming<R>,
) -> Result<(Outcome, bool), Trouble> {
    let framing = head.framing().map_err(Trouble::Wrong)?;
    let Some(Framing::Length(length)) = framing else {
        return Err(Trouble::Wrong(format!("a 502 of clearcoat's own is framed {framing:?}")));
    };
    let mut left = if exchange.request.method == "HEAD" { 0 } else { length };
    while left > 0 {
        left -= incoming.some(left).await?.len();
    }
    if expect::is_kept(head, exchange.request.version).map_err(Trouble::Wrong)? {
        return Err(Trouble::Wrong("a 502 of clearcoat's own keeps the connection".into()));
    }
    Ok((Outcome::BadGateway, false))
}
