//! How many requests a client may make, and all of them together.
//!
//! # The bucket
//!
//! A token bucket, kept as one number: the time at which it will be full again (the "theoretical arrival time" of the generic
//! cell rate algorithm, ITU-T I.371). A request moves that time by one interval into the future, and is refused if it would lie
//! further away than the burst takes to fill. So there is nothing to refill, and a bucket is one atomic word that is taken from
//! with one compare-and-swap.
//!
//! The time of a request is read before its bucket is: a worker that was held up in between comes with a time that is a little older
//! than what it finds. That bucket is as empty as it can be, and no fuller than it was.
//!
//! What is owed is kept as a time, which is worth another number of tokens at another rate: a reload that changes a rate has all
//! buckets converted ([`RateBuckets::convert`]).
//!
//! # The addresses
//!
//! There may be more addresses than memory: an attacker with one IPv6 network has 2^64 and more. IPv6 clients are counted by
//! /64, the least that a site gets (RFC 6177), and the table has a fixed size: 16,384 sets of eight places, one cache line each,
//! 1 MiB, made for the first request that is counted. A place holds a part of the address's hash and its bucket, in one word. The hash is
//! keyed anew in each process, so nobody can choose whom it shares a set with.
//!
//! What becomes of an address whose set is full? To forget somebody else gives that one a full bucket, and who sends from many
//! addresses could have his own debts forgotten that way. So nothing is forgotten: the new address takes the place of the one
//! that is next to full, **and its bucket as it is** (the idea of Space-Saving, Metwally and others, 2005). Of eight buckets the
//! fullest is taken over, so an address that comes back never finds a fuller one than it left: whatever others do, nobody gets
//! more than his burst and his rate. What an attack can do is the other thing: make a newcomer begin with less than a full
//! bucket. To have one refused, all eight places of his set must be held at their limit; for every set that is 131,072 times
//! the rate, which the limit of the whole is there for.
//!
//! Two addresses share a bucket if they are in one set and have the same 24 bits besides: of 100,000 addresses one has such a
//! twin in twenty tables. Two workers that meet a new address at the same moment may give it two places; the second is never
//! used again.

use std::hash::{BuildHasher as _, RandomState};
use std::net::IpAddr;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use crate::proxy::site::site_of;

/// Places in a set: those that are looked through for an address.
const PLACES: usize = 8;

/// Sets of the table; a power of two.
const SETS: usize = 16 * 1024;

/// Times are counted in 2^-22 s, modulo 2^40: three days, half of which is the future and half the past. Full buckets are forgotten
/// before they come around ([`RateBuckets::tidy`]). Intervals are whole ticks, so the highest rate (100,000 a second) is kept to 2 %.
const TICKS_PER_SECOND: u64 = 1 << 22;
const TIME_BITS: u32 = 40;
const TIME_MASK: u64 = (1 << TIME_BITS) - 1;

/// The tag of the bucket of the whole: any, so that it can be told from one that was never used.
const OF_ALL: u64 = 1 << TIME_BITS;

/// A rate and a burst.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Rate {
    /// Of one token.
    interval: u64,
    /// That an empty bucket takes to fill.
    depth: u64,
}

impl Rate {
    /// So many requests a second, and so many at once. `None` if there is no limit.
    pub(super) fn new(per_second: u32, burst: u32) -> Option<Self> {
        let per_second = u64::from(per_second);
        let interval = (TICKS_PER_SECOND + per_second / 2).checked_div(per_second)?.max(1);
        Some(Rate { interval, depth: interval.saturating_mul(u64::from(burst.max(1))).min(TIME_MASK / 2) })
    }

    /// Takes one token from a bucket that is full at `full`. Gives the new time of that, or how long to wait for a token.
    fn take(self, full: u64, now: u64) -> Result<u64, u64> {
        let full = self.until_full(full, now) + self.interval;
        if full > self.depth { Err(full - self.depth) } else { Ok((now + full) & TIME_MASK) }
    }

    /// How long it is until a bucket is full: never longer than it takes to fill.
    fn until_full(self, full: u64, now: u64) -> u64 {
        time_between(now, full).min(self.depth)
    }

    /// What is owed to a bucket at this rate, as it is at another one.
    fn converted(self, owed: u64, other: Rate) -> u64 {
        let owed = u128::from(owed.min(self.depth)) * u128::from(other.interval) / u128::from(self.interval);
        u64::try_from(owed).unwrap_or(u64::MAX).min(other.depth)
    }
}

/// From `now` until then; zero if it is over.
fn time_between(now: u64, then: u64) -> u64 {
    let ahead = then.wrapping_sub(now) & TIME_MASK;
    if ahead > TIME_MASK / 2 { 0 } else { ahead }
}

/// When this bucket is full; one that was never used is.
fn full_at(word: u64, now: u64) -> u64 {
    if word == 0 { now } else { word & TIME_MASK }
}

/// The buckets of a process. They outlive a reload: what was used up stays so.
#[derive(Default)]
pub struct RateBuckets {
    hasher: RandomState,
    by_client: OnceLock<Box<[BucketSet]>>,
    of_all: AtomicU64,
    /// The set that is tidied up next.
    untidy: AtomicUsize,
}

/// The places of a set, in one cache line.
#[derive(Default)]
#[repr(align(64))]
struct BucketSet([AtomicU64; PLACES]);

impl std::fmt::Debug for RateBuckets {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RateBuckets").finish_non_exhaustive()
    }
}

impl RateBuckets {
    /// Takes a token of this client. `now` counts from a moment that is the same for all.
    ///
    /// # Errors
    /// How long it is until there is one.
    pub(super) fn take_of_client(&self, client: IpAddr, rate: Rate, now: Duration) -> Result<(), Duration> {
        let (set, tag) = self.places_of(client);
        set.take(tag, rate, ticks(now)).map_err(duration)
    }

    /// Gives the last token back that this client has taken: it was of no use.
    pub(super) fn give_back(&self, client: IpAddr, rate: Rate, now: Duration) {
        let ((set, tag), now) = (self.places_of(client), ticks(now));
        let less = |word: u64| {
            let owed = rate.until_full(word & TIME_MASK, now).saturating_sub(rate.interval);
            (word & !TIME_MASK == tag).then_some(tag | ((now + owed) & TIME_MASK))
        };
        // It may have lost its place meanwhile.
        let mut places = set.0.iter();
        _ = places.find(|place| place.fetch_update(Ordering::Relaxed, Ordering::Relaxed, less).is_ok());
    }

    fn places_of(&self, client: IpAddr) -> (&BucketSet, u64) {
        let sets = self.by_client.get_or_init(|| (0..SETS).map(|_| BucketSet::default()).collect());
        let hash = self.hasher.hash_one(site_of(client));
        (&sets[hash as usize % SETS], hash >> TIME_BITS << TIME_BITS)
    }

    /// Takes a token of the whole.
    ///
    /// # Errors
    /// How long it is until there is one.
    pub(super) fn take_of_all(&self, rate: Rate, now: Duration) -> Result<(), Duration> {
        let now = ticks(now);
        let take = |word| Some(OF_ALL | rate.take(full_at(word, now), now).ok()?);
        let taken = self.of_all.fetch_update(Ordering::Relaxed, Ordering::Relaxed, take);
        taken.map(drop).map_err(|word| duration(rate.take(full_at(word, now), now).err().unwrap_or(rate.interval)))
    }

    /// Has what clients and all of them owe at the rates of before counted at those of now: the same tokens. What was not limited
    /// before owes nothing.
    pub(super) fn convert(&self, (client, total): (RateChange, RateChange), now: Duration) {
        let now = ticks(now);
        let by_client = self.by_client.get().into_iter().flatten().flat_map(|set| &set.0);
        let of_all = [(&self.of_all, total)];
        for (place, RateChange { before, after }) in by_client.map(|place| (place, client)).chain(of_all) {
            let Some(after) = after.filter(|_| before != after) else { continue };
            let converted = |word: u64| {
                let owed = before.map_or(0, |before| before.converted(time_between(now, full_at(word, now)), after));
                (word != 0).then_some((word & !TIME_MASK) | ((now + owed) & TIME_MASK))
            };
            _ = place.fetch_update(Ordering::Relaxed, Ordering::Relaxed, converted);
        }
    }

    /// Forgets full buckets, a set at each call, before their time comes around and they look empty. A worker calls it some times a
    /// second, so each set has its turn some times a day.
    pub(super) fn tidy(&self, now: Duration) {
        let now = ticks(now);
        let is_full = |word: u64| (time_between(now, full_at(word, now)) == 0).then_some(0);
        let set = self.untidy.fetch_add(1, Ordering::Relaxed) % SETS;
        let places = self.by_client.get().map(|sets| &sets[set].0);
        for place in places.into_iter().flatten().chain([&self.of_all]) {
            _ = place.fetch_update(Ordering::Relaxed, Ordering::Relaxed, is_full);
        }
    }
}

/// A rate that a reload has changed, or not.
#[derive(Clone, Copy, Debug)]
pub(super) struct RateChange {
    pub(super) before: Option<Rate>,
    pub(super) after: Option<Rate>,
}

impl BucketSet {
    /// Takes a token from the bucket with this tag, which is given a place if it has none.
    fn take(&self, tag: u64, rate: Rate, now: u64) -> Result<(), u64> {
        loop {
            let held = self.0.each_ref().map(|place| place.load(Ordering::Relaxed));
            let own = held.iter().position(|&word| word & !TIME_MASK == tag);
            let nearest_to_full = || (0..PLACES).min_by_key(|&at| rate.until_full(full_at(held[at], now), now));
            let at = own.or_else(nearest_to_full).unwrap_or_default();
            let full = rate.take(full_at(held[at], now), now)?;
            let swapped = self.0[at].compare_exchange_weak(held[at], tag | full, Ordering::Relaxed, Ordering::Relaxed);
            if swapped.is_ok() {
                return Ok(());
            }
        }
    }
}

fn ticks(time: Duration) -> u64 {
    let parts = u64::from(time.subsec_nanos()) * TICKS_PER_SECOND / 1_000_000_000;
    (time.as_secs().wrapping_mul(TICKS_PER_SECOND) + parts) & TIME_MASK
}

fn duration(ticks: u64) -> Duration {
    Duration::from_nanos(ticks.saturating_mul(1_000_000_000 / 64) / (TICKS_PER_SECOND / 64))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Later than the start, at a time that wraps around in the middle of a test.
    const START: Duration = Duration::from_secs((1 << 18) - 5);

    fn client(number: u16) -> IpAddr {
        let [high, low] = number.to_be_bytes();
        [192, 0, high, low].into()
    }

    /// A bucket as the books have it.
    struct Model {
        tokens: f64,
        last: Duration,
    }

    proptest! {
        #[test]
        fn one_bucket_is_a_token_bucket(
            per_second in 1u32..2000,
            burst in 1u32..50,
            pauses in prop::collection::vec(prop_oneof![Just(0u64), 0..2_000u64, 0..3_000_000u64], 1..300),
        ) {
            let rate = Rate::new(per_second, burst).unwrap();
            let exact = TICKS_PER_SECOND as f64 / rate.interval as f64;
            let buckets = RateBuckets::default();
            let (mut now, mut model) = (START, Model { tokens: f64::from(burst), last: START });
            for pause in pauses {
                now += Duration::from_micros(pause);
                let refilled = model.tokens + (now - model.last).as_secs_f64() * exact;
                model = Model { tokens: refilled.min(f64::from(burst)), last: now };
                let taken = buckets.take_of_client(client(1), rate, now);
                // Times are rounded to a tick each.
                let slack = 3.0 * exact / TICKS_PER_SECOND as f64 + 1e-9;
                if (model.tokens - 1.0).abs() > slack * 300.0 {
                    prop_assert_eq!(taken.is_ok(), model.tokens >= 1.0, "{} tokens at {:?}", model.tokens, now);
                }
                match taken {
                    Ok(()) => model.tokens -= 1.0,
                    // There is one after an interval at most.
                    Err(wait) => {
                        prop_assert!(wait <= Duration::from_secs_f64(1.1 / exact + 1e-5), "{:?}", wait);
                    }
                }
            }
        }

        #[test]
        fn nobody_gets_more_than_his_share_whatever_others_do(
            others in prop::collection::vec((0u64..40, 0u64..20_000), 1..1500),
            share in 1u32..20,
        ) {
            // One set, with many more addresses than places. The one that is watched asks whenever it may.
            let places = BucketSet::default();
            let rate = Rate::new(share, share).unwrap();
            let mut now = ticks(START);
            let (began, mut given) = (now, 0u64);
            for (other, pause) in others {
                now += pause;
                let tag = (other + 2) << TIME_BITS;
                _ = places.take(tag, rate, now & TIME_MASK);
                while places.take(1 << TIME_BITS, rate, now & TIME_MASK).is_ok() { given += 1; }
            }
            prop_assert!(given <= u64::from(share) + (now - began) / rate.interval + 1, "{} in {}", given, now - began);
        }
    }

    #[test]
    fn who_waits_as_long_as_he_is_told_is_served() {
        let (buckets, rate) = (RateBuckets::default(), Rate::new(10, 3).unwrap());
        for _ in 0..3 {
            assert_eq!(buckets.take_of_client(client(1), rate, START), Ok(()));
        }
        let wait = buckets.take_of_client(client(1), rate, START).unwrap_err();
        assert!(wait > Duration::from_millis(90) && wait <= Duration::from_millis(100), "{wait:?}");
        // Nobody else is affected, and a refusal costs nothing.
        assert_eq!(buckets.take_of_client(client(2), rate, START), Ok(()));
        let just_then = START + wait + Duration::from_micros(2);
        assert_eq!(buckets.take_of_client(client(1), rate, just_then), Ok(()));
        assert!(buckets.take_of_client(client(1), rate, just_then).is_err());
    }

    #[test]
    fn a_request_whose_time_is_older_than_its_bucket_finds_it_no_fuller() {
        let (buckets, rate) = (RateBuckets::default(), Rate::new(50, 300).unwrap());
        let older = |lag: u64| START - Duration::from_micros(lag);
        let ways: [fn(&RateBuckets, Rate, Duration) -> bool; 2] = [
            |buckets, rate, at| buckets.take_of_client(client(1), rate, at).is_ok(),
            |buckets, rate, at| buckets.take_of_all(rate, at).is_ok(),
        ];
        for take in ways {
            // Workers that were held up between their clock and the bucket.
            let given = (0..4000_u64).filter(|number| take(&buckets, rate, older(number * 7919 % 10_000))).count();
            assert!((299..=300).contains(&given), "{given}");
        }
    }

    #[test]
    fn a_rate_that_is_changed_leaves_everybody_the_tokens_that_he_has() {
        let free_after = |before: (u32, u32), used: usize, after: (u32, u32)| {
            let (before, after) = (Rate::new(before.0, before.1), Rate::new(after.0, after.1));
            let buckets = RateBuckets::default();
            let taken = |rate: Rate, most: usize| {
                let of_client =
                    (0..most).take_while(|_| buckets.take_of_client(client(1), rate, START).is_ok()).count();
                let of_all = (0..most).take_while(|_| buckets.take_of_all(rate, START).is_ok()).count();
                assert_eq!(of_client, of_all);
                of_client
            };
            before.map(|before| taken(before, used));
            let change = RateChange { before, after };
            buckets.convert((change, change), START);
            taken(after.unwrap(), 1000)
        };
        for (before, after) in
            [((50, 300), (50, 100)), ((1, 300), (10, 50)), ((50, 300), (5, 300)), ((5, 300), (50, 300))]
        {
            assert_eq!(free_after(before, 300, after), 0, "{before:?} to {after:?}");
        }
        assert_eq!(free_after((50, 300), 100, (5, 300)), 200);
        assert_eq!(free_after((50, 100), 100, (50, 300)), 200);
        assert_eq!(free_after((0, 300), 0, (50, 300)), 300);
    }

    #[test]
    fn a_token_that_was_of_no_use_is_given_back() {
        let (buckets, rate) = (RateBuckets::default(), Rate::new(1, 2).unwrap());
        let take = || buckets.take_of_client(client(1), rate, START).is_ok();
        assert!(take() && take() && !take());
        buckets.give_back(client(1), rate, START);
        assert!(take() && !take());
        // A bucket is never more than full.
        (0..5).for_each(|_| buckets.give_back(client(1), rate, START));
        assert!(take() && take() && !take());
    }

    #[test]
    fn a_bucket_is_full_again_however_long_nobody_asked() {
        let (buckets, rate) = (RateBuckets::default(), Rate::new(1, 1).unwrap());
        assert!(buckets.take_of_client(client(1), rate, START).is_ok() && buckets.take_of_all(rate, START).is_ok());
        let all = |now| (0..SETS).for_each(|_| buckets.tidy(now));
        all(START);
        assert!(buckets.take_of_client(client(1), rate, START).is_err(), "it is not full");
        all(START + Duration::from_secs(3600));
        // A time that is nearly once around: it would be an hour ahead.
        let around = START + Duration::from_secs((1 << 18) - 3600);
        assert!(buckets.take_of_client(client(1), rate, around).is_ok() && buckets.take_of_all(rate, around).is_ok());
    }

    #[test]
    fn a_client_of_ipv6_is_a_64_and_a_mapped_address_is_one_of_ipv4() {
        let (buckets, rate) = (RateBuckets::default(), Rate::new(1, 1).unwrap());
        let take = |address: &str| buckets.take_of_client(address.parse().unwrap(), rate, START).is_ok();
        assert!(take("2001:db8::1") && !take("2001:db8::ffff:0:0:2") && take("2001:db8:0:1::1"));
        assert!(take("192.0.2.1") && !take("::ffff:192.0.2.1") && take("192.0.2.2"));
    }

    #[test]
    fn the_whole_has_one_bucket() {
        let (buckets, rate) = (RateBuckets::default(), Rate::new(100, 5).unwrap());
        let given = (0..20).filter(|_| buckets.take_of_all(rate, START).is_ok()).count();
        assert_eq!(given, 5);
        let wait = buckets.take_of_all(rate, START).unwrap_err();
        assert!(wait > Duration::ZERO && wait <= Duration::from_millis(10), "{wait:?}");
        assert_eq!(Rate::new(0, 5), None);
    }

    #[test]
    fn workers_that_take_at_once_get_no_more_than_there_is() {
        let (buckets, rate) = (RateBuckets::default(), Rate::new(1, 500).unwrap());
        assert_eq!(buckets.take_of_client(client(1), rate, START), Ok(()));
        let given: usize = std::thread::scope(|scope| {
            let take = || (0..400).filter(|_| buckets.take_of_client(client(1), rate, START).is_ok()).count();
            let workers: Vec<_> = (0..4).map(|_| scope.spawn(take)).collect();
            workers.into_iter().map(|worker| worker.join().unwrap()).sum()
        });
        assert_eq!(given, 499);
    }
}
