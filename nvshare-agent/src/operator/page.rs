//! The status page: one file without anything from outside.
//!
//! The agent draws the picture as HTML, here and nowhere else. A browser without scripts shows it as it came; one with
//! scripts fetches it anew each second and changes what differs. The policy that travels with the page lets nothing run
//! but the script in it, so a hostile program's name is text twice over.

use std::{fmt::Write as _, sync::OnceLock};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use nvshare_core::ModeOrder;
use sha2::{Digest as _, Sha256};

use super::{
    history::GpuHistory,
    overview::OverviewReport,
    protocol::{GpuClientReport, GpuReport},
};
use crate::{
    driver::PlanEvent,
    observe::source::{SensorState, SensorStatus},
    text::{bytes, clean, or_dash, percent, rate, seconds},
};

const PAGE: &str = include_str!("page.html");

/// Seconds that the charts span.
const SPAN: usize = 120;
/// Less than this, in bytes per second, is drawn as quiet.
const QUIET_RATE: f64 = 1_048_576.0;

/// The whole page.
pub fn page(overview: &OverviewReport) -> String {
    PAGE.replacen("{{live}}", &live(overview), 1)
}

/// What browsers are to allow the page: its own style and script by their hashes, and to fetch from the agent.
pub fn policy() -> &'static str {
    static POLICY: OnceLock<String> = OnceLock::new();
    POLICY.get_or_init(|| {
        let hash = |tag: &str| {
            let inside = PAGE.split_once(&format!("<{tag}>")).and_then(|(_, rest)| rest.split_once(&format!("</{tag}>")));
            let text = inside.map_or("", |(text, _)| text);
            STANDARD.encode(Sha256::digest(text.as_bytes()))
        };
        format!(
            "default-src 'none'; style-src 'sha256-{}'; script-src 'sha256-{}'; connect-src 'self'; img-src data:; \
             base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
            hash("style"),
            hash("script")
        )
    })
}

/// A text of somebody else's, as it can stand in HTML.
fn escape(text: &str) -> String {
    clean(text).chars().fold(String::with_capacity(text.len()), |mut escaped, c| {
        match c {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            '\'' => escaped.push_str("&#39;"),
            other => escaped.push(other),
        }
        escaped
    })
}

/// The part that changes.
pub fn live(overview: &OverviewReport) -> String {
    let status = &overview.status;
    let announce = status.gpus.iter().map(announcement).collect::<Vec<_>>().join(". ");
    let mut html = format!(
        "<div data-announce=\"{}\"><p>nvshare-agent {}, up {}: {} and {}</p>",
        escape(&announce),
        escape(&status.version),
        seconds(status.uptime_s),
        count(status.gpus.len(), "GPU"),
        count(overview.clients(), "client"),
    );
    if status.gpus.is_empty() {
        html.push_str(
            "<section><h2>No GPU</h2><p>GPUs appear when NVML works or a program uses one.</p></section>",
        );
    }
    for gpu in &status.gpus {
        gpu_section(&mut html, overview, gpu);
    }
    changes(&mut html, overview);
    sensors(&mut html, &status.sensors);
    html.push_str("</div>");
    html
}

/// What a screen reader is told when it changes.
fn announcement(gpu: &GpuReport) -> String {
    let name = gpu.name.as_deref().unwrap_or("GPU");
    let reason = gpu.reason.as_deref().map(|reason| format!(": {reason}")).unwrap_or_default();
    format!("{name} is {}{reason}", gpu.mode)
}

fn count(count: usize, what: &str) -> String {
    format!("{count} {what}{}", if count == 1 { "" } else { "s" })
}

// Writing to a String does not fail.
fn gpu_section(html: &mut String, overview: &OverviewReport, gpu: &GpuReport) {
    let id = gpu.gpu.to_string();
    let ordered = match gpu.order {
        ModeOrder::Auto => "",
        ModeOrder::Shared | ModeOrder::Exclusive => " <span class=\"order\">by order of an operator</span>",
    };
    let lasting = overview.in_mode_for(gpu).map(|s| format!(" for {}", seconds(s))).unwrap_or_default();
    let reason = gpu.reason.as_deref().map(|reason| format!(": {}", escape(reason))).unwrap_or_default();
    let _ = write!(
        html,
        "<section data-key=\"{id}\" aria-labelledby=\"{id}\"><h2 id=\"{id}\">{} <small>{id}</small></h2>\
         <p class=\"mode{}\"><strong>{}</strong>{ordered}{lasting}{reason}</p>",
        escape(gpu.name.as_deref().unwrap_or("GPU")),
        if gpu.takes_turns() { " turns" } else { "" },
        escape(&gpu.mode),
    );
    facts(html, gpu);
    memory(html, gpu);
    if let Some(history) = overview.history(gpu) {
        charts(html, history);
    }
    clients(html, gpu, overview.history(gpu));
    html.push_str("</section>");
}

fn facts(html: &mut String, gpu: &GpuReport) {
    let turn = if gpu.takes_turns() {
        let who: Vec<String> =
            gpu.holders().map(|client| format!("{} {}", client.client, client.name)).collect();
        if who.is_empty() { "nobody’s".to_owned() } else { who.join(", ") }
    } else {
        "everybody at once".to_owned()
    };
    let quantum = gpu.takes_turns().then(|| ("Quantum", or_dash(gpu.quantum_s, seconds)));
    let facts = [("Turn", turn)].into_iter().chain(quantum).chain([
        ("Hand-over costs", or_dash(gpu.handover_s, seconds)),
        ("Evidence of thrash (1 acts)", format!("{:.2}", gpu.score)),
        ("Refaulted so far", bytes(gpu.curable_refaulted_bytes as f64)),
    ]);
    html.push_str("<dl class=\"facts\">");
    for (name, value) in facts {
        let _ = write!(html, "<div><dt>{name}</dt><dd>{}</dd></div>", escape(&value));
    }
    html.push_str("</dl>");
}

/// Each client's memory in a row, against what the GPU has.
fn memory(html: &mut String, gpu: &GpuReport) {
    let capacity = gpu.capacity_bytes.unwrap_or(0);
    let whole = capacity.max(gpu.committed_bytes).max(1) as f64;
    let of = gpu.capacity_bytes.map_or_else(
        || "an unknown size".to_owned(),
        |capacity| {
            let full = gpu.committed_ratio().map(|full| format!(" ({})", percent(full))).unwrap_or_default();
            format!("{}{full}", bytes(capacity as f64))
        },
    );
    let said = format!("{} managed of {of}", bytes(gpu.committed_bytes as f64));
    let mark = if capacity > 0 { " <small>The dashed line marks what the GPU can hold.</small>" } else { "" };
    let _ = write!(
        html,
        "<p><span id=\"m-{0}\">{said}</span>.{mark}</p><svg class=\"memory\" viewBox=\"0 0 1000 20\" preserveAspectRatio=\"none\" role=\"img\" \
         aria-labelledby=\"m-{0}\">",
        gpu.gpu
    );
    let mut x = 0.0;
    for client in &gpu.clients {
        let width = client.managed_bytes as f64 / whole * 1000.0;
        let class = if holds(gpu, client) { "part holds" } else { "part" };
        let _ = write!(
            html,
            "<rect class=\"{class}\" x=\"{x:.1}\" y=\"2\" width=\"{:.1}\" height=\"16\"><title>{} {}: {}</title></rect>",
            (width - 3.0).max(0.0),
            client.client,
            escape(&client.name),
            bytes(client.managed_bytes as f64)
        );
        x += width;
    }
    if capacity > 0 {
        let end = capacity as f64 / whole * 1000.0;
        let _ = write!(
            html,
            "<rect class=\"there\" x=\"0\" y=\"0\" width=\"{end:.1}\" height=\"20\"/>\
             <line class=\"end\" x1=\"{end:.1}\" x2=\"{end:.1}\" y1=\"0\" y2=\"20\"/>"
        );
    }
    html.push_str("</svg>");
}

fn holds(gpu: &GpuReport, client: &GpuClientReport) -> bool {
    gpu.takes_turns() && gpu.holders().any(|holder| holder.client == client.client)
}

fn charts(html: &mut String, history: &GpuHistory) {
    let known = |rates: &[f64]| rates.iter().copied().map(Some).collect::<Vec<_>>();
    let peak = |values: &[Option<f64>]| values.iter().flatten().copied().fold(0.0, f64::max);
    let (ins, outs) = (known(&history.bytes_in), known(&history.bytes_out));
    let moved = peak(&ins).max(peak(&outs)).max(QUIET_RATE);
    let curable = known(&history.curable);
    html.push_str("<div class=\"charts\">");
    chart(html, "Stall", &history.stall, 1.0, percent);
    chart(html, "Refaulted", &curable, peak(&curable).max(QUIET_RATE), rate);
    chart(html, "Brought in", &ins, moved, rate);
    chart(html, "Moved out", &outs, moved, rate);
    html.push_str("</div>");
}

/// The last two minutes of one figure, the present on the right.
fn chart(html: &mut String, name: &str, values: &[Option<f64>], top: f64, text: fn(f64) -> String) {
    let now = or_dash(values.last().copied().flatten(), text);
    let peak = or_dash(values.iter().flatten().copied().reduce(f64::max), text);
    let _ = write!(
        html,
        "<figure><figcaption>{name}: <b>{now}</b> <span>peak {peak}</span></figcaption>\
         <svg viewBox=\"0 0 {} 40\" preserveAspectRatio=\"none\" role=\"img\" aria-label=\"{name} in the last two minutes: \
         {now} now, {peak} at most\">",
        SPAN - 1
    );
    let first = SPAN - values.len().min(SPAN);
    let shown = &values[values.len().saturating_sub(SPAN)..];
    let mut run: Vec<(usize, f64)> = Vec::new();
    let points = shown.iter().enumerate().map(|(index, value)| (first + index, *value));
    for (x, value) in points.chain([(SPAN, None)]) {
        if let Some(value) = value {
            run.push((x, 39.0 - (value / top).clamp(0.0, 1.0) * 37.0));
        } else if let (Some(&(begin, _)), Some(&(end, _))) = (run.first(), run.last()) {
            let points: Vec<String> = run.iter().map(|(x, y)| format!("{x},{y:.1}")).collect();
            let line = points.join(" ");
            let _ = write!(
                html,
                "<polygon class=\"area\" points=\"{begin},40 {line} {end},40\"/><polyline class=\"top\" points=\"{line}\"/>"
            );
            run.clear();
        }
    }
    html.push_str("</svg></figure>");
}

fn clients(html: &mut String, gpu: &GpuReport, history: Option<&GpuHistory>) {
    if gpu.clients.is_empty() {
        html.push_str("<p>No clients.</p>");
        return;
    }
    html.push_str(
        "<div class=\"scroll\" tabindex=\"0\" role=\"region\" aria-label=\"Clients\"><table>\
         <caption>Clients; ▶ has the turn. In and out: moved to and from the GPU. For others: pushed out to \
         make room for other programs.</caption>\
         <thead><tr><th scope=\"col\">Client<th scope=\"col\">Program<th scope=\"col\">PID<th scope=\"col\">State\
         <th scope=\"col\" class=\"number\">Managed<th scope=\"col\" class=\"number\">Uses<th scope=\"col\" class=\"number\">Plain\
         <th scope=\"col\" class=\"number\">Limit<th scope=\"col\" class=\"number\">Weight\
         <th scope=\"col\" class=\"number\">Had GPU<th scope=\"col\" class=\"number\">Waited\
         <th scope=\"col\" class=\"number\">In<th scope=\"col\" class=\"number\">Out\
         <th scope=\"col\" class=\"number\">Refaulted<th scope=\"col\" class=\"number\">For others</tr></thead><tbody>",
    );
    for client in &gpu.clients {
        let rates = history.map(|history| history.rates(client)).unwrap_or_default();
        let numbers = [
            bytes(client.managed_bytes as f64),
            client.working_set(),
            bytes(client.device_bytes as f64),
            or_dash(client.limit_bytes.map(|limit| limit as f64), bytes),
            (f64::from(client.weight_milli) / 1e3).to_string(),
            seconds(client.granted_s),
            seconds(client.waited_s),
            or_dash(rates.bytes_in, rate),
            or_dash(rates.bytes_out, rate),
            bytes(client.refaulted_bytes as f64),
            or_dash(client.seen.evicted_by_others.map(|evicted| evicted.0 as f64), bytes),
        ];
        let numbers = numbers.map(|number| format!("<td class=\"number\">{number}</td>")).concat();
        let turn = if holds(gpu, client) { " class=\"holds\"" } else { "" };
        let _ = write!(
            html,
            "<tr data-key=\"{0}\"{turn}><th scope=\"row\">{0}</th><td class=\"name\">{1}</td><td>{2}</td><td>{3}</td>{numbers}</tr>",
            client.client,
            escape(&client.name),
            client.pid,
            escape(&client.state),
        );
    }
    html.push_str("</tbody></table></div>");
}

fn changes(html: &mut String, overview: &OverviewReport) {
    html.push_str("<section aria-labelledby=\"changes\"><h2 id=\"changes\">Last changes of plan</h2>");
    if overview.changes.is_empty() {
        html.push_str("<p>None since the agent started.</p>");
    }
    html.push_str("<ol>");
    let several = overview.status.gpus.len() > 1;
    for change in overview.changes.iter().rev() {
        let PlanEvent { gpu, from, to, reason, .. } = change;
        let place = if several { format!("{gpu} ") } else { String::new() };
        let what = if from == to { format!("still {to}") } else { format!("{from} → {to}") };
        let _ = write!(
            html,
            "<li><span>{} ago</span><span>{place}<b>{}</b>: {}</span></li>",
            seconds(overview.ago(change)),
            escape(&what),
            escape(reason)
        );
    }
    html.push_str("</ol></section>");
}

fn sensors(html: &mut String, sensors: &[SensorStatus]) {
    html.push_str(
        "<section aria-labelledby=\"sensors\"><h2 id=\"sensors\">Sensors</h2><div class=\"scroll\" tabindex=\"0\" role=\"region\" aria-label=\"Sensors\"><table><thead><tr>\
         <th scope=\"col\">Sensor<th scope=\"col\">State<th scope=\"col\">Detail</tr></thead><tbody>",
    );
    for sensor in sensors {
        let (state, detail) = match &sensor.state {
            SensorState::Attached(detail) => ("attached", detail),
            SensorState::Unavailable(reason) => ("unavailable", reason),
        };
        let _ = write!(
            html,
            "<tr><th scope=\"row\">{}</th><td>{state}</td><td>{}</td></tr>",
            sensor.sensor,
            escape(detail)
        );
    }
    html.push_str("</tbody></table></div></section>");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_programs_name_cannot_inject_markup() {
        assert_eq!(escape("<script>'&\"\u{202e}"), "&lt;script&gt;&#39;&amp;&quot;?");
    }

    #[test]
    fn the_policy_names_the_style_and_the_script_that_are_there() {
        assert_eq!(PAGE.matches("<style>").count(), 1);
        assert_eq!(PAGE.matches("<script>").count(), 1);
        assert!(!PAGE.contains("style=\""), "a style in an attribute is not allowed by the policy");
        // The hash of nothing: a tag that was not found.
        assert!(!policy().contains("47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU="), "{}", policy());
        assert!(PAGE.contains("{{live}}") && !policy().contains("unsafe"));
    }

    #[test]
    fn a_chart_leaves_gaps_where_nothing_is_known() {
        let mut html = String::new();
        chart(&mut html, "Stall", &[Some(0.0), Some(1.0), None, Some(0.5)], 1.0, percent);
        assert!(html.contains("points=\"116,39.0 117,2.0\""), "{html}");
        assert!(html.contains("points=\"119,20.5\""), "{html}");
        assert!(
            html.contains("aria-label=\"Stall in the last two minutes: 50 % now, 100 % at most\""),
            "{html}"
        );
    }
}
