//! 10,000 seeded histories of requests that wait, in virtual time, over several workers: requests come, end, are cancelled and give up,
//! nodes go down and come up, and the limit changes. Each worker does one step after the other, as the product does
//! (`proxy::RequestQueue`), and which worker is next is left to chance: between the end of a request and the look at who waits, anything
//! may happen. What has to hold is asserted by name.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};

use super::WaitingLine;

const HISTORIES: u64 = 10_000;

/// Numbers by chance, the same ones for the same seed: `SplitMix64`, since this layer has no source of them.
struct Dice(u64);

impl Dice {
    /// Below `sides`.
    fn throw(&mut self, sides: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut word = self.0;
        word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (word ^ (word >> 31)) % sides
    }

    fn index(&mut self, length: usize) -> usize {
        self.throw(length as u64) as usize
    }
}

struct SimulatedNode {
    is_up: bool,
    inflight: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Progress {
    Coming,
    /// In the line by this number.
    Waiting(u64),
    /// It has a place.
    Running(usize),
    Done,
    Refused,
    GivenUp,
}

struct SimulatedRequest {
    /// The nodes that it may use, a bit each: its class.
    class: u8,
    takes: u64,
    gives_up_at: u64,
    progress: Progress,
    /// When it first looked for a node, and when it joined the line, in steps of all workers.
    came: u64,
    joined: u64,
}

/// What happens at some time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Happening {
    Comes(usize),
    Ends(usize),
    GivesUp(usize),
    Changes,
}

/// What a worker does at once, as far as others can tell.
#[derive(Clone, Copy, Debug)]
enum Step {
    Choose(usize),
    /// It has found this node to have room, and looks whether somebody waits, who comes first.
    LookBefore(usize, usize),
    /// It takes a place there, if there still is one.
    Take(usize, usize),
    /// Takes the lock, and joins.
    Join(usize),
    /// Takes the lock.
    Lock,
    /// With the lock.
    Serve,
    /// With the lock: who was not served, and is one too many, leaves.
    Settle(usize),
    Unlock,
    /// A request that was served hears of its place.
    Hear(usize, usize),
    End(usize),
    /// Looks whether somebody waits, after a place became free.
    Look,
    GiveUp(usize),
    Change,
}

#[derive(Default)]
struct SimulatedWorker {
    steps: VecDeque<Step>,
}

impl SimulatedWorker {
    /// Goes on with these.
    fn then(&mut self, steps: &[Step]) {
        steps.iter().rev().for_each(|step| self.steps.push_front(*step));
    }
}

/// What the histories met together: a simulation in which nothing happens shows nothing.
#[derive(Debug, Default)]
struct Met {
    at_once: u64,
    overtaken: u64,
    waited: u64,
    refused: u64,
    left: u64,
    left_with_a_place: u64,
    /// Served before somebody who came earlier, and could use no node that had room.
    passed_by: u64,
    /// A limit was lowered below what a node had.
    above_the_limit: u64,
    ends: u64,
}

struct History {
    seed: u64,
    dice: Dice,
    now: u64,
    /// Steps so far.
    clock: u64,
    nodes: Vec<SimulatedNode>,
    limit: u32,
    most: usize,
    line: WaitingLine<u8, usize>,
    /// What workers look at without the lock.
    waiting: usize,
    locked_by: Option<usize>,
    /// Who was served while the lock was held, and is told when it is not any more.
    told: Vec<(usize, usize)>,
    requests: Vec<SimulatedRequest>,
    workers: Vec<SimulatedWorker>,
    happenings: BinaryHeap<Reverse<(u64, Happening)>>,
}

impl History {
    fn new(seed: u64) -> Self {
        let mut dice = Dice(seed);
        let nodes = 1 + dice.index(4);
        let timeout = 1 + dice.throw(30);
        let busy = 1 + dice.throw(8);
        let mut happenings = BinaryHeap::new();
        let requests = (0..20 + dice.index(60)).map(|id| {
            let at = dice.throw(40);
            happenings.push(Reverse((at, Happening::Comes(id))));
            let all = (1 << nodes) - 1;
            // Most can use every node, some all but one, and some one alone.
            let class = match dice.throw(6) {
                0 => all & !(1 << dice.index(nodes)),
                1 => 1 << dice.index(nodes),
                _ => all,
            };
            let patience = if dice.throw(5) == 0 { dice.throw(timeout) } else { timeout };
            let takes = dice.throw(busy * 3);
            let progress = Progress::Coming;
            SimulatedRequest { class, takes, gives_up_at: at + patience, progress, came: 0, joined: 0 }
        });
        let requests = requests.collect();
        (0..dice.throw(8)).for_each(|_| happenings.push(Reverse((dice.throw(60), Happening::Changes))));
        History {
            seed,
            now: 0,
            clock: 0,
            nodes: (0..nodes).map(|_| SimulatedNode { is_up: true, inflight: 0 }).collect(),
            limit: 1 + dice.throw(4) as u32,
            most: dice.index(16),
            line: WaitingLine::default(),
            waiting: 0,
            locked_by: None,
            told: Vec::new(),
            requests,
            workers: (0..2 + dice.index(3)).map(|_| SimulatedWorker::default()).collect(),
            happenings,
            dice,
        }
    }

    /// The nodes with room for a request of this class. Another test than that of the product, of which the line knows nothing.
    fn with_room(&self, class: u8) -> Vec<usize> {
        let has_room =
            |(at, node): &(usize, &SimulatedNode)| class & (1 << at) != 0 && node.is_up && node.inflight < self.limit;
        self.nodes.iter().enumerate().filter(has_room).map(|(at, _)| at).collect()
    }

    /// Counts a request at a node, which must have room.
    fn put(&mut self, node: usize) {
        let seed = self.seed;
        assert!(self.nodes[node].inflight < self.limit, "{seed}: more requests at a node than its limit");
        self.nodes[node].inflight += 1;
    }

    fn begin(&mut self, id: usize, node: usize) {
        self.requests[id].progress = Progress::Running(node);
        let ends = self.now + self.requests[id].takes;
        self.happenings.push(Reverse((ends, Happening::Ends(id))));
    }

    fn serve(&mut self, met: &mut Met) {
        let seed = self.seed;
        let mut line = std::mem::take(&mut self.line);
        let served = line.serve(|&class, &id| {
            let room = self.with_room(class);
            let node = *room.get(self.dice.index(room.len().max(1)))?;
            let Progress::Waiting(number) = self.requests[id].progress else {
                panic!("{seed}: who does not wait is served")
            };
            for other in &self.requests {
                let Progress::Waiting(before) = other.progress else { continue };
                if before < number {
                    assert!(
                        self.with_room(other.class).is_empty(),
                        "{seed}: somebody was passed by for a place of his"
                    );
                    met.passed_by += 1;
                }
            }
            self.put(node);
            // It waits no more, and does not know it yet.
            self.requests[id].progress = Progress::Coming;
            Some(node)
        });
        self.line = line;
        self.waiting -= served.len();
        met.waited += served.len() as u64;
        self.told.extend(served);
    }

    /// Whether the step was done: one that needs the lock may have to wait for it.
    fn step(&mut self, worker: usize, step: Step, met: &mut Met) -> bool {
        let needs_lock = matches!(step, Step::Join(_) | Step::Lock | Step::GiveUp(_));
        if needs_lock && self.locked_by.is_some() {
            return false;
        }
        self.clock += 1;
        match step {
            Step::Choose(id) => {
                if self.requests[id].came == 0 {
                    self.requests[id].came = self.clock;
                }
                let room = self.with_room(self.requests[id].class);
                let step = match room.get(self.dice.index(room.len().max(1))) {
                    Some(&node) => Step::LookBefore(id, node),
                    None => Step::Join(id),
                };
                self.workers[worker].then(&[step]);
            }
            Step::LookBefore(id, node) => {
                let next = if self.waiting > 0 { Step::Join(id) } else { Step::Take(id, node) };
                self.workers[worker].then(&[next]);
            }
            Step::Take(id, node) if self.nodes[node].inflight >= self.limit => {
                met.overtaken += 1;
                self.workers[worker].then(&[Step::Choose(id)]);
            }
            Step::Take(id, node) => {
                met.at_once += 1;
                let could = |other: &&SimulatedRequest| {
                    matches!(other.progress, Progress::Waiting(_)) && other.class & (1 << node) != 0
                };
                let came = self.requests[id].came;
                let is_first = self.requests.iter().filter(could).all(|other| other.joined > came);
                assert!(is_first, "{}: who waits is passed by by one who comes", self.seed);
                self.put(node);
                self.begin(id, node);
            }
            Step::Join(id) => self.join(worker, id),
            Step::Lock => {
                self.locked_by = Some(worker);
                self.workers[worker].then(&[Step::Serve, Step::Unlock]);
            }
            Step::Serve => self.serve(met),
            Step::Settle(id) => self.settle(id, met),
            Step::Unlock => {
                self.locked_by = None;
                let told: Vec<Step> = self.told.drain(..).map(|(id, node)| Step::Hear(id, node)).collect();
                self.workers[worker].then(&told);
            }
            Step::Hear(id, node) if self.requests[id].progress == Progress::GivenUp => {
                met.left_with_a_place += 1;
                self.nodes[node].inflight -= 1;
                self.workers[worker].then(&[Step::Look]);
            }
            Step::Hear(id, node) => self.begin(id, node),
            Step::End(id) => {
                let Progress::Running(node) = self.requests[id].progress else { return true };
                self.requests[id].progress = Progress::Done;
                met.ends += 1;
                self.nodes[node].inflight -= 1;
                self.workers[worker].then(&[Step::Look]);
            }
            Step::Look if self.waiting > 0 => self.workers[worker].then(&[Step::Lock]),
            Step::Look => {}
            Step::GiveUp(id) => self.give_up(id, met),
            Step::Change => {
                self.change(met);
                self.workers[worker].then(&[Step::Lock]);
            }
        }
        true
    }

    fn join(&mut self, worker: usize, id: usize) {
        let number = self.line.join(self.requests[id].class, id);
        (self.requests[id].progress, self.requests[id].joined) = (Progress::Waiting(number), self.clock);
        let at = self.requests[id].gives_up_at.max(self.now);
        self.happenings.push(Reverse((at, Happening::GivesUp(id))));
        self.waiting += 1;
        self.locked_by = Some(worker);
        self.workers[worker].then(&[Step::Serve, Step::Settle(id), Step::Unlock]);
    }

    fn settle(&mut self, id: usize, met: &mut Met) {
        let Progress::Waiting(number) = self.requests[id].progress else { return };
        if self.line.len() > self.most {
            assert_eq!(self.line.leave(&self.requests[id].class, number), Some(id), "{}", self.seed);
            self.waiting -= 1;
            met.refused += 1;
            self.requests[id].progress = Progress::Refused;
        }
    }

    fn give_up(&mut self, id: usize, met: &mut Met) {
        match self.requests[id].progress {
            Progress::Waiting(number) => {
                let left = self.line.leave(&self.requests[id].class, number);
                assert_eq!(left, Some(id), "{}: who waits is not in the line", self.seed);
                self.waiting -= 1;
            }
            // It was served this moment, and has not heard of it.
            Progress::Coming => {}
            _ => return,
        }
        met.left += 1;
        self.requests[id].progress = Progress::GivenUp;
    }

    fn change(&mut self, met: &mut Met) {
        if self.dice.throw(2) == 0 {
            self.limit = 1 + self.dice.throw(4) as u32;
            met.above_the_limit += self.nodes.iter().filter(|node| node.inflight > self.limit).count() as u64;
        } else {
            let node = self.dice.index(self.nodes.len());
            self.nodes[node].is_up = !self.nodes[node].is_up;
        }
    }

    /// What holds while no worker is in the middle of something.
    fn holds(&self) {
        let seed = self.seed;
        assert!(self.locked_by.is_none(), "{seed}: the lock was kept");
        assert_eq!(self.waiting, self.line.len(), "{seed}: what workers look at is not so");
        assert!(self.line.len() <= self.most, "{seed}: more wait than may");
        for request in &self.requests {
            let waits = matches!(request.progress, Progress::Waiting(_));
            assert!(!waits || self.with_room(request.class).is_empty(), "{seed}: somebody waits, and a node has room");
        }
        let running = self.requests.iter().filter(|request| matches!(request.progress, Progress::Running(_))).count();
        let inflight: u32 = self.nodes.iter().map(|node| node.inflight).sum();
        assert_eq!(running as u32, inflight, "{seed}: a place that nobody has");
    }

    fn run(mut self, met: &mut Met) {
        loop {
            let busy: Vec<usize> = (0..self.workers.len()).filter(|&at| !self.workers[at].steps.is_empty()).collect();
            let is_due = self.happenings.peek().is_some_and(|Reverse((at, _))| *at <= self.now);
            if busy.is_empty() {
                self.holds();
            }
            if is_due && (busy.is_empty() || self.dice.throw(2) == 0) {
                self.happen();
            } else if !busy.is_empty() {
                let worker = busy[self.dice.index(busy.len())];
                let Some(step) = self.workers[worker].steps.pop_front() else { continue };
                if !self.step(worker, step, met) {
                    self.workers[worker].steps.push_front(step);
                }
            } else if let Some(Reverse((at, _))) = self.happenings.peek() {
                self.now = *at;
            } else {
                break;
            }
        }
        let is_over = |request: &SimulatedRequest| {
            matches!(request.progress, Progress::Done | Progress::Refused | Progress::GivenUp)
        };
        assert!(self.requests.iter().all(is_over), "{}: somebody never ends", self.seed);
        assert!(self.line.is_empty() && self.nodes.iter().all(|node| node.inflight == 0), "{}", self.seed);
    }

    /// Gives what is due next to some worker.
    fn happen(&mut self) {
        let Some(Reverse((_, happening))) = self.happenings.pop() else { return };
        let step = match happening {
            Happening::Comes(id) => Step::Choose(id),
            Happening::Ends(id) => Step::End(id),
            Happening::GivesUp(id) => Step::GiveUp(id),
            Happening::Changes => Step::Change,
        };
        let worker = self.dice.index(self.workers.len());
        self.workers[worker].steps.push_back(step);
    }
}

#[test]
fn what_must_hold_of_those_who_wait_holds_in_10_000_histories() {
    let mut met = Met::default();
    (0..HISTORIES).for_each(|seed| History::new(seed).run(&mut met));
    let Met { at_once, overtaken, waited, refused, left, left_with_a_place, passed_by, above_the_limit, ends } = met;
    let all = [at_once, overtaken, waited, refused, left, left_with_a_place, passed_by, above_the_limit, ends];
    assert!(all.iter().all(|&times| times > HISTORIES / 200), "it shows little: {met:?}");
    println!("{met:?}");
}
