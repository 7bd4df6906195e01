//! Kubelets and plugins come and go.

use std::os::unix::fs::FileTypeExt as _;

use nvshare_tests::wait_until;
use tonic::Status;

use crate::{
    kubelet::{Kubelet, PATIENCE},
    scene::{ENDPOINT, Node, Scene, share},
    wire::Wire,
};

fn request() -> Wire {
    Wire::new().message(1, &Wire::new().text(1, &share(0, 0)))
}

#[tokio::test]
async fn a_kubelet_that_restarts_is_told_again() {
    let Scene { node, process, mut kubelet, mut watch, .. } = Scene::open(Node::with_gpus(1), &[]).await;
    watch.next().await.expect("a list");
    for _ in 0..3 {
        kubelet.kill().await;
        // Removes all sockets, the plugin's too.
        kubelet = Kubelet::start(&node.kubelet_dir());
        let registration = kubelet.registration().await;
        let mut plugin = kubelet.plugin(&registration.one_text(2)).await;
        assert_eq!(plugin.watch().await.next().await.map(|list| list.len()), Some(10));
        plugin.allocate(request()).await.expect("an allocation");
    }
    drop(process);
}

#[tokio::test]
async fn a_kubelet_that_restarts_and_leaves_the_plugins_socket_alone_is_told_again() {
    let Scene { node, process, kubelet, .. } = Scene::open(Node::with_gpus(1), &[]).await;
    kubelet.kill().await;
    let mut kubelet = Kubelet::start_beside(&node.kubelet_dir());
    kubelet.registration().await;
    kubelet.plugin(ENDPOINT).await.allocate(request()).await.expect("an allocation");
    drop(process);
}

#[tokio::test]
async fn a_socket_that_somebody_removes_is_made_again() {
    let mut scene = Scene::open(Node::with_gpus(1), &[]).await;
    std::fs::remove_file(scene.node.kubelet_dir().join(ENDPOINT)).expect("a socket to remove");
    scene.kubelet.registration().await;
    // The old connection ends, as the kubelet expects of a plugin that is replaced.
    scene.watch.next().await.expect("what was said before");
    assert_eq!(scene.watch.next().await, None);
    scene.kubelet.plugin(ENDPOINT).await.allocate(request()).await.expect("an allocation");
}

#[tokio::test]
async fn a_plugin_that_starts_before_the_kubelet_waits_for_it() {
    let node = Node::with_gpus(1);
    std::fs::create_dir_all(node.kubelet_dir()).expect("a directory");
    let process = node.plugin(&[]);
    wait_until("the plugin to look for the kubelet", PATIENCE, || {
        Ok(process.log().contains("nobody listens").then_some(()))
    })
    .expect("a plugin that waits");
    let mut kubelet = Kubelet::start(&node.kubelet_dir());
    kubelet.registration().await;
}

#[tokio::test]
async fn a_refused_registration_is_tried_again() {
    let node = Node::with_gpus(1);
    let mut kubelet = Kubelet::start(&node.kubelet_dir());
    kubelet.answer(Err(Status::unknown("the version is not supported")));
    let process = node.plugin(&[]);
    kubelet.registration().await;
    wait_until("the refusal to be reported", PATIENCE, || {
        Ok(process.log().contains("the version is not supported").then_some(()))
    })
    .expect("a report");
    kubelet.answer(Ok(()));
    kubelet.registration().await;
    wait_until("success", PATIENCE, || {
        Ok(process.log().contains("registered with the kubelet").then_some(()))
    })
    .expect("a registration");
}

#[tokio::test]
async fn a_plugin_that_is_told_to_end_closes_its_streams_and_leaves_no_socket() {
    let mut scene = Scene::open(Node::with_gpus(1), &[]).await;
    scene.watch.next().await.expect("a list");
    scene.process.signal(libc::SIGTERM);
    assert_eq!(scene.watch.next().await, None);
    let status = scene.process.wait(PATIENCE).expect("an end");
    assert!(status.success(), "{status}: {}", scene.process.log());
    assert!(!scene.node.kubelet_dir().join(ENDPOINT).exists());
}

#[tokio::test]
async fn a_plugin_that_replaces_a_killed_one_takes_over_its_socket() {
    let mut scene = Scene::open(Node::with_gpus(1), &[]).await;
    scene.process.signal(libc::SIGKILL);
    scene.process.wait(PATIENCE).expect("an end");
    let socket = scene.node.kubelet_dir().join(ENDPOINT);
    assert!(socket.metadata().expect("what was left").file_type().is_socket());
    scene.process = scene.node.plugin(&[]);
    scene.kubelet.registration().await;
    scene.kubelet.plugin(ENDPOINT).await.allocate(request()).await.expect("an allocation");
}

#[test]
fn a_mistake_on_the_command_line_is_explained() {
    let node = Node::with_gpus(1);
    let inventory = node.inventory().display().to_string();
    for (arguments, reason) in [
        (["--resource", "gpu"], "nvshare.com/gpu"),
        (["--library-dir-here", "lib"], "cannot watch"),
        (["--run-dir", "run"], "cannot be used multiple times"),
        (["--shares", "0"], "1..=1000"),
        (["--log", "=x="], "log filter"),
        (["--agent-grace", "soon"], "invalid digit"),
    ] {
        let output = node.command(&inventory, &arguments).output().expect("a plugin");
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success() && errors.contains(reason), "{arguments:?}: {errors}");
    }
    let output = node.command("ftp://x", &[]).output().expect("a plugin");
    assert!(String::from_utf8_lossy(&output.stderr).contains("http://127.0.0.1:9464/gpus.json"));
}
