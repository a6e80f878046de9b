//! What somebody may have meant who wrote a name that is none.

use strsim::damerau_levenshtein;

/// The one of these names that is written nearly so: at most a third of its letters are other ones.
pub(super) fn nearest<'n>(written: &str, names: impl IntoIterator<Item = &'n str>) -> Option<&'n str> {
    let written = written.to_lowercase();
    let distances = names.into_iter().map(|name| (damerau_levenshtein(&written, &name.to_lowercase()), name));
    let near = distances.filter(|(distance, name)| *distance <= name.chars().count() / 3);
    near.min_by_key(|(distance, _)| *distance).map(|(_, name)| name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slip_is_recognised_and_another_word_is_not() {
        let names = ["listen", "policy", "ack_timeout", "allow"];
        for (written, meant) in [
            ("polcy", Some("policy")),
            ("Listen", Some("listen")),
            ("lisetn", Some("listen")),
            ("ack-timeout", Some("ack_timeout")),
            ("timeout", None),
            ("port", None),
        ] {
            assert_eq!(nearest(written, names), meant, "{written}");
        }
    }
}
