//! What Allocate returns makes a client: the real agent on the simulated GPU, and a program started with exactly those
//! variables and mounts.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use nvshare_tests::{Agent, Binaries, Simulator, SimulatorOptions, process::Guarded, wait_until};

use crate::{
    kubelet::{Kubelet, PATIENCE},
    scene::Node,
    wire::{Value, Wire},
};

/// Binds each `FROM TO MODE` before `--` in a mount namespace of its own, then runs what follows.
const IN_CONTAINER: &str = r#"
while [ "$1" != -- ]; do mount --bind "$1" "$2" && mount -o remount,bind,$3 "$2" || exit 90; shift 3; done
shift; exec "$@""#;

/// A container as a runtime makes it of an answer, with its paths below `root`.
struct Container {
    variables: Vec<(String, String)>,
    /// From, to, and `ro` or `rw`.
    mounts: Vec<(PathBuf, String, &'static str)>,
    root: PathBuf,
}

impl Container {
    fn new(answer: &Wire, root: &Path) -> Self {
        let variables = answer.all(1).iter().map(|entry| (entry.one_text(1), entry.one_text(2))).collect();
        let mode = |mount: &Wire| if mount.fields().contains(&(3, Value::Number(1))) { "ro" } else { "rw" };
        let mounts: Vec<_> = answer
            .all(2)
            .iter()
            .map(|mount| (PathBuf::from(mount.one_text(2)), mount.one_text(1), mode(mount)))
            .collect();
        for (_, inside, _) in &mounts {
            std::fs::create_dir_all(Self::below(root, inside)).expect("a place to mount at");
        }
        Self { variables, mounts, root: root.to_owned() }
    }

    fn below(root: &Path, inside: &str) -> PathBuf {
        root.join(inside.strip_prefix('/').expect("an absolute path"))
    }

    fn variable(&self, name: &str) -> &str {
        let found = self.variables.iter().find(|(known, _)| known == name);
        found.map(|(_, value)| value.as_str()).expect("a variable")
    }

    /// Runs a program there. What a variable says of paths is meant inside.
    fn command(&self, program: &Path, arguments: &[&str]) -> Command {
        let mut command = Command::new("unshare");
        command.args(["--mount", "--propagation", "private", "sh", "-c", IN_CONTAINER, "sh"]);
        for (outside, inside, mode) in &self.mounts {
            command.arg(outside).arg(Self::below(&self.root, inside)).arg(mode);
        }
        command.args(["--", "env"]);
        for (name, value) in &self.variables {
            let value = match value.strip_prefix('/') {
                Some(_) => Self::below(&self.root, value).display().to_string(),
                None => value.clone(),
            };
            command.arg(format!("{name}={value}"));
        }
        command.arg(program).args(arguments);
        command
    }
}

#[tokio::test]
async fn a_program_started_with_what_allocate_returned_is_a_client_on_its_gpu() {
    let binaries = Binaries::of_this_test().expect("everything built");
    let node = Node::new();
    std::fs::copy(binaries.shim(), node.library_dir().join("libnvshare.so")).expect("the library");
    let options = SimulatorOptions { gpus: 2, ..SimulatorOptions::default() };
    let simulator = Simulator::start(&binaries, &node.dir().join("sim"), &options).expect("a simulated host");
    let agent = Agent::start(&binaries, &simulator.agent_config(), &node.run_dir()).expect("an agent");
    let status = agent.ctl_json(&["status", "--json"]).expect("a status");
    let inventory = format!("http://{}/gpus.json", status["metrics"].as_str().expect("an address"));

    let mut kubelet = Kubelet::start(&node.kubelet_dir());
    let process = node.plugin_on(&inventory, &["--shares", "3"]);
    let registration = kubelet.registration().await;
    let mut plugin = kubelet.plugin(&registration.one_text(2)).await;
    let devices = plugin.watch().await.next().await.expect("a list");
    assert_eq!(devices.len(), 6, "{devices:?}: {}", process.log());

    // The last device belongs to the second GPU: the simulator numbers its cards in the order of their UUIDs.
    let (id, health) = devices.last().expect("a device");
    assert_eq!(health, "Healthy");
    let request = Wire::new().message(1, &Wire::new().text(1, id));
    let answer = plugin.allocate(request).await.expect("an allocation").all(1).remove(0);
    let container = Container::new(&answer, &node.dir().join("container"));
    let gpu = container.variable("NVIDIA_VISIBLE_DEVICES");
    assert_eq!(Some(gpu), id.split("::").next());

    // The part of NVIDIA's container toolkit: the driver's library and device files of that GPU.
    let sweep = [
        "sweep",
        "--verify",
        "--memory",
        "64MiB",
        "--gpu-work",
        "500ms",
        "--sweep-time",
        "10ms",
        "--gpu",
        "1",
    ];
    let mut command = container.command(&binaries.workload(), &sweep);
    command.envs(simulator.environment());
    let mut program = Guarded::spawn("the program", &mut command, &node.dir().join("program.log"), false)
        .expect("a program");
    wait_until("the program to be a client of the agent", PATIENCE, || {
        if let Some(status) = program.finished()? {
            anyhow::bail!("the program ended with {status} before it was a client: {}", program.log());
        }
        let clients = agent.ctl_json(&["clients", "--json"])?;
        let used = clients["clients"][0]["gpus"][0].as_str().map(str::to_owned);
        Ok(used.filter(|used| used == gpu))
    })
    .expect("a client on the GPU that was given");
    let status = program.wait(PATIENCE).expect("an end");
    assert!(status.success(), "{status}: {}", program.log());

    // The agent's socket cannot be taken from the other containers.
    let socket = Container::below(&container.root, "/run/nvshare/clients.sock");
    let output = container.command(Path::new("/bin/rm"), &["-f", socket.to_str().expect("a path")]).output();
    let errors = String::from_utf8_lossy(&output.expect("rm").stderr).into_owned();
    assert!(errors.contains("Read-only file system"), "{errors}");
    assert!(node.run_dir().join("clients.sock").exists());
}
