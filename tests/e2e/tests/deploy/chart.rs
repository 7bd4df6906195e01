//! The Helm chart.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
    process::Command,
    time::Duration,
};

use nvshare_tests::{Binaries, process::Guarded, wait_until};
use serde_json::{Value, json};

use crate::{
    helm::{Rendered, chart, helm},
    root,
};

/// Everything that can be switched on.
const ALL: &[&str] = &[
    "gpuAccess=cdi",
    "placement=pack",
    "several=together",
    "serviceMonitor.enabled=true",
    "serviceMonitor.labels.release=prometheus",
    "image.pullSecrets={registry}",
    "agent.extraCapabilities={SYS_RESOURCE}",
    "seLinuxOptions.type=spc_t",
    "podLabels.team=ml",
    "podAnnotations.why=not",
    "podTerms.enabled=true",
    "podTerms.weightMax=2.5",
];

/// The chart as it is, and with everything on.
fn both() -> Option<[Rendered; 2]> {
    Some([Rendered::of(&chart(), &[])?, Rendered::of(&chart(), ALL)?])
}

fn containers(rendered: &Rendered) -> Vec<&Value> {
    let pod = &rendered.only("DaemonSet")["spec"]["template"]["spec"];
    ["initContainers", "containers"].iter().flat_map(|kind| pod[kind].as_array().unwrap()).collect()
}

fn container<'a>(rendered: &'a Rendered, name: &str) -> &'a Value {
    containers(rendered).into_iter().find(|container| container["name"] == name).unwrap()
}

fn variables(container: &Value) -> BTreeMap<String, String> {
    let variables = container["env"].as_array().unwrap().iter();
    variables
        .map(|variable| {
            let text = |key: &str| variable[key].as_str().unwrap().to_owned();
            (text("name"), text("value"))
        })
        .collect()
}

#[test]
fn the_chart_is_clean_and_its_manifests_are_what_kubernetes_has_published() {
    let Some(lint) = helm(&chart(), "lint", &[]) else { return };
    assert!(lint.status.success(), "{}", String::from_utf8_lossy(&lint.stdout));
    for rendered in both().unwrap() {
        assert_eq!(rendered.complaints().unwrap(), Vec::<String>::new());
    }
}

#[test]
fn the_schemas_find_a_mistake() {
    let Some(mut rendered) = Rendered::of(&chart(), &[]) else { return };
    let daemon_set = rendered.manifests.iter_mut().find(|manifest| manifest["kind"] == "DaemonSet").unwrap();
    daemon_set["spec"]["template"]["spec"]["hostPid"] = json!(true);
    let complaints = rendered.complaints().unwrap();
    assert!(!complaints.is_empty() && complaints.iter().all(|complaint| complaint.contains("hostPid")));
}

#[test]
fn settings_that_make_no_sense_are_refused() {
    for (setting, reason) in [
        ("share=3", "share"),
        ("shares=0", "shares"),
        ("placement=random", "placement"),
        ("resourceName=gpu", "resourceName"),
        ("paths.run=run/nvshare", "run"),
        ("agent.extraCapabilities={ALL}", "extraCapabilities"),
        ("agent.privileged=true", "privileged"),
        ("agent.address=127.0.0.1", "address"),
    ] {
        let Some(output) = helm(&chart(), "template", &[setting]) else { return };
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success() && errors.contains(reason), "{setting}: {errors}");
    }
}

#[test]
fn the_schema_of_the_values_knows_every_value_and_no_other() {
    let Some(rendered) = Rendered::of(&chart(), &[]) else { return };
    drop(rendered);
    let text = std::fs::read_to_string(chart().join("values.yaml")).unwrap();
    let known: BTreeSet<&str> = text
        .lines()
        .filter(|line| line.starts_with(|first: char| first.is_ascii_lowercase()))
        .filter_map(|line| line.split(':').next())
        .collect();
    let schema: Value =
        serde_json::from_str(&std::fs::read_to_string(chart().join("values.schema.json")).unwrap()).unwrap();
    let described: BTreeSet<&str> = schema["properties"]
        .as_object()
        .unwrap()
        .keys()
        .map(String::as_str)
        .filter(|key| *key != "global")
        .collect();
    assert_eq!(known, described);
}

#[test]
fn every_container_has_as_little_power_as_it_can() {
    let Some([plain, all]) = both() else { return };
    for rendered in [&plain, &all] {
        let pod = &rendered.only("DaemonSet")["spec"]["template"]["spec"];
        assert_eq!(pod["automountServiceAccountToken"], false);
        assert_eq!(pod["hostNetwork"], Value::Null);
        assert_eq!(pod["hostIPC"], Value::Null);
        assert_eq!(pod["securityContext"]["seccompProfile"]["type"], "RuntimeDefault");
        for container in containers(rendered) {
            let name = container["name"].as_str().unwrap();
            let context = &container["securityContext"];
            assert_eq!(context["privileged"], false, "{name}");
            assert_eq!(context["allowPrivilegeEscalation"], false, "{name}");
            assert_eq!(context["readOnlyRootFilesystem"], true, "{name}");
            assert_eq!(context["capabilities"]["drop"], json!(["ALL"]), "{name}");
            if name != "agent" {
                assert_eq!(context["capabilities"]["add"], Value::Null, "{name}");
            }
        }
    }
    assert_eq!(
        container(&plain, "agent")["securityContext"]["capabilities"]["add"],
        json!(["BPF", "PERFMON"])
    );
    assert_eq!(
        container(&all, "agent")["securityContext"]["capabilities"]["add"],
        json!(["BPF", "PERFMON", "SYS_RESOURCE"])
    );
}

#[test]
fn only_with_pod_terms_is_there_a_role_and_only_the_agent_has_a_token() {
    let Some([plain, all]) = both() else { return };
    assert!(!plain.manifests.iter().any(|manifest| manifest["kind"].as_str().unwrap().contains("Role")));
    assert!(!plain.text.contains("serviceAccountToken"));
    let rules = &all.only("ClusterRole")["rules"];
    assert_eq!(*rules, json!([{"apiGroups": [""], "resources": ["pods"], "verbs": ["list"]}]));
    let binding = all.only("ClusterRoleBinding");
    assert_eq!(binding["roleRef"]["name"], all.only("ClusterRole")["metadata"]["name"]);
    let account = all.only("ServiceAccount");
    assert_eq!(binding["subjects"][0]["name"], account["metadata"]["name"]);
    assert_eq!(account["automountServiceAccountToken"], false);
    let with_token = |container: &&Value| {
        container["volumeMounts"].as_array().unwrap().iter().any(|mount| mount["name"] == "account")
    };
    let names: Vec<_> =
        containers(&all).into_iter().filter(with_token).map(|container| &container["name"]).collect();
    assert_eq!(names, ["agent"]);
    let node =
        container(&all, "agent")["env"].as_array().unwrap().iter().find(|entry| entry["name"] == "NODE_NAME");
    assert_eq!(node.unwrap()["valueFrom"]["fieldRef"]["fieldPath"], "spec.nodeName");
}

#[test]
fn every_power_is_explained_in_the_documents() {
    let Some([_, all]) = both() else { return };
    let document = std::fs::read_to_string(root().join("docs/kubernetes.md")).unwrap();
    let pod = &all.only("DaemonSet")["spec"]["template"]["spec"];
    let capabilities = containers(&all)
        .into_iter()
        .flat_map(|container| {
            container["securityContext"]["capabilities"]["add"].as_array().into_iter().flatten()
        })
        .map(|capability| format!("CAP_{}", capability.as_str().unwrap()));
    let places = pod["volumes"]
        .as_array()
        .unwrap()
        .iter()
        .filter_map(|volume| volume["hostPath"]["path"].as_str().map(str::to_owned));
    let others = ["hostPID", "list pods"].map(str::to_owned);
    for power in capabilities.chain(places).chain(others) {
        assert!(document.contains(&format!("| `{power}` |")), "docs/kubernetes.md does not explain {power}");
    }
}

#[test]
fn operators_have_their_socket_where_containers_do_not_look() {
    let Some(rendered) = Rendered::of(&chart(), &[]) else { return };
    let text = rendered.only("ConfigMap")["data"]["nvshare.toml"].as_str().unwrap();
    let config: toml::Table = text.parse().unwrap();
    let (run, control) = (&config["listen"]["run_dir"], &config["listen"]["control_dir"]);
    assert_eq!(
        run.as_str(),
        Some(variables(container(&rendered, "device-plugin"))["NVSHARE_RUN_DIR"].as_str())
    );
    assert!(!Path::new(control.as_str().unwrap()).starts_with(run.as_str().unwrap()));
}

#[test]
fn the_agent_takes_its_configuration() {
    let binaries = Binaries::of_this_test().unwrap();
    let Some(rendered) = Rendered::of(
        &chart(),
        &[
            "agent.config=[engine]\noverhead = 0.1",
            "agent.port=9000",
            "podTerms.enabled=true",
            "podTerms.weightMax=4",
        ],
    ) else {
        return;
    };
    let text = rendered.only("ConfigMap")["data"]["nvshare.toml"].as_str().unwrap();
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("nvshare.toml");
    std::fs::write(&file, text).unwrap();
    let output = Command::new(binaries.agent()).arg("check-config").arg(&file).output().unwrap();
    assert!(output.status.success(), "{text}: {}", String::from_utf8_lossy(&output.stderr));
    assert!(text.contains("weight_max = 4.0"), "{text}");
    assert!(text.contains("overhead = 0.1") && text.contains(":9000"), "{text}");
    let inventory = &variables(container(&rendered, "device-plugin"))["NVSHARE_INVENTORY"];
    assert_eq!(inventory, "http://127.0.0.1:9000/gpus.json");
}

#[test]
fn the_plugin_takes_its_settings() {
    let binaries = Binaries::of_this_test().unwrap();
    let Some(both) = both() else { return };
    for rendered in both {
        let dir = tempfile::tempdir().unwrap();
        let mut command = Command::new(binaries.device_plugin());
        command.envs(variables(container(&rendered, "device-plugin")));
        // Nobody listens there; the plugin waits for its agent.
        command.env("NVSHARE_INVENTORY", "http://127.0.0.1:1/gpus.json");
        let mut plugin =
            Guarded::spawn("the device plugin", &mut command, &dir.path().join("log"), false).unwrap();
        wait_until("the plugin to wait for the agent", Duration::from_secs(20), || {
            anyhow::ensure!(plugin.finished()?.is_none(), "the plugin ended: {}", plugin.log());
            Ok(plugin.log().contains("waiting for the list of GPUs").then_some(()))
        })
        .unwrap();
    }
}

#[test]
fn prometheus_finds_the_agents() {
    let Some(rendered) = Rendered::of(&chart(), ALL) else { return };
    let monitor = &rendered.only("ServiceMonitor")["spec"];
    let service = rendered.only("Service");
    for (label, value) in monitor["selector"]["matchLabels"].as_object().unwrap() {
        assert_eq!(&service["metadata"]["labels"][label], value);
    }
    assert_eq!(monitor["namespaceSelector"]["matchNames"], json!([service["metadata"]["namespace"]]));
    assert_eq!(monitor["endpoints"][0]["port"], service["spec"]["ports"][0]["name"]);
    let pod = &rendered.only("DaemonSet")["spec"]["template"];
    for (label, value) in service["spec"]["selector"].as_object().unwrap() {
        assert_eq!(&pod["metadata"]["labels"][label], value);
    }
    assert_eq!(service["spec"]["ports"][0]["targetPort"], container(&rendered, "agent")["ports"][0]["name"]);
}

/// A copy of the chart with these files in rules/.
fn with_rules(files: &[(&str, &str)]) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let copied = Command::new("cp").arg("-rL").arg(chart()).arg(dir.path().join("nvshare")).status().unwrap();
    assert!(copied.success());
    let rules = dir.path().join("nvshare/rules");
    std::fs::remove_dir_all(&rules).ok();
    std::fs::create_dir_all(&rules).unwrap();
    for (name, text) in files {
        std::fs::write(rules.join(name), text).unwrap();
    }
    dir
}

#[test]
fn the_rules_of_all_files_are_one_manifest_and_their_tests_are_left_out() {
    let rule = |name: &str| {
        format!(
            "groups:\n  - name: {name}\n    rules:\n      - alert: A\n        expr: up == 0\n        annotations: {{summary: \"{{{{ $labels.gpu }}}}\"}}\n"
        )
    };
    let (one, two) = (rule("one"), rule("two"));
    let dir = with_rules(&[
        ("alerts.yaml", &one),
        ("recording.yaml", &two),
        ("alerts_test.yaml", "groups: [{name: no}]"),
    ]);
    let Some(rendered) = Rendered::of(&dir.path().join("nvshare"), &["prometheusRule.enabled=true"]) else {
        return;
    };
    let groups = rendered.only("PrometheusRule")["spec"]["groups"].as_array().unwrap();
    let names: Vec<_> = groups.iter().map(|group| group["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["one", "two"]);
    assert_eq!(groups[0]["rules"][0]["annotations"]["summary"], "{{ $labels.gpu }}");

    let dir = with_rules(&[]);
    let output = helm(&dir.path().join("nvshare"), "template", &["prometheusRule.enabled=true"]).unwrap();
    assert!(String::from_utf8_lossy(&output.stderr).contains("carries no rules"));
}

#[test]
fn the_chart_carries_the_rules_of_the_dashboards() {
    let source = root().join("dashboards/rules");
    if !source.exists() {
        assert!(!chart().join("rules").exists(), "rules without a source");
        return;
    }
    assert_eq!(chart().join("rules").canonicalize().unwrap(), source);
}

#[test]
fn the_chart_is_of_the_products_version() {
    let Some(rendered) = Rendered::of(&chart(), &[]) else { return };
    let version = env!("CARGO_PKG_VERSION");
    let labels = &rendered.only("DaemonSet")["metadata"]["labels"];
    assert_eq!(labels["app.kubernetes.io/version"], version);
    assert_eq!(labels["helm.sh/chart"], format!("nvshare-{version}"));
    assert!(rendered.text.contains(&format!("image: ghcr.io/nvshare/nvshare:{version}")));
}
