//! Scenario files: the contract's example, defaults, and what is said about wrong ones.

use nvshare_core::{
    Bytes, Nanos,
    sim::{Access, Act, Scenario},
};

const EXAMPLE: &str = r#"
title = "two training jobs that do not fit"
[gpu]
preset = "p100-pcie3"
memory = "15.5 GiB"
[[client]]
name = "a"
count = 2
start = "0 s"
allocated = "15.3 GiB"
working_set = "15.3 GiB"
gpu_work = "719 s"
duty = 0.9
burst = "200 ms"
sweep = "350 ms"
access = "cyclic"
weight = 1
priority = 0
gpus = [0]
shim = true
[[client.phase]]
after = "100 s"
working_set = "2 GiB"
access = "random"
[[event]]
at = "300 s"
do = "kill"
client = "a-0"
"#;

#[test]
fn the_documented_example_is_read_as_it_is_meant() {
    let scenario = Scenario::parse("x", EXAMPLE).unwrap();
    assert_eq!(scenario.title.as_deref(), Some("two training jobs that do not fit"));
    assert_eq!(scenario.gpus[0].memory, Bytes::mib(15_872));
    let names: Vec<&str> = scenario.clients.iter().map(|client| client.name.as_str()).collect();
    assert_eq!(names, ["a-0", "a-1"]);
    let client = &scenario.clients[1];
    assert_eq!((client.gpu_work, client.burst), (Nanos::seconds(719), Nanos::millis(200)));
    assert_eq!(client.phases[0].sweep, Nanos::millis(350));
    assert_eq!(client.phases[1].after, Nanos::seconds(100));
    assert_eq!((client.phases[1].working_set, client.phases[1].access), (Bytes::gib(2), Access::Random));
    assert_eq!(scenario.events[0].act, Act::Kill(vec![0]));
}

#[test]
fn what_is_left_out_has_the_documented_default() {
    let text = "[[client]]\nname = \"a\"\nworking_set = \"2 GiB\"\ngpu_work = \"1 min\"\nburst = \"50 ms\"\n";
    let scenario = Scenario::parse("x", text).unwrap();
    assert_eq!(scenario.gpus.len(), 1);
    let client = &scenario.clients[0];
    assert_eq!((client.name.as_str(), client.allocated, client.start), ("a", Bytes::gib(2), Nanos::ZERO));
    assert_eq!((client.weight_milli, client.priority, client.shim, client.duty), (1000, 0, true, 1.0));
    assert_eq!((client.gpus.as_slice(), client.phases[0].sweep), ([0].as_slice(), Nanos::millis(50)));
}

#[test]
fn several_gpus_are_counted_from_0_and_an_event_on_a_group_hits_all_clones() {
    let text = "[[gpu]]\n[[gpu]]\npreset = \"p100-pcie3\"\n[[client]]\nname = \"a\"\ncount = 3\n\
        allocated = \"1 GiB\"\ngpu_work = \"1 s\"\ngpus = [1, 0]\n\
        [[event]]\nat = \"1 s\"\ndo = \"set-weight\"\nclient = \"a\"\nvalue = 2.5\n\
        [[event]]\nat = \"0 s\"\ndo = \"stop-agent\"\n";
    let scenario = Scenario::parse("x", text).unwrap();
    assert_eq!(scenario.clients[0].gpus, [0, 1]);
    assert_eq!(scenario.events[0].act, Act::StopAgent);
    assert_eq!(scenario.events[1].act, Act::SetWeight(vec![0, 1, 2], 2500));
}

#[test]
fn every_mistake_is_named_with_its_place_and_what_would_be_right() {
    let client = "[[client]]\nname = \"a\"\nallocated = \"1 GiB\"\ngpu_work = \"1 s\"\n";
    let with = |lines: &str| format!("{client}{lines}");
    let cases = [
        (with("strat = \"0 s\"\n"), "x:5:1: unknown key `strat` in [[client]]; did you mean `start`?"),
        (format!("[gpu]\npreset = \"v100\"\n{client}"), "expected one of p100-pcie3, h100-pcie5"),
        (format!("[gpu]\nmemroy = \"1 GiB\"\n{client}"), "did you mean `memory`?"),
        (format!("[[gpu]]\nmemory = \"5\"\n{client}"), "15.5 GiB"),
        (with("working_set = \"2 GiB\"\n"), "larger than allocated"),
        (with("duty = 0\n"), "duty = 0"),
        (with("duty = 1.5\n"), "at most 1"),
        (with("weight = -1\n"), "weight = -1"),
        (with("gpus = [1]\n"), "the last one is GPU 0"),
        (with("gpus = [0, 0]\n"), "at most once"),
        (with("count = 0\n"), "count = 0"),
        (with("burst = \"0 s\"\n"), "longer than 0"),
        (with("access = \"backwards\"\n"), "cyclic"),
        (with("pause = \"1 s\"\n"), "go together"),
        (with("duty = 0.9\npause = \"1 s\"\npause_every = \"1 s\"\n"), "duty leaves 0.1 s"),
        (with("[[client.phase]]\nafter = \"2 s\"\n[[client.phase]]\nafter = \"1 s\"\n"), "order of `after`"),
        (
            with("[[client.phase]]\nafter = \"1 s\"\nworking_set = \"9 GiB\"\n"),
            "x:5:1: client `a`: working_set",
        ),
        (with("[[event]]\nat = \"1 s\"\ndo = \"kill\"\n"), "needs `client`"),
        (with("[[event]]\nat = \"1 s\"\ndo = \"kill\"\nclient = \"b\"\n"), "there is no client `b`"),
        (with("[[event]]\nat = \"1 s\"\ndo = \"kill\"\nclient = \"a\"\nvalue = 1\n"), "only set-weight"),
        (with("[[event]]\nat = \"1 s\"\ndo = \"set-weight\"\nclient = \"a\"\n"), "needs a value"),
        (with("[[event]]\nat = \"1 s\"\ndo = \"stop-agent\"\nclient = \"a\"\n"), "leave `client` out"),
        (with("[[event]]\nat = \"1 s\"\ndo = \"reboot\"\n"), "start-agent"),
        (format!("{client}{client}"), "two clients are named `a`"),
        (with("shim = false\n[gpu]\nmemory = \"1 GiB\"\n"), "plain memory must fit"),
        ("title = \"nothing\"\n".to_owned(), "at least one"),
        ("[[client]]\nname = \"a\"\nallocated = \"1 GiB\"\n".to_owned(), "missing field `gpu_work`"),
    ];
    for (text, expected) in cases {
        let message = Scenario::parse("x", &text).unwrap_err().to_string();
        assert!(message.contains(expected), "`{message}` does not say `{expected}`, for\n{text}");
    }
}

#[test]
fn the_library_is_valid() {
    let dir = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/scenarios");
    let mut count = 0;
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|end| end == "toml") && !path.ends_with("library.toml") {
            let text = std::fs::read_to_string(&path).unwrap();
            Scenario::parse(&path.display().to_string(), &text).unwrap();
            count += 1;
        }
    }
    assert!(count >= 30, "{count} scenarios");
}
