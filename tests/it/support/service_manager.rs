//! The other side of sd_notify(3): the real protocol on a real socket, in place of systemd.

use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use super::eventually;

/// Collects what a process says to its service manager.
pub struct ServiceManager {
    socket: PathBuf,
    messages: Messages,
}

/// With their times of arrival.
type Messages = Arc<Mutex<Vec<(Instant, String)>>>;

impl ServiceManager {
    /// Listens in this folder.
    pub fn start(folder: &Path) -> Self {
        let socket = folder.join("notify");
        let receiver = UnixDatagram::bind(&socket).expect("a socket");
        let messages = Messages::default();
        let collected = Arc::clone(&messages);
        std::thread::spawn(move || {
            let mut bytes = [0; 4096];
            // Until the test ends, and its process with it.
            while let Ok(length) = receiver.recv(&mut bytes) {
                let text = String::from_utf8_lossy(&bytes[..length]).into_owned();
                collected.lock().unwrap().push((Instant::now(), text));
            }
        });
        ServiceManager { socket, messages }
    }

    /// A command that runs `clearcoat` below this manager, watched at this interval if there is one.
    pub fn command(&self, watchdog: Option<Duration>) -> Command {
        // The pid is known to the process itself only.
        let mut command = Command::new("sh");
        command.args(["-c", "WATCHDOG_PID=$$ exec \"$0\" \"$@\"", env!("CARGO_BIN_EXE_clearcoat")]);
        command.env("NOTIFY_SOCKET", &self.socket).stdin(Stdio::null());
        if let Some(interval) = watchdog {
            command.env("WATCHDOG_USEC", interval.as_micros().to_string());
        }
        command
    }

    /// The messages so far.
    pub fn messages(&self) -> Vec<String> {
        self.messages.lock().unwrap().iter().map(|(_, text)| text.clone()).collect()
    }

    /// How many messages have this line.
    pub fn count(&self, line: &str) -> usize {
        self.messages().iter().filter(|message| message.lines().any(|of| of == line)).count()
    }

    /// Waits for a line that this is the beginning of, in a message after the first `skipped` ones. Returns the line.
    pub fn says(&self, skipped: usize, beginning: &str) -> String {
        eventually(&format!("the service manager is told {beginning}"), || {
            let messages = self.messages();
            let mut lines = messages.iter().skip(skipped).flat_map(|message| message.lines());
            lines.find(|line| line.starts_with(beginning)).map(str::to_owned)
        })
    }
}
