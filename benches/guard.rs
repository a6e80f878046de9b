//! The guard's cost for an answer on the origin path: a page with thirty tags, after 50,000 purged tags.
//!
//! Usually no purge comes while a page is rendered, and only the stamps cost; any purge makes every tag be looked up; a
//! purge of a pattern is matched against the whole header.

use std::hint::black_box;
use std::time::{Duration, Instant};

use clearcoat::purge::{Guard, Page, Pattern, Purge, TagSet, Target};
use criterion::{Criterion, criterion_group, criterion_main};

/// Tags purged before.
const WARM: usize = 50_000;

/// Tags in one purge of them: a chunk of Magento's reindex has 350.
const CHUNK: usize = 350;

fn purge(target: Target) -> Purge {
    Purge { targets: vec![target], soft: false }
}

fn tags<'a>(tags: impl IntoIterator<Item = &'a str>) -> Purge {
    let terms: Vec<String> = tags.into_iter().map(|tag| format!("((^|,){tag}(,|$))")).collect();
    purge(Target::Tags(TagSet::from_magento(&terms.join("|")).expect("Magento's form")))
}

fn warm() -> Guard {
    let guard = Guard::new(Instant::now());
    let names: Vec<String> = (0..WARM).map(|product| format!("cat_p_{product}")).collect();
    names.chunks(CHUNK).for_each(|chunk| guard.note(&tags(chunk.iter().map(String::as_str))));
    guard
}

/// The fields of a page with thirty tags, none of which was purged.
fn fields() -> Vec<(Vec<u8>, Vec<u8>)> {
    let mut tags = String::from("store,cms_b,cat_c_12,cat_p");
    (1..=26).for_each(|block| tags += &format!(",cat_p_new_{block}"));
    let mut fields: Vec<_> = (0..12).map(|n| (format!("X-Other-{n}"), "value".to_owned())).collect();
    fields.insert(6, ("X-Magento-Tags".into(), tags));
    fields.into_iter().map(|(name, value)| (name.into_bytes(), value.into_bytes())).collect()
}

fn check(criterion: &mut Criterion) {
    let fields = fields();
    let mut group = criterion.benchmark_group("guard");
    let at = Instant::now() + Duration::from_secs(1);
    let mut measure = |name: &str, guard: &Guard, began: u64| {
        group.bench_function(name, |bencher| {
            bencher.iter(|| {
                let fields = fields.iter().map(|(name, value)| (&name[..], &value[..]));
                let page = Page { status: 200, target: b"/women/tops-women.html?p=2", fields };
                assert!(guard.may_be_stored(black_box(began), &page, at));
            });
        });
    };
    let guard = warm();
    measure("thirty tags, nothing purged since", &guard, guard.now());
    let began = guard.now();
    guard.note(&tags(["cms_p_1"]));
    measure("thirty tags, another purged since", &guard, began);
    guard.note(&purge(Target::Pattern(Pattern::new("cat_p_(7|9)[0-9]+").expect("a pattern"))));
    measure("thirty tags, a pattern purged since", &guard, began);
}

fn note(criterion: &mut Criterion) {
    let guard = warm();
    let names: Vec<String> = (0..CHUNK).map(|product| format!("cat_p_{product}")).collect();
    let chunk = tags(names.iter().map(String::as_str));
    let mut group = criterion.benchmark_group("guard");
    group.bench_function("take note of 350 tags", |bencher| bencher.iter(|| guard.note(black_box(&chunk))));
}

criterion_group!(guard, check, note);
criterion_main!(guard);
