//! A case of the corpus as in its file. `tests/corpus/README.md` defines the format.
//!
//! The parser is strict: a typo that turned a hostile byte into a harmless one would leave a case that tests nothing,
//! unnoticed.

use std::path::Path;

/// The allowed keys of a file, in this order. The first three are required.
const KEYS: [&str; 5] = ["why", "source", "verdict", "request", "then"];

/// One file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Case {
    /// The name of the file without its ending.
    pub name: String,
    /// The lines at its top: key and value.
    keys: Vec<(&'static str, String)>,
    /// The title and the bytes of each section.
    sections: Vec<(String, Vec<u8>)>,
}

impl Case {
    /// Reads all files of a folder, sorted by name. Panics on a malformed one.
    pub fn read_all(folder: &str) -> Vec<Case> {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/corpus").join(folder);
        let entries = std::fs::read_dir(&folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
        let mut paths: Vec<_> = entries.map(|entry| entry.expect("an entry").path()).collect();
        paths.sort();
        let read = |path: &Path| -> Result<Case, String> {
            let name = path.file_name().and_then(|name| name.to_str()).ok_or("a name that is no text")?;
            let name = name.strip_suffix(".txt").ok_or("the name does not end with .txt")?;
            let text = std::fs::read_to_string(path).map_err(|error| error.to_string())?;
            Case::parse(name, &text)
        };
        paths.iter().map(|path| read(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))).collect()
    }

    /// Parses the text of one file.
    ///
    /// # Errors
    /// The error, with its line number.
    pub fn parse(name: &str, text: &str) -> Result<Case, String> {
        let word = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
        if name.is_empty() || !name.chars().all(word) {
            return Err("the name is not made of a-z, 0-9 and -".into());
        }
        let mut case = Case { name: name.to_owned(), keys: Vec::new(), sections: Vec::new() };
        for (number, line) in text.split_terminator('\n').enumerate() {
            case.line(line).map_err(|error| format!("line {}: {error}", number + 1))?;
        }
        for key in &KEYS[..3] {
            case.key(key).ok_or_else(|| format!("there is no line `# {key}: `"))?;
        }
        if !text.ends_with('\n') || text.ends_with("\n\n") {
            return Err("the file does not end with one line end".into());
        }
        match case.sections.iter().find(|(_, bytes)| bytes.is_empty()) {
            Some((title, _)) => Err(format!("the section `{title}` is empty")),
            None if case.sections.is_empty() => Err("there is no section".into()),
            None => Ok(case),
        }
    }

    fn line(&mut self, line: &str) -> Result<(), String> {
        if let Some(title) = line.strip_prefix("== ") {
            let title = title.strip_suffix(" ==").ok_or("a section is written `== title ==`")?;
            self.sections.push((title.to_owned(), Vec::new()));
            return Ok(());
        }
        match (self.sections.last_mut(), line.strip_prefix("# ")) {
            (Some((_, bytes)), _) if !line.is_empty() => bytes.extend(unescape(line)?),
            (None, Some(line)) => {
                let (key, value) = line.split_once(": ").ok_or("a line at the top is written `# key: value`")?;
                let place = KEYS.iter().position(|known| *known == key).ok_or("an unknown key")?;
                let last = self.keys.last().and_then(|(last, _)| KEYS.iter().position(|known| known == last));
                if last.is_some_and(|last| last >= place) {
                    return Err(format!("`{key}` is repeated, or not in the order of {KEYS:?}"));
                }
                if value.trim().is_empty() || value.trim() != value {
                    return Err(format!("the value of `{key}` is empty or has blanks around it"));
                }
                self.keys.push((KEYS[place], value.to_owned()));
            }
            (_, None) if line.is_empty() => {}
            _ => return Err("bytes before the first section".into()),
        }
        Ok(())
    }

    /// The value of a key.
    pub fn key(&self, key: &str) -> Option<&str> {
        self.keys.iter().find(|(known, _)| *known == key).map(|(_, value)| value.as_str())
    }

    /// The required outcome.
    pub fn verdict(&self) -> &str {
        self.key("verdict").expect("checked when it was read")
    }

    /// The bytes of all sections with this title.
    pub fn sections(&self, title: &str) -> Vec<&[u8]> {
        let titled = self.sections.iter().filter(|(known, _)| known == title);
        titled.map(|(_, bytes)| bytes.as_slice()).collect()
    }

    /// The bytes of the only section with this title.
    ///
    /// # Errors
    /// If there is none, or more than one.
    pub fn section(&self, title: &str) -> Result<&[u8], String> {
        match self.sections(title).as_slice() {
            [bytes] => Ok(bytes),
            other => Err(format!("{}: {} sections `{title}` instead of one", self.name, other.len())),
        }
    }

    /// Checks that a file has only the keys and sections of its kind.
    ///
    /// # Errors
    /// Names the unexpected key or section.
    pub fn has_only(&self, keys: &[&str], titles: &[&str]) -> Result<(), String> {
        let key = self.keys.iter().map(|(key, _)| *key).find(|key| !KEYS[..3].contains(key) && !keys.contains(key));
        let title = self.sections.iter().map(|(title, _)| title.as_str()).find(|title| !titles.contains(title));
        match key.or(title) {
            Some(odd) => Err(format!("{}: `{odd}` does not belong into a file of this kind", self.name)),
            None => Ok(()),
        }
    }
}

/// The bytes that a line represents, without its line end.
fn unescape(line: &str) -> Result<Vec<u8>, String> {
    if let Some(odd) = line.chars().find(|c| !(' '..='~').contains(c)) {
        return Err(format!("{odd:?} must be escaped"));
    }
    if line.ends_with(' ') {
        return Err("a blank at the end of a line is written \\x20, so that it can be seen".into());
    }
    let (mut bytes, mut rest) = (Vec::new(), line);
    while let Some((plain, escape)) = rest.split_once('\\') {
        bytes.extend(plain.bytes());
        let code = escape.chars().next().ok_or("a \\ at the end of a line")?;
        rest = &escape[1..];
        match code {
            'r' => bytes.push(b'\r'),
            'n' => bytes.push(b'\n'),
            't' => bytes.push(b'\t'),
            '\\' => bytes.push(b'\\'),
            'x' => {
                let digits = rest.get(..2).filter(|digits| digits.bytes().all(|digit| digit.is_ascii_hexdigit()));
                bytes.push(
                    digits.and_then(|digits| u8::from_str_radix(digits, 16).ok()).ok_or("\\x without two digits")?,
                );
                rest = &rest[2..];
            }
            '{' => {
                let (inside, behind) = rest.split_once('}').ok_or("\\{ without }")?;
                let (count, text) = inside.split_once(" x ").ok_or("a repetition is written \\{count x text}")?;
                let count: usize = count.parse().map_err(|_| "a repetition without a count")?;
                bytes.extend(unescape(text)?.repeat(count));
                rest = behind;
            }
            other => return Err(format!("an unknown escape \\{other}")),
        }
    }
    bytes.extend(rest.bytes());
    Ok(bytes)
}

#[test]
fn a_case_is_read_to_the_byte() {
    let text =
        "# why: w\n# source: s\n# verdict: v\n\n== sent ==\nA: b\\r\\n\n\\x00\\\\\\t\\{3 x ab\\n}.\n\n== seen ==\n#\n";
    let case = Case::parse("a-1", text).unwrap();
    assert_eq!((case.verdict(), case.key("why"), case.key("then")), ("v", Some("w"), None));
    assert_eq!(case.section("sent").unwrap(), b"A: b\r\n\0\\\tab\nab\nab\n.");
    assert_eq!(case.section("seen").unwrap(), b"#");
    assert!(case.section("other").is_err() && case.has_only(&[], &["sent"]).is_err());
    assert!(case.has_only(&[], &["sent", "seen"]).is_ok());
}

#[test]
fn a_malformed_case_is_refused_with_its_line() {
    let top = "# why: w\n# source: s\n# verdict: v\n";
    for (text, error) in [
        ("# why: w\n# verdict: v\n== sent ==\na\n".to_owned(), "there is no line `# source: `"),
        (format!("{top}# verdict: v\n== sent ==\na\n"), "line 4: `verdict` is repeated"),
        (format!("{top}# because: v\n== sent ==\na\n"), "line 4: an unknown key"),
        (format!("{top}# then:  v\n== sent ==\na\n"), "line 4: the value of `then`"),
        (format!("{top}#then: v\n== sent ==\na\n"), "line 4: bytes before the first section"),
        (format!("{top}a\n"), "line 4: bytes before the first section"),
        (top.to_owned(), "there is no section"),
        (format!("{top}== sent ==\n\n== seen ==\na\n"), "the section `sent` is empty"),
        (format!("{top}== sent\na\n"), "line 4: a section is written"),
        (format!("{top}== sent ==\na"), "the file does not end with one line end"),
        (format!("{top}== sent ==\na\n\n"), "the file does not end with one line end"),
        (format!("{top}== sent ==\na \n"), "line 5: a blank at the end"),
        (format!("{top}== sent ==\na\r\n"), "line 5: '\\r' must be escaped"),
        (format!("{top}== sent ==\n\u{e4}\n"), "line 5: '\u{e4}' must be escaped"),
        (format!("{top}== sent ==\n\\q\n"), "line 5: an unknown escape \\q"),
        (format!("{top}== sent ==\n\\x+1\n"), "line 5: \\x without two digits"),
        (format!("{top}== sent ==\na\\\n"), "line 5: a \\ at the end"),
        (format!("{top}== sent ==\n\\{{3 x a\n"), "line 5: \\{ without }"),
        (format!("{top}== sent ==\n\\{{x a}}\n"), "line 5: a repetition"),
    ] {
        let refusal = Case::parse("a", &text).expect_err(&text);
        assert!(refusal.starts_with(error), "{text:?}: {refusal}");
    }
    assert!(Case::parse("A b", &format!("{top}== sent ==\na\n")).is_err());
}
