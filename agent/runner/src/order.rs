//! What an agent asks of a runner: complete before the runner starts, never changed afterwards.

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::path::{Path, PathBuf};

use crate::codec::{self, Decoder, Encoder, FormatError, Kind};
use crate::isolation::Isolation;
use crate::journal::{self, Journal};
use crate::limits::Limits;
use crate::paths::AttemptDir;

const KIND: Kind = Kind { magic: b"HLXORDR\0", version: 1 };

/// Whose rights the command has.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct User {
    /// User id.
    pub uid: u32,
    /// Group id; there are no further groups.
    pub gid: u32,
}

/// Whether set-uid programs work inside.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Privileges {
    /// `no_new_privs` is set: for every build that does not need otherwise.
    NeverMore,
    /// As the kernel does by default: rootless podman needs `newuidmap`.
    MayGain,
}

/// What to run and within which bounds.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Order {
    /// The program and its arguments. A name without `/` is looked up in the ordered `PATH`.
    pub argv: Vec<OsString>,
    /// The whole environment, in this order; nothing else is inherited.
    pub environment: Vec<(OsString, OsString)>,
    /// Where the command starts.
    pub workdir: PathBuf,
    /// Other rights than the runner's own.
    pub user: Option<User>,
    /// Whether set-uid programs work inside.
    pub privileges: Privileges,
    /// A cgroup v2 directory that does not exist yet, under one that does; see [`crate::cgroup::base`].
    pub cgroup: Option<PathBuf>,
    /// The command is stopped with `timeout` after so long.
    pub wall_ms: Option<u64>,
    /// The command is stopped with `silence` after so long without output.
    pub silence_ms: Option<u64>,
    /// Between SIGTERM and SIGKILL when one of the two limits above is reached.
    pub grace_ms: u64,
    /// How long processes that the command left behind may go on after it; then they are killed.
    pub leftover_ms: u64,
    /// Bytes of spool on disk, at most, framing included; see [`crate::SpoolWriter`].
    pub log_bytes_max: u64,
    /// What it sees of the host; `None` for the host as it is.
    pub isolation: Option<Isolation>,
    /// What it may use.
    pub limits: Limits,
    /// A directory in memory whose files hold what the log must not show; where the command sees it is in its environment.
    pub secrets: Option<PathBuf>,
}

impl Order {
    /// Writes it into the attempt's journal, whole or not at all.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn write(&self, dir: &AttemptDir) -> io::Result<()> {
        journal::append(dir, journal::Kind::Order, &self.encode())
    }

    /// Reads it from a journal, withdrawn or not.
    ///
    /// # Errors
    /// `NotFound` when there is none; `InvalidData` with a [`FormatError`] inside.
    pub fn of(journal: &Journal) -> io::Result<Self> {
        let bytes = journal.last(journal::Kind::Order);
        let bytes = bytes.ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, "there is no order"))?;
        Ok(Self::decode(bytes)?)
    }

    /// The file's bytes.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Encoder::default();
        out.u32(count(self.argv.len()));
        for argument in &self.argv {
            out.bytes(argument.as_bytes());
        }
        out.u32(count(self.environment.len()));
        for (name, value) in &self.environment {
            out.bytes(name.as_bytes()).bytes(value.as_bytes());
        }
        out.bytes(self.workdir.as_os_str().as_bytes());
        match self.user {
            None => out.u8(0),
            Some(user) => out.u8(1).u32(user.uid).u32(user.gid),
        };
        out.u8(match self.privileges {
            Privileges::NeverMore => 0,
            Privileges::MayGain => 1,
        });
        // Neither path nor limit can be empty or 0 when it is there.
        out.bytes(self.cgroup.as_deref().map_or(&[], |path| path.as_os_str().as_bytes()));
        for optional in [self.wall_ms, self.silence_ms] {
            match optional {
                None => out.u8(0),
                Some(ms) => out.u8(1).u64(ms),
            };
        }
        out.u64(self.grace_ms).u64(self.leftover_ms).u64(self.log_bytes_max);
        match &self.isolation {
            None => {
                out.u8(0);
            }
            Some(isolation) => isolation.encode(&mut out),
        }
        out.bytes(&self.limits.encode());
        out.bytes(self.secrets.as_deref().map_or(&[], |path| path.as_os_str().as_bytes()));
        codec::seal(&KIND, &out.finish())
    }

    /// Reads what [`Self::encode`] made.
    ///
    /// # Errors
    /// What is wrong with the bytes.
    pub fn decode(file: &[u8]) -> Result<Self, FormatError> {
        let mut fields = Decoder::new(codec::unseal(&KIND, file)?);
        let argv = (0..fields.u32()?).map(|_| field(&mut fields, "argv")).collect::<Result<Vec<_>, _>>()?;
        let environment = (0..fields.u32()?)
            .map(|_| Ok((field(&mut fields, "environment")?, field(&mut fields, "environment")?)))
            .collect::<Result<Vec<_>, FormatError>>()?;
        let workdir = PathBuf::from(field(&mut fields, "workdir")?);
        let user = match fields.u8()? {
            0 => None,
            1 => Some(User { uid: fields.u32()?, gid: fields.u32()? }),
            _ => return Err(FormatError::Value("user")),
        };
        let privileges = match fields.u8()? {
            0 => Privileges::NeverMore,
            1 => Privileges::MayGain,
            _ => return Err(FormatError::Value("privileges")),
        };
        let cgroup = Some(field(&mut fields, "cgroup")?).filter(|path| !path.is_empty()).map(PathBuf::from);
        let (wall_ms, silence_ms) = (optional_ms(&mut fields)?, optional_ms(&mut fields)?);
        let (grace_ms, leftover_ms, log_bytes_max) = (fields.u64()?, fields.u64()?, fields.u64()?);
        let isolation = match fields.u8()? {
            0 => None,
            tool => Some(Isolation::decode(tool, &mut fields)?),
        };
        let limits = Limits::decode(fields.bytes()?)?;
        let secrets = Some(field(&mut fields, "secrets")?).filter(|path| !path.is_empty()).map(PathBuf::from);
        fields.end()?;
        let order = Self {
            argv,
            environment,
            workdir,
            user,
            privileges,
            cgroup,
            wall_ms,
            silence_ms,
            grace_ms,
            leftover_ms,
            log_bytes_max,
            isolation,
            limits,
            secrets,
        };
        Ok(order)
    }

    /// A variable of the ordered environment; the last one of that name counts.
    #[must_use]
    pub fn variable(&self, name: &str) -> Option<&OsStr> {
        self.environment.iter().rev().find(|(key, _)| key == name).map(|(_, value)| value.as_os_str())
    }

    /// Whether a path lies in the workdir.
    pub(crate) fn owns_path(&self, path: &Path) -> bool {
        path.starts_with(&self.workdir)
    }
}

fn count(length: usize) -> u32 {
    u32::try_from(length).expect("an order has far fewer than 4 billion entries")
}

/// A string for the kernel: without NUL bytes.
fn field(fields: &mut Decoder<'_>, name: &'static str) -> Result<OsString, FormatError> {
    let bytes = fields.bytes()?;
    if bytes.contains(&0) { Err(FormatError::Value(name)) } else { Ok(OsString::from_vec(bytes.to_vec())) }
}

fn optional_ms(fields: &mut Decoder<'_>) -> Result<Option<u64>, FormatError> {
    match fields.u8()? {
        0 => Ok(None),
        1 => Ok(Some(fields.u64()?)),
        _ => Err(FormatError::Value("limit")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn order() -> Order {
        Order {
            argv: vec!["sh".into(), "-c".into(), OsString::from_vec(vec![0xff, b'\n'])],
            environment: vec![("A".into(), "1".into()), ("A".into(), "".into())],
            workdir: "/w".into(),
            user: Some(User { uid: 1, gid: 2 }),
            privileges: Privileges::MayGain,
            cgroup: Some("/c".into()),
            wall_ms: Some(0),
            silence_ms: None,
            grace_ms: 1,
            leftover_ms: 2,
            log_bytes_max: u64::MAX,
            isolation: None,
            limits: Limits { open_files: Some(7), ..Limits::default() },
            secrets: Some("/s".into()),
        }
    }

    #[test]
    fn reads_back_what_it_writes() {
        let full = order();
        assert_eq!(Order::decode(&full.encode()), Ok(full.clone()));
        let bare =
            Order { secrets: None, user: None, cgroup: None, wall_ms: None, silence_ms: Some(5), argv: vec![], ..full };
        assert_eq!(Order::decode(&bare.encode()), Ok(bare.clone()));
        assert_eq!(bare.variable("A"), Some(OsStr::new("")));
    }

    #[test]
    fn refuses_nul_bytes() {
        let mut wrong = order();
        wrong.argv[0] = "a\0b".into();
        assert_eq!(Order::decode(&wrong.encode()), Err(FormatError::Value("argv")));
    }
}
