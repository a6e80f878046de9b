//! The load generator: one thread per core, which keeps many connections busy and checks every answer.
//!
//! Closed loop: each connection sends its next request once it has the last answer, so the proxy is saturated; CPU per
//! request is compared this way. Open loop: requests begin at a fixed rate, whatever the proxy does, and latency counts
//! from the scheduled time, even if the request had to wait for a connection. Otherwise a stalling proxy would get
//! fewer requests while it stalls, and its latency would look good.

mod connection;
mod h2;

use std::collections::VecDeque;
use std::fs::File;
use std::io::{ErrorKind, Read};
use std::net::SocketAddr;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow, bail};
use mio::unix::SourceFd;
use mio::{Events, Interest, Poll, Token};
use rustix::time::{Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec};
use rustls::ClientConfig;

use crate::messages::Exchange;
use crate::namespace::pin;
use connection::{Connection, Target};
pub(crate) use h2::Http2;

/// If no answer arrives for this long, something hangs.
const PATIENCE: Duration = Duration::from_secs(5);
/// Large, so that a large body needs few calls.
const READ_BUFFER: usize = 256 << 10;
const TICKS: Token = Token(usize::MAX);

/// The properties of a load.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    pub(crate) exchange: Exchange,
    pub(crate) connections: usize,
    pub(crate) pace: Pace,
    pub(crate) reuse: Reuse,
    pub(crate) tls: Option<Arc<ClientConfig>>,
}

/// When requests begin.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Pace {
    /// When the last answer has arrived.
    Closed,
    /// At this rate per second.
    Open(u32),
}

/// The fate of a connection after an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reuse {
    /// The next request is sent on it.
    KeepAlive,
    /// The proxy closes it, as requested.
    Close,
    /// The same, and the next TLS session must be a resumption.
    Resume,
}

/// The measurements of a load over some time.
#[derive(Debug, Default)]
pub(crate) struct Sample {
    /// Of each answer, in nanoseconds.
    pub(crate) latencies: Vec<u32>,
}

/// A load that can be run repeatedly against a proxy.
pub(crate) trait Load: Send {
    /// Runs the load for this long. Requests in flight at the end are finished in the next run.
    ///
    /// # Errors
    /// If an answer is wrong or missing.
    fn run(&mut self, time: Duration) -> anyhow::Result<Sample>;
}

/// Runs one load on each of these cores concurrently.
///
/// # Errors
/// The first error of a load.
pub(crate) fn run<'l>(loads: &'l mut [(usize, Box<dyn Load>)], time: Duration) -> anyhow::Result<Sample> {
    std::thread::scope(|scope| {
        let start = |(core, load): &'l mut (usize, Box<dyn Load>)| {
            std::thread::Builder::new().name(format!("load-{core}")).spawn_scoped(scope, move || {
                pin(*core)?;
                load.run(time)
            })
        };
        let threads = loads.iter_mut().map(start).collect::<std::io::Result<Vec<_>>>()?;
        let mut all = Sample::default();
        for thread in threads {
            let sample = thread.join().map_err(|_| anyhow!("the load panicked"))??;
            all.latencies.extend(sample.latencies);
        }
        Ok(all)
    })
}

/// A load of HTTP/1.1, with or without TLS.
pub(crate) struct Http1 {
    target: Target,
    pace: Pace,
    poll: Poll,
    events: Events,
    connections: Vec<Connection>,
    /// Idle connections; the longest idle one is used next.
    resting: VecDeque<usize>,
    scratch: Vec<u8>,
    ticks: Option<File>,
}

impl Http1 {
    /// A load for the proxy at this address. Connections are opened by their first requests.
    ///
    /// # Errors
    /// The system's error.
    pub(crate) fn new(address: SocketAddr, plan: &Plan) -> anyhow::Result<Self> {
        let poll = Poll::new()?;
        let ticks = match plan.pace {
            Pace::Closed => None,
            Pace::Open(rate) => Some(ticks(rate, &poll)?),
        };
        let target = Target::new(address, plan);
        Ok(Http1 {
            pace: plan.pace,
            poll,
            events: Events::with_capacity(1024),
            connections: (0..plan.connections).map(|_| Connection::new(&target)).collect(),
            resting: (0..plan.connections).collect(),
            scratch: vec![0; READ_BUFFER],
            ticks,
            target,
        })
    }

    /// Sends one request on every connection, at most `at_once` concurrently.
    ///
    /// # Errors
    /// If an answer is wrong or missing.
    pub(crate) fn once_each(&mut self, at_once: usize) -> anyhow::Result<()> {
        let mut sample = Sample::default();
        let mut next = 0;
        let mut last_answer = Instant::now();
        self.resting.clear();
        while sample.latencies.len() < self.connections.len() {
            while next < self.connections.len() && next - sample.latencies.len() < at_once {
                self.begin(next, Instant::now(), &mut sample)?;
                next += 1;
            }
            if sample.latencies.len() < self.connections.len() {
                self.wait(&mut last_answer, &mut sample)?;
            }
        }
        Ok(())
    }

    /// Begins a request, whose latency counts from an earlier time if it had to wait.
    fn begin(&mut self, index: usize, counts_from: Instant, sample: &mut Sample) -> anyhow::Result<()> {
        let connection = &mut self.connections[index];
        if connection.begin(&self.target, counts_from)?
            && let Some(stream) = connection.stream()
        {
            let both = Interest::READABLE | Interest::WRITABLE;
            self.poll.registry().register(stream, Token(index), both)?;
        }
        self.proceed(index, sample)
    }

    fn proceed(&mut self, index: usize, sample: &mut Sample) -> anyhow::Result<()> {
        if let Some(latency) = self.connections[index].proceed(&self.target, &mut self.scratch)? {
            sample.latencies.push(u32::try_from(latency.as_nanos()).unwrap_or(u32::MAX));
            self.resting.push_back(index);
        }
        Ok(())
    }

    /// Waits for events, and handles them.
    fn wait(&mut self, last_answer: &mut Instant, sample: &mut Sample) -> anyhow::Result<()> {
        let answers = sample.latencies.len();
        let mut events = std::mem::replace(&mut self.events, Events::with_capacity(0));
        match self.poll.poll(&mut events, Some(Duration::from_millis(50))) {
            Err(error) if error.kind() == ErrorKind::Interrupted => events.clear(),
            polled => polled?,
        }
        for event in &events {
            match (event.token(), &mut self.ticks) {
                // The clock says how many ticks are due; the read rearms the timer.
                (TICKS, Some(ticks)) => drop_would_block(ticks.read(&mut [0; 8]))?,
                (Token(index), _) => self.proceed(index, sample)?,
            }
        }
        self.events = events;
        if sample.latencies.len() > answers {
            *last_answer = Instant::now();
        } else if last_answer.elapsed() > PATIENCE {
            bail!("no answer for {PATIENCE:?}");
        }
        Ok(())
    }
}

impl Load for Http1 {
    fn run(&mut self, time: Duration) -> anyhow::Result<Sample> {
        let mut sample = Sample::default();
        let began = Instant::now();
        let mut last_answer = began;
        let mut started = 0_u32;
        loop {
            let now = began.elapsed();
            if now >= time {
                return Ok(sample);
            }
            match self.pace {
                Pace::Closed => {
                    for _ in 0..self.resting.len() {
                        if let Some(index) = self.resting.pop_front() {
                            self.begin(index, Instant::now(), &mut sample)?;
                        }
                    }
                }
                Pace::Open(rate) => {
                    while f64::from(started) < now.as_secs_f64() * f64::from(rate)
                        && let Some(index) = self.resting.pop_front()
                    {
                        let meant_for = began + Duration::from_secs_f64(f64::from(started) / f64::from(rate));
                        self.begin(index, meant_for, &mut sample)?;
                        started += 1;
                    }
                }
            }
            self.wait(&mut last_answer, &mut sample)?;
        }
    }
}

/// A timer at this rate per second, more precise than the timeout of epoll, which counts milliseconds.
fn ticks(rate: u32, poll: &Poll) -> anyhow::Result<File> {
    let flags = TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC;
    let timer = rustix::time::timerfd_create(TimerfdClockId::Monotonic, flags)?;
    let period = Timespec { tv_sec: 0, tv_nsec: i64::from(1_000_000_000 / rate.max(2)) };
    let spec = Itimerspec { it_interval: period, it_value: period };
    rustix::time::timerfd_settime(&timer, TimerfdTimerFlags::empty(), &spec).context("a timer")?;
    let timer = File::from(timer);
    poll.registry().register(&mut SourceFd(&timer.as_raw_fd()), TICKS, Interest::READABLE)?;
    Ok(timer)
}

fn drop_would_block(read: std::io::Result<usize>) -> std::io::Result<()> {
    match read {
        Err(error) if error.kind() != ErrorKind::WouldBlock => Err(error),
        _ => Ok(()),
    }
}
