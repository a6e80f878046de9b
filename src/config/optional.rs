//! Keys that may be unset, and yet are always there: `clearcoat check` prints every key with a value that can be set. The file
//! says "none" by the empty text or by 0; in the code that is `None`, so that no user of a key can forget to ask.

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Text, a path or a factor: empty or 0 is read as `None`.
pub(super) mod empty_is_none {
    use super::*;

    pub(in crate::config) fn deserialize<'de, D, T>(deserializer: D) -> Result<Option<T>, D::Error>
    where
        D: Deserializer<'de>,
        T: Deserialize<'de> + Default + PartialEq,
    {
        let value = T::deserialize(deserializer)?;
        Ok(if value == T::default() { None } else { Some(value) })
    }

    pub(in crate::config) fn serialize<S, T>(value: &Option<T>, serializer: S) -> Result<S::Ok, S::Error>
    where
        S: Serializer,
        T: Serialize + Default,
    {
        match value {
            Some(value) => value.serialize(serializer),
            None => T::default().serialize(serializer),
        }
    }
}

/// A whole number: 0 is read as `None`.
pub(super) mod zero_is_none {
    use std::num::NonZeroU64;

    use serde::de::{Error, Unexpected};

    use super::*;

    pub(in crate::config) fn deserialize<'de, D, T>(deserializer: D) -> Result<Option<T>, D::Error>
    where
        D: Deserializer<'de>,
        T: TryFrom<NonZeroU64>,
    {
        let number = NonZeroU64::new(u64::deserialize(deserializer)?);
        let too_large =
            |number: NonZeroU64| D::Error::invalid_value(Unexpected::Unsigned(number.get()), &"a smaller number");
        number.map(|number| T::try_from(number).map_err(|_| too_large(number))).transpose()
    }

    pub(in crate::config) fn serialize<S, T>(number: &Option<T>, serializer: S) -> Result<S::Ok, S::Error>
    where
        S: Serializer,
        T: Serialize,
    {
        match number {
            Some(number) => number.serialize(serializer),
            None => serializer.serialize_u64(0),
        }
    }
}

/// A duration: 0 is read as `None`.
pub(super) mod zero_duration_is_none {
    use std::time::Duration;

    use super::super::text;
    use super::*;

    pub(in crate::config) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Option<Duration>, D::Error> {
        text::one(deserializer).map(|duration: Duration| Some(duration).filter(|duration| !duration.is_zero()))
    }

    pub(in crate::config) fn serialize<S: Serializer>(
        duration: &Option<Duration>,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        text::write_duration(&duration.unwrap_or_default(), serializer)
    }
}
