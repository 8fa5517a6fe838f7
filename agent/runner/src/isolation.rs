//! How a command is kept apart from its host: the part of an order that says what it sees.
//!
//! Policy is the agent's: it lists every file and directory that a build may see, and the runner shows these and nothing
//! else. What no order can change (its own namespaces, no capabilities, the refused system calls) is the runner's.

use std::ffi::OsString;
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::path::PathBuf;

use crate::codec::{Decoder, Encoder, FormatError};
use crate::order::User;

/// Whom an isolated command believes to be, whatever it is outside: what it packs is owned alike on every host.
pub const USER_INSIDE: User = User { uid: 1000, gid: 1000 };

/// The host's name as an isolated command sees it: one that always resolves.
pub const HOST_NAME_INSIDE: &str = "localhost";

/// Entries of a view, at most.
const ENTRIES_MAX: u32 = 1024;

/// An isolated command's surroundings.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Isolation {
    /// Who makes them.
    pub tool: Tool,
    /// What it reaches.
    pub network: Network,
    /// All it sees of the host's files, in the order in which they are put there. `/proc`, a small `/dev`, user names and
    /// empty directories are there besides.
    pub view: Vec<Entry>,
}

/// Who makes the surroundings.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Tool {
    /// The runner itself.
    Namespaces,
    /// The program `bwrap` at this path.
    Bubblewrap(PathBuf),
}

/// What a command reaches of the network.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Network {
    /// What the host reaches.
    Host,
    /// A loopback interface of its own.
    None,
}

/// Something that a command sees.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Entry {
    /// A file or directory of the host, with what is mounted below.
    Bind {
        /// Where it is on the host.
        source: PathBuf,
        /// Where the command sees it.
        target: PathBuf,
        /// What it may do there.
        access: Access,
        /// What if the host has it no more.
        absence: Absence,
    },
    /// A symbolic link.
    Link {
        /// Where it is.
        target: PathBuf,
        /// What it says.
        to: PathBuf,
    },
}

/// What a command may do with what it sees.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Access {
    /// Read.
    Read,
    /// Whatever the files' modes allow.
    Write,
}

/// Whether a command can do without.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Absence {
    /// The command is not started.
    Fails,
    /// It is left out.
    Ignored,
}

impl Entry {
    /// A part of the host that builds see where it is, to read, if it is there.
    #[must_use]
    pub fn host(path: impl Into<PathBuf>) -> Self {
        let source = path.into();
        Self::Bind { target: source.clone(), source, access: Access::Read, absence: Absence::Ignored }
    }

    /// A directory of the attempt's own.
    #[must_use]
    pub fn own(source: impl Into<PathBuf>, target: impl Into<PathBuf>) -> Self {
        let (source, target) = (source.into(), target.into());
        Self::Bind { source, target, access: Access::Write, absence: Absence::Fails }
    }
}

impl Isolation {
    pub(crate) fn encode(&self, out: &mut Encoder) {
        match &self.tool {
            Tool::Namespaces => out.u8(1),
            Tool::Bubblewrap(program) => out.u8(2).bytes(program.as_os_str().as_bytes()),
        };
        out.u8(match self.network {
            Network::Host => 0,
            Network::None => 1,
        });
        out.u32(u32::try_from(self.view.len()).unwrap_or(u32::MAX));
        for entry in &self.view {
            match entry {
                Entry::Bind { source, target, access, absence } => {
                    let flags = u8::from(*access == Access::Write) | (u8::from(*absence == Absence::Ignored) << 1);
                    out.u8(0).bytes(source.as_os_str().as_bytes()).bytes(target.as_os_str().as_bytes()).u8(flags)
                }
                Entry::Link { target, to } => {
                    out.u8(1).bytes(target.as_os_str().as_bytes()).bytes(to.as_os_str().as_bytes())
                }
            };
        }
    }

    /// Reads what [`Self::encode`] wrote; `tool` is its first byte.
    pub(crate) fn decode(tool: u8, fields: &mut Decoder<'_>) -> Result<Self, FormatError> {
        let tool = match tool {
            1 => Tool::Namespaces,
            2 => Tool::Bubblewrap(path(fields)?),
            _ => return Err(FormatError::Value("isolation")),
        };
        let network = match fields.u8()? {
            0 => Network::Host,
            1 => Network::None,
            _ => return Err(FormatError::Value("network")),
        };
        let count = fields.u32()?;
        if count > ENTRIES_MAX {
            return Err(FormatError::Value("view"));
        }
        let view = (0..count).map(|_| entry(fields)).collect::<Result<_, _>>()?;
        Ok(Self { tool, network, view })
    }
}

fn entry(fields: &mut Decoder<'_>) -> Result<Entry, FormatError> {
    match fields.u8()? {
        0 => {
            let (source, target) = (path(fields)?, path(fields)?);
            let flags = fields.u8()?;
            if flags > 3 {
                return Err(FormatError::Value("view"));
            }
            let access = if flags & 1 == 0 { Access::Read } else { Access::Write };
            let absence = if flags & 2 == 0 { Absence::Fails } else { Absence::Ignored };
            Ok(Entry::Bind { source, target, access, absence })
        }
        1 => Ok(Entry::Link { target: path(fields)?, to: path(fields)? }),
        _ => Err(FormatError::Value("view")),
    }
}

fn path(fields: &mut Decoder<'_>) -> Result<PathBuf, FormatError> {
    let bytes = fields.bytes()?;
    if bytes.is_empty() || bytes.contains(&0) {
        return Err(FormatError::Value("view"));
    }
    Ok(OsString::from_vec(bytes.to_vec()).into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_back_what_it_writes() {
        let view = vec![
            Entry::host("/usr"),
            Entry::own("/w/tmp", "/tmp"),
            Entry::Link { target: "/bin".into(), to: "usr/bin".into() },
        ];
        for tool in [Tool::Namespaces, Tool::Bubblewrap("/usr/bin/bwrap".into())] {
            for network in [Network::Host, Network::None] {
                let isolation = Isolation { tool: tool.clone(), network, view: view.clone() };
                let mut out = Encoder::default();
                isolation.encode(&mut out);
                let bytes = out.finish();
                let mut fields = Decoder::new(&bytes);
                let tool = fields.u8().unwrap();
                assert_eq!(Isolation::decode(tool, &mut fields), Ok(isolation));
                assert_eq!(fields.end(), Ok(()));
            }
        }
    }
}
