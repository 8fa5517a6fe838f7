//! Unpacking a directory that a build made: a tar that nobody vouches for, into a directory that is only ours.
//!
//! Regular files, directories and links within the tree, and nothing else. Invariant: nothing is written outside of the
//! directory, and no link in it leads out.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, OpenOptionsExt, PermissionsExt, symlink};
use std::path::{Component, Path, PathBuf};

use tar::{Archive, EntryType};

const BLOCK_BYTES: usize = 512;

/// Whether a file is a tar, by its first block: a header's, or the end of an empty one.
pub(crate) fn is_tar(file: &File) -> bool {
    let mut block = [0; BLOCK_BYTES];
    if file.read_exact_at(&mut block, 0).is_err() {
        return false;
    }
    let empty = file.metadata().is_ok_and(|file| file.len() == 2 * BLOCK_BYTES as u64) && block == [0; BLOCK_BYTES];
    let header = tar::Header::from_byte_slice(&block);
    let sum = block.iter().enumerate().map(|(at, byte)| if (148..156).contains(&at) { 32 } else { u32::from(*byte) });
    empty || (block[257..].starts_with(b"ustar") && header.cksum().is_ok_and(|told| told == sum.sum::<u32>()))
}

/// Unpacks a tar into an empty directory that nobody else writes to.
///
/// # Errors
/// Those of the file system; `InvalidData` where the tar is none, or holds what would lead out of the directory.
pub(crate) fn unpack(mut file: File, into: &Path) -> io::Result<()> {
    if !is_tar(&file) {
        return Err(invalid("the artifact is no tar of a directory: leave out --extract".to_owned()));
    }
    file.seek(SeekFrom::Start(0))?;
    let mut archive = Archive::new(io::BufReader::new(file));
    // Last, so that no entry is written through one.
    let mut links: Vec<(PathBuf, PathBuf)> = Vec::new();
    for entry in archive.entries()? {
        let mut entry = entry?;
        let path = inner_path(&entry.path()?)?;
        let at = into.join(&path);
        let mode = entry.header().mode().unwrap_or(0o644) & 0o777;
        match entry.header().entry_type() {
            EntryType::Directory => fs::create_dir_all(&at)?,
            EntryType::Regular | EntryType::Continuous => {
                make_parent(&at)?;
                let file = OpenOptions::new().write(true).create_new(true).mode(mode).open(&at);
                let mut file = file.map_err(|error| named(&path, &error))?;
                let size = entry.size();
                if io::copy(&mut entry.by_ref().take(size), &mut file)? != size {
                    return Err(invalid(format!("{} is cut short", path.display())));
                }
                file.set_permissions(fs::Permissions::from_mode(mode & !crate::verb::artifacts::umask()))?;
            }
            EntryType::Symlink => {
                let target =
                    entry.link_name()?.ok_or_else(|| invalid(format!("{}: a link to nothing", path.display())))?;
                if !stays_inside(&path, &target) {
                    let (path, target) = (path.display(), target.display());
                    let advice = "leave out --extract to get the tar as it is";
                    return Err(invalid(format!("the link {path} leads outside, to {target}: {advice}")));
                }
                links.push((path, target.into_owned()));
            }
            other => return Err(invalid(format!("{} is of a kind that is not unpacked ({other:?})", path.display()))),
        }
    }
    for (path, target) in links {
        let at = into.join(&path);
        // Where a link lies decides what its target means.
        let mut above = path.ancestors().skip(1);
        if above.any(|above| fs::symlink_metadata(into.join(above)).is_ok_and(|there| there.is_symlink())) {
            return Err(invalid(format!("{} lies behind a link", path.display())));
        }
        make_parent(&at)?;
        symlink(target, at).map_err(|error| named(&path, &error))?;
    }
    Ok(())
}

fn make_parent(at: &Path) -> io::Result<()> {
    at.parent().map_or(Ok(()), fs::create_dir_all)
}

/// A path that can only lie in the directory.
fn inner_path(path: &Path) -> io::Result<PathBuf> {
    let mut inner = PathBuf::new();
    for component in path.components() {
        match component {
            Component::Normal(name) => inner.push(name),
            Component::CurDir => {}
            Component::ParentDir | Component::RootDir | Component::Prefix(_) => {
                return Err(invalid(format!("the path {} leads outside", path.display())));
            }
        }
    }
    Ok(inner)
}

/// Whether a link's target, read where the link lies, stays in the directory. No link lies behind another one, so that
/// counting steps is enough as long as no step up follows one down.
fn stays_inside(link: &Path, target: &Path) -> bool {
    let mut depth = link.components().count().saturating_sub(1);
    let mut went_down = false;
    for component in target.components() {
        match component {
            Component::Normal(_) => went_down = true,
            Component::CurDir => {}
            Component::ParentDir if depth > 0 && !went_down => depth -= 1,
            Component::ParentDir | Component::RootDir | Component::Prefix(_) => return false,
        }
    }
    true
}

fn named(path: &Path, error: &io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{}: {error}", path.display()))
}

fn invalid(why: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, why)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    /// A tar of entries, written without the checks of the writer's library.
    fn tar_of(entries: &[(&str, EntryType, &str)]) -> File {
        let mut builder = tar::Builder::new(tempfile::tempfile().unwrap());
        for (path, kind, what) in entries {
            let mut header = tar::Header::new_gnu();
            let name = &mut header.as_old_mut().name;
            name[..path.len()].copy_from_slice(path.as_bytes());
            header.set_entry_type(*kind);
            header.set_mode(0o4755);
            let data = if *kind == EntryType::Regular { what.as_bytes() } else { b"" };
            if matches!(kind, EntryType::Symlink | EntryType::Link) {
                header.as_old_mut().linkname[..what.len()].copy_from_slice(what.as_bytes());
            }
            header.set_size(data.len() as u64);
            header.set_cksum();
            builder.append(&header, data).unwrap();
        }
        builder.into_inner().unwrap()
    }

    fn unpacked(entries: &[(&str, EntryType, &str)]) -> (tempfile::TempDir, io::Result<()>) {
        let base = tempfile::tempdir().unwrap();
        let into = base.path().join("into");
        fs::create_dir(&into).unwrap();
        let done = unpack(tar_of(entries), &into);
        (base, done)
    }

    #[test]
    fn a_tree_comes_out_as_it_was() {
        let (base, done) = unpacked(&[
            ("bin/", EntryType::Directory, ""),
            ("bin/tool", EntryType::Regular, "#!"),
            ("./deep/er/file", EntryType::Regular, "x"),
            ("tool", EntryType::Symlink, "bin/tool"),
            ("deep/er/up", EntryType::Symlink, "../../bin"),
        ]);
        done.unwrap();
        let into = base.path().join("into");
        assert_eq!(fs::read_to_string(into.join("tool")).unwrap(), "#!");
        assert_eq!(fs::read_to_string(into.join("deep/er/up/tool")).unwrap(), "#!");
        let mode = fs::metadata(into.join("bin/tool")).unwrap().permissions().mode();
        assert_eq!(mode & 0o7111, 0o0111 & !crate::verb::artifacts::umask(), "executable, not set-uid");
    }

    #[test]
    fn nothing_gets_out() {
        let hostile: [&[(&str, EntryType, &str)]; 10] = [
            &[("p", EntryType::Symlink, "."), ("p/l", EntryType::Symlink, "..")],
            &[("../escaped", EntryType::Regular, "x")],
            &[("/escaped", EntryType::Regular, "x")],
            &[("a/../../escaped", EntryType::Regular, "x")],
            &[("link", EntryType::Symlink, ".."), ("link/escaped", EntryType::Regular, "x")],
            &[("link", EntryType::Symlink, "/"), ("x", EntryType::Regular, "x")],
            &[("a/l", EntryType::Symlink, "b/../../.."), ("x", EntryType::Regular, "x")],
            &[("twin", EntryType::Link, "../secret")],
            &[("device", EntryType::Char, "")],
            &[("same", EntryType::Regular, "x"), ("same", EntryType::Regular, "y")],
        ];
        for entries in hostile {
            let (base, done) = unpacked(entries);
            assert!(done.is_err(), "{entries:?}");
            let outside: Vec<_> = fs::read_dir(base.path()).unwrap().collect();
            assert_eq!(outside.len(), 1, "{entries:?}");
        }
        // A link that stays is written last: what lies behind its name is a directory of the tar's own, or nothing.
        let (_base, done) = unpacked(&[
            ("l", EntryType::Symlink, "d"),
            ("l/file", EntryType::Regular, "x"),
            ("d/", EntryType::Directory, ""),
        ]);
        assert!(done.is_err());
    }

    #[test]
    fn tars_are_told_from_other_files() {
        assert!(is_tar(&tar_of(&[("a", EntryType::Regular, "x")])) && is_tar(&tar_of(&[])));
        let mut other = tempfile::tempfile().unwrap();
        other.write_all(&[b'u'; 2000]).unwrap();
        assert!(!is_tar(&other) && !is_tar(&tempfile::tempfile().unwrap()));
    }
}
