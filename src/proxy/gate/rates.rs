//! How many requests a client may make, and all of them together.
//!
//! # The bucket
//!
//! A token bucket, kept as one number: the time at which it will be full again (the "theoretical arrival time" of the generic
//! cell rate algorithm, ITU-T I.371). A request moves that time by one interval into the future, and is refused if it would lie
//! further away than the burst takes to fill. So there is nothing to refill, and a bucket is one atomic word that is taken from
//! with one compare-and-swap.
//!
//! # The addresses
//!
//! There may be more addresses than memory: an attacker with one IPv6 network has 2^64 and more. IPv6 clients are counted by
//! /64, the least that a site gets (RFC 6177), and the table has a fixed size: 16,384 sets of eight places, one cache line each,
//! 1 MiB, made when the first limit is set. A place holds a part of the address's hash and its bucket, in one word. The hash is
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
use std::net::{IpAddr, Ipv6Addr};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Places in a set: those that are looked through for an address.
const PLACES: usize = 8;

/// Sets of the table; a power of two.
const SETS: usize = 16 * 1024;

/// Times are counted in 2^-22 s, modulo 2^40: three days. A bucket that was not used for longer may be taken for one that was, with
/// a chance of the time that it takes to fill in three days; the configuration allows an hour. Intervals are whole ticks, so the
/// highest rate (100,000 a second) is kept to 2 %.
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
        let full = wait_until(full, now, self.depth) + self.interval;
        if full > self.depth { Err(full - self.depth) } else { Ok((now + full) & TIME_MASK) }
    }
}

/// How long it is until a bucket is full. One that will be later than it takes to fill is full: the time has gone once around, or
/// the limits were others.
fn wait_until(full: u64, now: u64, depth: u64) -> u64 {
    let ahead = full.wrapping_sub(now) & TIME_MASK;
    if ahead > depth { 0 } else { ahead }
}

/// When this bucket is full; one that was never used is.
fn full_at(word: u64, now: u64) -> u64 {
    if word == 0 { now } else { word & TIME_MASK }
}

/// The buckets of a process. They outlive a reload: what was used up stays so.
pub struct RateBuckets {
    hasher: RandomState,
    by_client: OnceLock<Box<[[AtomicU64; PLACES]]>>,
    of_all: AtomicU64,
}

impl Default for RateBuckets {
    fn default() -> Self {
        RateBuckets { hasher: RandomState::new(), by_client: OnceLock::new(), of_all: AtomicU64::new(0) }
    }
}

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
        let sets = self.by_client.get_or_init(|| (0..SETS).map(|_| <[AtomicU64; PLACES]>::default()).collect());
        let hash = self.hasher.hash_one(site_of(client));
        let tag = hash >> TIME_BITS << TIME_BITS;
        take_in(&sets[hash as usize % SETS], tag, rate, ticks(now)).map_err(duration)
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
}

/// Takes a token from the bucket with this tag, which is given a place if it has none.
fn take_in(places: &[AtomicU64; PLACES], tag: u64, rate: Rate, now: u64) -> Result<(), u64> {
    loop {
        let held = places.each_ref().map(|place| place.load(Ordering::Relaxed));
        let own = held.iter().position(|&word| word & !TIME_MASK == tag);
        let nearest_to_full = || (0..PLACES).min_by_key(|&at| wait_until(full_at(held[at], now), now, rate.depth));
        let at = own.or_else(nearest_to_full).unwrap_or_default();
        let full = rate.take(full_at(held[at], now), now)?;
        let swapped = places[at].compare_exchange_weak(held[at], tag | full, Ordering::Relaxed, Ordering::Relaxed);
        if swapped.is_ok() {
            return Ok(());
        }
    }
}

/// What counts as one client: an IPv4 address, a /64 of IPv6.
fn site_of(client: IpAddr) -> u128 {
    match client.to_canonical() {
        IpAddr::V4(v4) => v4.to_ipv6_mapped().to_bits(),
        IpAddr::V6(v6) => Ipv6Addr::to_bits(v6) >> 64 << 64,
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
            let places: [AtomicU64; PLACES] = Default::default();
            let rate = Rate::new(share, share).unwrap();
            let mut now = ticks(START);
            let (began, mut given) = (now, 0u64);
            for (other, pause) in others {
                now += pause;
                let tag = (other + 2) << TIME_BITS;
                _ = take_in(&places, tag, rate, now & TIME_MASK);
                while take_in(&places, 1 << TIME_BITS, rate, now & TIME_MASK).is_ok() { given += 1; }
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
