//! Debian's docker-registry as a peer: one process, files on this disk, no TLS, driven over HTTP/1.1 on one connection.

use std::fs;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::TcpStream;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use helix_common::ports;

use super::artifact_rate::Blob;
use super::drive::DEADLINE;
use super::machine::version;

const INSTALL: &str = "docker-registry is absent: apt-get install docker-registry";

/// What runs here and how, or the step that installs it.
pub(super) fn describe() -> Result<String, String> {
    let version = version(Command::new("docker-registry").arg("--version")).ok_or_else(|| INSTALL.to_owned())?;
    Ok(format!("{version}, one process, no TLS, one copy"))
}

/// A registry; ends with its owner.
pub(super) struct Registry {
    child: Child,
    port: u16,
    _directory: tempfile::TempDir,
}

impl Registry {
    /// Starts one and waits until it answers.
    pub(super) fn start() -> anyhow::Result<Self> {
        let directory = tempfile::Builder::new().prefix("helix-bench-registry-").tempdir()?;
        let (root, port) = (directory.path(), ports::free(1)?);
        let config = format!(
            "version: 0.1\nlog: {{level: error, accesslog: {{disabled: true}}}}\n\
             storage: {{filesystem: {{rootdirectory: {}}}}}\nhttp: {{addr: \"127.0.0.1:{port}\"}}\n",
            root.join("data").display()
        );
        fs::write(root.join("config.yml"), config)?;
        let log = fs::File::create(root.join("log"))?;
        let mut command = Command::new("docker-registry");
        command.arg("serve").arg(root.join("config.yml")).stdin(Stdio::null());
        let child = command.stderr(log.try_clone()?).stdout(log).spawn().context(INSTALL)?;
        let registry = Self { child, port, _directory: directory };
        let end = Instant::now() + DEADLINE;
        while TcpStream::connect(("127.0.0.1", port)).is_err() {
            ensure!(Instant::now() < end, "docker-registry does not listen");
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(registry)
    }

    /// A connection that is kept.
    pub(super) fn client(&self) -> anyhow::Result<Client> {
        let stream = TcpStream::connect(("127.0.0.1", self.port))?;
        stream.set_nodelay(true)?;
        Ok(Client { stream: BufReader::new(stream), host: format!("127.0.0.1:{}", self.port) })
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What an answer's head said.
struct Answer {
    status: u16,
    location: Option<String>,
    length: u64,
}

/// Who uploads.
pub(super) struct Client {
    stream: BufReader<TcpStream>,
    host: String,
}

impl Client {
    /// Uploads a blob as docker does: asks for a place, then puts all bytes there under their digest.
    pub(super) fn put(&mut self, blob: &Blob) -> anyhow::Result<()> {
        self.ask("POST", "/v2/bench/blobs/uploads/", 0)?;
        let answer = self.answer(true)?;
        let place = answer.location.filter(|_| answer.status == 202);
        let place = place.with_context(|| format!("no place for an upload: {}", answer.status))?;
        // It may come with the host.
        let path = place.find("/v2/").map_or(place.as_str(), |begin| &place[begin..]);
        let separator = if path.contains('?') { '&' } else { '?' };
        self.ask("PUT", &format!("{path}{separator}digest=sha256:{}", blob.hex()), blob.size())?;
        blob.chunks().try_for_each(|chunk| self.stream.get_mut().write_all(chunk))?;
        let answer = self.answer(true)?;
        ensure!(answer.status == 201, "docker-registry did not take a blob: {}", answer.status);
        Ok(())
    }

    /// Whether a blob of this size is there.
    pub(super) fn has(&mut self, blob: &Blob) -> anyhow::Result<bool> {
        self.ask("HEAD", &format!("/v2/bench/blobs/sha256:{}", blob.hex()), 0)?;
        let answer = self.answer(false)?;
        Ok(answer.status == 200 && answer.length == blob.size())
    }

    fn ask(&mut self, method: &str, path: &str, length: u64) -> anyhow::Result<()> {
        let head = format!("{method} {path} HTTP/1.1\r\nHost: {}\r\nContent-Length: {length}\r\n\r\n", self.host);
        Ok(self.stream.get_mut().write_all(head.as_bytes())?)
    }

    fn answer(&mut self, has_body: bool) -> anyhow::Result<Answer> {
        let mut line = String::new();
        self.stream.read_line(&mut line)?;
        let status = line.split_whitespace().nth(1).and_then(|word| word.parse().ok());
        let mut answer =
            Answer { status: status.with_context(|| format!("no HTTP: {line:?}"))?, location: None, length: 0 };
        loop {
            line.clear();
            self.stream.read_line(&mut line)?;
            let Some((name, value)) = line.trim_end().split_once(": ") else { break };
            match name.to_ascii_lowercase().as_str() {
                "location" => answer.location = Some(value.to_owned()),
                "content-length" => answer.length = value.parse()?,
                _ => {}
            }
        }
        if has_body {
            let mut body = vec![0; usize::try_from(answer.length)?];
            self.stream.read_exact(&mut body)?;
        }
        Ok(answer)
    }
}
