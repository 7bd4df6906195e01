//! The picture, line by line. Words and position carry the meaning; weight of type helps, colour is not used.

use ratatui::{
    buffer::Buffer,
    layout::Rect,
    style::{Modifier, Style},
    text::{Line, Span},
    widgets::{Block, Clear, Paragraph, Widget as _},
};
use unicode_width::UnicodeWidthChar as _;

use super::{
    model::{Link, Model},
    spark,
};
use crate::{
    driver::PlanEvent,
    operator::{
        history::GpuHistory,
        overview::OverviewReport,
        protocol::{GpuClientReport, GpuReport},
    },
    text::{bytes, clean, or_dash, percent, rate, seconds},
};
use nvshare_core::ModeOrder;

const BOLD: Style = Style::new().add_modifier(Modifier::BOLD);
const DIM: Style = Style::new().add_modifier(Modifier::DIM);
const REVERSED: Style = Style::new().add_modifier(Modifier::REVERSED);
const HEAD: Style = Style::new().add_modifier(Modifier::UNDERLINED);

/// The lowest full bar of bytes per second: less than this is quiet.
const QUIET_RATE: f64 = 1_048_576.0;
/// Changes of plan shown at most.
const CHANGES: usize = 12;
/// The keys, as the help shows them.
const KEYS: [(&str, &str); 7] = [
    ("q, Esc, Ctrl-C", "quit"),
    ("?, h", "show or hide these keys"),
    ("s", "next order of clients"),
    ("p, space", "pause, go on"),
    ("up, down, j, k", "scroll the GPUs"),
    ("PgUp, PgDn", "scroll by ten lines"),
    ("Home, End", "to the top, to the bottom"),
];

/// Draws the whole screen.
pub fn screen(model: &mut Model, area: Rect, buffer: &mut Buffer) {
    if area.width == 0 || area.height < 3 {
        return;
    }
    let width = usize::from(area.width);
    let mut put = |y: u16, line: &Line<'_>| {
        buffer.set_line(area.x, area.y + y, line, area.width);
    };
    put(0, &bar(&title(model), state(model), width));
    put(area.height - 1, &bar(&keys(model), String::new(), width));
    let room = usize::from(area.height - 2);
    let Some(overview) = &model.overview else { return };
    let gpus = gpus(overview, model, width);
    let changes = changes(overview, width);
    // What came before keeps a quarter of the screen at least.
    let below = changes.len().min(room.saturating_sub(gpus.len()).max(room / 4).max(2)).min(room);
    let above = room - below;
    model.scroll = model.scroll.min(gpus.len().saturating_sub(above));
    let hidden = gpus.len().saturating_sub(model.scroll + above);
    for (line, y) in gpus.iter().skip(model.scroll).take(above).zip(1..) {
        put(y, line);
    }
    if hidden > 0 {
        let more = format!("… {} more lines: scroll with the arrow keys", hidden + 1);
        let y = above as u16;
        put(y, &Line::raw(" ".repeat(width)));
        put(y, &Line::styled(more, DIM));
    }
    for (line, y) in changes.iter().take(below).zip(area.height - 1 - below as u16..) {
        put(y, line);
    }
    if model.help {
        help(area, buffer);
    }
}

/// The same as text without an end: one picture for a pipe.
pub fn plain(model: &Model, width: u16) -> String {
    let Some(overview) = &model.overview else { return String::new() };
    let width = usize::from(width.max(40));
    let mut text = title(model) + "\n";
    for line in gpus(overview, model, width).iter().chain(&changes(overview, width)) {
        text.push_str(line.to_string().trim_end());
        text.push('\n');
    }
    text
}

/// A reversed line over the whole width, with something at its right end.
fn bar(left: &str, right: String, width: usize) -> Line<'static> {
    let right = if right.is_empty() { right } else { format!(" {right} ") };
    let left = fit(&format!(" {left}"), width.saturating_sub(right.chars().count()));
    Line::styled(left + &right, REVERSED)
}

fn title(model: &Model) -> String {
    let Some(overview) = &model.overview else { return "nvshare".to_owned() };
    let status = &overview.status;
    let (gpus, clients) = (status.gpus.len(), overview.clients());
    format!(
        "nvshare-agent {}   up {}   {gpus} GPU{}   {clients} client{}",
        status.version,
        seconds(status.uptime_s),
        if gpus == 1 { "" } else { "s" },
        if clients == 1 { "" } else { "s" },
    )
}

fn state(model: &Model) -> String {
    match (&model.link, model.is_paused()) {
        (_, true) => "PAUSED".to_owned(),
        (Link::Live, false) => "live".to_owned(),
        (Link::Lost(_), false) => "NO AGENT: looking for it".to_owned(),
    }
}

fn keys(model: &Model) -> String {
    match &model.link {
        Link::Lost(why) => format!("{why}   q quit"),
        Link::Live => format!("q quit   ? keys   p pause   s sort: {}", model.sort.as_str()),
    }
}

fn help(area: Rect, buffer: &mut Buffer) {
    let wide = KEYS.iter().map(|(keys, _)| keys.len()).max().unwrap_or_default();
    let lines: Vec<Line<'_>> =
        KEYS.iter().map(|(keys, what)| Line::raw(format!(" {keys:<wide$}  {what} "))).collect();
    let width = lines.iter().map(Line::width).max().unwrap_or_default() as u16 + 2;
    let height = lines.len() as u16 + 2;
    let place = Rect {
        x: area.x + area.width.saturating_sub(width) / 2,
        y: area.y + area.height.saturating_sub(height) / 2,
        width: width.min(area.width),
        height: height.min(area.height),
    };
    Clear.render(place, buffer);
    Paragraph::new(lines).block(Block::bordered().title(" keys ")).render(place, buffer);
}

/// `text` in exactly `width` columns, cut with an ellipsis or filled with blanks.
fn fit(text: &str, width: usize) -> String {
    let columns = |c: char| c.width().unwrap_or(0);
    let all: usize = text.chars().map(columns).sum();
    let mut fitted = String::new();
    let mut used = 0;
    let room = if all > width { width.saturating_sub(1) } else { width };
    for c in text.chars() {
        if used + columns(c) > room {
            break;
        }
        used += columns(c);
        fitted.push(c);
    }
    if all > width && width > 0 {
        fitted.push('…');
        used += 1;
    }
    fitted.extend(std::iter::repeat_n(' ', width - used));
    fitted
}

/// `text` in lines of at most `width` columns, broken between words.
fn wrap(text: &str, width: usize) -> Vec<String> {
    let mut lines = vec![String::new()];
    for word in text.split_whitespace() {
        let last = lines.len() - 1;
        if lines[last].is_empty() {
            lines[last].push_str(word);
        } else if lines[last].chars().count() + 1 + word.chars().count() <= width {
            lines[last].push(' ');
            lines[last].push_str(word);
        } else {
            lines.push(word.to_owned());
        }
    }
    lines
}

fn gpus(overview: &OverviewReport, model: &Model, width: usize) -> Vec<Line<'static>> {
    let mut lines = Vec::new();
    if overview.status.gpus.is_empty() {
        lines.push(Line::raw("No GPU is known; GPUs appear when NVML works or a program uses one."));
    }
    for gpu in &overview.status.gpus {
        lines.extend(about(overview, gpu, width));
        lines.extend(figures(overview.history(gpu), gpu, width));
        lines.extend(clients(overview.history(gpu), gpu, model, width));
        lines.push(Line::default());
    }
    lines
}

/// What the GPU is and how it is shared.
fn about(overview: &OverviewReport, gpu: &GpuReport, width: usize) -> Vec<Line<'static>> {
    let name = format!("{}  {}", gpu.name.as_deref().map(clean).unwrap_or_default(), gpu.gpu);
    let mut lines = vec![Line::styled(fit(name.trim_start(), width).trim_end().to_owned(), BOLD)];
    let lasting = overview.in_mode_for(gpu).map(|s| format!(" for {}", seconds(s))).unwrap_or_default();
    let ordered = match gpu.order {
        ModeOrder::Auto => "",
        ModeOrder::Shared | ModeOrder::Exclusive => ", ordered",
    };
    let why = gpu.reason.as_deref().map(|reason| format!(": {}", clean(reason))).unwrap_or_default();
    let mode = gpu.mode.to_uppercase();
    let rest = format!("{lasting}{ordered}{why}");
    let mut wrapped = wrap(&rest, width.saturating_sub(mode.len() + 3)).into_iter();
    let first = wrapped.next().unwrap_or_default();
    let joint = if first.starts_with([':', ',']) { "" } else { " " };
    lines.push(Line::from(vec![
        Span::raw("  "),
        Span::styled(mode, BOLD),
        Span::raw(format!("{joint}{first}")),
    ]));
    lines.extend(wrapped.map(|line| Line::raw(format!("    {line}"))));
    let turn = if gpu.takes_turns() {
        let who: Vec<String> =
            gpu.holders().map(|client| format!("{} {}", client.client, clean(&client.name))).collect();
        let who = if who.is_empty() { "nobody".to_owned() } else { who.join(", ") };
        let waiting = gpu.clients.iter().filter(|client| client.state == "waiting").count();
        format!(
            "  turn: {who}   waiting: {waiting}   quantum {}   hand-over {}",
            or_dash(gpu.quantum_s, seconds),
            or_dash(gpu.handover_s, seconds)
        )
    } else {
        "  everybody runs at once".to_owned()
    };
    lines.push(Line::raw(fit(&turn, width)));
    lines
}

/// Memory, stalls and bytes.
fn figures(history: Option<&GpuHistory>, gpu: &GpuReport, width: usize) -> Vec<Line<'static>> {
    let bars = (width.saturating_sub(42) / 2).clamp(6, 60);
    let known = |of: fn(&GpuHistory) -> &Vec<f64>| {
        history.map(of).map(|rates| rates.iter().copied().map(Some).collect::<Vec<_>>()).unwrap_or_default()
    };
    let (ins, outs, curable) = (
        known(|history| &history.bytes_in),
        known(|history| &history.bytes_out),
        known(|history| &history.curable),
    );
    let peak = |rates: &[Option<f64>]| rates.iter().flatten().copied().fold(QUIET_RATE, f64::max);
    let moved = peak(&ins).max(peak(&outs));
    let now = |rates: &[Option<f64>]| rate(rates.last().copied().flatten().unwrap_or_default());
    let line = |rates: &[Option<f64>], top| spark::line(rates.iter().copied(), top, bars);
    let stall = history.map(|history| history.stall.clone()).unwrap_or_default();
    let full = gpu.committed_ratio();
    // What is there and used, used beyond what is there, there and free.
    let cells = |ratio: f64| (ratio * bars as f64).round() as usize;
    let full_or_none = full.unwrap_or_default();
    let (held, beyond) = (cells(full_or_none.min(1.0) / full_or_none.max(1.0)), cells(full_or_none.min(1.0)));
    let memory = format!("{}{}{}", "█".repeat(held), "▒".repeat(beyond - held), "·".repeat(bars - beyond));
    let of = gpu.capacity_bytes.map_or_else(
        || "an unknown size".to_owned(),
        |capacity| format!("{} ({})", bytes(capacity as f64), percent(full_or_none)),
    );
    vec![
        Line::raw(fit(
            &format!("  memory {memory} {} managed of {of}", bytes(gpu.committed_bytes as f64)),
            width,
        )),
        Line::raw(fit(
            &format!(
                "  stall  {} {:<10} refault {} {:<10}",
                line(&stall, 1.0),
                or_dash(gpu.stall, percent),
                line(&curable, peak(&curable)),
                now(&curable),
            ),
            width,
        )),
        Line::raw(fit(
            &format!(
                "  in     {} {:<10} out     {} {:<10}",
                line(&ins, moved),
                now(&ins),
                line(&outs, moved),
                now(&outs)
            ),
            width,
        )),
    ]
}

/// A column of the clients' table.
struct Column {
    head: &'static str,
    width: usize,
    /// The narrowest screen on which there is room for it.
    from: usize,
    text: fn(&GpuClientReport, Option<&GpuHistory>) -> String,
}

const COLUMNS: [Column; 14] = [
    Column { head: "STATE", width: 8, from: 0, text: |client, _| client.state.clone() },
    Column { head: "MANAGED", width: 8, from: 0, text: |client, _| bytes(client.managed_bytes as f64) },
    Column { head: "USES", width: 9, from: 100, text: |client, _| client.working_set() },
    Column { head: "PLAIN", width: 8, from: 110, text: |client, _| bytes(client.device_bytes as f64) },
    Column {
        head: "LIMIT",
        width: 8,
        from: 130,
        text: |client, _| or_dash(client.limit_bytes.map(|limit| limit as f64), bytes),
    },
    Column { head: "HAD", width: 6, from: 0, text: |client, _| seconds(client.granted_s) },
    Column { head: "WAITED", width: 6, from: 0, text: |client, _| seconds(client.waited_s) },
    Column {
        head: "IN",
        width: 9,
        from: 0,
        text: |client, history| or_dash(history.and_then(|history| history.rates(client).bytes_in), rate),
    },
    Column {
        head: "OUT",
        width: 9,
        from: 0,
        text: |client, history| or_dash(history.and_then(|history| history.rates(client).bytes_out), rate),
    },
    Column { head: "REFAULT", width: 8, from: 100, text: |client, _| bytes(client.refaulted_bytes as f64) },
    Column {
        head: "FOR OTHERS",
        width: 10,
        from: 120,
        text: |client, _| or_dash(client.seen.evicted_by_others.map(|evicted| evicted.0 as f64), bytes),
    },
    Column {
        head: "FAULTS",
        width: 9,
        from: 140,
        text: |client, _| client.seen.gpu_faults.map_or_else(|| "-".to_owned(), |faults| faults.to_string()),
    },
    Column {
        head: "WEIGHT",
        width: 6,
        from: 110,
        text: |client, _| (f64::from(client.weight_milli) / 1e3).to_string(),
    },
    Column { head: "PRIO", width: 5, from: 110, text: |client, _| client.priority.to_string() },
];

fn clients(history: Option<&GpuHistory>, gpu: &GpuReport, model: &Model, width: usize) -> Vec<Line<'static>> {
    if gpu.clients.is_empty() {
        return vec![Line::styled("  no clients", DIM)];
    }
    let shown: Vec<&Column> = COLUMNS.iter().filter(|column| width >= column.from).collect();
    let fixed: usize = 2 + 5 + 8 + shown.iter().map(|column| column.width + 1).sum::<usize>();
    let program = width.saturating_sub(fixed).clamp(6, 40);
    let row = |id: &str, name: &str, pid: &str, cells: &[String]| {
        let mut text = format!("  {} {} {}", fit(id, 4), fit(name, program), fit(pid, 7));
        for (column, cell) in shown.iter().zip(cells) {
            let cell = fit(cell, column.width);
            // Figures stand at the right of their column, so that their digits line up.
            let words = cell.trim_end();
            let blanks = " ".repeat(cell.len() - words.len());
            let (left, right) = if column.head == "STATE" { (words, &*blanks) } else { (&*blanks, words) };
            text.extend([" ", left, right]);
        }
        fit(&text, width)
    };
    let heads: Vec<String> = shown.iter().map(|column| column.head.to_owned()).collect();
    let mut lines = vec![Line::styled(row("ID", "PROGRAM", "PID", &heads), HEAD)];
    let mut sorted: Vec<&GpuClientReport> = gpu.clients.iter().collect();
    sorted.sort_by(|a, b| model.sort.compare(history, a, b));
    for client in sorted {
        let cells: Vec<String> = shown.iter().map(|column| (column.text)(client, history)).collect();
        let text = row(&client.client.to_string(), &clean(&client.name), &client.pid.to_string(), &cells);
        let holds = gpu.takes_turns() && gpu.holders().any(|holder| holder.client == client.client);
        lines.push(Line::styled(text, if holds { BOLD } else { Style::new() }));
    }
    lines
}

/// The last changes of plan, newest first.
fn changes(overview: &OverviewReport, width: usize) -> Vec<Line<'static>> {
    let mut lines = vec![Line::styled(fit("Last changes of plan", width), HEAD)];
    if overview.changes.is_empty() {
        lines.push(Line::raw("  none since the agent started"));
    }
    let several = overview.status.gpus.len() > 1;
    for change in overview.changes.iter().rev().take(CHANGES) {
        let PlanEvent { gpu, from, to, reason, .. } = change;
        let place = if several { format!("{} ", &gpu.to_string()[..12]) } else { String::new() };
        let what = if from == to { format!("still {to}") } else { format!("{from} -> {to}") };
        let when = format!("  {:>7} ago  ", seconds(overview.ago(change)));
        let text = format!("{place}{what}: {}", clean(reason));
        let mut wrapped = wrap(&text, width.saturating_sub(when.len())).into_iter();
        lines.push(Line::raw(when.clone() + &wrapped.next().unwrap_or_default()));
        lines.extend(wrapped.map(|rest| Line::raw(" ".repeat(when.len()) + &rest)));
    }
    lines
}

#[cfg(test)]
mod tests;
