//! Registering metrics while writing down what was registered.

use prometheus::{
    CounterVec, GaugeVec, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge,
    IntGaugeVec, Opts, Registry, core::Collector, process_collector::ProcessCollector,
};

/// What a metric is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Only rises.
    Counter,
    /// Goes both ways.
    Gauge,
    /// Counts observations by size.
    Histogram,
}

impl Kind {
    /// The name in the documentation.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Counter => "counter",
            Self::Gauge => "gauge",
            Self::Histogram => "histogram",
        }
    }
}

/// One metric.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Family {
    /// Its name.
    pub name: String,
    /// What it is.
    pub kind: Kind,
    /// The names of its labels.
    pub labels: Vec<String>,
    /// What it says.
    pub help: String,
}

#[derive(Default)]
pub(super) struct Catalogue {
    registry: Registry,
    families: Vec<Family>,
}

impl Catalogue {
    fn add<C: Collector + Clone + 'static>(
        &mut self,
        kind: Kind,
        collector: C,
    ) -> Result<C, prometheus::Error> {
        for desc in collector.desc() {
            self.families.push(Family {
                name: desc.fq_name.clone(),
                kind,
                labels: desc.variable_labels.clone(),
                help: desc.help.clone(),
            });
        }
        self.registry.register(Box::new(collector.clone()))?;
        Ok(collector)
    }

    pub(super) fn counter(
        &mut self,
        name: &str,
        help: &str,
        labels: &[&str],
    ) -> Result<IntCounterVec, prometheus::Error> {
        self.add(Kind::Counter, IntCounterVec::new(Opts::new(name, help), labels)?)
    }

    pub(super) fn seconds(
        &mut self,
        name: &str,
        help: &str,
        labels: &[&str],
    ) -> Result<CounterVec, prometheus::Error> {
        self.add(Kind::Counter, CounterVec::new(Opts::new(name, help), labels)?)
    }

    pub(super) fn plain_counter(&mut self, name: &str, help: &str) -> Result<IntCounter, prometheus::Error> {
        self.add(Kind::Counter, IntCounter::new(name, help)?)
    }

    pub(super) fn gauge(
        &mut self,
        name: &str,
        help: &str,
        labels: &[&str],
    ) -> Result<IntGaugeVec, prometheus::Error> {
        self.add(Kind::Gauge, IntGaugeVec::new(Opts::new(name, help), labels)?)
    }

    pub(super) fn plain_gauge(&mut self, name: &str, help: &str) -> Result<IntGauge, prometheus::Error> {
        self.add(Kind::Gauge, IntGauge::new(name, help)?)
    }

    pub(super) fn float(
        &mut self,
        name: &str,
        help: &str,
        labels: &[&str],
    ) -> Result<GaugeVec, prometheus::Error> {
        self.add(Kind::Gauge, GaugeVec::new(Opts::new(name, help), labels)?)
    }

    pub(super) fn histogram(
        &mut self,
        name: &str,
        help: &str,
        labels: &[&str],
        buckets: Vec<f64>,
    ) -> Result<HistogramVec, prometheus::Error> {
        self.add(Kind::Histogram, HistogramVec::new(HistogramOpts::new(name, help).buckets(buckets), labels)?)
    }

    pub(super) fn plain_histogram(
        &mut self,
        name: &str,
        help: &str,
        buckets: Vec<f64>,
    ) -> Result<Histogram, prometheus::Error> {
        self.add(Kind::Histogram, Histogram::with_opts(HistogramOpts::new(name, help).buckets(buckets))?)
    }

    /// Adds the process's own metrics and gives everything away.
    pub(super) fn finish(mut self) -> Result<(Registry, Vec<Family>), prometheus::Error> {
        let process = ProcessCollector::for_self();
        for desc in process.desc() {
            let kind = if desc.fq_name.ends_with("_total") { Kind::Counter } else { Kind::Gauge };
            self.families.push(Family {
                name: desc.fq_name.clone(),
                kind,
                labels: desc.variable_labels.clone(),
                help: desc.help.clone(),
            });
        }
        self.registry.register(Box::new(process))?;
        Ok((self.registry, self.families))
    }
}
