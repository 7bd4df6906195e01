//! Python packages that tests use for what NVIDIA publishes only there: runtimes and headers. A package is fetched
//! once and kept in the target folder.
#![expect(clippy::expect_used, reason = "what fails here fails the test")]

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use crate::{program::profile_dir, skip};

/// How long the newest version of a package stays the newest without asking again.
const FRESH: Duration = Duration::from_hours(24);

/// The folder with the files of a package (`name`, for its newest version, or `name==version`). `None`, after saying
/// so, where it cannot be fetched.
///
/// # Panics
/// Where nothing may be skipped, or the target folder cannot be written.
pub fn fetched(requirement: &str) -> Option<PathBuf> {
    fetch(requirement, &["--no-deps"])
}

/// The same with the packages that it needs: a folder for `PYTHONPATH`.
///
/// # Panics
/// As [`fetched`].
pub fn fetched_to_run(requirement: &str) -> Option<PathBuf> {
    fetch(requirement, &[])
}

fn fetch(requirement: &str, how: &[&str]) -> Option<PathBuf> {
    let cache = profile_dir().parent().expect("a target folder").join("pypi");
    fs::create_dir_all(&cache).expect("a folder for packages");
    let lock = File::create(cache.join("lock")).expect("a lock for the packages");
    lock.lock().expect("the lock on the packages");
    let place = cache.join(requirement);
    let age = fs::metadata(&place).and_then(|kept| kept.modified()).ok().and_then(|time| time.elapsed().ok());
    if age.is_some_and(|age| requirement.contains("==") || age < FRESH) {
        return Some(place);
    }
    let part = cache.join(format!("{requirement}.part"));
    match install(requirement, how, &part) {
        Ok(()) => {
            fs::remove_dir_all(&place).ok();
            fs::rename(&part, &place).expect("a place for the package");
        }
        Err(why) if age.is_none() => {
            skip(&format!("a test with the package {requirement}"), &why);
            return None;
        }
        // An older copy is better than none.
        Err(_) => {}
    }
    Some(place)
}

fn install(requirement: &str, how: &[&str], into: &Path) -> Result<(), String> {
    fs::remove_dir_all(into).ok();
    let output = Command::new("python3")
        .args(["-m", "pip", "install", "--quiet", "--only-binary=:all:"])
        .args(how)
        .arg("--target")
        .arg(into)
        .arg(requirement)
        .output()
        .map_err(|error| format!("pip cannot be run: {error}"))?;
    if output.status.success() {
        return Ok(());
    }
    Err(format!("pip: {}", String::from_utf8_lossy(&output.stderr).trim()))
}

/// The first file below `folder` whose name begins like this.
///
/// # Panics
/// If there is none.
pub fn find(folder: &Path, beginning: &str) -> PathBuf {
    let mut folders = vec![folder.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).expect("a readable package").flatten() {
            let path = entry.path();
            if path.is_dir() {
                folders.push(path);
            } else if entry.file_name().to_string_lossy().starts_with(beginning) {
                return path;
            }
        }
    }
    panic!("{} holds no {beginning}", folder.display());
}
