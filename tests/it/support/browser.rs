//! A headless Chromium, driven by the DevTools protocol over two pipes: messages of JSON, each ended by a zero byte.

use std::io::{BufRead, BufReader, Write};
use std::net::SocketAddr;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use serde_json::{Value, json};

use super::eventually;

/// One open page. The browser is killed when this value is dropped.
pub struct Page {
    browser: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
    last_id: u64,
    session: Option<String>,
    /// What went wrong in the page: exceptions, refused loads, failed requests.
    faults: Vec<String>,
    _profile: tempfile::TempDir,
}

impl Page {
    /// Opens this path of an admin listener, and waits until it has drawn a fleet.
    pub fn open(admin: SocketAddr, path: &str) -> Self {
        let profile = tempfile::tempdir().expect("a folder");
        // The browser wants the pipes as files 3 and 4. As root, as in a container, it has no sandbox.
        let run = "exec chromium --headless=new --no-sandbox --disable-gpu --disable-dev-shm-usage --hide-scrollbars \
                   --no-first-run --user-data-dir=\"$1\" --remote-debugging-pipe about:blank \
                   3<&0 4>&1 </dev/null >/dev/null 2>&1";
        let mut command = Command::new("sh");
        command.args(["-c", run, "sh"]).arg(profile.path()).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut browser = command.spawn().expect("chromium is installed (make test installs it)");
        let input = browser.stdin.take().expect("a pipe");
        let output = BufReader::new(browser.stdout.take().expect("a pipe"));
        let mut page =
            Page { browser, input, output, last_id: 0, session: None, faults: Vec::new(), _profile: profile };
        let target = page.ask("Target.createTarget", &json!({"url": "about:blank"}))["targetId"].clone();
        let session = page.ask("Target.attachToTarget", &json!({"targetId": target, "flatten": true}));
        page.session = session["sessionId"].as_str().map(str::to_owned);
        for domain in ["Page.enable", "Runtime.enable", "Log.enable"] {
            page.ask(domain, &json!({}));
        }
        page.size(1320, 900);
        page.ask("Page.navigate", &json!({"url": format!("http://{admin}{path}")}));
        page
    }

    /// Sends a command and returns its result.
    fn ask(&mut self, method: &str, params: &Value) -> Value {
        self.last_id += 1;
        let mut message = json!({"id": self.last_id, "method": method, "params": params});
        if let Some(session) = &self.session {
            message["sessionId"] = session.as_str().into();
        }
        self.input.write_all(format!("{message}\0").as_bytes()).expect("the browser runs");
        loop {
            let mut answer = Vec::new();
            self.output.read_until(0, &mut answer).expect("the browser runs");
            assert_eq!(answer.pop(), Some(0), "the browser has ended");
            let mut answer: Value = serde_json::from_slice(&answer).expect("JSON");
            if answer["id"] == self.last_id {
                assert!(answer["error"].is_null(), "{method}: {answer}");
                return answer["result"].take();
            }
            if let Some("Runtime.exceptionThrown" | "Log.entryAdded") = answer["method"].as_str() {
                self.faults.push(answer["params"].to_string());
            }
        }
    }

    /// The value of an expression. A promise is waited for.
    pub fn value(&mut self, expression: &str) -> Value {
        let wanted = json!({"expression": expression, "returnByValue": true, "awaitPromise": true});
        let mut answer = self.ask("Runtime.evaluate", &wanted);
        assert!(answer["exceptionDetails"].is_null(), "{expression}: {answer}");
        answer["result"]["value"].take()
    }

    /// The visible text of the first element that this selector finds; empty if there is none.
    pub fn text(&mut self, selector: &str) -> String {
        let selector = Value::from(selector);
        let text = self.value(&format!("document.querySelector({selector})?.innerText ?? ''"));
        text.as_str().expect("text").to_owned()
    }

    /// Waits until the text of an element has this in it, and returns the text.
    pub fn waits_for(&mut self, selector: &str, text: &str) -> String {
        let mut last = String::new();
        // The last text is worth more than that it was waited for.
        let began = std::time::Instant::now();
        eventually(&format!("{selector} says {text}"), || {
            last = self.text(selector);
            let is_late = began.elapsed() > super::PATIENCE.mul_f32(0.9);
            assert!(!is_late, "{selector} says {last:?} and not {text:?}");
            last.contains(text).then_some(())
        });
        last
    }

    /// How many elements this selector finds.
    pub fn count(&mut self, selector: &str) -> usize {
        let selector = Value::from(selector);
        let count = self.value(&format!("document.querySelectorAll({selector}).length"));
        usize::try_from(count.as_u64().expect("a number")).expect("few")
    }

    /// Sets the size of the window. Below 600 it is a telephone.
    pub fn size(&mut self, width: u32, height: u32) {
        let size = json!({"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600});
        self.ask("Emulation.setDeviceMetricsOverride", &size);
    }

    /// Sets whether the reader likes it dark.
    pub fn dark(&mut self, dark: bool) {
        let value = if dark { "dark" } else { "light" };
        let features = json!({"features": [{"name": "prefers-color-scheme", "value": value}]});
        self.ask("Emulation.setEmulatedMedia", &features);
    }

    /// Presses a key.
    pub fn press(&mut self, key: &str) {
        let text = match key {
            "Enter" => "\r",
            "Tab" => "\t",
            other => other,
        };
        let code = if key == "Enter" { 13 } else { 9 };
        for kind in ["keyDown", "keyUp"] {
            let mut event = json!({"type": kind, "key": key, "code": key, "windowsVirtualKeyCode": code});
            if kind == "keyDown" {
                event["text"] = text.into();
            }
            self.ask("Input.dispatchKeyEvent", &event);
        }
    }

    /// What went wrong in the page so far.
    pub fn faults(&mut self) -> Vec<String> {
        // Events that are on their way come before the answer to this.
        self.value("1");
        std::mem::take(&mut self.faults)
    }
}

impl Drop for Page {
    fn drop(&mut self) {
        // An error means that it has already ended.
        _ = self.browser.kill();
        _ = self.browser.wait();
    }
}
