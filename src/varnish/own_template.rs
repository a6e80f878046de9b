//! A VCL of the shop's own, in which clearcoat writes a part.
//!
//! It has to stay a VCL that its authors can try without clearcoat: with varnishtest, or `varnishd -C`. So there are no
//! placeholders, which no compiler takes, but comments: what stands between a line that names a block and the line that ends it
//! is taken as it is by whoever does not know them, and is replaced by clearcoat.
//!
//! ```text
//! # clearcoat: backends
//! backend default { .host = "127.0.0.1"; .port = "8081"; }
//! # clearcoat: end
//! ```
//!
//! A line that only looks like one of ours is an error: a block that nobody fills in would push a VCL with the backends of a
//! test to a shop.

use ipnet::IpNet;

use super::vcl::acl;

/// How each line of ours begins, behind white space.
const MARK: &str = "# clearcoat:";
/// What ends a block.
const END: &str = "end";

/// A block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Block {
    /// The backends and their director, at the top level.
    Backends,
    /// The entries of an ACL.
    Allow,
}

/// A part of a template.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Part {
    /// Text as it stands there, with the lines of ours around a block.
    Text(String),
    /// What clearcoat writes.
    Block(Block),
}

/// A VCL with blocks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OwnTemplate(Vec<Part>);

/// Why a text is no template.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidTemplate {
    /// A line of ours with another word.
    #[error("line {0}: `{1}` is no block; allowed: backends, allow, and end")]
    UnknownBlock(usize, String),
    /// A block in a block, or a second one of its kind.
    #[error("line {0}: a block begins within another one, or there are two of its kind")]
    Nested(usize),
    /// An end of nothing, or a block that does not end.
    #[error("line {0}: a block that begins with `# clearcoat: NAME` ends with `# clearcoat: end`")]
    Unpaired(usize),
    /// Nothing to fill in.
    #[error("it has no line `# clearcoat: backends`, so its backends would never change")]
    NoBackends,
    /// A NUL, which no command of varnishd can hold.
    #[error("it holds a NUL byte")]
    Nul,
}

impl OwnTemplate {
    /// Reads a VCL.
    ///
    /// # Errors
    /// [`InvalidTemplate`] if a block is missing, unknown, or not closed.
    pub fn parse(text: &str) -> Result<Self, InvalidTemplate> {
        if text.contains('\0') {
            return Err(InvalidTemplate::Nul);
        }
        let mut parts: Vec<Part> = Vec::new();
        let mut plain = String::new();
        let mut open: Option<usize> = None;
        for (number, line) in (1..).zip(text.lines()) {
            let Some(word) = line.trim().strip_prefix(MARK).map(str::trim) else {
                if open.is_none() {
                    plain += &format!("{line}\n");
                }
                continue;
            };
            let block = match word {
                END => {
                    open.take().ok_or(InvalidTemplate::Unpaired(number))?;
                    plain += &format!("{line}\n");
                    continue;
                }
                "backends" => Block::Backends,
                "allow" => Block::Allow,
                other => return Err(InvalidTemplate::UnknownBlock(number, other.to_owned())),
            };
            if open.is_some() || parts.contains(&Part::Block(block)) {
                return Err(InvalidTemplate::Nested(number));
            }
            open = Some(number);
            plain += &format!("{line}\n");
            parts.extend([Part::Text(std::mem::take(&mut plain)), Part::Block(block)]);
        }
        if let Some(number) = open {
            return Err(InvalidTemplate::Unpaired(number));
        }
        parts.push(Part::Text(plain));
        if !parts.contains(&Part::Block(Block::Backends)) {
            return Err(InvalidTemplate::NoBackends);
        }
        Ok(OwnTemplate(parts))
    }

    /// The VCL with its blocks filled in.
    pub(super) fn filled_in(&self, backends: &str, allow: &[IpNet]) -> String {
        let fill = |part: &Part| match part {
            Part::Text(text) => text.clone(),
            Part::Block(Block::Backends) => backends.to_owned(),
            Part::Block(Block::Allow) => format!("    {}\n", acl(allow)),
        };
        self.0.iter().map(fill).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHOP: &str = "vcl 4.1;\n  # clearcoat: backends\nbackend a { .host = \"127.0.0.1\"; }\n# clearcoat: end\n\
                        acl purge {\n    # clearcoat: allow\n    \"127.0.0.1\";\n    # clearcoat: end\n}\n# the rest";

    #[test]
    fn blocks_are_replaced_and_the_rest_stays() {
        let vcl = OwnTemplate::parse(SHOP).unwrap().filled_in("backend b {}\n", &["10.0.0.0/8".parse().unwrap()]);
        let expected = "vcl 4.1;\n  # clearcoat: backends\nbackend b {}\n# clearcoat: end\nacl purge {\n    # clearcoat: allow\n    \
                        \"10.0.0.0\"/8;\n    # clearcoat: end\n}\n# the rest\n";
        assert_eq!(vcl, expected);
        // What was pushed is a template again.
        assert_eq!(OwnTemplate::parse(&vcl).unwrap(), OwnTemplate::parse(SHOP).unwrap());
    }

    #[test]
    fn a_block_that_would_not_be_filled_in_is_an_error() {
        for (text, error) in [
            ("vcl 4.1;\n", InvalidTemplate::NoBackends),
            ("# clearcoat: backend\n", InvalidTemplate::UnknownBlock(1, "backend".to_owned())),
            ("\n# clearcoat: backends\n", InvalidTemplate::Unpaired(2)),
            ("# clearcoat: end\n", InvalidTemplate::Unpaired(1)),
            ("# clearcoat: backends\n# clearcoat: allow\n", InvalidTemplate::Nested(2)),
            ("# clearcoat: backends\n# clearcoat: end\n# clearcoat: backends\n", InvalidTemplate::Nested(3)),
            ("\0", InvalidTemplate::Nul),
        ] {
            assert_eq!(OwnTemplate::parse(text), Err(error), "{text:?}");
        }
    }
}
