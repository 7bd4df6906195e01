//! A report for a person, on standard error.

use nvshare_core::sim::{Report, Scenario};

fn seconds(value: Option<f64>) -> String {
    value.map_or_else(|| "-".to_owned(), |value| format!("{value:.1} s"))
}

pub(super) fn report(scenario: &Scenario, report: &Report) {
    if let Some(title) = &scenario.title {
        eprintln!("{title}");
    }
    eprintln!(
        "policy {}, seed {}: makespan {}, useful {}, Jain {}, {:.1} GB moved in turns",
        report.policy,
        report.seed,
        seconds(report.makespan_s),
        report.useful_fraction.map_or_else(|| "-".to_owned(), |share| format!("{:.1} %", share * 100.0)),
        report.jain.map_or_else(|| "-".to_owned(), |jain| format!("{jain:.3}")),
        report.handover_bytes as f64 / 1e9,
    );
    for switch in &report.mode_switches {
        eprintln!("  {:>9.1} s  {} -> {}: {}", switch.t_s, switch.from, switch.to, switch.reason);
    }
    if let Some(delay) = report.detection_delay_s {
        eprintln!("  detected {:.0} ms after the first refault", delay * 1000.0);
    }
    let width = report.clients.iter().map(|client| client.name.len()).max().unwrap_or(0).max(6);
    eprintln!("  {:width$}  {:>11}  {:>10}  {:>10}  {:>10}", "client", "finish", "GPU", "stalled", "waited");
    for client in &report.clients {
        eprintln!(
            "  {:width$}  {:>11}  {:>8.1} s  {:>8.1} s  {:>8.1} s",
            client.name,
            seconds(client.finish_s),
            client.gpu_s,
            client.stall_s,
            client.wait_s,
        );
    }
}
