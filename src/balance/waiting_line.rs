//! The line in which requests wait for a node with room. Pure: who locks it, and wakes those who wait, is the caller's business.
//!
//! HAProxy has a queue for each server and one for the backend. Who stands in the queue of a server waits for that one alone, however
//! idle the others have become, until a timeout moves him (`option redispatch`); and a server that hangs keeps its queue. Here there
//! is one line, and **whichever node gets room takes the first who can use it**: a sick node delays nobody but those whose requests
//! it has.
//!
//! **Classes.** Not everybody can use every node: a request of the edge wants a Varnish, one of the origin a web node, and one that
//! has failed at a node wants another one. Requests that can use the same nodes are a class, and stand in the order in which they came.
//! Over all classes the one who came first and can be served is served first. So nobody is passed by for a place that he could have had,
//! and nobody who can use one node only keeps others from the rest: if the first of a class cannot be served, none of the class can, and
//! the next class is looked at. An attempt to serve costs a question for each class and one for each that is served, however long the line
//! is.

use std::collections::{BTreeMap, VecDeque};

/// Those who wait, by class (`C`).
#[derive(Debug)]
pub struct WaitingLine<C, W> {
    classes: BTreeMap<C, WaitingClass<W>>,
    /// The number of the next who joins.
    next: u64,
    length: usize,
}

/// Those of one class, the first one first; never empty.
#[derive(Debug)]
struct WaitingClass<W> {
    waiters: VecDeque<(u64, W)>,
    /// In the present attempt to serve: none of the class can be.
    is_blocked: bool,
}

impl<C, W> Default for WaitingLine<C, W> {
    fn default() -> Self {
        WaitingLine { classes: BTreeMap::new(), next: 0, length: 0 }
    }
}

impl<C: Ord + Clone, W> WaitingLine<C, W> {
    /// How many wait.
    pub fn len(&self) -> usize {
        self.length
    }

    /// Whether nobody waits.
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// Joins at the end. Returns the number by which one leaves.
    pub fn join(&mut self, class: C, waiter: W) -> u64 {
        let number = self.next;
        self.next += 1;
        self.length += 1;
        let new = || WaitingClass { waiters: VecDeque::new(), is_blocked: false };
        self.classes.entry(class).or_insert_with(new).waiters.push_back((number, waiter));
        number
    }

    /// Leaves, wherever one stands; `None` for one who was served, or has left.
    pub fn leave(&mut self, class: &C, number: u64) -> Option<W> {
        let waiters = &mut self.classes.get_mut(class)?.waiters;
        let at = waiters.binary_search_by_key(&number, |(number, _)| *number).ok()?;
        let (_, waiter) = waiters.remove(at)?;
        if waiters.is_empty() {
            self.classes.remove(class);
        }
        self.length -= 1;
        Some(waiter)
    }

    /// Serves whoever can be served, in order. `take` takes a place for one of this class; `None`: there is none for the class.
    pub fn serve<P>(&mut self, mut take: impl FnMut(&C, &W) -> Option<P>) -> Vec<(W, P)> {
        self.classes.values_mut().for_each(|class| class.is_blocked = false);
        let mut served = Vec::new();
        loop {
            let open = self.classes.iter_mut().filter(|(_, class)| !class.is_blocked);
            let first = open.min_by_key(|(_, class)| class.waiters.front().map(|(number, _)| *number));
            let Some((name, class)) = first else { return served };
            let place = class.waiters.front().and_then(|(_, waiter)| take(name, waiter));
            class.is_blocked = place.is_none();
            if let Some(place) = place
                && let Some((_, waiter)) = class.waiters.pop_front()
            {
                self.length -= 1;
                served.push((waiter, place));
                if class.waiters.is_empty() {
                    let name = name.clone();
                    self.classes.remove(&name);
                }
            }
        }
    }
}

#[cfg(test)]
mod simulation;

#[cfg(test)]
mod tests {
    use super::*;

    /// A line of classes `a` and `b` with these in it.
    fn line(waiters: &[(char, u32)]) -> WaitingLine<char, u32> {
        let mut line = WaitingLine::default();
        for &(class, waiter) in waiters {
            line.join(class, waiter);
        }
        line
    }

    /// Who is served with this many places of each class.
    fn served(line: &mut WaitingLine<char, u32>, a: u32, b: u32) -> Vec<u32> {
        let mut left = BTreeMap::from([('a', a), ('b', b)]);
        let take = |class: &char, _: &u32| {
            let left = left.get_mut(class)?;
            *left = left.checked_sub(1)?;
            Some(())
        };
        line.serve(take).into_iter().map(|(waiter, ())| waiter).collect()
    }

    #[test]
    fn who_came_first_is_served_first_whatever_his_class() {
        let mut line = line(&[('a', 1), ('b', 2), ('b', 3), ('a', 4), ('b', 5)]);
        assert_eq!((served(&mut line, 2, 2), line.len()), (vec![1, 2, 3, 4], 1));
        assert_eq!((served(&mut line, 9, 9), line.len()), (vec![5], 0));
        assert_eq!(served(&mut line, 9, 9), Vec::<u32>::new());
    }

    #[test]
    fn who_cannot_be_served_keeps_nobody_of_another_class_back() {
        let mut line = line(&[('a', 1), ('b', 2), ('a', 3), ('b', 4)]);
        assert_eq!(served(&mut line, 0, 1), [2]);
        assert_eq!(served(&mut line, 1, 0), [1]);
        assert_eq!(served(&mut line, 1, 1), [3, 4]);
    }

    #[test]
    fn the_others_of_a_class_are_not_asked_about_when_the_first_must_wait() {
        let mut line = WaitingLine::default();
        (0..1000).for_each(|waiter| _ = line.join((), waiter));
        let mut asked = 0;
        let served = line.serve(|(), _| {
            asked += 1;
            (asked == 1).then_some(())
        });
        assert_eq!((served.len(), asked), (1, 2));
    }

    #[test]
    fn who_leaves_leaves_no_gap_and_leaves_once() {
        let mut line = WaitingLine::default();
        let numbers: Vec<u64> = (0..5).map(|waiter| line.join('a', waiter)).collect();
        assert_eq!(line.leave(&'a', numbers[0]), Some(0));
        assert_eq!(line.leave(&'a', numbers[2]), Some(2));
        assert_eq!((line.leave(&'a', numbers[2]), line.leave(&'b', numbers[1]), line.len()), (None, None, 3));
        assert_eq!(served(&mut line, 2, 0), [1, 3]);
        assert_eq!(line.leave(&'a', numbers[3]), None, "who was served");
        assert_eq!(line.leave(&'a', numbers[4]), Some(4));
        assert!(line.is_empty() && line.classes.is_empty());
    }
}
