//! What the choice of a node costs, for 2 to 1,000 of them, by every policy: on pages that were asked for before, on pages that
//! never were, and with caches that may not serve.
//!
//! All nodes are asked for what a request asks (who may serve, how busy it is), as on the edge. The figures are
//! of the choice alone; what it is of a request's cost, `docs/benchmarks.md` says.

use std::hint::black_box;
use std::sync::Arc;

use clearcoat::balance::{BoundedLoad, LbContext, Policy, pick};
use clearcoat::fleet::{Fence, Health, Live, Member, Node, NodeId, NodeSpec, Pool, Role};
use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};

const SIZES: [usize; 4] = [2, 30, 300, 1000];

/// Pages that are asked for again and again: as many as a middling shop has.
const PAGES: u64 = 20_000;

/// Nodes of the first weight, and every third of the second.
fn pool(nodes: usize, weights: [u32; 2]) -> Pool {
    let member = |index: usize| {
        let id = NodeId::try_from(format!("varnish-{index}")).expect("an id");
        let weight = weights[usize::from(index % 3 == 2)];
        let spec = NodeSpec { weight, ..NodeSpec::new(Role::Varnish, id, ([198, 51, 100, 1], 80).into()) };
        let node = Arc::new(Node::new(spec, Arc::new(Live::default()), index as u64));
        Member { node, health: Health::Up, fault: None, ejection: None, retained: false, usable: false }
    };
    Pool::new((0..nodes).map(member).collect(), 0.0, None).remembering(&Pool::default())
}

/// The n-th request, for one of so many pages.
fn request(n: u64, pages: u64) -> LbContext {
    let spread = |n: u64| n.wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    LbContext { request_hash: spread(n % pages), turn: n as u32, now_ms: n as u32, random: spread(n ^ 0xff51) }
}

fn choose(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("choice");
    let bound = Some(BoundedLoad { factor: 1.25, from: 32 });
    let (fence, even) = (Fence::at(0), [1, 1]);
    let mut measure = |name: &str, policy: Policy, weights: [u32; 2], pages: u64, behind: usize| {
        for size in SIZES {
            let pool = pool(size, weights);
            // So many of a hundred are behind.
            let fence = if behind > 0 { Fence::at(5) } else { Fence::at(fence.position()) };
            let members = pool.members().iter().enumerate();
            members.filter(|(index, _)| index % 100 >= behind).for_each(|(_, member)| member.node.live.set_cursor(5));
            let admits = |member: &Member| member.usable && fence.admits(&member.node.live);
            let mut n = 0;
            group.bench_function(BenchmarkId::new(name, size), |bencher| {
                bencher.iter(|| {
                    n += 1;
                    black_box(pick(policy, &pool, black_box(request(n, pages)), bound, admits))
                });
            });
        }
    };
    measure("rendezvous, pages again", Policy::Rendezvous, even, PAGES, 0);
    measure("rendezvous, pages again, weights", Policy::Rendezvous, [1, 3], PAGES, 0);
    measure("rendezvous, new pages", Policy::Rendezvous, even, u64::MAX, 0);
    measure("rendezvous, new pages, weights", Policy::Rendezvous, [1, 3], u64::MAX, 0);
    measure("rendezvous, one of two behind", Policy::Rendezvous, even, PAGES, 50);
    measure("round robin", Policy::RoundRobin, even, PAGES, 0);
    measure("least request", Policy::LeastRequest, even, PAGES, 0);
    measure("peak ewma", Policy::PeakEwma, even, PAGES, 0);
    measure("random", Policy::Random, even, PAGES, 0);
}

criterion_group! {
    name = benches;
    config = Criterion::default().sample_size(20);
    targets = choose
}
criterion_main!(benches);
