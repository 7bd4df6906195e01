//! Answers as text for people.

use std::{collections::BTreeSet, fmt::Write as _};

use nvshare_core::{Bytes, ClientId, ModeOrder};

use crate::{
    clients::client::ClientTotals,
    config::overrides::Overrides,
    driver::PlanEvent,
    observe::{
        fusion::disagreement::Disagreement,
        gaps::Gap,
        source::{SensorState, SensorStatus},
    },
    operator::protocol::{
        ClientsReport, DoctorReport, Done, ExplainReport, GpuReport, GroundsReport, SettingsReport,
        StatusReport,
    },
    text::clean,
};

/// The answer to an order.
pub fn done(done: &Done) -> String {
    let Done { said, clients, persisted } = done;
    let concerns = match clients.len() {
        0 | 1 => String::new(),
        count => format!(" ({count} clients now)"),
    };
    match persisted {
        Some(file) => format!("{said}{concerns}; kept in {}\n", file.display()),
        None => format!("{said}{concerns}; until the agent restarts\n"),
    }
}

/// `nvsharectl settings`.
pub fn settings(report: &SettingsReport) -> String {
    let SettingsReport { in_force, persisted, file, overhead, quantum_max_s } = report;
    let mut text = format!(
        "Hand-overs may cost {} % of the time; the longest derived quantum is {quantum_max_s} s.\n",
        (overhead * 1e3).round() / 10.0
    );
    let rows = settings_rows(in_force, persisted);
    if rows.is_empty() {
        text.push_str("Nothing was changed with `nvsharectl set`: the configuration holds.\n");
    } else {
        text.push_str("Changed with `nvsharectl set`:\n");
        text.push_str(&table(&["what", "now", "after a restart"], &rows));
    }
    let _ = match file {
        Some(file) => writeln!(text, "--persist writes to {}.", file.display()),
        None => writeln!(
            text,
            "--persist has no file: start the agent with --config FILE (then it lies beside it) or --overrides FILE."
        ),
    };
    text
}

/// A line for each thing that differs from the configuration, now or after a restart.
fn settings_rows(now: &Overrides, later: &Overrides) -> Vec<Vec<String>> {
    let mode = |mode: ModeOrder| format!("{mode:?}").to_lowercase();
    let mut rows = Vec::new();
    let mut row = |what: String, now: Option<String>, later: Option<String>| {
        if now.is_some() || later.is_some() {
            rows.push(vec![what, or_dash(now, |text| text), or_dash(later, |text| text)]);
        }
    };
    let both = |read: &dyn Fn(&Overrides) -> Option<String>| (read(now), read(later));
    let (a, b) = both(&|over| over.mode.map(mode));
    row("mode".to_owned(), a, b);
    for gpu in now.gpu.keys().chain(later.gpu.keys()).collect::<BTreeSet<_>>() {
        let (a, b) = both(&|over| over.gpu.get(gpu).map(|over| mode(over.mode)));
        row(format!("mode of {gpu}"), a, b);
    }
    let (a, b) = both(&|over| over.quantum.map(|quantum| quantum.to_string()));
    row("quantum".to_owned(), a, b);
    let (a, b) = both(&|over| over.quantum_max.map(|quantum| quantum.to_string()));
    row("quantum-max".to_owned(), a, b);
    let (a, b) = both(&|over| over.overhead.map(|milli| (f64::from(milli) / 1e3).to_string()));
    row("overhead".to_owned(), a, b);
    for uid in now.user.keys().chain(later.user.keys()).collect::<BTreeSet<_>>() {
        let rule = |over: &Overrides| over.user.get(uid).copied().unwrap_or_default();
        let (a, b) = both(&|over| rule(over).weight.map(|milli| (f64::from(milli) / 1e3).to_string()));
        row(format!("weight of user {uid}"), a, b);
        let (a, b) = both(&|over| rule(over).priority.map(|priority| priority.to_string()));
        row(format!("priority of user {uid}"), a, b);
        let (a, b) = both(&|over| rule(over).memory_limit.map(|limit| limit.to_string()));
        row(format!("limit of user {uid}"), a, b);
    }
    rows
}

/// Columns, each as wide as its widest cell; the last is not padded.
fn table(head: &[&str], rows: &[Vec<String>]) -> String {
    let width = |column: usize| {
        rows.iter()
            .map(|row| row.get(column).map_or(0, |cell| cell.chars().count()))
            .chain([head.get(column).map_or(0, |cell| cell.chars().count())])
            .max()
            .unwrap_or(0)
    };
    let widths: Vec<usize> = (0..head.len()).map(width).collect();
    let mut text = String::new();
    let head: Vec<String> = head.iter().map(ToString::to_string).collect();
    for row in std::iter::once(&head).chain(rows) {
        let mut line = String::from(" ");
        for (cell, width) in row.iter().zip(&widths) {
            line.push(' ');
            line.push_str(cell);
            line.extend(std::iter::repeat_n(' ', width + 1 - cell.chars().count()));
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

fn bytes(count: u64) -> String {
    Bytes(count).to_string()
}

fn or_dash<T>(value: Option<T>, text: impl Fn(T) -> String) -> String {
    value.map_or_else(|| "-".to_owned(), text)
}

fn gpu_head(gpu: &GpuReport) -> String {
    let mut text = format!("{} {}\n", gpu.gpu, gpu.name.as_deref().unwrap_or(""));
    // Writing to a String does not fail.
    let _ = write!(text, "  mode {}", gpu.mode);
    match gpu.order {
        ModeOrder::Auto => {}
        ModeOrder::Shared | ModeOrder::Exclusive => {
            text.push_str(" (ordered; `nvsharectl set mode auto` lets the agent decide)");
        }
    }
    if let Some(reason) = &gpu.reason {
        let _ = write!(text, ": {reason}");
    }
    let _ = write!(
        text,
        "\n  managed {} of {}",
        bytes(gpu.committed_bytes),
        gpu.capacity_bytes
            .map_or_else(|| "an unknown size (no NVML; set [gpu] usable_memory)".to_owned(), bytes)
    );
    if let Some(quantum) = gpu.quantum_s {
        let _ = write!(text, ", quantum {quantum:.2} s");
    }
    if let Some(cost) = gpu.handover_s {
        let _ = write!(text, ", hand-over {cost:.2} s");
    }
    let _ = writeln!(
        text,
        "\n  thrash score {:.2}, stall {}, curable refaults {}, other refaults {}",
        gpu.score,
        or_dash(gpu.stall, |stall| format!("{:.0} %", stall * 100.0)),
        bytes(gpu.curable_refaulted_bytes),
        bytes(gpu.own_refaulted_bytes)
    );
    text
}

/// `nvsharectl status`.
pub fn status(report: &StatusReport) -> String {
    let mut text =
        format!("nvshare-agent {} (pid {}), up {:.0} s\n", report.version, report.pid, report.uptime_s);
    if report.gpus.is_empty() {
        text.push_str("\nNo GPU is known; GPUs appear when NVML works or a program uses one.\n");
    }
    for gpu in &report.gpus {
        text.push('\n');
        text.push_str(&gpu_head(gpu));
        let rows: Vec<Vec<String>> = gpu
            .clients
            .iter()
            .map(|client| {
                vec![
                    client.client.to_string(),
                    clean(&client.name),
                    client.pid.to_string(),
                    client.state.clone(),
                    bytes(client.managed_bytes),
                    bytes(client.device_bytes),
                    format!("{:.1} s", client.granted_s),
                    format!("{:.1} s", client.waited_s),
                ]
            })
            .collect();
        if rows.is_empty() {
            text.push_str("  no clients\n");
        } else {
            let head = ["client", "program", "pid", "state", "managed", "plain", "had the GPU", "waited"];
            text.push_str(&table(&head, &rows));
        }
    }
    text.push_str("\nSensors\n");
    text.push_str(&sensors(&report.sensors));
    text.push_str(&gaps(&report.gaps));
    text
}

/// What is not known here; nothing if everything is.
fn gaps(all: &[Gap]) -> String {
    let mut text = String::new();
    for Gap { unknown, instead, told_by } in all {
        let told_by: Vec<String> = told_by.iter().map(ToString::to_string).collect();
        let _ = writeln!(text, "  {unknown}\n    {instead}; told by {}", told_by.join(" or "));
    }
    if text.is_empty() { text } else { format!("\nNot known here\n{text}") }
}

fn sensors(all: &[SensorStatus]) -> String {
    let rows: Vec<Vec<String>> = all
        .iter()
        .map(|status| {
            let (state, detail) = match &status.state {
                SensorState::Attached(detail) => ("attached", detail),
                SensorState::Unavailable(reason) => ("unavailable", reason),
            };
            vec![status.sensor.to_string(), state.to_owned(), detail.clone()]
        })
        .collect();
    table(&["sensor", "state", "detail"], &rows)
}

/// `nvsharectl clients`.
pub fn clients(report: &ClientsReport) -> String {
    if report.clients.is_empty() {
        return "no clients\n".to_owned();
    }
    let rows: Vec<Vec<String>> = report
        .clients
        .iter()
        .map(|client| {
            let ClientTotals {
                gpu_faults,
                cpu_faults: _,
                bytes_in,
                bytes_out,
                evicted: _,
                evicted_by_others,
            } = client.seen;
            vec![
                client.client.to_string(),
                clean(&client.name),
                client.pid.to_string(),
                client.uid.to_string(),
                bytes(client.managed_bytes),
                bytes(client.device_bytes),
                or_dash(gpu_faults, |count| count.to_string()),
                or_dash(bytes_in, |count| count.to_string()),
                or_dash(bytes_out, |count| count.to_string()),
                or_dash(evicted_by_others, |count| count.to_string()),
            ]
        })
        .collect();
    let head = [
        "client",
        "program",
        "pid",
        "uid",
        "managed",
        "plain",
        "GPU faults",
        "in",
        "out",
        "evicted for others",
    ];
    table(&head, &rows)
}

/// `nvsharectl explain`.
pub fn explain(report: &ExplainReport) -> String {
    let mut text = String::new();
    for (index, gpu) in report.gpus.iter().enumerate() {
        text.push_str(&gpu_head(gpu));
        if let Some(ground) = report.grounds.get(index) {
            text.push_str(&grounds(ground));
        }
    }
    if report.changes.is_empty() {
        text.push_str("The plan has not changed since the agent started.\n");
    } else {
        text.push_str("Changes of plan, oldest first:\n");
    }
    for change in &report.changes {
        text.push_str(&event(change));
        text.push('\n');
    }
    text.push_str(&gaps(&report.gaps));
    text
}

/// What a plan rests on.
fn grounds(grounds: &GroundsReport) -> String {
    let GroundsReport { expected_handover_s, sets, holders, working_set_bytes, reckoned, effect, next } =
        grounds;
    let percent = |share: f64| format!("{:.0} %", share * 100.0);
    let (low, high) = *working_set_bytes;
    let mut text = format!("  clients use {} to {} of their memory together", bytes(low), bytes(high));
    if let Some(cost) = expected_handover_s {
        let _ = write!(text, "; a hand-over is taken to cost {cost:.2} s");
    }
    text.push('\n');
    if !holders.is_empty() {
        let _ = writeln!(text, "  turns: {}; now: {}", sets_text(sets), set_text(holders));
    }
    if let Some((shared, turns)) = *reckoned {
        let (shared, turns) = (percent(shared), percent(turns));
        let _ = writeln!(text, "  reckoned use of the GPU: {shared} side by side, {turns} in turns");
    }
    if let Some((before, after, gain)) = *effect {
        let (before, after) = (percent(before), percent(after));
        let _ = write!(
            text,
            "  time lost to waiting for memory: {before} before the last turns, {after} in them"
        );
        if let Some(gain) = gain {
            let _ = write!(text, "; clients got on {gain:.1} times as fast");
        }
        text.push('\n');
    }
    let _ = writeln!(text, "  next: {next}");
    text
}

fn set_text(set: &[ClientId]) -> String {
    set.iter().map(ToString::to_string).collect::<Vec<_>>().join("+")
}

fn sets_text(sets: &[Vec<ClientId>]) -> String {
    sets.iter().map(|set| set_text(set)).collect::<Vec<_>>().join(", ")
}

/// One change of plan.
pub fn event(event: &PlanEvent) -> String {
    let PlanEvent {
        t_ms,
        gpu,
        from,
        to,
        reason,
        first_refault_ms,
        provisional: _,
        order: _,
        figures: _,
        sets,
    } = event;
    let mut text = format!("{:.3} s  {gpu}  {from} -> {to}: {reason}", t_ms / 1e3);
    if let Some(first) = first_refault_ms {
        let _ = write!(text, "; {:.0} ms after the first refault", t_ms - first);
    }
    if sets.len() > 1 {
        let _ = write!(text, "; turns: {}", sets_text(sets));
    }
    text
}

/// `nvsharectl doctor`.
pub fn doctor(report: &DoctorReport) -> String {
    let mut text = String::new();
    for sensor in &report.sensors {
        let (mark, detail) = match &sensor.status.state {
            SensorState::Attached(detail) => ("ok     ", detail),
            SensorState::Unavailable(reason) => ("missing", reason),
        };
        let _ = writeln!(
            text,
            "{mark}  {:<12} sees {}\n         {detail}",
            sensor.status.sensor.to_string(),
            sensor.sees
        );
        if let Some(advice) = &sensor.advice {
            let _ = writeln!(text, "         to get it: {advice}");
        }
    }
    text.push_str(&gaps(&report.gaps));
    for Disagreement { sensor, with, figure, client, gpu, says, other_says } in &report.disagreements {
        let _ = writeln!(
            text,
            "\nWARNING: {sensor} and {with} disagree on {} of {client} on {gpu}: {says} against {other_says} in the last window; \
             one of them is wrong on this driver, please report it",
            figure.as_str(),
        );
    }
    let _ = writeln!(text, "\n{}", report.verdict);
    for hazard in &report.hazards {
        let _ = writeln!(
            text,
            "known of this driver: {} ({})\n    {}",
            hazard.what, hazard.source, hazard.advice
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up() {
        let rows = vec![vec!["c1".to_owned(), "python".to_owned()], vec!["c10".to_owned(), "x".to_owned()]];
        assert_eq!(table(&["id", "name"], &rows), "  id   name\n  c1   python\n  c10  x\n");
    }

    #[test]
    fn the_grounds_of_a_plan_are_told_in_sentences_and_what_is_not_known_is_left_out() {
        let known = GroundsReport {
            expected_handover_s: Some(1.25),
            sets: vec![vec![ClientId(1), ClientId(2)], vec![ClientId(3)]],
            holders: vec![ClientId(3)],
            working_set_bytes: (1 << 30, 2 << 30),
            reckoned: Some((0.05, 0.9)),
            effect: Some((0.88, 0.04, Some(7.25))),
            next: "nothing".to_owned(),
        };
        let expected = "  clients use 1.00 GiB to 2.00 GiB of their memory together; a hand-over is taken to cost 1.25 s\n  \
                        turns: c1+c2, c3; now: c3\n  \
                        reckoned use of the GPU: 5 % side by side, 90 % in turns\n  \
                        time lost to waiting for memory: 88 % before the last turns, 4 % in them; clients got on 7.2 times as fast\n  \
                        next: nothing\n";
        assert_eq!(grounds(&known), expected);
        let unknown = GroundsReport {
            expected_handover_s: None,
            sets: vec![vec![ClientId(1)]],
            holders: Vec::new(),
            working_set_bytes: (0, 0),
            reckoned: None,
            effect: None,
            next: "nothing".to_owned(),
        };
        assert_eq!(grounds(&unknown), "  clients use 0 B to 0 B of their memory together\n  next: nothing\n");
    }
}
