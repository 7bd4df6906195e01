use std::collections::BTreeMap;

use nvshare_core::{Bytes, ClientId, GpuId, Reason};
use ratatui::{Terminal, backend::TestBackend};

use super::*;
use crate::{
    clients::client::ClientTotals,
    ctl::top::model::{Action, Sort, Wants},
    observe::fusion::Fused,
    operator::{history::Rates, protocol::StatusReport},
};

const GPU: GpuId = GpuId([0xab; 16]);

pub(super) fn client(id: u64, name: &str, state: &str, managed: u64) -> GpuClientReport {
    GpuClientReport {
        client: ClientId(id),
        name: name.to_owned(),
        pid: 1000 + id as u32,
        state: state.to_owned(),
        managed_bytes: managed << 20,
        device_bytes: 0,
        weight_milli: 1000,
        priority: 0,
        limit_bytes: None,
        granted_s: id as f64,
        waited_s: 61.0,
        grants: 3,
        working_set_bytes: (300 << 20, 300 << 20),
        refaulted_bytes: 5 << 20,
        seen: ClientTotals { evicted_by_others: Some(Bytes::gib(2)), ..ClientTotals::default() },
        figures: Fused::default(),
    }
}

/// A GPU on which two of three clients wait for their turn.
fn overview() -> OverviewReport {
    let gpu = GpuReport {
        gpu: GPU,
        name: Some("NVIDIA H100 80GB HBM3".to_owned()),
        mode: "exclusive".to_owned(),
        order: ModeOrder::Auto,
        hangs_s: None,
        reason: Some("thrash: 300.0 MiB came back that others had pushed out, 45 % of the time went into faults, 1.17 GiB committed on 1.00 GiB (provisional)".to_owned()),
        total_bytes: Some(1 << 30),
        used_bytes: None,
        capacity_bytes: Some(1 << 30),
        committed_bytes: 1200 << 20,
        quantum_s: Some(2.0),
        handover_s: Some(0.1),
        score: 1.5,
        stall: Some(0.45),
        curable_refaulted_bytes: 0,
        own_refaulted_bytes: 0,
        clients: vec![
            client(1, "train.py", "running", 400),
            client(2, "\u{1b}[31mevil\u{202e}", "waiting", 300),
            client(3, "a-program-with-a-very-long-name", "waiting", 500),
        ],
    };
    let change = PlanEvent {
        t_ms: 98_000.0,
        gpu: GPU,
        from: "shared".to_owned(),
        to: "exclusive".to_owned(),
        reason: "thrash: 300.0 MiB came back".to_owned(),
        first_refault_ms: None,
        provisional: true,
        order: None,
        figures: Reason::Alone,
        sets: Vec::new(),
    };
    let history = GpuHistory {
        gpu: GPU,
        stall: vec![Some(0.0), None, Some(0.5), Some(0.45)],
        bytes_in: vec![0.0, 0.0, 5e8, 1e9],
        bytes_out: vec![0.0, 0.0, 0.0, 5e8],
        curable: vec![0.0, 0.0, 0.0, 3e8],
        clients: BTreeMap::from([(ClientId(3), Rates { bytes_in: Some(2e6), bytes_out: Some(1.0) })]),
    };
    let status = StatusReport {
        version: "0.1.0".to_owned(),
        pid: 1,
        uptime_s: 64.0,
        metrics: None,
        gpus: vec![gpu],
        sensors: Vec::new(),
        gaps: Vec::new(),
    };
    OverviewReport { status, t_ms: 110_000.0, changes: vec![change], history: vec![history] }
}

fn model() -> Model {
    let mut model = Model::new(Sort::Client);
    model.see(overview());
    model
}

/// The screen as text, and the terminal for its styles.
fn drawn(model: &mut Model, width: u16, height: u16) -> (Vec<String>, Terminal<TestBackend>) {
    let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
    terminal.draw(|frame| screen(model, frame.area(), frame.buffer_mut())).unwrap();
    let buffer = terminal.backend().buffer().clone();
    let lines = (0..height)
        .map(|y| (0..width).map(|x| buffer[(x, y)].symbol()).collect::<String>().trim_end().to_owned())
        .collect();
    (lines, terminal)
}

#[test]
fn at_80_by_24_everything_that_matters_is_there() {
    let (lines, _) = drawn(&mut model(), 80, 24);
    let text = lines.join("\n");
    for said in [
        "nvshare-agent 0.1.0   up 64 s   1 GPU   3 clients",
        "live",
        "NVIDIA H100 80GB HBM3  GPU-abababab",
        "EXCLUSIVE for 12 s: thrash: 300.0 MiB came back",
        "turn: c1 train.py   waiting: 2   quantum 2.0 s   hand-over 0.1 s",
        "1.2 GiB managed of 1.0 GiB (117 %)",
        "45 %",
        "954 MiB/s",
        "c1   train.py",
        "1003",
        "12 s ago  shared -> exclusive: thrash: 300.0 MiB came back",
        "q quit   ? keys",
    ] {
        assert!(text.contains(said), "no {said:?} in\n{text}");
    }
    assert!(lines.iter().all(|line| line.chars().count() <= 80));
}

#[test]
fn a_hostile_name_reaches_the_terminal_without_its_claws() {
    let (lines, _) = drawn(&mut model(), 80, 24);
    let row = lines.iter().find(|line| line.trim_start().starts_with("c2 ")).unwrap();
    assert!(row.contains("?[31mevil?") && !lines.concat().contains('\u{1b}'), "{row}");
    assert!(!plain(&model(), 100).contains(['\u{1b}', '\u{202e}']));
}

#[test]
fn nothing_depends_on_colour() {
    let (_, terminal) = drawn(&mut model(), 120, 40);
    let coloured = |cell: &ratatui::buffer::Cell| {
        use ratatui::style::Color::Reset;
        cell.fg != Reset || cell.bg != Reset
    };
    assert!(!terminal.backend().buffer().content.iter().any(coloured));
}

#[test]
fn no_size_is_too_small_and_a_wide_one_shows_more() {
    for (width, height) in [(1, 1), (5, 3), (20, 4), (40, 10), (80, 24), (200, 60), (300, 100)] {
        let (lines, _) = drawn(&mut model(), width, height);
        assert_eq!(lines.len(), usize::from(height));
    }
    let wide = drawn(&mut model(), 200, 50).0.join("\n");
    assert!(
        wide.contains("WEIGHT")
            && wide.contains("FOR OTHERS")
            && wide.contains("2.0 GiB")
            && wide.contains("300 MiB")
            && wide.contains("5.0 MiB"),
        "{wide}"
    );
}

#[test]
fn sorting_changes_the_rows_and_the_footer_says_how() {
    let order = |model: &mut Model| {
        let (lines, _) = drawn(model, 80, 24);
        let rows = lines.iter().filter_map(|line| line.trim_start().split(' ').next());
        let ids = rows.filter(|word| word.len() == 2 && word.starts_with('c')).map(ToOwned::to_owned);
        (ids.collect::<Vec<String>>(), lines.last().unwrap().clone())
    };
    let mut model = model();
    assert_eq!(order(&mut model).0, ["c1", "c2", "c3"]);
    assert_eq!(model.act(Action::Sort), Wants::Draw);
    assert_eq!(order(&mut model).0, ["c2", "c3", "c1"], "by program");
    model.act(Action::Sort);
    let (by_memory, footer) = order(&mut model);
    assert_eq!(by_memory, ["c3", "c1", "c2"]);
    assert!(footer.contains("s sort: managed"), "{footer}");
    model.sort = Sort::In;
    assert_eq!(order(&mut model).0, ["c3", "c1", "c2"]);
}

#[test]
fn more_gpus_than_fit_are_scrolled_and_scrolling_ends_at_both_ends() {
    let mut model = model();
    let mut overview = overview();
    let gpu = overview.status.gpus[0].clone();
    overview.status.gpus = (0..8).map(|n| GpuReport { gpu: GpuId([n; 16]), ..gpu.clone() }).collect();
    model.see(overview);
    let (first, _) = drawn(&mut model, 80, 24);
    assert!(first[1].contains("GPU-00000000"), "{first:#?}");
    assert!(first.join("\n").contains("more lines"), "{first:#?}");
    assert!(first.join("\n").contains("Last changes of plan"));
    model.act(Action::Scroll(i32::MAX));
    let (last, _) = drawn(&mut model, 80, 24);
    assert!(last.join("\n").contains("GPU-07070707") && !last.join("\n").contains("more lines"), "{last:#?}");
    model.act(Action::Scroll(i32::MIN));
    assert_eq!(drawn(&mut model, 80, 24).0, first);
}

#[test]
fn keys_open_and_close_the_help_pause_and_quit() {
    let mut model = model();
    model.act(Action::Help);
    assert!(drawn(&mut model, 80, 24).0.join("\n").contains("next order of clients"));
    assert_eq!(model.act(Action::Quit), Wants::Draw, "closes the help");
    assert!(!drawn(&mut model, 80, 24).0.join("\n").contains("next order of clients"));
    model.act(Action::Pause);
    assert!(model.is_paused() && drawn(&mut model, 80, 24).0[0].ends_with("PAUSED"));
    model.act(Action::Pause);
    assert_eq!(model.act(Action::Nothing), Wants::Nothing);
    assert_eq!(model.act(Action::Quit), Wants::Quit);
}

#[test]
fn a_lost_agent_is_said_and_the_old_picture_stays() {
    let mut model = model();
    model.lose(Link::Lost("no agent is running at /run".to_owned()));
    let (lines, _) = drawn(&mut model, 80, 24);
    assert!(lines[0].contains("NO AGENT") && lines[23].contains("no agent is running"), "{lines:#?}");
    assert!(lines.join("\n").contains("train.py"));
    model.see(overview());
    assert!(drawn(&mut model, 80, 24).0[0].ends_with("live"));
}

#[test]
fn a_picture_for_a_pipe_holds_all_gpus_and_changes_and_no_escape_codes() {
    let text = plain(&model(), 100);
    assert!(text.starts_with("nvshare-agent 0.1.0"), "{text}");
    assert!(text.contains("Last changes of plan") && text.contains("EXCLUSIVE for 12 s"), "{text}");
    assert!(text.lines().all(|line| line.chars().count() <= 100 && !line.ends_with(' ')));
}
