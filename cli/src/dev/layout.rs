//! What a development cluster consists of on disk: certificates, configurations, data directories, the context.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use helix_common::identity::Role;
use helix_common::pki::{Authority, CA_FILE, VALID_FOR_DEFAULT};
use helix_common::ports::free;
use serde::{Deserialize, Serialize};
use toml::{Table, Value};

use crate::context::Context;
use crate::dev::{DevArguments, Setting};
use crate::failure::Failure;

const CLUSTER: &str = "dev";

/// The ports that the cluster was made with; members know each other by them, so they outlive restarts.
#[derive(Serialize, Deserialize, Clone, PartialEq)]
struct Made {
    coordinators: Vec<Ports>,
}

/// A coordinator's ports on loopback.
#[derive(Serialize, Deserialize, Clone, Copy, PartialEq)]
pub(super) struct Ports {
    pub(super) grpc: u16,
    pub(super) peer: u16,
    pub(super) http: u16,
}

/// One process to run.
#[derive(Clone)]
pub(super) struct Member {
    pub(super) role: &'static str,
    pub(super) id: String,
    pub(super) argv: Vec<String>,
    pub(super) ports: Option<Ports>,
    pub(super) data_dir: PathBuf,
    pub(super) log: PathBuf,
}

/// A prepared cluster.
pub(super) struct Layout {
    root: PathBuf,
    made: Made,
    pub(super) members: Vec<Member>,
    pub(super) agents: usize,
}

impl Layout {
    /// Makes what is missing; what is there stays as it is.
    pub(super) fn prepare(root: &Path, arguments: &DevArguments) -> Result<Self, Failure> {
        for directory in ["pki", "config", "logs"] {
            let path = root.join(directory);
            fs::create_dir_all(&path).map_err(|error| cannot("create", &path, &error))?;
        }
        let made = made(root, arguments)?;
        let authority = authority(&root.join("pki"))?;
        let mut members = Vec::new();
        for (index, ports) in made.coordinators.iter().enumerate() {
            members.push(coordinator(root, &authority, &made, (index + 1, *ports), arguments)?);
        }
        for number in 1..=arguments.agents {
            members.push(agent(root, &authority, &made, number, arguments)?);
        }
        let layout = Self { root: root.to_owned(), made, members, agents: usize::from(arguments.agents) };
        layout.write_context(&authority)?;
        Ok(layout)
    }

    pub(super) fn endpoints(&self) -> Vec<String> {
        endpoints(&self.made)
    }

    pub(super) fn context_path(&self) -> PathBuf {
        self.root.join("context.toml")
    }

    pub(super) fn cluster_path(&self) -> PathBuf {
        self.root.join("cluster.json")
    }

    pub(super) fn http_ports(&self) -> impl Iterator<Item = u16> + '_ {
        self.made.coordinators.iter().map(|ports| ports.http)
    }

    fn write_context(&self, authority: &Authority) -> Result<(), Failure> {
        let pki = self.root.join("pki");
        let (cert, key) = identity(&pki, authority, Role::Operator, "dev", &[])?;
        let context =
            Context { cluster: CLUSTER.to_owned(), endpoints: self.endpoints(), ca: pki.join(CA_FILE), cert, key };
        let text = toml::to_string(&context).map_err(|error| Failure::plain(error.to_string()))?;
        write(&self.context_path(), &text)
    }
}

fn cannot(what: &str, path: &Path, error: &std::io::Error) -> Failure {
    Failure::plain(format!("cannot {what} {}: {error}", path.display()))
}

fn write(path: &Path, text: &str) -> Result<(), Failure> {
    fs::write(path, text).map_err(|error| cannot("write", path, &error))
}

fn endpoints(made: &Made) -> Vec<String> {
    made.coordinators.iter().map(|ports| format!("https://127.0.0.1:{}", ports.grpc)).collect()
}

/// The ports of an earlier run, or new ones.
fn made(root: &Path, arguments: &DevArguments) -> Result<Made, Failure> {
    let path = root.join("dev.json");
    let wanted = usize::from(arguments.coordinators);
    if let Ok(text) = fs::read_to_string(&path) {
        let made: Made =
            serde_json::from_str(&text).map_err(|error| Failure::plain(format!("{}: {error}", path.display())))?;
        if made.coordinators.len() != wanted {
            return Err(Failure::usage(format!(
                "{} holds a cluster of {} coordinators: say --coordinators {} or name another --data-dir",
                root.display(),
                made.coordinators.len(),
                made.coordinators.len()
            )));
        }
        return Ok(made);
    }
    let made = Made { coordinators: ports(wanted, arguments.base_port)? };
    let text = serde_json::to_string(&made).map_err(|error| Failure::plain(error.to_string()))?;
    write(&path, &text)?;
    Ok(made)
}

fn ports(coordinators: usize, base: Option<u16>) -> Result<Vec<Ports>, Failure> {
    let count = coordinators * 3;
    let unfit = |base: u16| Failure::usage(format!("--base-port {base}: {count} ports do not fit above it"));
    let base = match (base, u16::try_from(count)) {
        (Some(base), _) => base,
        (None, Ok(count)) => free(count).map_err(|error| Failure::plain(error.to_string()))?,
        (None, Err(_)) => return Err(Failure::usage(format!("{coordinators} coordinators need too many ports"))),
    };
    let numbers: Vec<u16> = (0..count)
        .map(|offset| u16::try_from(offset).ok().and_then(|offset| base.checked_add(offset)))
        .collect::<Option<_>>()
        .ok_or_else(|| unfit(base))?;
    Ok(numbers.chunks_exact(3).map(|three| Ports { grpc: three[0], peer: three[1], http: three[2] }).collect())
}

fn authority(pki: &Path) -> Result<Authority, Failure> {
    if pki.join(CA_FILE).exists() {
        return Ok(Authority::load(pki)?);
    }
    let authority = Authority::create(CLUSTER)?;
    authority.save(pki)?;
    Ok(authority)
}

/// An identity's files, issued once.
fn identity(
    pki: &Path,
    authority: &Authority,
    role: Role,
    name: &str,
    hosts: &[String],
) -> Result<(PathBuf, PathBuf), Failure> {
    let stem = format!("{}-{name}", role.as_str());
    let (cert, key) = (pki.join(format!("{stem}.pem")), pki.join(format!("{stem}-key.pem")));
    if cert.exists() && key.exists() {
        return Ok((cert, key));
    }
    Ok(authority.issue(role, name, hosts, VALID_FOR_DEFAULT)?.save(pki, &stem)?)
}

fn tls(root: &Path, cert: &Path, key: &Path) -> Value {
    let mut table = Table::new();
    table.insert("ca".to_owned(), text(&root.join("pki").join(CA_FILE)));
    table.insert("cert".to_owned(), text(cert));
    table.insert("key".to_owned(), text(key));
    Value::Table(table)
}

fn text(path: &Path) -> Value {
    Value::String(path.display().to_string())
}

fn coordinator(
    root: &Path,
    authority: &Authority,
    made: &Made,
    (id, ports): (usize, Ports),
    arguments: &DevArguments,
) -> Result<Member, Failure> {
    let program = program("helix-coordinator")?;
    let data_dir = root.join(format!("coordinator-{id}"));
    let hosts = ["localhost", "127.0.0.1", "::1"].map(str::to_owned);
    let (cert, key) = identity(&root.join("pki"), authority, Role::Coordinator, &id.to_string(), &hosts)?;
    let marker = root.join("config").join(format!("coordinator-{id}.toml"));
    // A directory that was emptied later is left so: only an operator may decide that a node begins anew.
    if !marker.exists() {
        let members: Vec<String> =
            (1..).zip(&made.coordinators).map(|(id, ports)| format!("{id}=127.0.0.1:{}", ports.peer)).collect();
        init(&program, id, &members.join(","), &data_dir)?;
    }
    let mut config = Table::new();
    config.insert("data_dir".to_owned(), text(&data_dir));
    let mut listen = Table::new();
    for (name, port) in [("grpc", ports.grpc), ("peer", ports.peer), ("http", ports.http)] {
        listen.insert(name.to_owned(), Value::String(format!("127.0.0.1:{port}")));
    }
    config.insert("listen".to_owned(), Value::Table(listen));
    config.insert("advertise".to_owned(), Value::String(format!("https://127.0.0.1:{}", ports.grpc)));
    config.insert("tls".to_owned(), tls(root, &cert, &key));
    set_all(&mut config, "coordinator", &arguments.settings)?;
    write(&marker, &config.to_string())?;
    Ok(Member {
        role: "coordinator",
        id: id.to_string(),
        argv: vec![
            program.display().to_string(),
            "run".to_owned(),
            "--config".to_owned(),
            marker.display().to_string(),
        ],
        ports: Some(ports),
        data_dir,
        log: root.join("logs").join(format!("coordinator-{id}.log")),
    })
}

fn init(program: &Path, id: usize, members: &str, data_dir: &Path) -> Result<(), Failure> {
    let mut command = Command::new(program);
    command
        .args(["init", "--cluster", CLUSTER, "--id", &id.to_string(), "--members", members, "--data-dir"])
        .arg(data_dir);
    let done = command.output().map_err(|error| cannot("run", program, &error))?;
    if done.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&done.stderr);
    Err(Failure::plain(format!("helix-coordinator init for node {id} failed: {}", said.trim())))
}

fn agent(
    root: &Path,
    authority: &Authority,
    made: &Made,
    number: u16,
    arguments: &DevArguments,
) -> Result<Member, Failure> {
    let program = program("helix-agent")?;
    let name = format!("agent-{number}");
    let data_dir = root.join(&name);
    let (cert, key) = identity(&root.join("pki"), authority, Role::Agent, &name, &[])?;
    let mut config = Table::new();
    config.insert("name".to_owned(), Value::String(name.clone()));
    config.insert("coordinators".to_owned(), Value::Array(endpoints(made).into_iter().map(Value::String).collect()));
    config.insert("capacity".to_owned(), Value::Integer(i64::from(arguments.capacity)));
    config.insert("data_dir".to_owned(), text(&data_dir));
    config.insert("isolation".to_owned(), Value::String(arguments.isolation.clone()));
    config.insert("tls".to_owned(), tls(root, &cert, &key));
    set(&mut config, "agent", "exec.allow_job_commands", "true")?;
    set(&mut config, "agent", "source.allow_file_urls", "true")?;
    set_all(&mut config, "agent", &arguments.settings)?;
    let path = root.join("config").join(format!("{name}.toml"));
    write(&path, &config.to_string())?;
    Ok(Member {
        role: "agent",
        id: name.clone(),
        argv: vec![program.display().to_string(), "run".to_owned(), "--config".to_owned(), path.display().to_string()],
        ports: None,
        data_dir,
        log: root.join("logs").join(format!("{name}.log")),
    })
}

fn set_all(config: &mut Table, role: &str, settings: &[Setting]) -> Result<(), Failure> {
    let mut own = settings.iter().filter(|setting| setting.role == role);
    own.try_for_each(|setting| set(config, role, &setting.key, &setting.value))
}

/// Sets a dotted key of a role's configuration; the value is TOML if it reads as that, else text.
fn set(config: &mut Table, role: &str, key: &str, value: &str) -> Result<(), Failure> {
    let value = format!("v = {value}")
        .parse::<Table>()
        .ok()
        .and_then(|mut table| table.remove("v"))
        .unwrap_or_else(|| Value::String(value.to_owned()));
    let mut parts: Vec<&str> = key.split('.').collect();
    let last = parts.pop().unwrap_or_default();
    let mut table = config;
    for part in parts {
        let inner = table.entry(part).or_insert_with(|| Value::Table(Table::new()));
        table = inner.as_table_mut().ok_or_else(|| Failure::usage(format!("{role}.{key}: {part} is not a table")))?;
    }
    table.insert(last.to_owned(), value);
    Ok(())
}

/// A program of ours: beside this one, else on the PATH.
pub(crate) fn program(name: &str) -> Result<PathBuf, Failure> {
    let beside = std::env::current_exe().ok().and_then(|own| own.parent().map(|directory| directory.join(name)));
    let on_path =
        std::env::var_os("PATH").into_iter().flat_map(|paths| std::env::split_paths(&paths).collect::<Vec<_>>());
    beside
        .into_iter()
        .chain(on_path.map(|directory| directory.join(name)))
        .find(|candidate| candidate.is_file())
        .ok_or_else(|| Failure::plain(format!("{name} is neither beside helix nor on the PATH: install or build it")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dev::setting;

    #[test]
    fn settings_are_toml_or_text_at_dotted_keys() {
        let mut config = Table::new();
        set(&mut config, "agent", "capacity", "3").unwrap();
        set(&mut config, "agent", "exec.shell", "bash").unwrap();
        set(&mut config, "agent", "exec.bind", "[\"/a:/b:ro\"]").unwrap();
        assert_eq!(config["capacity"].as_integer(), Some(3));
        assert_eq!(config["exec"]["shell"].as_str(), Some("bash"));
        assert_eq!(config["exec"]["bind"].as_array().map(Vec::len), Some(1));
    }

    #[test]
    fn a_key_below_one_that_is_no_table_is_refused_in_the_words_it_was_given_in() {
        for (role, setting_of_it) in [("coordinator", "coordinator.data_dir.x=1"), ("agent", "agent.data_dir.x.y=1")] {
            let mut config = Table::new();
            config.insert("data_dir".to_owned(), Value::String("/data".to_owned()));
            let refused = set_all(&mut config, role, &[setting(setting_of_it).unwrap()]).unwrap_err();
            let key = setting_of_it.trim_end_matches("=1");
            assert_eq!(refused.message, format!("{key}: data_dir is not a table"));
            assert_eq!(refused.code, crate::exit::Code::USAGE);
        }
    }

    #[test]
    fn a_setting_is_for_one_role() {
        let settings =
            ["coordinator.raft.snapshot_log_bytes=16MiB", "agent.name=x=y"].map(|text| setting(text).unwrap());
        let (mut coordinator, mut agent) = (Table::new(), Table::new());
        set_all(&mut coordinator, "coordinator", &settings).unwrap();
        set_all(&mut agent, "agent", &settings).unwrap();
        assert_eq!(coordinator.to_string(), "[raft]\nsnapshot_log_bytes = \"16MiB\"\n");
        assert_eq!(agent.to_string(), "name = \"x=y\"\n");
        for wrong in ["worker.x=1", "x=1", "agent.=1", "agent.x", "agents.x=1", ""] {
            assert!(setting(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn ports_are_three_for_each_coordinator_and_distinct() {
        let three = ports(3, Some(7000)).unwrap();
        assert_eq!((three[2].grpc, three[2].peer, three[2].http), (7006, 7007, 7008));
        let free = ports(3, None).unwrap();
        let all: std::collections::BTreeSet<u16> = free.iter().flat_map(|p| [p.grpc, p.peer, p.http]).collect();
        assert_eq!(all.len(), 9);
        assert!(ports(9, Some(65_530)).is_err());
    }
}
