//! The management port of a varnishd: its command line, as `varnishadm` talks to it.
//!
//! There is no maintained crate for it, and `varnishadm` cannot take its place: the agent, which is process 1 of a
//! container, must be the only one that waits for children. The protocol is small (varnish-cli(7)): commands are lines of
//! words, and an answer is a line of 13 bytes, with a status and the length of a text, and that text.
//!
//! Who connects is asked to prove that it has the secret file of this varnishd (`-S`), without sending it: the greeting
//! holds a challenge, and the proof is a hash over both.

use std::io;
use std::str::FromStr;
use std::time::Duration;

use aws_lc_rs::digest;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpStream, ToSocketAddrs};

/// The length of the line before each text: `200 1234    \n`.
const STATUS_LINE: usize = 13;
/// The text after which we do not go on reading. varnishd itself stops at its `cli_limit`, of 48 KiB unless configured.
const MAX_TEXT: usize = 16 << 20;
/// The statuses that we act upon (vcli.h of Varnish).
const OK: u16 = 200;
/// The same, with a text that was cut at `cli_limit`.
const TRUNCATED: u16 = 201;
/// It wants to be shown that we have its secret.
const AUTHENTICATE: u16 = 107;
/// It ends the connection: also the answer to a proof with another secret.
const CLOSE: u16 = 500;
/// The length of a challenge in bytes.
const CHALLENGE: usize = 32;

/// A connection to the management port of a varnishd.
#[derive(Debug)]
pub struct ManagementPort {
    stream: TcpStream,
    /// For the greeting, and for each answer.
    timeout: Duration,
}

/// The answer to a command that was carried out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CommandAnswer {
    /// The text; its whole lines if it was cut.
    pub text: String,
    /// varnishd has cut it at its `cli_limit` (48 KiB unless configured): what follows is not known.
    pub is_truncated: bool,
}

/// Why a command was not carried out.
#[derive(Debug, thiserror::Error)]
pub enum ManagementError {
    /// No connection.
    #[error("connecting failed")]
    Connect(#[source] io::Error),
    /// The connection broke.
    #[error("the connection broke")]
    Io(#[from] io::Error),
    /// Nothing in time.
    #[error("no answer within {0:?}")]
    Timeout(Duration),
    /// Not what a varnishd sends.
    #[error("it does not speak as a management port: {0}")]
    Malformed(String),
    /// It wants a secret, and we have none.
    #[error("it wants to be shown a secret: the file that varnishd was given with -S")]
    NoSecret,
    /// It has another secret.
    #[error("it has another secret: varnishd was given another file with -S")]
    WrongSecret,
    /// It said no. Of a VCL that does not compile, the text is the compiler's.
    #[error("{status}: {text}")]
    Refused {
        /// The status (varnish-cli(7)).
        status: u16,
        /// The words of varnishd, without white space at the end.
        text: String,
    },
    /// A word that cannot be written.
    #[error("no word of a command may be empty or hold a NUL")]
    Unsendable,
}

impl ManagementPort {
    /// Connects, and shows the content of the secret file if it is asked for. `timeout` is for each step.
    ///
    /// # Errors
    /// If it is not there, not a management port, or has another secret.
    pub async fn connect(
        address: impl ToSocketAddrs,
        secret: Option<&[u8]>,
        timeout: Duration,
    ) -> Result<Self, ManagementError> {
        let stream = tokio::time::timeout(timeout, TcpStream::connect(address)).await;
        let stream = stream.map_err(|_| ManagementError::Timeout(timeout))?.map_err(ManagementError::Connect)?;
        let mut port = ManagementPort { stream, timeout };
        let (status, greeting) = port.answer().await?;
        if status != AUTHENTICATE {
            return accepted(status, greeting).map(|_| port);
        }
        let proof = proof(&greeting, secret.ok_or(ManagementError::NoSecret)?)?;
        port.write(&format!("auth {proof}\n")).await?;
        match port.answer().await? {
            (AUTHENTICATE | CLOSE, _) => Err(ManagementError::WrongSecret),
            (status, text) => accepted(status, text).map(|_| port),
        }
    }

    /// Carries out one command, given by its words. Gives the text of the answer.
    ///
    /// # Errors
    /// [`ManagementError::Refused`] if varnishd says no; of any other error the connection is of no more use.
    pub async fn command(&mut self, words: &[&str]) -> Result<CommandAnswer, ManagementError> {
        self.write(&line(words)?).await?;
        let (status, text) = self.answer().await?;
        accepted(status, text)
    }

    /// Has this VCL compiled, and loaded under this name.
    ///
    /// The text follows the command, up to a word that does not stand in it (varnish-cli(7), "Here documents"): as a word of the
    /// command it would be four times as long.
    ///
    /// # Errors
    /// As [`ManagementPort::command`]; the words of [`ManagementError::Refused`] are the compiler's.
    pub async fn load(&mut self, name: &str, vcl: &str) -> Result<CommandAnswer, ManagementError> {
        if vcl.contains('\0') {
            return Err(ManagementError::Unsendable);
        }
        let mut end = "END_OF_VCL".to_owned();
        while vcl.contains(&end) {
            end.push('_');
        }
        let command = line(&["vcl.inline", name])?;
        self.write(&format!("{} << {end}\n{vcl}\n{end}\n", command.trim_end())).await?;
        let (status, text) = self.answer().await?;
        accepted(status, text)
    }

    /// Each step from now on may take this long.
    pub fn set_timeout(&mut self, timeout: Duration) {
        self.timeout = timeout;
    }

    /// Returns when varnishd has closed the connection, or says something that it was not asked. Can be given up at any time.
    pub async fn closed(&self) {
        // Not `ready`, which says yes once after each answer that was read to its end. An error is an end, too.
        _ = self.stream.peek(&mut [0]).await;
    }

    async fn write(&mut self, line: &str) -> Result<(), ManagementError> {
        let written = tokio::time::timeout(self.timeout, self.stream.write_all(line.as_bytes())).await;
        Ok(written.map_err(|_| ManagementError::Timeout(self.timeout))??)
    }

    async fn answer(&mut self) -> Result<(u16, String), ManagementError> {
        let read = async {
            let mut head = [0; STATUS_LINE];
            self.stream.read_exact(&mut head).await?;
            let (status, length) = parse_status_line(&head)
                .ok_or_else(|| ManagementError::Malformed(format!("`{}` is no status line", head.escape_ascii())))?;
            if length > MAX_TEXT {
                return Err(ManagementError::Malformed(format!("a text of {length} bytes")));
            }
            // With the newline that ends it and is not counted.
            let mut text = vec![0; length + 1];
            self.stream.read_exact(&mut text).await?;
            match text.pop() {
                Some(b'\n') => Ok((status, String::from_utf8_lossy(&text).into_owned())),
                _ => Err(ManagementError::Malformed("a text that does not end with a newline".to_owned())),
            }
        };
        tokio::time::timeout(self.timeout, read).await.map_err(|_| ManagementError::Timeout(self.timeout))?
    }
}

fn accepted(status: u16, mut text: String) -> Result<CommandAnswer, ManagementError> {
    match status {
        OK => Ok(CommandAnswer { text, is_truncated: false }),
        TRUNCATED => {
            // The last line may have been cut within.
            text.truncate(text.rfind('\n').map_or(0, |at| at + 1));
            Ok(CommandAnswer { text, is_truncated: true })
        }
        _ => Err(ManagementError::Refused { status, text: text.trim_end().to_owned() }),
    }
}

/// The status and the length of the text that follows.
fn parse_status_line(line: &[u8; STATUS_LINE]) -> Option<(u16, usize)> {
    let line = std::str::from_utf8(line).ok()?.strip_suffix('\n')?;
    let (status, length) = (line.get(..3)?, line.get(3..)?.strip_prefix(' ')?.trim_end_matches(' '));
    Some((digits(status)?, digits(length)?))
}

/// A number of digits alone: `parse` takes a sign, too.
fn digits<N: FromStr>(text: &str) -> Option<N> {
    text.bytes().all(|byte| byte.is_ascii_digit()).then(|| text.parse().ok()).flatten()
}

/// The proof that we have this secret: the hash of the challenge, a newline, the secret, the challenge and a newline.
fn proof(greeting: &str, secret: &[u8]) -> Result<String, ManagementError> {
    let challenge = greeting.get(..CHALLENGE).filter(|_| greeting[CHALLENGE..].starts_with('\n'));
    let challenge = challenge.ok_or_else(|| ManagementError::Malformed("a greeting without a challenge".to_owned()))?;
    let mut hash = digest::Context::new(&digest::SHA256);
    for part in [challenge.as_bytes(), b"\n", secret, challenge.as_bytes(), b"\n"] {
        hash.update(part);
    }
    Ok(hash.finish().as_ref().iter().map(|byte| format!("{byte:02x}")).collect())
}

/// A command as one line. Every byte that could mean something is escaped (varnish-cli(7), "Syntax"). Words are not quoted: Varnish
/// 7.1 takes nothing behind a word in quotes.
fn line(words: &[&str]) -> Result<String, ManagementError> {
    let mut line = String::new();
    for (index, word) in words.iter().enumerate() {
        if word.is_empty() || word.contains('\0') {
            return Err(ManagementError::Unsendable);
        }
        if index > 0 {
            line.push(' ');
        }
        for byte in word.bytes() {
            match byte {
                b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'_' | b'-' | b'.' | b'/' => line.push(byte.into()),
                other => line.push_str(&format!("\\x{other:02x}")),
            }
        }
    }
    line.push('\n');
    Ok(line)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use tokio::net::TcpListener;

    use super::*;

    #[test]
    fn a_status_line_has_a_status_and_a_length() {
        assert_eq!(parse_status_line(b"200 0       \n"), Some((200, 0)));
        assert_eq!(parse_status_line(b"107 59      \n"), Some((107, 59)));
        assert_eq!(parse_status_line(b"106 12345678\n"), Some((106, 12_345_678)));
        for wrong in [
            b"HTTP/1.1 400 ",
            b"200 -1      \n",
            b"+20 1       \n",
            b"200         \n",
            b"200 1       x",
            b"2000 1      \n",
        ] {
            assert_eq!(parse_status_line(wrong), None, "{}", wrong.escape_ascii());
        }
    }

    #[test]
    fn the_proof_is_that_of_the_manual() {
        // varnish-cli(7), "Authentication with -S", has this challenge and this proof for a secret file with `foo\n`.
        let greeting = "ixslvvxrgkjptxmcgnnsdxsvdmvfympg\n\nAuthentication required.\n";
        let expected = "455ce847f0073c7ab3b1465f74507b75d3dc064c1e7de3b71e00de9092fdc89a";
        assert_eq!(proof(greeting, b"foo\n").unwrap(), expected);
        assert!(proof("short\n", b"foo\n").is_err());
        assert!(proof(&"\u{e9}".repeat(40), b"foo\n").is_err());
    }

    #[test]
    fn words_keep_what_is_in_them() {
        assert_eq!(line(&["vcl.use", "a b\\\"\n"]).unwrap(), "vcl.use a\\x20b\\x5c\\x22\\x0a\n");
        assert_eq!(line(&["<<", "\u{e9}"]).unwrap(), "\\x3c\\x3c \\xc3\\xa9\n");
        assert!(line(&["ping\0"]).is_err() && line(&["vcl.use", ""]).is_err());
    }

    #[test]
    fn what_varnishd_has_cut_has_whole_lines_alone_and_says_that_it_is_cut() {
        let cut = "Present bans:\n1795858128.185205     0 -  req.url ~ y1\n17958581";
        let answer = accepted(201, cut.to_owned()).unwrap();
        assert!(answer.is_truncated);
        assert_eq!(answer.text, "Present bans:\n1795858128.185205     0 -  req.url ~ y1\n");
        assert_eq!(accepted(201, "x".to_owned()).unwrap().text, "");
        assert!(!accepted(200, "x".to_owned()).unwrap().is_truncated);
    }

    proptest! {
        #[test]
        fn a_command_is_one_line_whatever_its_words(words in prop::collection::vec("[^\0]{1,40}", 1..5)) {
            let words: Vec<&str> = words.iter().map(String::as_str).collect();
            let line = line(&words).unwrap();
            prop_assert_eq!(line.matches('\n').count(), 1);
            prop_assert!(line.ends_with('\n'));
            prop_assert_eq!(line.split(' ').count(), words.len());
        }

        #[test]
        fn no_status_line_is_a_panic(bytes in prop::array::uniform13(any::<u8>())) {
            let _ = parse_status_line(&bytes);
        }
    }

    /// What a server says that sends these bytes to whoever connects.
    async fn told(bytes: &'static [u8]) -> ManagementError {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let server = tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            stream.write_all(bytes).await.unwrap();
        });
        let error = ManagementPort::connect(address, None, Duration::from_secs(30)).await.unwrap_err();
        server.await.unwrap();
        error
    }

    #[tokio::test]
    async fn what_is_no_management_port_is_named() {
        let cases: [(&[u8], &str); 5] = [
            (b"SSH-2.0-OpenSSH_9.2p1 Debian-2\r\n", "`SSH-2.0-OpenS` is no status line"),
            (b"200 3       \nabcd", "does not end with a newline"),
            (b"200 99999999\n", "a text of 99999999 bytes"),
            (b"200 3", "the connection broke"),
            (b"107 59      \nixslvvxrgkjptxmcgnnsdxsvdmvfympg\n\nAuthentication required.\n\n", "with -S"),
        ];
        for (bytes, says) in cases {
            let error = told(bytes).await.to_string();
            assert!(error.contains(says), "{error}");
        }
    }
}
