//! Chromium without a window, driven over its debugging pipe.

use std::{
    fs::File,
    io::{BufRead as _, BufReader, Write as _},
    os::{
        fd::{AsRawFd as _, FromRawFd as _, OwnedFd, RawFd},
        unix::process::CommandExt as _,
    },
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::mpsc,
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, anyhow, bail};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::process::wait_until;

/// The names under which distributions install it.
const NAMES: [&str; 3] = ["chromium", "chromium-browser", "google-chrome"];
/// A browser that takes longer for anything is broken.
const PATIENCE: Duration = Duration::from_mins(1);

/// A running browser with one page; dropped, it is killed.
#[derive(Debug)]
pub struct Browser {
    child: Child,
    to: File,
    from: mpsc::Receiver<Value>,
    session: String,
    last: u64,
    complaints: Vec<String>,
    _profile: TempDir,
}

/// Where the browser is, if it is installed.
pub fn installed() -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    let names = |dir: PathBuf| NAMES.map(|name| dir.join(name));
    std::env::split_paths(&path).flat_map(names).find(|candidate| candidate.is_file())
}

fn pipe() -> Result<(OwnedFd, OwnedFd)> {
    let mut ends = [-1; 2];
    // SAFETY: both ends are valid for writes.
    if unsafe { libc::pipe2(ends.as_mut_ptr(), libc::O_CLOEXEC) } != 0 {
        bail!("pipe2: {}", std::io::Error::last_os_error());
    }
    // SAFETY: both were just opened and belong to nobody else.
    Ok(unsafe { (OwnedFd::from_raw_fd(ends[0]), OwnedFd::from_raw_fd(ends[1])) })
}

/// Gives the browser its ends as descriptors 3 and 4, whatever numbers they have here.
fn hand_over(command: &mut Command, read: RawFd, write: RawFd) {
    // SAFETY: only async-signal-safe calls between fork and exec.
    unsafe {
        command.pre_exec(move || {
            // First out of the way of each other.
            let (high_read, high_write) =
                (libc::fcntl(read, libc::F_DUPFD, 100), libc::fcntl(write, libc::F_DUPFD, 100));
            if libc::dup2(high_read, 3) < 0 || libc::dup2(high_write, 4) < 0 {
                return Err(std::io::Error::last_os_error());
            }
            libc::close(high_read);
            libc::close(high_write);
            Ok(())
        });
    }
}

impl Browser {
    /// Starts `program` with an empty page of this size.
    pub fn start(program: &Path, width: u32, height: u32) -> Result<Self> {
        let profile = tempfile::Builder::new().prefix("nvshare-browser-").tempdir()?;
        let (their_read, to) = pipe()?;
        let (from, their_write) = pipe()?;
        let mut command = Command::new(program);
        command
            .args(["--headless=new", "--remote-debugging-pipe", "--no-first-run", "--disable-gpu"])
            // Tests run as root in containers, where the sandbox does not work; they visit their own agent only.
            .args(["--no-sandbox", "--disable-dev-shm-usage", "--disable-extensions", "--hide-scrollbars"])
            .args(["--disable-background-networking", "--disable-component-update", "--disable-sync"])
            .arg(format!("--window-size={width},{height}"))
            .arg(format!("--user-data-dir={}", profile.path().display()))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        hand_over(&mut command, their_read.as_raw_fd(), their_write.as_raw_fd());
        let child = command.spawn().with_context(|| format!("starting {}", program.display()))?;
        drop((their_read, their_write));
        let (said_tx, said_rx) = mpsc::channel();
        thread::spawn(move || {
            let messages = BufReader::new(File::from(from)).split(0).map_while(Result::ok);
            for message in messages.filter_map(|bytes| serde_json::from_slice(&bytes).ok()) {
                if said_tx.send(message).is_err() {
                    return;
                }
            }
        });
        let mut browser = Self {
            child,
            to: File::from(to),
            from: said_rx,
            session: String::new(),
            last: 0,
            complaints: Vec::new(),
            _profile: profile,
        };
        let target = browser.call("Target.createTarget", &json!({"url": "about:blank"}))?;
        let attach = json!({"targetId": target["targetId"], "flatten": true});
        let attached = browser.call("Target.attachToTarget", &attach)?;
        let session = attached["sessionId"].as_str().context("the browser gives no session")?;
        browser.session.push_str(session);
        for domain in ["Page.enable", "Runtime.enable", "Log.enable"] {
            browser.call(domain, &json!({}))?;
        }
        browser.resize(width, height)?;
        Ok(browser)
    }

    /// One command of the DevTools protocol and its answer.
    pub fn call(&mut self, method: &str, params: &Value) -> Result<Value> {
        self.last += 1;
        let mut request = json!({"id": self.last, "method": method, "params": params});
        if !self.session.is_empty() {
            request["sessionId"] = self.session.clone().into();
        }
        let mut bytes = serde_json::to_vec(&request)?;
        bytes.push(0);
        self.to.write_all(&bytes).context("talking to the browser")?;
        loop {
            let message = self.from.recv_timeout(PATIENCE).with_context(|| format!("{method}: no answer"))?;
            self.note(&message);
            if message["id"] == self.last {
                if let Some(error) = message.get("error") {
                    bail!("{method}: {error}");
                }
                return Ok(message["result"].clone());
            }
        }
    }

    /// Remembers what the page should not have given rise to.
    fn note(&mut self, message: &Value) {
        let complaint = match message["method"].as_str() {
            Some("Runtime.exceptionThrown") => true,
            Some("Runtime.consoleAPICalled") => message["params"]["type"] == "error",
            Some("Log.entryAdded") => message["params"]["entry"]["level"] == "error",
            _ => false,
        };
        if complaint {
            self.complaints.push(message["params"].to_string());
        }
    }

    /// Errors of the page so far: exceptions, refusals of its policy, failed requests.
    pub fn complaints(&mut self) -> Result<Vec<String>> {
        // What was said before the answer has come.
        self.evaluate("0")?;
        Ok(std::mem::take(&mut self.complaints))
    }

    /// Opens a page.
    pub fn open(&mut self, url: &str) -> Result<()> {
        let opened = self.call("Page.navigate", &json!({"url": url}))?;
        if let Some(error) = opened["errorText"].as_str() {
            bail!("{url}: {error}");
        }
        let url = url.to_owned();
        wait_until("the page to be loaded", PATIENCE, || {
            let place = self.evaluate("[document.readyState, location.href]")?;
            let loaded = place[0] == "complete" && place[1].as_str().is_some_and(|at| at.starts_with(&url));
            Ok(loaded.then_some(()))
        })
    }

    /// The value of an expression in the page.
    pub fn evaluate(&mut self, expression: &str) -> Result<Value> {
        let params = json!({"expression": expression, "returnByValue": true, "awaitPromise": true});
        let answer = self.call("Runtime.evaluate", &params)?;
        if let Some(thrown) = answer.get("exceptionDetails") {
            return Err(anyhow!("{expression}: {thrown}"));
        }
        Ok(answer["result"]["value"].clone())
    }

    /// Waits until an expression is true.
    pub fn wait_for(&mut self, expression: &str, within: Duration) -> Result<()> {
        let waited =
            wait_until(expression, within, || Ok((self.evaluate(expression)? == true).then_some(())));
        waited.with_context(|| {
            let text = self.evaluate("document.body.innerText").unwrap_or_default();
            format!("the page:\n{}", text.as_str().unwrap_or_default())
        })
    }

    /// Prefers dark or light pages.
    pub fn prefer(&mut self, scheme: &str) -> Result<()> {
        let features = json!({"features": [{"name": "prefers-color-scheme", "value": scheme}]});
        self.call("Emulation.setEmulatedMedia", &features)?;
        Ok(())
    }

    /// Lets pages run scripts, or not.
    pub fn allow_scripts(&mut self, allow: bool) -> Result<()> {
        self.call("Emulation.setScriptExecutionDisabled", &json!({"value": !allow}))?;
        Ok(())
    }

    /// Changes the size of the page.
    pub fn resize(&mut self, width: u32, height: u32) -> Result<()> {
        let size = json!({"width": width, "height": height, "deviceScaleFactor": 1, "mobile": false});
        self.call("Emulation.setDeviceMetricsOverride", &size)?;
        Ok(())
    }

    /// A picture of the page as PNG.
    pub fn screenshot(&mut self) -> Result<Vec<u8>> {
        let shot = self.call("Page.captureScreenshot", &json!({"format": "png"}))?;
        let data = shot["data"].as_str().context("the browser gives no picture")?;
        STANDARD.decode(data).context("the browser's picture is broken")
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        // It may have ended already.
        self.child.kill().ok();
        self.child.wait().ok();
    }
}
