//! Archives, honest and hostile.

use super::*;
use helix_model::Reason;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;

struct Archive(tar::Builder<Vec<u8>>);

impl Archive {
    fn new() -> Self {
        Self(tar::Builder::new(Vec::new()))
    }

    /// Puts an entry with its name as it is, which the builder itself would refuse.
    fn put(mut self, name: &str, kind: EntryType, link: &str, data: &str) -> Self {
        let mut header = tar::Header::new_gnu();
        header.as_old_mut().name[..name.len()].copy_from_slice(name.as_bytes());
        header.as_old_mut().linkname[..link.len()].copy_from_slice(link.as_bytes());
        header.set_entry_type(kind);
        header.set_mode(0o4777);
        header.set_size(data.len() as u64);
        header.set_cksum();
        self.0.append(&header, data.as_bytes()).unwrap();
        self
    }

    fn file(self, name: &str, data: &str) -> Self {
        self.put(name, EntryType::Regular, "", data)
    }

    fn bytes(self) -> Vec<u8> {
        zstd::encode_all(self.0.into_inner().unwrap().as_slice(), 1).unwrap()
    }
}

fn sha256(bytes: &[u8]) -> Digest {
    Sha256::digest(bytes)
}

/// Unpacks beside a file that must not change.
fn try_unpack(archive: Archive, limits: Limits) -> (tempfile::TempDir, Result<(), SourceError>) {
    let base = tempfile::tempdir().unwrap();
    fs::create_dir(base.path().join("work")).unwrap();
    fs::write(base.path().join("outside"), "untouched").unwrap();
    let bytes = archive.bytes();
    let result = unpack(bytes.as_slice(), &sha256(&bytes), &base.path().join("work"), limits);
    assert_eq!(fs::read_to_string(base.path().join("outside")).unwrap(), "untouched");
    assert_eq!(fs::read_dir(base.path()).unwrap().count(), 2);
    (base, result)
}

#[test]
fn an_honest_archive_unpacks() {
    let archive = Archive::new()
        .put("./", EntryType::Directory, "", "")
        .put("dir", EntryType::Directory, "", "")
        .file("dir/a", "one")
        .file("deep/er/b", "two")
        .put("link", EntryType::Symlink, "dir/a", "")
        .put("hard", EntryType::Link, "dir/a", "")
        .file("dir/a2", "x")
        .file("dir/a2", "replaced");
    let (base, result) = try_unpack(archive, Limits::default());
    result.unwrap();
    let work = base.path().join("work");
    for (path, text) in
        [("dir/a", "one"), ("deep/er/b", "two"), ("link", "one"), ("hard", "one"), ("dir/a2", "replaced")]
    {
        assert_eq!(fs::read_to_string(work.join(path)).unwrap(), text, "{path}");
    }
    assert_eq!(fs::metadata(work.join("dir/a")).unwrap().permissions().mode() & 0o7000, 0);
}

#[test]
fn nothing_leaves_the_directory() {
    let regular = EntryType::Regular;
    let table = [
        Archive::new().file("../outside", "x"),
        Archive::new().file("a/../../outside", "x"),
        Archive::new().file("/tmp/helix-archive-test", "x"),
        Archive::new().put("up", EntryType::Symlink, "..", "").file("up/outside", "x"),
        Archive::new()
            .put("up", EntryType::Symlink, "..", "")
            .put("up", EntryType::Directory, "", "")
            .file("up/outside", "x"),
        Archive::new().put("abs", EntryType::Symlink, "/", "").file("abs/tmp/helix-archive-test", "x"),
        Archive::new().put("steal", EntryType::Link, "../outside", ""),
        Archive::new().put("up", EntryType::Symlink, "..", "").put("steal", EntryType::Link, "up/outside", ""),
        Archive::new().put("steal", EntryType::Link, "/etc/passwd", ""),
        Archive::new().file("f", "x").file("f/below", "x"),
        Archive::new().put("fifo", EntryType::Fifo, "", ""),
        Archive::new().put("dev", EntryType::Block, "", ""),
        Archive::new().put("dev", EntryType::Char, "", ""),
        Archive::new().put("", regular, "", "x"),
        Archive::new().put("steal", EntryType::Link, "", ""),
    ];
    for (number, archive) in table.into_iter().enumerate() {
        let (_base, result) = try_unpack(archive, Limits::default());
        let error = result.expect_err(&format!("archive {number}"));
        assert_eq!(error.reason, Reason::Source, "archive {number}: {error}");
    }
    assert!(!Path::new("/tmp/helix-archive-test").exists());
}

#[test]
fn a_file_in_the_place_of_a_link_replaces_the_link_itself() {
    let archive = Archive::new().put("link", EntryType::Symlink, "../outside", "").file("link", "mine");
    let (base, result) = try_unpack(archive, Limits::default());
    result.unwrap();
    assert_eq!(fs::read_to_string(base.path().join("work/link")).unwrap(), "mine");
}

#[test]
fn bounds_hold() {
    let limits = Limits { bytes_max: 10, entries_max: 2 };
    let (_base, result) = try_unpack(Archive::new().file("a", "12345").file("b", "123456"), limits);
    assert!(result.unwrap_err().message.contains("more than 10 bytes"));
    let (_base, result) = try_unpack(Archive::new().file("a", "").file("b", "").file("c", ""), limits);
    assert!(result.unwrap_err().message.contains("more than 2 entries"));
}

#[test]
fn damage_is_noticed() {
    let dir = tempfile::tempdir().unwrap();
    let bytes = Archive::new().file("a", "text").bytes();
    let wrong = unpack(bytes.as_slice(), &Digest([0; 32]), dir.path(), Limits::default()).unwrap_err();
    assert!(wrong.message.contains("has sha256"), "{wrong}");
    let rubbish = b"this is no archive";
    let error = unpack(rubbish.as_slice(), &sha256(rubbish), dir.path(), Limits::default()).unwrap_err();
    assert!(error.message.contains("no zstd tar"), "{error}");
    let cut = &bytes[..bytes.len() / 2];
    assert!(unpack(cut, &sha256(cut), dir.path(), Limits::default()).is_err());
}
