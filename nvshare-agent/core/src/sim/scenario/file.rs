//! The file as it is written: every key optional unless nothing can stand for it, no other key accepted.

use serde::{Deserialize, Deserializer, de::Error as _};
use toml::Spanned;

use super::{
    Access, Scenario, ScenarioError,
    check::{self, Problem},
};
use crate::{
    quantity::{parse_rate, parse_size, parse_time},
    toml_text,
    units::{Bytes, Nanos},
};

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct File {
    pub(super) title: Option<String>,
    #[serde(default)]
    pub(super) gpu: Gpus,
    #[serde(default)]
    pub(super) client: Vec<Spanned<Client>>,
    #[serde(default)]
    pub(super) event: Vec<Spanned<Event>>,
}

/// One `[gpu]` or several `[[gpu]]`.
#[derive(Default)]
pub(super) struct Gpus(pub(super) Vec<Spanned<Gpu>>);

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Gpu {
    pub(super) preset: Option<String>,
    pub(super) memory: Option<Size>,
    pub(super) link: Option<Rate>,
    pub(super) fault_in: Option<Rate>,
    pub(super) first_touch: Option<Rate>,
    pub(super) evict: Option<Rate>,
    pub(super) first_out: Option<Rate>,
    pub(super) prefetch_in: Option<Rate>,
    pub(super) prefetch_out: Option<Rate>,
    pub(super) protected_out: Option<Rate>,
    pub(super) duplex: Option<f64>,
    pub(super) in_flight: Option<Time>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Client {
    pub(super) name: String,
    pub(super) count: Option<u32>,
    pub(super) start: Option<Time>,
    pub(super) allocated: Option<Size>,
    pub(super) working_set: Option<Size>,
    pub(super) gpu_work: Time,
    pub(super) duty: Option<f64>,
    pub(super) burst: Option<Time>,
    pub(super) pause: Option<Time>,
    pub(super) pause_every: Option<Time>,
    pub(super) sweep: Option<Time>,
    pub(super) access: Option<AccessName>,
    pub(super) weight: Option<f64>,
    pub(super) priority: Option<i32>,
    pub(super) gpus: Option<Vec<usize>>,
    pub(super) shim: Option<bool>,
    #[serde(default)]
    pub(super) phase: Vec<Spanned<Phase>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Phase {
    pub(super) after: Time,
    pub(super) working_set: Option<Size>,
    pub(super) sweep: Option<Time>,
    pub(super) access: Option<AccessName>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Event {
    pub(super) at: Time,
    #[serde(rename = "do")]
    pub(super) act: ActName,
    pub(super) client: Option<String>,
    pub(super) value: Option<f64>,
}

#[derive(Clone, Copy, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum AccessName {
    Cyclic,
    Random,
    Stream,
}

impl From<AccessName> for Access {
    fn from(name: AccessName) -> Self {
        match name {
            AccessName::Cyclic => Self::Cyclic,
            AccessName::Random => Self::Random,
            AccessName::Stream => Self::Stream,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum ActName {
    Kill,
    StopAgent,
    StartAgent,
    SetWeight,
}

#[derive(Clone, Copy)]
pub(super) struct Time(pub(super) Nanos);
#[derive(Clone, Copy)]
pub(super) struct Size(pub(super) Bytes);
#[derive(Clone, Copy)]
pub(super) struct Rate(pub(super) Bytes);

macro_rules! quantity {
    ($name:ident, $parse:ident) => {
        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                $parse(&String::deserialize(deserializer)?).map(Self).map_err(D::Error::custom)
            }
        }
    };
}
quantity!(Time, parse_time);
quantity!(Size, parse_size);
quantity!(Rate, parse_rate);

impl<'de> Deserialize<'de> for Gpus {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        // An untagged enum would hide which key of the table is wrong.
        let value = Spanned::<toml::Value>::deserialize(deserializer)?;
        let span = value.span();
        let one = |value: toml::Value| {
            value.try_into().map(|gpu| Spanned::new(span.clone(), gpu)).map_err(D::Error::custom)
        };
        match value.into_inner() {
            toml::Value::Array(gpus) => gpus.into_iter().map(one).collect::<Result<_, _>>().map(Self),
            gpu => one(gpu).map(|gpu| Self(vec![gpu])),
        }
    }
}

/// Reads and checks.
pub(super) fn parse(name: &str, text: &str) -> Result<Scenario, ScenarioError> {
    let fail = |at: usize, message: String| {
        let (line, column) = toml_text::place(text, at);
        ScenarioError { name: name.to_owned(), line, column, message }
    };
    let file: File = toml::from_str(text).map_err(|error| {
        let at = error.span().map_or(0, |span| span.start);
        fail(at, toml_text::explain(text, at, error.message()))
    })?;
    check::scenario(file).map_err(|Problem { at, message }| fail(at, message))
}
