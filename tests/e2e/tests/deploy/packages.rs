//! The packages: what is in them, and whether it runs from where it is unpacked.

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
    process::{Command, Output},
    sync::OnceLock,
};

use nvshare_tests::{Agent, Binaries, Simulator, SimulatorOptions, Workload, WorkloadOptions, skip};
use tempfile::TempDir;

use crate::root;

const VERSION: &str = env!("CARGO_PKG_VERSION");

fn run(command: &mut Command) -> Output {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    output
}

/// What `cargo xtask dist` makes of the programs beside this test.
fn pack(out: &Path) {
    let built = Binaries::of_this_test().unwrap();
    run(Command::new("sh")
        .current_dir(root())
        // A careful user's files are for nobody else; a package's are.
        .args(["-c", "umask 077; exec \"$@\"", "sh", env!("CARGO")])
        .args(["run", "--quiet", "--package=xtask", "--", "dist", "--built"])
        .arg(built.dir())
        .arg("--out")
        .arg(out));
}

/// The packages; `None`, after saying so, where there is no dpkg-deb.
fn packages() -> Option<&'static Path> {
    static PACKAGES: OnceLock<Option<TempDir>> = OnceLock::new();
    PACKAGES
        .get_or_init(|| {
            if let Err(error) = Command::new("dpkg-deb").arg("--version").output() {
                skip("a test of the packages", &format!("dpkg-deb cannot be run: {error}"));
                return None;
            }
            let dir = tempfile::tempdir().unwrap();
            pack(dir.path());
            Some(dir)
        })
        .as_ref()
        .map(TempDir::path)
}

fn package(ending: &str) -> Option<PathBuf> {
    let found = packages()?.read_dir().unwrap().map(|entry| entry.unwrap().path());
    let found: Vec<PathBuf> = found.filter(|path| path.to_string_lossy().ends_with(ending)).collect();
    assert_eq!(found.len(), 1, "{ending}: {found:?}");
    found.into_iter().next()
}

/// Every file below a folder.
fn files(folder: &Path) -> BTreeSet<String> {
    let listed = run(Command::new("find").arg(".").args(["-type", "f"]).current_dir(folder)).stdout;
    String::from_utf8(listed).unwrap().lines().map(|line| line.trim_start_matches("./").to_owned()).collect()
}

/// The .deb, unpacked as into a system's root.
fn installed() -> Option<TempDir> {
    let deb = package(".deb")?;
    let root = tempfile::tempdir().unwrap();
    run(Command::new("dpkg").arg("-x").arg(deb).arg(root.path()));
    Some(root)
}

#[test]
fn the_checksums_are_those_of_the_packages() {
    let Some(packages) = packages() else { return };
    let check = || {
        let mut command = Command::new("sha256sum");
        command.args(["--check", "--strict", "SHA256SUMS"]).current_dir(packages).output().unwrap()
    };
    let output = check();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && said.lines().count() == 2, "{said}");
}

#[test]
fn the_same_files_give_the_same_packages() {
    let Some(first) = packages() else { return };
    let again = tempfile::tempdir().unwrap();
    pack(again.path());
    let sums = |dir: &Path| std::fs::read_to_string(dir.join("SHA256SUMS")).unwrap();
    assert_eq!(sums(first), sums(again.path()));
}

#[test]
fn the_deb_holds_what_the_documents_say_and_the_tarball_the_rest() {
    let Some(root) = installed() else { return };
    let in_deb = files(root.path());
    for place in [
        "usr/bin/nvshare-agent",
        "usr/bin/nvsharectl",
        "usr/bin/nvshare-device-plugin",
        "usr/lib/nvshare/libnvshare.so",
        "usr/lib/systemd/system/nvshare-agent.service",
        "usr/lib/sysusers.d/nvshare.conf",
        "etc/nvshare/nvshare.toml",
        "usr/share/doc/nvshare/copyright",
        "usr/share/doc/nvshare/kubernetes.md",
    ] {
        assert!(in_deb.contains(place), "{place} is missing: {in_deb:?}");
    }
    let unpacked = tempfile::tempdir().unwrap();
    run(Command::new("tar").arg("xf").arg(package(".tar.gz").unwrap()).arg("-C").arg(unpacked.path()));
    let top = unpacked.path().join(format!("nvshare-{VERSION}-{}", std::env::consts::ARCH));
    let in_tarball = files(&top);
    assert!(in_tarball.is_superset(&in_deb));
    let chart = "helm/nvshare/Chart.yaml";
    assert!(in_tarball.contains(chart) && in_tarball.contains("containers/nvshare.Dockerfile"));

    // The container file finds what it copies.
    let text = std::fs::read_to_string(top.join("containers/nvshare.Dockerfile")).unwrap();
    let copied: Vec<&str> =
        text.lines().filter_map(|line| line.strip_prefix("COPY ")?.split_whitespace().next()).collect();
    assert!(copied.len() >= 3);
    for from in copied {
        assert!(top.join(from).exists(), "COPY {from}");
    }
}

#[test]
fn the_package_says_what_it_needs_and_its_scripts_are_scripts() {
    let Some(deb) = package(".deb") else { return };
    let field = |name: &str| {
        let output = run(Command::new("dpkg-deb").arg("-f").arg(&deb).arg(name));
        String::from_utf8(output.stdout).unwrap().trim().to_owned()
    };
    assert_eq!(field("Version"), VERSION);
    assert!(field("Depends").contains("libc6 (>= 2."), "{}", field("Depends"));
    let control = tempfile::tempdir().unwrap();
    run(Command::new("dpkg-deb").arg("-e").arg(&deb).arg(control.path()));
    let conffiles = std::fs::read_to_string(control.path().join("conffiles")).unwrap();
    assert_eq!(conffiles, "/etc/nvshare/nvshare.toml\n");
    for script in ["postinst", "prerm", "postrm"] {
        run(Command::new("sh").arg("-n").arg(control.path().join(script)));
    }
    // Nothing belongs to whoever packed it.
    let listed = run(Command::new("dpkg-deb").arg("-c").arg(&deb));
    for line in String::from_utf8(listed.stdout).unwrap().lines() {
        assert!(line.contains(" root/root "), "{line}");
        assert!(line.starts_with("-rw") || line.starts_with("drwxr-xr-x "), "{line}");
    }
}

#[test]
fn dpkg_takes_it_into_a_root_of_its_own() {
    let Some(deb) = package(".deb") else { return };
    if !nvshare_tests::is_root() {
        return skip("dpkg in a root of its own", "dpkg changes owners, which needs root");
    }
    let dir = tempfile::tempdir().unwrap();
    let database = dir.path().join("var/lib/dpkg");
    for folder in ["info", "updates"] {
        std::fs::create_dir_all(database.join(folder)).unwrap();
    }
    std::fs::write(database.join("status"), "").unwrap();
    let dpkg = || {
        let mut command = Command::new("dpkg");
        command.arg(format!("--root={}", dir.path().display()));
        command
    };
    // Without its scripts, which would act on this machine.
    run(dpkg().args(["--force-depends", "--unpack"]).arg(&deb));
    let listed = run(dpkg().args(["--listfiles", "nvshare"]));
    assert!(String::from_utf8_lossy(&listed.stdout).contains("/usr/bin/nvshare-agent\n"));
    // As it lies there until it is configured: an administrator's file would be kept.
    assert!(dir.path().join("etc/nvshare/nvshare.toml.dpkg-new").exists());
}

#[test]
fn the_unpacked_programs_are_of_this_version_and_share_a_gpu() {
    let Some(scratch) = installed() else { return };
    let bin = scratch.path().join("usr/bin");
    for program in ["nvshare-agent", "nvsharectl", "nvshare-device-plugin"] {
        let output = run(Command::new(bin.join(program)).arg("--version"));
        let said = String::from_utf8(output.stdout).unwrap();
        assert_eq!(said.split_whitespace().nth(1), Some(VERSION), "{program}");
    }
    let config = scratch.path().join("etc/nvshare/nvshare.toml");
    run(Command::new(bin.join("nvshare-agent")).arg("check-config").arg(&config));

    // The unpacked agent and library, and the simulated GPU from the build.
    let built = Binaries::of_this_test().unwrap();
    let home = tempfile::tempdir().unwrap();
    let simulator = Simulator::start(&built, &home.path().join("sim"), &SimulatorOptions::default()).unwrap();
    let unpacked = Binaries::installed_in(scratch.path(), built.dir());
    let mut agent = Agent::start(&unpacked, &simulator.agent_config(), &home.path().join("run")).unwrap();
    let options = WorkloadOptions {
        name: "packaged".to_owned(),
        memory: "64MiB".to_owned(),
        gpu_work: "300ms".to_owned(),
        sweep_time: "10ms".to_owned(),
        extra: Vec::new(),
    };
    let mut program =
        Workload::start(&unpacked, &simulator, Some(agent.run_dir()), home.path(), &options).unwrap();
    program.finish(std::time::Duration::from_secs(30)).unwrap();
    let process = agent.process();
    assert!(process.log().contains("client joined"), "{}", process.log());
    let agent_program = std::fs::read_link(format!("/proc/{}/exe", process.id())).unwrap();
    assert_eq!(agent_program, bin.join("nvshare-agent"));
}
