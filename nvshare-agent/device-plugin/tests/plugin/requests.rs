//! What the kubelet asks and what it is told.

use std::collections::{BTreeMap, BTreeSet};

use tonic::Code;

use crate::{
    kubelet::Kubelet,
    scene::{ENDPOINT, Node, Scene, share, uuid},
    wire::Wire,
};

/// One container that wants these devices.
fn container<'a>(devices: impl IntoIterator<Item = &'a String>) -> Wire {
    Wire::new().texts(1, devices.into_iter().map(String::as_str))
}

fn allocate(containers: &[Wire]) -> Wire {
    containers.iter().fold(Wire::new(), |request, container| request.message(1, container))
}

fn prefer(available: &[String], must: &[String], size: u64) -> Wire {
    let wish = Wire::new()
        .texts(1, available.iter().map(String::as_str))
        .texts(2, must.iter().map(String::as_str))
        .number(3, size);
    Wire::new().message(1, &wish)
}

/// The variables of an answer to one container.
fn variables(answer: &Wire) -> BTreeMap<String, String> {
    answer.all(1).iter().map(|entry| (entry.one_text(1), entry.one_text(2))).collect()
}

#[tokio::test]
async fn the_plugin_registers_with_the_bytes_of_the_interface() {
    let scene = Scene::open(Node::with_gpus(1), &[]).await;
    let options = Wire::new().number(2, 1);
    let expected =
        Wire::new().text(1, "v1beta1").text(2, ENDPOINT).text(3, "nvshare.com/gpu").message(4, &options);
    assert_eq!(scene.registration, expected);
}

#[tokio::test]
async fn options_say_that_advice_is_to_be_had_and_no_call_before_a_start_is_needed() {
    let mut scene = Scene::open(Node::with_gpus(1), &[]).await;
    let options = scene.plugin.options().await.expect("options");
    assert_eq!(options, Wire::new().number(2, 1));
    assert_eq!(scene.plugin.pre_start(container(&[share(0, 0)])).await.expect("an answer"), Wire::new());
}

#[tokio::test]
async fn sixteen_gpus_are_a_hundred_and_sixty_devices() {
    let mut scene = Scene::open(Node::with_gpus(16), &["--shares", "10"]).await;
    let list = scene.watch.next().await.expect("a list");
    let expected: Vec<(String, String)> = (0..16)
        .flat_map(|gpu| (0..10).map(move |number| (share(gpu, number), "Healthy".to_owned())))
        .collect();
    assert_eq!(list, expected);

    // All of them can be given away, and each container gets the GPU of its device.
    let ids: Vec<String> = expected.into_iter().map(|(id, _)| id).collect();
    let containers: Vec<Wire> = ids.iter().map(|id| container([id])).collect();
    let answer = scene.plugin.allocate(allocate(&containers)).await.expect("an allocation");
    let given: Vec<String> =
        answer.all(1).iter().map(|answer| variables(answer)["NVIDIA_VISIBLE_DEVICES"].clone()).collect();
    assert_eq!(
        given,
        ids.iter().map(|id| id.split("::").next().expect("a GPU").to_owned()).collect::<Vec<_>>()
    );
}

#[tokio::test]
async fn a_container_is_given_the_library_the_run_directory_and_its_gpu() {
    let mut scene = Scene::open(Node::with_gpus(2), &[]).await;
    let request = allocate(&[container(&[share(1, 3)])]);
    let answer = scene.plugin.allocate(request).await.expect("an allocation");
    let entry = |name: &str, value: &str| Wire::new().text(1, name).text(2, value);
    let mount = |inside: &str, outside: &std::path::Path| {
        Wire::new().text(1, inside).text(2, outside.to_str().expect("a path")).number(3, 1)
    };
    let container = Wire::new()
        .message(1, &entry("LD_PRELOAD", "/usr/lib/nvshare/libnvshare.so"))
        .message(1, &entry("NVIDIA_VISIBLE_DEVICES", &uuid(1)))
        .message(1, &entry("NVSHARE_RUN_DIR", "/run/nvshare"))
        .message(2, &mount("/usr/lib/nvshare", &scene.node.library_dir()))
        .message(2, &mount("/run/nvshare", &scene.node.run_dir()));
    assert_eq!(answer, Wire::new().message(1, &container));
}

#[tokio::test]
async fn devices_of_one_container_are_its_gpus_each_once() {
    let mut scene = Scene::open(Node::with_gpus(3), &[]).await;
    let request = allocate(&[container(&[share(2, 0), share(0, 1), share(2, 5)]), container(&[share(1, 0)])]);
    let answer = scene.plugin.allocate(request).await.expect("an allocation");
    let visible: Vec<String> =
        answer.all(1).iter().map(|answer| variables(answer)["NVIDIA_VISIBLE_DEVICES"].clone()).collect();
    assert_eq!(visible, [format!("{},{}", uuid(0), uuid(2)), uuid(1)]);
}

#[tokio::test]
async fn with_cdi_the_runtime_is_told_the_device_and_its_own_hook_is_kept_out() {
    let mut scene = Scene::open(Node::with_gpus(2), &["--gpu-access", "cdi"]).await;
    let answer = scene.plugin.allocate(allocate(&[container(&[share(1, 0)])])).await.expect("an allocation");
    let answer = &answer.all(1)[0];
    assert_eq!(answer.all(5), [Wire::new().text(1, &format!("nvidia.com/gpu={}", uuid(1)))]);
    assert_eq!(variables(answer)["NVIDIA_VISIBLE_DEVICES"], "void");
    assert_eq!(variables(answer)["LD_PRELOAD"], "/usr/lib/nvshare/libnvshare.so");
}

/// The GPUs of the devices that are advised.
async fn advised(scene: &mut Scene, available: &[String], size: u64) -> BTreeSet<String> {
    let answer = scene.plugin.prefer(prefer(available, &[], size)).await.expect("advice");
    let chosen = answer.all(1)[0].all_texts(1);
    assert_eq!(chosen.len() as u64, size, "{chosen:?}");
    chosen.iter().map(|id| id.split("::").next().expect("a GPU").to_owned()).collect()
}

#[tokio::test]
async fn advice_spreads_or_packs_as_it_is_told() {
    // GPU 0 has given away eight of ten, GPU 1 one, GPU 2 none.
    let available: Vec<String> = (8..10)
        .map(|number| share(0, number))
        .chain((1..10).map(|number| share(1, number)))
        .chain((0..10).map(|number| share(2, number)))
        .collect();
    let mut spread = Scene::open(Node::with_gpus(3), &[]).await;
    assert_eq!(advised(&mut spread, &available, 1).await, [uuid(2)].into());
    assert_eq!(advised(&mut spread, &available, 2).await, [uuid(1), uuid(2)].into());
    let mut pack = Scene::open(Node::with_gpus(3), &["--placement", "pack", "--several", "together"]).await;
    assert_eq!(advised(&mut pack, &available, 1).await, [uuid(0)].into());
    assert_eq!(advised(&mut pack, &available, 5).await, [uuid(1)].into());
}

#[tokio::test]
async fn advice_avoids_gpus_in_trouble_and_keeps_what_must_be_included() {
    let node = Node::new();
    let gpu = |(number, committed, thrashing): (usize, u64, bool)| {
        format!(
            r#"{{"uuid": "{}", "capacity_bytes": 1000, "committed_bytes": {committed}, "thrashing": {thrashing}}}"#,
            uuid(number)
        )
    };
    node.list_with(true, [(0, 0, true), (1, 900, false), (2, 300, false)].into_iter().map(gpu));
    let mut scene = Scene::open(node, &["--shares", "4"]).await;
    let available: Vec<String> =
        (0..3).flat_map(|gpu| (0..4).map(move |number| share(gpu, number))).collect();
    assert_eq!(advised(&mut scene, &available, 1).await, [uuid(2)].into());
    assert_eq!(advised(&mut scene, &available, 2).await, [uuid(1), uuid(2)].into());
    let answer = scene.plugin.prefer(prefer(&available, &[share(0, 3)], 2)).await.expect("advice");
    assert_eq!(answer.all(1)[0].all_texts(1), [share(0, 3), share(2, 0)]);
}

#[tokio::test]
async fn bad_requests_are_refused_with_a_reason_and_the_plugin_lives_on() {
    let mut scene = Scene::open(Node::with_gpus(2), &["--shares", "2"]).await;
    let cases = [
        (allocate(&[]), Code::InvalidArgument, "no container"),
        (allocate(&[container(&[])]), Code::InvalidArgument, "no device"),
        (allocate(&[container(&["nvidia0".to_owned()])]), Code::InvalidArgument, "`nvidia0`"),
        (allocate(&[container(&[share(0, 0), share(0, 0)])]), Code::InvalidArgument, "named twice"),
        (allocate(&[container(&[share(7, 0)])]), Code::NotFound, "no such GPU"),
        (allocate(&[container(&[share(0, 0)]), container(&[share(0, 2)])]), Code::NotFound, "2 devices"),
        (Wire(vec![0x0a, 0xff]), Code::Internal, ""),
    ];
    for (request, code, reason) in cases {
        let status = scene.plugin.allocate(request.clone()).await.expect_err("a refusal");
        assert_eq!(status.code(), code, "{request:?}: {status}");
        assert!(status.message().contains(reason), "{request:?}: {status}");
    }
    let available = [share(0, 0), share(0, 1)];
    let cases = [
        (prefer(&available, &[], 3), "3 devices"),
        (prefer(&available, &[], (-1_i64).cast_unsigned()), "-1 devices"),
        (prefer(&available, &[share(1, 0)], 1), "must be included"),
        (prefer(&available, &available, 1), "must be included"),
        (prefer(&["?".to_owned()], &[], 1), "`?`"),
    ];
    for (request, reason) in cases {
        let status = scene.plugin.prefer(request.clone()).await.expect_err("a refusal");
        assert_eq!(status.code(), Code::InvalidArgument, "{request:?}: {status}");
        assert!(status.message().contains(reason), "{request:?}: {status}");
    }
    scene.plugin.allocate(allocate(&[container(&[share(1, 1)])])).await.expect("an allocation");
}

#[tokio::test]
async fn nothing_is_given_away_before_the_library_is_installed() {
    let mut scene = Scene::open(Node::with_gpus(1), &[]).await;
    let library = scene.node.library_dir().join("libnvshare.so");
    std::fs::remove_file(&library).expect("a library to remove");
    let request = allocate(&[container(&[share(0, 0)])]);
    let status = scene.plugin.allocate(request.clone()).await.expect_err("a refusal");
    assert_eq!(status.code(), Code::FailedPrecondition);
    assert!(status.message().contains("libnvshare.so is not there"), "{status}");
    std::fs::write(&library, "").expect("a library");
    scene.plugin.allocate(request).await.expect("an allocation");
}

#[tokio::test]
async fn a_lost_gpu_and_a_lost_agent_make_devices_unhealthy_until_they_are_back() {
    let mut scene = Scene::open(Node::with_gpus(2), &["--shares", "1", "--agent-grace", "2"]).await;
    scene.watch.next().await.expect("a list");
    scene.node.list(true, [0]);
    let list = scene.watch.next().await.expect("news");
    assert_eq!(list, [(share(0, 0), "Healthy".to_owned()), (share(1, 0), "Unhealthy".to_owned())]);
    let status = scene.plugin.allocate(allocate(&[container(&[share(1, 0)])])).await.expect_err("a refusal");
    assert_eq!(status.code(), Code::FailedPrecondition, "{status}");

    std::fs::remove_file(scene.node.inventory()).expect("a list to remove");
    scene.watch.until(|list| list.iter().all(|(_, health)| health == "Unhealthy")).await;
    let status = scene.plugin.allocate(allocate(&[container(&[share(0, 0)])])).await.expect_err("a refusal");
    assert!(status.message().contains("nvshare-agent does not answer"), "{status}");

    scene.node.list(true, [0, 1]);
    scene.watch.until(|list| list.iter().all(|(_, health)| health == "Healthy")).await;
    scene.plugin.allocate(allocate(&[container(&[share(0, 0)])])).await.expect("an allocation");
}

#[tokio::test]
async fn the_kubelet_hears_nothing_before_the_gpus_are_known() {
    let node = Node::new();
    let mut kubelet = Kubelet::start(&node.kubelet_dir());
    node.list(false, [0]);
    let process = node.plugin(&[]);
    nvshare_tests::wait_until("the plugin to wait", crate::kubelet::PATIENCE, || {
        Ok(process.log().contains("waiting for the list").then_some(()))
    })
    .expect("a plugin that waits");
    assert!(!node.kubelet_dir().join(ENDPOINT).exists());
    node.list(true, [0, 1]);
    kubelet.registration().await;
    let list = kubelet.plugin(ENDPOINT).await.watch().await.next().await.expect("a list");
    assert_eq!(list.len(), 20);
}
