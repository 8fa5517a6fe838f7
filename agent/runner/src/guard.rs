//! Between podman and the container runtime: a look at what a `RUN` step would see of the host, and a no where that is more
//! than its build's own.
//!
//! podman resolves what a Dockerfile mounts on the host. Versions that are in use follow links of an image there, and take `..`
//! in the name of a cache, and so mount any directory of the host, writable, into a step. Which words lead to that is
//! podman's affair and changes; a base image may bring them, where nobody reads them before. So this looks at what is
//! mounted in the end, and asks the kernel where it comes from. And it keeps steps from writing to their own cgroups.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::io::{self, Write as _};
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use helix_runner::step::{GUARD_VARIABLE, Network, Rules};
use serde_json::Value;

/// An id that podman gives to a container or a layer has so many characters, and nobody guesses it.
const ID_LENGTH: usize = 64;

/// File systems that the runtime makes anew for a container.
const MADE_ANEW: [&str; 7] = ["proc", "sysfs", "tmpfs", "devpts", "mqueue", "cgroup", "cgroup2"];

/// Options of an overlay that name directories.
const LAYERS: [&str; 3] = ["lowerdir", "upperdir", "workdir"];

/// Options of an overlay that name none.
const PLAIN: [&str; 19] = [
    "private",
    "rprivate",
    "slave",
    "rslave",
    "shared",
    "rshared",
    "ro",
    "rw",
    "nodev",
    "nosuid",
    "noexec",
    "noatime",
    "relatime",
    "volatile",
    "userxattr",
    "index=off",
    "index=on",
    "metacopy=off",
    "metacopy=on",
];

/// The rules, if this process is to be a guard.
pub(crate) fn asked() -> Option<OsString> {
    std::env::var_os(GUARD_VARIABLE)
}

/// Looks at the container that is to be made, if one is, and becomes the runtime.
pub(crate) fn serve(rules: &OsStr, arguments: Vec<OsString>) -> ExitCode {
    let told = Rules::decode(rules).ok_or_else(|| "the guard's rules cannot be read".to_owned());
    let allowed = told.and_then(|mut rules| {
        // The kernel's table knows no links.
        for store in [&mut rules.store, &mut rules.run_store] {
            *store = fs::canonicalize(&*store).unwrap_or_else(|_| store.clone());
        }
        if let Some(bundle) = bundle(&arguments) {
            let checked = check_bundle(&rules, &bundle);
            // Where the agent looks for it: what podman makes of our words is podman's affair.
            checked.inspect_err(|why| drop(note(&rules.refusal, why)))?;
        }
        Ok(rules.runtime)
    });
    match allowed {
        Ok(runtime) => {
            let error = Command::new(&runtime).args(arguments).env_remove(GUARD_VARIABLE).exec();
            eprintln!("cannot start the container runtime {}: {error}", runtime.display());
        }
        Err(why) => eprintln!("{why}"),
    }
    ExitCode::FAILURE
}

/// Writes a refusal down; the first counts, and whatever else is there is left alone.
fn note(file: &Path, why: &str) -> io::Result<()> {
    // Follows no link.
    fs::OpenOptions::new().write(true).create_new(true).open(file)?.write_all(why.as_bytes())
}

/// The directory of the container that is to be made; `None` when this is another request.
fn bundle(arguments: &[OsString]) -> Option<PathBuf> {
    let mut bundle = None;
    let mut makes = false;
    let mut words = arguments.iter();
    while let Some(word) = words.next() {
        if word == "--bundle" || word == "-b" {
            bundle = words.next().map(PathBuf::from);
        } else if let Some(path) = word.as_bytes().strip_prefix(b"--bundle=") {
            bundle = Some(OsStr::from_bytes(path).into());
        } else {
            makes |= ["create", "run", "restore"].iter().any(|verb| word == verb);
        }
    }
    // Without one, the runtime takes its working directory.
    bundle.or_else(|| makes.then(|| PathBuf::from(".")))
}

fn check_bundle(rules: &Rules, bundle: &Path) -> Result<(), String> {
    let unreadable = |error: io::Error| format!("the container's configuration cannot be read: {error}");
    let text = fs::read(bundle.join("config.json")).map_err(unreadable)?;
    let mut config: Value = serde_json::from_slice(&text).map_err(|error| unreadable(error.into()))?;
    let table = fs::read("/proc/self/mountinfo").map_err(unreadable)?;
    let host = Host { rules, mounts: table.split(|byte| *byte == b'\n').filter_map(Mount::parse).collect() };
    check(&config, rules, |path| host.check(path))?;
    protect_cgroups(&mut config);
    fs::write(bundle.join("config.json"), config.to_string())
        .map_err(|error| format!("the container's configuration cannot be written: {error}"))
}

/// A step that writes to its own cgroup could freeze itself, and then not even be killed.
fn protect_cgroups(config: &mut Value) {
    for mount in config["mounts"].as_array_mut().into_iter().flatten() {
        if ["cgroup", "cgroup2"].contains(&text(&mount["type"])) {
            let mut options: Vec<Value> =
                list(&mount["options"]).filter(|option| text(option) != "rw").cloned().collect();
            options.push("ro".into());
            mount["options"] = options.into();
        }
    }
}

/// Checks a container's configuration; `from_host` a path of the host that it would see.
fn check(config: &Value, rules: &Rules, from_host: impl Fn(&Path) -> Result<(), String>) -> Result<(), String> {
    for mount in list(&config["mounts"]) {
        let (kind, source) = (text(&mount["type"]), text(&mount["source"]));
        let options: Vec<&str> = list(&mount["options"]).map(text).collect();
        if [source, text(&mount["destination"])] == ["/sys", "/sys"] && options.contains(&"ro") {
            // Who is not root cannot make a new one, and gets the host's.
            continue;
        }
        if kind == "bind" || options.iter().any(|option| ["bind", "rbind"].contains(option)) {
            from_host(Path::new(source))?;
        } else if kind == "overlay" {
            check_overlay(&options, &from_host)?;
        } else if !MADE_ANEW.contains(&kind) {
            return Err(format!("the step would see a mount of type {kind:?} at {}", text(&mount["destination"])));
        }
    }
    // One with a path is somebody's already.
    let new = list(&config["linux"]["namespaces"]).filter(|namespace| text(&namespace["path"]).is_empty());
    let own: Vec<&str> = new.map(|namespace| text(&namespace["type"])).collect();
    let mut wanted = vec!["pid", "mount", "ipc"];
    wanted.extend((rules.network == Network::Own).then_some("network"));
    match wanted.iter().find(|kind| !own.contains(kind)) {
        Some(kind) => Err(format!("the step would share the host's {kind} namespace")),
        None => Ok(()),
    }
}

/// Checks the options of an overlay. The kernel takes them in one string, where commas part and backslashes hide.
fn check_overlay(options: &[&str], from_host: impl Fn(&Path) -> Result<(), String>) -> Result<(), String> {
    for option in options {
        match option.split_once('=') {
            Some((name, paths)) if LAYERS.contains(&name) && !paths.contains(['\\', ',']) => {
                paths.split(':').try_for_each(|path| from_host(Path::new(path)))?;
            }
            _ if PLAIN.contains(option) => {}
            _ => return Err(format!("the step would see an overlay with the option {option:?}")),
        }
    }
    Ok(())
}

fn list(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().into_iter().flatten()
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}

/// What is mounted where this process stands.
struct Host<'a> {
    rules: &'a Rules,
    mounts: Vec<Mount>,
}

/// A line of the kernel's table.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Mount {
    device: Vec<u8>,
    /// Which directory of its file system is mounted.
    root: PathBuf,
    point: PathBuf,
}

impl Mount {
    fn parse(line: &[u8]) -> Option<Self> {
        let mut fields = line.split(|byte| *byte == b' ').skip(2);
        let (device, root, point) = (fields.next()?, fields.next()?, fields.next()?);
        Some(Self { device: device.to_vec(), root: unescaped(root), point: unescaped(point) })
    }
}

/// A file by what the kernel calls it, however it is reached.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Origin {
    device: Vec<u8>,
    path: PathBuf,
}

impl Host<'_> {
    fn check(&self, source: &Path) -> Result<(), String> {
        let origin = self.origin(source).map_err(|error| {
            format!("where {} leads, which the step would see, cannot be told: {error}", source.display())
        })?;
        let own = self.rules.places.iter().filter_map(|place| self.origin(place).ok());
        let own = own.into_iter().any(|place| origin.device == place.device && origin.path.starts_with(&place.path));
        if own || self.is_of_scratch(&origin) || self.is_of_image(&origin) || self.is_of_container(&origin) {
            return Ok(());
        }
        Err(format!("the step would see {} of this host, which is not its build's", origin.path.display()))
    }

    /// Where a path leads: links are followed, and what is mounted on the way is seen through.
    fn origin(&self, path: &Path) -> io::Result<Origin> {
        let real = fs::canonicalize(path)?;
        // Of mounts upon each other the last is seen.
        let over = self.mounts.iter().filter(|mount| real.starts_with(&mount.point));
        let mount = over.max_by_key(|mount| mount.point.components().count()).ok_or(io::ErrorKind::NotFound)?;
        let below = real.strip_prefix(&mount.point).map_err(io::Error::other)?;
        let path = if below.as_os_str().is_empty() { mount.root.clone() } else { mount.root.join(below) };
        Ok(Origin { device: mount.device.clone(), path })
    }

    /// Whether it is one cache, or a file that podman makes for every step. All else beside them is podman's own.
    fn is_of_scratch(&self, origin: &Origin) -> bool {
        let scratch = self.origin(&self.rules.scratch).ok().filter(|scratch| scratch.device == origin.device);
        let below = scratch.and_then(|scratch| origin.path.strip_prefix(scratch.path).ok());
        let names: Vec<&[u8]> = below.into_iter().flatten().map(OsStr::as_bytes).collect();
        let begins = |prefix: &[u8]| names.first().is_some_and(|name| name.starts_with(prefix));
        match names[..] {
            [_, _, ..] if begins(b"buildah-cache") => true,
            [_, b"hostname" | b"hosts" | b"resolv.conf"] | [_, b"run", b".containerenv"] => begins(b"buildah"),
            _ => false,
        }
    }

    /// Whether it is in the file system that an image's layers make together: there every path is the image's.
    fn is_of_image(&self, origin: &Origin) -> bool {
        // DRIVER/ID/merged, which is never a directory of the host's own file system.
        let merged = |mount: &&Mount| {
            let below: Vec<&OsStr> = mount.point.strip_prefix(&self.rules.store).into_iter().flatten().collect();
            matches!(below[..], [_, id, last] if is_id(id) && last == "merged")
        };
        let store = self.origin(&self.rules.store).ok();
        let mut images = self.mounts.iter().filter(merged);
        images.any(|mount| mount.device == origin.device && store.as_ref().is_some_and(|s| s.device != mount.device))
    }

    /// Whether it is below a directory of the store that belongs to one container or, with a driver that copies, to one layer.
    fn is_of_container(&self, origin: &Origin) -> bool {
        let stores = [&self.rules.store, &self.rules.run_store].into_iter().filter_map(|store| self.origin(store).ok());
        stores.filter(|store| store.device == origin.device).any(|store| {
            let below: Vec<&OsStr> = origin.path.strip_prefix(&store.path).into_iter().flatten().collect();
            match below[..] {
                [kind, id, ..] if is_id(id) => kind.as_bytes().ends_with(b"-containers"),
                [driver, dir, id, ..] if is_id(id) => driver == "vfs" && dir == "dir",
                _ => false,
            }
        })
    }
}

fn is_id(name: &OsStr) -> bool {
    name.len() == ID_LENGTH && name.as_bytes().iter().all(u8::is_ascii_hexdigit)
}

/// A path as the kernel writes it: what would end the field stands there in octal.
fn unescaped(field: &[u8]) -> PathBuf {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&byte, tail)) = rest.split_first() {
        rest = tail;
        let octal = (byte == b'\\').then(|| tail.get(..3)).flatten();
        match octal.and_then(|digits| u8::from_str_radix(std::str::from_utf8(digits).ok()?, 8).ok()) {
            Some(decoded) => {
                bytes.push(decoded);
                rest = &tail[3..];
            }
            None => bytes.push(byte),
        }
    }
    OsString::from_vec(bytes).into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn rules(places: &[&Path], store: &Path) -> Rules {
        Rules {
            runtime: "runc".into(),
            store: store.to_owned(),
            run_store: store.join("run"),
            refusal: "/nowhere/refused".into(),
            scratch: store.join("../scratch"),
            network: Network::Own,
            places: places.iter().map(|&place| place.to_owned()).collect(),
        }
    }

    #[test]
    fn only_what_makes_a_container_is_looked_at() {
        let words = |line: &str| line.split(' ').map(OsString::from).collect::<Vec<_>>();
        for (line, expected) in [
            ("--root=/r create --bundle /b --pid-file /p id", Some("/b")),
            ("--root=/r create --bundle=/b id", Some("/b")),
            ("run -b /b id", Some("/b")),
            ("create id", Some(".")),
            ("--root=/r start id", None),
            ("--version", None),
        ] {
            assert_eq!(bundle(&words(line)).as_deref(), expected.map(Path::new), "{line}");
        }
    }

    #[test]
    fn a_step_has_namespaces_of_its_own_and_known_mounts() {
        let namespaces = json!([{"type": "pid"}, {"type": "mount"}, {"type": "ipc"}, {"type": "network"}]);
        let with = |mounts: Value, namespaces: Value| json!({"mounts": mounts, "linux": {"namespaces": namespaces}});
        let host = |path: &Path| if path == Path::new("/fine") { Ok(()) } else { Err(path.display().to_string()) };
        let mut rules = rules(&[], Path::new("/store"));
        let fine = json!([
            {"type": "proc", "source": "proc", "destination": "/proc"},
            {"type": "bind", "source": "/fine", "destination": "/x", "options": ["rbind"]},
            {"type": "bind", "source": "/sys", "destination": "/sys", "options": ["rbind", "ro"]},
            {"type": "overlay", "source": "overlay", "options": ["lowerdir=/fine:/fine", "upperdir=/fine", "private"]},
        ]);
        assert_eq!(check(&with(fine, namespaces.clone()), &rules, host), Ok(()));
        for mount in [
            json!({"type": "bind", "source": "/etc"}),
            json!({"type": "bind", "source": "/sys", "destination": "/sys", "options": ["rbind"]}),
            json!({"type": "bind", "source": "/sys", "destination": "/x", "options": ["rbind", "ro"]}),
            json!({"type": "none", "source": "/etc", "options": ["ro", "rbind"]}),
            json!({"type": "tmpfs", "source": "/etc", "options": ["bind"]}),
            json!({"type": "overlay", "options": ["lowerdir=/fine:/etc"]}),
            json!({"type": "overlay", "options": ["lowerdir=/fine,lowerdir=/etc"]}),
            json!({"type": "overlay", "options": [r"lowerdir=/fine\:/fine"]}),
            json!({"type": "overlay", "options": ["lowerdir+=/fine"]}),
            json!({"type": "overlay", "options": ["private,lowerdir=/etc"]}),
            json!({"type": "ext4", "source": "/dev/sda1"}),
        ] {
            assert!(check(&with(json!([mount]), namespaces.clone()), &rules, host).is_err(), "{mount}");
        }
        let shared = with(json!([]), json!([{"type": "pid"}, {"type": "mount"}, {"type": "ipc"}]));
        assert!(check(&shared, &rules, host).unwrap_err().contains("network"));
        for kind in ["pid", "mount", "ipc", "network"] {
            let mut joined = namespaces.clone();
            let entry = joined.as_array_mut().unwrap().iter_mut().find(|namespace| namespace["type"] == kind);
            entry.unwrap()["path"] = "/proc/1/ns/x".into();
            assert!(check(&with(json!([]), joined), &rules, host).unwrap_err().contains(kind));
        }
        rules.network = Network::OfHost;
        assert_eq!(check(&shared, &rules, host), Ok(()));
        assert!(check(&with(json!([]), json!([{"type": "network"}])), &rules, host).is_err());
    }

    #[test]
    fn the_first_refusal_counts_and_no_link_is_followed() {
        let base = tempfile::tempdir().unwrap();
        let (file, link) = (base.path().join("refused"), base.path().join("link"));
        note(&file, "first").unwrap();
        std::os::unix::fs::symlink(&file, &link).unwrap();
        assert!(note(&file, "second").is_err() && note(&link, "third").is_err());
        assert_eq!(fs::read_to_string(&file).unwrap(), "first");
    }

    #[test]
    fn a_step_cannot_write_to_its_cgroup() {
        let mut config = json!({"mounts": [
            {"type": "cgroup", "options": ["rprivate", "rw"]}, {"type": "cgroup2"}, {"type": "proc", "options": ["rw"]},
        ]});
        protect_cgroups(&mut config);
        assert_eq!(
            config,
            json!({"mounts": [
                {"type": "cgroup", "options": ["rprivate", "ro"]},
                {"type": "cgroup2", "options": ["ro"]},
                {"type": "proc", "options": ["rw"]},
            ]})
        );
    }

    #[test]
    fn where_a_path_leads_is_what_counts() {
        let id = "0123456789abcdef".repeat(4);
        let base = tempfile::tempdir().unwrap();
        let base = base.path().canonicalize().unwrap();
        let (own, store, scratch) = (base.join("own"), base.join("store"), base.join("scratch"));
        let container = store.join("overlay-containers").join(&id).join("userdata");
        let running = store.join("run/overlay-containers").join(&id).join("userdata");
        for path in [
            own.join("tmp"),
            scratch.join("buildah-cache/one/below"),
            scratch.join("runtime"),
            scratch.join("buildah123/run"),
            container.clone(),
            running.clone(),
            store.join("vfs/dir").join(&id),
            store.join("overlay"),
        ] {
            fs::create_dir_all(path).unwrap();
        }
        std::os::unix::fs::symlink("/etc", own.join("tmp/link")).unwrap();
        fs::create_dir_all(own.join("bound")).unwrap();
        let rules = rules(&[&own], &store);
        let mount = |device: &str, root: &str, point: &Path| Mount {
            device: device.as_bytes().to_vec(),
            root: root.into(),
            point: point.to_owned(),
        };
        let merged = store.join("overlay").join(&id).join("merged");
        let mut host = Host { rules: &rules, mounts: vec![mount("8:1", "/", Path::new("/"))] };
        host.mounts.push(mount("0:50", "/", &merged));
        // The store upon itself, as podman mounts it, says nothing of what is below.
        host.mounts.push(mount("8:1", &store.join("overlay").display().to_string(), &store.join("overlay")));
        let fine = |host: &Host<'_>, path: &Path| host.check(path).is_ok();
        assert!(
            fine(&host, &own.join("tmp"))
                && fine(&host, &container)
                && fine(&host, &running)
                && fine(&host, &store.join("vfs/dir").join(&id))
        );
        fs::write(scratch.join("buildah123/hostname"), "").unwrap();
        for (path, expected) in [
            ("buildah-cache/one", true),
            ("buildah-cache/one/below", true),
            ("buildah123/hostname", true),
            ("", false),
            ("buildah-cache", false),
            ("buildah-cache/one/../..", false),
            ("runtime", false),
            ("buildah123", false),
            ("buildah123/run", false),
        ] {
            assert_eq!(fine(&host, &scratch.join(path)), expected, "{path}");
        }
        for path in ["/etc".into(), own.join("tmp/link"), store.clone(), store.join("overlay"), store.join("vfs/dir")] {
            assert!(!fine(&host, &path), "{}", path.display());
        }
        assert!(host.check(&own.join("missing")).is_err());
        // What is mounted in the build's own directory is judged by what it is.
        for (device, root, expected) in [
            ("8:1", "/etc", false),
            ("0:50", "/anything", true),
            ("0:51", "/", false),
            ("8:1", &*own.join("tmp").display().to_string(), true),
        ] {
            host.mounts.push(mount(device, root, &own.join("bound")));
            assert_eq!(fine(&host, &own.join("bound")), expected, "{device} {root}");
            host.mounts.pop();
        }
        assert_eq!(unescaped(br"/a\040b\134c\"), Path::new("/a b\\c\\"));
    }
}
