//! Quantities that may be absent, written as people read them and read again to the last digit.

/// A duration that may be absent, as text.
pub(super) mod optional_duration {
    use nvshare_core::{Nanos, quantity::parse_duration};
    use serde::{Deserialize as _, Deserializer, Serializer, de::Error as _};

    #[expect(clippy::ref_option, reason = "serde calls it so")]
    pub(in crate::config) fn serialize<S: Serializer>(
        value: &Option<Nanos>,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        match value {
            Some(value) => serializer.collect_str(&format_args!("{} ms", value.0 as f64 / 1e6)),
            None => serializer.serialize_none(),
        }
    }

    pub(in crate::config) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Option<Nanos>, D::Error> {
        parse_duration(&String::deserialize(deserializer)?).map(Some).map_err(D::Error::custom)
    }
}

/// A size that may be absent, as text.
pub(super) mod optional_bytes {
    use nvshare_core::{Bytes, quantity::optional_size};
    use serde::{Deserializer, Serializer};

    #[expect(clippy::ref_option, reason = "serde calls it so")]
    pub(in crate::config) fn serialize<S: Serializer>(
        value: &Option<Bytes>,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        match value {
            Some(value) => serializer.collect_str(&format_args!("{} MiB", value.0 as f64 / 1_048_576.0)),
            None => serializer.serialize_none(),
        }
    }

    pub(in crate::config) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Option<Bytes>, D::Error> {
        optional_size(deserializer)
    }
}

/// A positive number that may be absent, kept in thousandths.
pub(super) mod optional_milli {
    use nvshare_core::quantity::milli;
    use serde::{Deserialize as _, Deserializer, Serializer, de::Error as _};

    #[expect(clippy::ref_option, clippy::trivially_copy_pass_by_ref, reason = "serde calls it so")]
    pub(in crate::config) fn serialize<S: Serializer>(
        value: &Option<u32>,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        match value {
            Some(value) => serializer.serialize_f64(f64::from(*value) / 1e3),
            None => serializer.serialize_none(),
        }
    }

    pub(in crate::config) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Option<u32>, D::Error> {
        let number = f64::deserialize(deserializer)?;
        milli(number).map(Some).map_err(D::Error::custom)
    }
}

/// A share of 1 that may be absent, kept in thousandths.
pub(super) mod optional_ratio {
    use nvshare_core::quantity::ratio_milli;
    use serde::Deserializer;

    pub(in crate::config) use super::optional_milli::serialize;

    pub(in crate::config) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Option<u32>, D::Error> {
        ratio_milli(deserializer).map(Some)
    }
}
