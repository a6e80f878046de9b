//! Parts of the promise that are broken on purpose, one at a time: mutants, as in mutation testing.
//!
//! A test that has never failed proves nothing. So there is a build in which one part does not do its work, and for each
//! part a test that must fail then (`make mutants`, `tests/it/mutants.rs`). It is a build of its own and no setting,
//! because nothing that is shipped may be able to break its promise: the feature `mutants` is on in no default build, and
//! does not compile without debug assertions. Without it [`Mutant::lives`] is a constant `false`, and the program has
//! nothing of any mutant.

#[cfg(all(feature = "mutants", not(debug_assertions)))]
compile_error!("the feature `mutants` breaks parts of the promise on purpose: no release has it");

/// A part that can be broken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mutant {
    /// An answer is sealed with the position at its end, and not with that from before it was asked for.
    LateSeal,
    /// The edge takes every answer for fresh.
    BlindEdge,
    /// The index of purged names loses every other one.
    LostName,
    /// A name that is pushed out of its bucket of the index leaves no floor.
    LostFloor,
    /// Pages from before what is remembered of purges are judged all the same.
    IgnoredFloor,
    /// A purge of a pattern counts as one that seals show.
    SealedPattern,
    /// So does a purge of the tags of a block.
    SealedBlock,
    /// A purge that no seal shows does not raise the fence for nodes that return seals.
    LowFence,
    /// A replica confirms a purge before it knows it.
    EarlyConfirmation,
    /// The guard marks no page.
    BlindGuard,
}

impl Mutant {
    /// Whether this part is broken.
    #[cfg(not(feature = "mutants"))]
    pub const fn lives(self) -> bool {
        false
    }
}

#[cfg(feature = "mutants")]
mod alive {
    use std::sync::OnceLock;

    use super::Mutant;

    static ALIVE: OnceLock<Mutant> = OnceLock::new();

    impl Mutant {
        /// All of them.
        pub const ALL: [Mutant; Mutant::BlindGuard as usize + 1] = [
            Mutant::LateSeal,
            Mutant::BlindEdge,
            Mutant::LostName,
            Mutant::LostFloor,
            Mutant::IgnoredFloor,
            Mutant::SealedPattern,
            Mutant::SealedBlock,
            Mutant::LowFence,
            Mutant::EarlyConfirmation,
            Mutant::BlindGuard,
        ];

        /// Whether this part is broken.
        pub fn lives(self) -> bool {
            ALIVE.get() == Some(&self)
        }

        /// Breaks this part until the process ends.
        pub fn let_live(self) {
            _ = ALIVE.set(self);
        }

        /// The one with this name, which is written as in the code.
        pub fn named(name: &str) -> Option<Mutant> {
            Mutant::ALL.into_iter().find(|mutant| format!("{mutant:?}") == name)
        }
    }
}
