//! What `top` knows and how the user wants to see it.

use std::cmp::Ordering;

use clap::ValueEnum;

use crate::operator::{history::GpuHistory, overview::OverviewReport, protocol::GpuClientReport};

/// The order of clients.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Sort {
    /// By number.
    #[default]
    Client,
    /// By name.
    Program,
    /// Most managed memory first.
    Managed,
    /// Longest with the GPU first.
    Had,
    /// Longest waiting first.
    Waited,
    /// Most brought in lately first.
    In,
}

impl Sort {
    const ALL: [Self; 6] = [Self::Client, Self::Program, Self::Managed, Self::Had, Self::Waited, Self::In];

    /// The column's name.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Client => "client",
            Self::Program => "program",
            Self::Managed => "managed",
            Self::Had => "had",
            Self::Waited => "waited",
            Self::In => "in",
        }
    }

    fn next(self) -> Self {
        let at = Self::ALL.iter().position(|&sort| sort == self).unwrap_or_default();
        Self::ALL[(at + 1) % Self::ALL.len()]
    }

    /// Two clients in this order; equal ones by number.
    pub fn compare(self, history: Option<&GpuHistory>, a: &GpuClientReport, b: &GpuClientReport) -> Ordering {
        let brought = |client: &GpuClientReport| {
            history.and_then(|history| history.rates(client).bytes_in).unwrap_or_default()
        };
        let ordering = match self {
            Self::Client => Ordering::Equal,
            Self::Program => a.name.cmp(&b.name),
            Self::Managed => b.managed_bytes.cmp(&a.managed_bytes),
            Self::Had => b.granted_s.total_cmp(&a.granted_s),
            Self::Waited => b.waited_s.total_cmp(&a.waited_s),
            Self::In => brought(b).total_cmp(&brought(a)),
        };
        ordering.then(a.client.cmp(&b.client))
    }
}

/// How the agent is reached.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Link {
    /// It answers.
    #[default]
    Live,
    /// It does not, for this reason; the picture is an old one.
    Lost(String),
}

/// What a key means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// End.
    Quit,
    /// Show or hide the keys.
    Help,
    /// The next order of clients.
    Sort,
    /// Keep the picture as it is, or go on.
    Pause,
    /// Move down by so many lines.
    Scroll(i32),
    /// No meaning.
    Nothing,
}

/// What follows from a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wants {
    /// End.
    Quit,
    /// Draw again.
    Draw,
    /// Nothing.
    Nothing,
}

/// What is drawn.
#[derive(Clone, Debug, Default)]
pub struct Model {
    /// The last answer.
    pub overview: Option<OverviewReport>,
    /// Whether it is the present.
    pub link: Link,
    /// The order of clients.
    pub sort: Sort,
    /// Lines above the screen; drawing keeps it within what there is.
    pub scroll: usize,
    /// The keys are shown.
    pub help: bool,
    paused: bool,
}

impl Model {
    /// Nothing seen yet.
    pub fn new(sort: Sort) -> Self {
        Self { sort, ..Self::default() }
    }

    /// The agent's answer.
    pub fn see(&mut self, overview: OverviewReport) {
        self.overview = Some(overview);
        self.link = Link::Live;
    }

    /// No answer.
    pub fn lose(&mut self, link: Link) {
        self.link = link;
    }

    /// Whether the picture is to stay as it is.
    pub fn is_paused(&self) -> bool {
        self.paused
    }

    /// A key.
    pub fn act(&mut self, action: Action) -> Wants {
        match action {
            Action::Quit if self.help => self.help = false,
            Action::Quit => return Wants::Quit,
            Action::Help => self.help = !self.help,
            Action::Sort => self.sort = self.sort.next(),
            Action::Pause => self.paused = !self.paused,
            Action::Scroll(lines) => {
                let by = usize::try_from(lines.unsigned_abs()).unwrap_or(usize::MAX);
                self.scroll =
                    if lines < 0 { self.scroll.saturating_sub(by) } else { self.scroll.saturating_add(by) };
            }
            Action::Nothing => return Wants::Nothing,
        }
        Wants::Draw
    }
}
