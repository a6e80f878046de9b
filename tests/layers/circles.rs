//! Finds siblings that use each other, anywhere in the tree of modules.
//!
//! A parent may use its children and a child its parent: that is the tree. Of two siblings one must be readable without
//! the other, with all that is below them. So each parent has a graph: its children, and an arrow from one to another
//! if a file of the first, or below it, names something of the second, or below it. A name that the parent only passes on
//! (`use`, `pub use`) counts as that of the child who has it.

use std::collections::{BTreeMap, BTreeSet};

/// Such as `["config", "read"]`; the crate itself is empty.
pub(crate) type Path = Vec<String>;

/// Siblings each of which needs all the others.
#[derive(Debug)]
pub(crate) struct Circle {
    /// The path of the module that has them.
    pub(crate) parent: String,
    /// Their names, sorted.
    pub(crate) members: Vec<String>,
    /// Which module uses which, to know where to cut.
    pub(crate) imports: Vec<String>,
}

/// What files say of each other: their product code by the module that each file is.
pub(crate) struct Modules(BTreeMap<Path, Module>);

struct Module {
    text: String,
    /// What a `use` brings in: a name and the path of which it is short.
    names: BTreeMap<String, Path>,
}

impl Modules {
    pub(crate) fn new(files: impl IntoIterator<Item = (Path, String)>) -> Self {
        let with_names = |(path, text): (Path, String)| {
            let names = uses(&text).into_iter().map(|(name, target)| (name, absolute(&path, target))).collect();
            (path, Module { text, names })
        };
        Modules(files.into_iter().map(with_names).collect())
    }

    /// The path and the product code of each.
    pub(crate) fn files(&self) -> impl Iterator<Item = (&Path, &str)> {
        self.0.iter().map(|(path, module)| (path, module.text.as_str()))
    }

    /// The groups of siblings that use each other.
    pub(crate) fn circles(&self) -> Vec<Circle> {
        let mut graphs: BTreeMap<Path, Vec<(Path, Path)>> = BTreeMap::new();
        for (from, to) in self.imports() {
            let shared = from.iter().zip(&to).take_while(|(a, b)| a == b).count();
            if from.len() > shared && to.len() > shared {
                graphs.entry(from[..shared].to_vec()).or_default().push((from, to));
            }
        }
        graphs.into_iter().flat_map(|(parent, imports)| circles_below(&parent, &imports)).collect()
    }

    /// Which module names something of which.
    fn imports(&self) -> BTreeSet<(Path, Path)> {
        let of = |(module, Module { text, names }): (&Path, &Module)| {
            let written = qualified(text).into_iter().map(|path| absolute(module, path));
            let targets = names.values().cloned().chain(written);
            targets.map(|target| (module.clone(), self.owner(target))).collect::<Vec<_>>()
        };
        self.0.iter().flat_map(of).collect()
    }

    /// The module in which a thing is, also if another one passes it on.
    fn owner(&self, mut path: Path) -> Path {
        // A name may be passed on several times, but not by more modules than there are.
        for _ in 0..self.0.len() {
            let module = (0..=path.len()).rev().map(|len| &path[..len]).find(|known| self.0.contains_key(*known));
            let module = module.unwrap_or_default().to_vec();
            let passed_on = path.get(module.len()).and_then(|name| self.0.get(&module)?.names.get(name));
            match passed_on {
                Some(target) if *target != path => path = [target, &path[module.len() + 1..]].concat(),
                _ => return module,
            }
        }
        path
    }
}

fn circles_below(parent: &Path, imports: &[(Path, Path)]) -> Vec<Circle> {
    let child = |path: &Path| path[parent.len()].clone();
    let arrows: BTreeSet<_> = imports.iter().map(|(from, to)| (child(from), child(to))).collect();
    let reached = |start: &String| {
        let mut reached = BTreeSet::new();
        let mut open = vec![start];
        while let Some(module) = open.pop() {
            open.extend(arrows.iter().filter(|(from, to)| from == module && reached.insert(to)).map(|(_, to)| to));
        }
        reached
    };
    let reached: BTreeMap<_, _> = arrows.iter().map(|(from, _)| (from, reached(from))).collect();
    let reaches = |from: &String, to: &String| reached.get(from).is_some_and(|modules| modules.contains(to));
    // Whoever reaches itself is in a circle, with all that it reaches and that reach it.
    let in_circles = reached.keys().filter(|module| reaches(module, module));
    let members = in_circles.map(|module| reached[module].iter().filter(|other| reaches(other, module)).copied());
    let distinct: BTreeSet<Vec<&String>> = members.map(Iterator::collect).collect();
    let circle = |members: Vec<&String>| {
        let inside = |(from, to): &&(Path, Path)| members.contains(&&child(from)) && members.contains(&&child(to));
        let shown = |(from, to): &(Path, Path)| format!("{} uses {}", from.join("::"), to.join("::"));
        let imports = imports.iter().filter(inside).map(shown).collect();
        Circle { parent: parent.join("::"), members: members.into_iter().cloned().collect(), imports }
    };
    distinct.into_iter().map(circle).collect()
}

/// A path as written in a module, from the crate on. What is neither `crate`, `self` nor `super` is a child or of no interest.
fn absolute(module: &[String], written: Path) -> Path {
    let mut path = module.to_vec();
    for step in written {
        match step.as_str() {
            "crate" => path.clear(),
            "self" => {}
            "super" => drop(path.pop()),
            _ => path.push(step),
        }
    }
    path
}

/// The paths that begin with `crate::` or `super::`, outside of `use` too.
fn qualified(text: &str) -> Vec<Path> {
    let is_name = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == ':';
    let words = text.split(|c| !is_name(c)).filter(|word| word.starts_with("crate::") || word.starts_with("super::"));
    words.map(|word| word.split("::").filter(|step| !step.is_empty()).map(str::to_owned).collect()).collect()
}

/// Each name that a `use` brings in, and the path as written. One that takes all (`*`) brings in none.
fn uses(text: &str) -> Vec<(String, Path)> {
    let mut names = Vec::new();
    for (start, _) in text.match_indices("use ") {
        let line = &text[text[..start].rfind('\n').map_or(0, |newline| newline + 1)..start];
        let is_statement = line.trim().is_empty() || line.trim_start().starts_with("pub");
        if let Some(end) = text[start..].find(';').filter(|_| is_statement) {
            tree(&[], &text[start + 4..start + end], &mut names);
        }
    }
    names
}

/// Reads `a::{b, c as d}` behind `before`.
fn tree(before: &[String], text: &str, names: &mut Vec<(String, Path)>) {
    let text = text.trim();
    if let Some((head, branches)) = text.split_once('{') {
        let before = [before, &steps(head)].concat();
        let mut depth = 0;
        let is_border = |c: char| {
            depth += i32::from(c == '{') - i32::from(c == '}');
            c == ',' && depth == 0
        };
        for branch in branches.strip_suffix('}').unwrap_or(branches).split(is_border) {
            tree(&before, branch, names);
        }
    } else if !text.is_empty() {
        let (path, alias) = text.split_once(" as ").unwrap_or((text, ""));
        let path = [before, &steps(path)].concat();
        if let Some(last) = path.iter().rfind(|step| *step != "self").cloned() {
            names.push((if alias.is_empty() { last } else { alias.trim().to_owned() }, path));
        }
    }
}

fn steps(path: &str) -> Path {
    path.split("::").map(str::trim).filter(|step| !step.is_empty()).map(str::to_owned).collect()
}
