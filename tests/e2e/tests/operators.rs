//! What operators look at, while programs thrash: `nvsharectl top` in a real terminal, the status page in a browser.

use std::{process::Command, time::Duration};

use anyhow::{Context as _, Result};
use nvshare_tests::{
    Browser, Scene, SimulatorOptions, Terminal, Workload, browser, process::Guarded, skip, wait_until,
};
use serde_json::json;

const PATIENCE: Duration = Duration::from_mins(1);

/// Two programs that do not fit together, at the time when the agent has noticed.
fn thrash() -> Result<(Scene, Vec<Workload>)> {
    let scene = Scene::open(&SimulatorOptions::default())?;
    let programs =
        vec![scene.sweep("left", "600MiB", "60s", &[])?, scene.sweep("right", "600MiB", "60s", &[])?];
    scene.agent.wait_for_mode("exclusive", PATIENCE)?;
    Ok((scene, programs))
}

fn top(scene: &Scene, columns: u16, rows: u16) -> Result<Terminal> {
    let mut command = Command::new(scene.binaries().ctl());
    command.arg("--run-dir").arg(scene.agent.run_dir()).args(["top", "--every", "200ms"]);
    Terminal::start(&mut command, columns, rows)
}

#[test]
fn top_shows_thrash_live_and_gives_the_terminal_back_however_it_ends() -> Result<()> {
    let (mut scene, _programs) = thrash()?;
    let mut terminal = top(&scene, 80, 24)?;
    terminal.wait_for("the picture", PATIENCE, |text| {
        text.contains("EXCLUSIVE")
            && text.contains("turn: c")
            && text.contains("shared -> exclusive: thrash")
            && text.contains("managed of")
            && text.matches("nvshare-work").count() >= 2
    })?;
    // Bytes were moved, and the sparkline is drawn.
    terminal
        .wait_for("bars", PATIENCE, |text| text.contains("MiB/s") && text.contains(['▅', '▆', '▇', '█']))?;
    assert!(!terminal.is_restored()?, "it draws on a screen of its own");
    terminal.press("?")?;
    terminal.wait_for("the keys", PATIENCE, |text| text.contains("next order of clients"))?;
    terminal.press("?s")?;
    terminal.wait_for("the next order", PATIENCE, |text| text.contains("sort: program"))?;
    terminal.press("p")?;
    let paused = terminal.wait_for("the pause", PATIENCE, |text| text.contains("PAUSED"))?;
    terminal.press("p")?;
    terminal.wait_for("news", PATIENCE, |text| text.contains("live") && *text != paused)?;
    terminal.resize(150, 40)?;
    terminal
        .wait_for("wider columns", PATIENCE, |text| text.contains("FOR OTHERS") && text.contains("WEIGHT"))?;
    terminal.press("q")?;
    assert!(terminal.wait(PATIENCE)?.success());
    terminal.wait_until_restored(PATIENCE)?;

    for signal in [libc::SIGTERM, libc::SIGINT, libc::SIGHUP] {
        let mut terminal = top(&scene, 100, 30)?;
        terminal.wait_for("the picture", PATIENCE, |text| text.contains("EXCLUSIVE"))?;
        terminal.signal(signal);
        assert!(terminal.wait(PATIENCE)?.success(), "signal {signal}");
        terminal.wait_until_restored(PATIENCE)?;
    }

    let mut terminal = top(&scene, 80, 24)?;
    terminal.wait_for("the picture", PATIENCE, |text| text.contains("live"))?;
    scene.agent.process().stop(PATIENCE)?;
    terminal
        .wait_for("the loss", PATIENCE, |text| text.contains("NO AGENT") && text.contains("nvshare-work"))?;
    scene.replace_agent()?;
    terminal.wait_for("the new agent", PATIENCE, |text| text.contains("live"))?;
    terminal.press("\u{3}")?;
    assert!(terminal.wait(PATIENCE)?.success());
    terminal.wait_until_restored(PATIENCE)?;
    Ok(())
}

/// The agent's page.
fn url(scene: &Scene) -> Result<String> {
    let status = scene.agent.ctl_json(&["status", "--json"])?;
    Ok(format!("http://{}/", status["metrics"].as_str().context("no HTTP server")?))
}

/// The contrast of the text of an element with the background behind it, as WCAG counts it.
const CONTRAST: &str = "(selector => {
    const rgb = text => text.match(/[\\d.]+/g).map(Number);
    const light = ([r, g, b]) => [r, g, b].map(v => v / 255)
        .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
        .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
    const element = document.querySelector(selector);
    let behind = element;
    while (rgb(getComputedStyle(behind).backgroundColor)[3] === 0) behind = behind.parentElement;
    const [a, b] = [light(rgb(getComputedStyle(element).color)), light(rgb(getComputedStyle(behind).backgroundColor))];
    return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
})";

/// What a hand-over costs is measured here, so the share of time that it may cost decides how long turns are.
#[test]
fn a_larger_overhead_makes_turns_shorter() -> Result<()> {
    let (scene, _programs) = thrash()?;
    let quantum = |scene: &Scene| -> Result<Option<f64>> {
        let gpu = &scene.agent.ctl_json(&["status", "--json"])?["gpus"][0];
        Ok(gpu["quantum_s"].as_f64().filter(|_| gpu["handover_s"].is_f64()))
    };
    assert!(scene.agent.ctl(&["set", "mode", "exclusive"])?.status.success());
    assert!(scene.agent.ctl(&["set", "overhead", "0.002"])?.status.success());
    let long = wait_until("a measured hand-over", PATIENCE, || quantum(&scene))?;
    assert!(scene.agent.ctl(&["set", "overhead", "0.9"])?.status.success());
    let short = wait_until("a measured hand-over", PATIENCE, || quantum(&scene))?;
    assert!(short < long / 4.0, "{short} s is not much shorter than {long} s");
    Ok(())
}

#[test]
fn the_status_page_is_live_readable_by_everybody_and_keeps_to_itself() -> Result<()> {
    let Some(program) = browser::installed() else {
        skip("the status page in a browser", "Chromium is not installed (Debian: chromium)");
        return Ok(());
    };
    let mut scene = Scene::open(&SimulatorOptions::default())?;
    let mut page = Browser::start(&program, 1100, 900)?;
    page.open(&url(&scene)?)?;
    page.wait_for(LIVE, PATIENCE)?;
    // The user opens the glossary, and is somewhere with the keyboard.
    page.evaluate("document.querySelector('details').open = true; document.getElementById('pause').focus()")?;
    // A program with a hostile name, and another that does not fit beside it.
    let _hostile = hostile(&scene)?;
    let _other = scene.sweep("other", "600MiB", "60s", &[])?;
    follows_what_happens(&mut page)?;
    nobody_is_left_out(&mut page)?;
    can_be_read_in_light_and_dark_and_on_a_phone(&mut page)?;
    stands_still_on_request(&mut page)?;
    assert_eq!(page.complaints()?, Vec::<String>::new());
    works_without_scripts(&mut page, &scene)?;

    // An agent that goes is said, and the picture stays.
    page.open(&url(&scene)?)?;
    page.wait_for(LIVE, PATIENCE)?;
    scene.agent.process().stop(PATIENCE)?;
    page.wait_for(
        "document.getElementById('state').textContent.startsWith('No answer from the agent')",
        PATIENCE,
    )?;
    assert_eq!(page.evaluate(CLIENTS)?, 2);
    Ok(())
}

const LIVE: &str = "document.getElementById('state').textContent === 'Live, every second'";
const CLIENTS: &str = "document.querySelectorAll('section tbody tr[data-key]').length";

/// A program whose name is markup.
fn hostile(scene: &Scene) -> Result<Guarded> {
    let file = scene.dir().join("<img src=x onerror=boom>");
    std::fs::copy(scene.binaries().workload(), &file)?;
    let mut command = Command::new(file);
    command
        .args([
            "sweep",
            "--name",
            "hostile",
            "--memory",
            "600MiB",
            "--gpu-work",
            "60s",
            "--sweep-time",
            "10ms",
        ])
        .envs(scene.simulator.environment())
        .env("LD_PRELOAD", scene.binaries().shim())
        .env("NVSHARE_RUN_DIR", scene.agent.run_dir());
    Guarded::spawn("hostile", &mut command, &scene.dir().join("hostile.log"), false)
}

/// All of it without moving the user, and with the hostile name as text.
fn follows_what_happens(page: &mut Browser) -> Result<()> {
    for shown in [
        "document.querySelector('.mode strong').textContent === 'exclusive'",
        &format!("{CLIENTS} === 2"),
        "document.querySelector('tr.holds') !== null",
        "document.querySelector('figure polyline') !== null",
        "document.getElementById('live').innerText.includes('shared → exclusive')",
        "document.getElementById('live').innerText.includes('<img src=x')",
        // The change is said to those who do not see it.
        "document.getElementById('said').textContent.includes('is exclusive: thrash')",
    ] {
        page.wait_for(shown, PATIENCE)?;
    }
    assert_eq!(page.evaluate("document.querySelectorAll('[aria-live]').length")?, 1);
    assert_eq!(page.evaluate("document.getElementById('said').ariaLive")?, "polite");
    assert_eq!(page.evaluate("document.activeElement.id")?, "pause");
    assert_eq!(page.evaluate("document.querySelector('details').open")?, true);
    assert_eq!(page.evaluate("document.querySelectorAll('img, main script').length")?, 0);
    Ok(())
}

/// Landmarks, headings, headers of tables, names of pictures and controls; and nothing from elsewhere.
fn nobody_is_left_out(page: &mut Browser) -> Result<()> {
    for (none, selector) in [
        ("missing landmark", "['header', 'main', 'footer'].filter(e => !document.querySelector(e))"),
        (
            "header of no row or column",
            "[...document.querySelectorAll('th:not([scope])')].map(e => e.outerHTML)",
        ),
        (
            "picture without a name",
            "[...document.querySelectorAll('svg')].filter(e => e.getAttribute('role') !== 'img' || \
             !(e.ariaLabel || document.getElementById(e.getAttribute('aria-labelledby')))).map(e => e.outerHTML)",
        ),
        (
            "section without a name",
            "[...document.querySelectorAll('section')].filter(e => \
             !document.getElementById(e.getAttribute('aria-labelledby'))).map(e => e.outerHTML)",
        ),
        (
            "control without a name",
            "[...document.querySelectorAll('button, a')].filter(e => !e.innerText.trim()).map(e => e.outerHTML)",
        ),
        (
            "doubled id",
            "[...document.querySelectorAll('[id]')].map(e => e.id).filter((id, i, all) => all.indexOf(id) !== i)",
        ),
        (
            "foreign request",
            "performance.getEntriesByType('resource').map(e => e.name).filter(n => !n.startsWith(location.origin))",
        ),
    ] {
        assert_eq!(page.evaluate(selector)?, json!([]), "{none}");
    }
    assert_eq!(page.evaluate("document.querySelectorAll('h1').length")?, 1);
    Ok(())
}

fn can_be_read_in_light_and_dark_and_on_a_phone(page: &mut Browser) -> Result<()> {
    let mut backgrounds = Vec::new();
    for scheme in ["light", "dark"] {
        page.prefer(scheme)?;
        backgrounds.push(page.evaluate("getComputedStyle(document.body).backgroundColor")?);
        for selector in [
            "main p",
            ".mode strong",
            "h2 small",
            "dt",
            "thead th",
            "td",
            "figcaption span",
            "#state",
            "a[href=metrics]",
        ] {
            let contrast = page.evaluate(&format!("{CONTRAST}({selector:?})"))?;
            let enough = contrast.as_f64().is_some_and(|contrast| contrast >= 4.5);
            assert!(enough, "{scheme} {selector}: {contrast}");
        }
    }
    assert_ne!(backgrounds[0], backgrounds[1]);
    page.resize(360, 800)?;
    let wide = "document.documentElement.scrollWidth <= 360 ? [] : \
                [...document.querySelectorAll('main *')].filter(e => e.getBoundingClientRect().right > 360 && \
                !e.parentElement.closest('.scroll')).map(e => e.outerHTML.slice(0, 80))";
    assert_eq!(page.evaluate(wide)?, json!([]), "wider than the screen");
    page.resize(1100, 900)
}

fn stands_still_on_request(page: &mut Browser) -> Result<()> {
    page.evaluate("document.getElementById('pause').click()")?;
    assert_eq!(page.evaluate("document.getElementById('pause').ariaPressed")?, "true");
    page.evaluate("document.getElementById('live').firstElementChild.firstElementChild.textContent = 'old'")?;
    let later =
        "new Promise(done => setTimeout(() => done(document.querySelector('main p').textContent), 1500))";
    assert_eq!(page.evaluate(later)?, "old");
    page.evaluate("document.getElementById('pause').click()")?;
    page.wait_for("document.querySelector('main p').textContent.startsWith('nvshare-agent')", PATIENCE)
}

/// The same picture, standing still and loaded anew.
fn works_without_scripts(page: &mut Browser, scene: &Scene) -> Result<()> {
    page.allow_scripts(false)?;
    page.open(&url(scene)?)?;
    let text = page.evaluate("document.body.innerText")?;
    let text = text.as_str().context("no text")?;
    for said in ["exclusive", "<img src=x", "A picture of one moment"] {
        assert!(text.contains(said), "no {said} in {text}");
    }
    assert_eq!(page.evaluate("document.querySelector('meta[http-equiv=refresh]') !== null")?, true);
    page.allow_scripts(true)
}

#[test]
fn a_picture_of_the_terminal_holds_its_text_and_styles() {
    let mut command = Command::new("printf");
    command.arg("\\033[1mbold\\033[0m <&> plain\\n\\033[7mreversed\\033[0m");
    let mut terminal = Terminal::start(&mut command, 20, 3).unwrap();
    terminal.wait_for("the text", PATIENCE, |text| text.contains("reversed")).unwrap();
    assert!(terminal.wait(PATIENCE).unwrap().success());
    let svg = nvshare_tests::terminal::to_svg(&terminal.screen());
    assert!(svg.contains("font-weight=\"bold\">bold</text>"), "{svg}");
    assert!(svg.contains("&lt;&amp;> plain") && svg.contains("fill=\"#dfe5ec\"/>"), "{svg}");
}
