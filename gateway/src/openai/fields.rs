//! Typed reading of a JSON object's fields. null counts as absent; every error names its field.

use std::ops::RangeInclusive;

use serde_json::{Map, Value};

use crate::error::ApiError;

/// The fields of a request body.
#[derive(Clone, Copy)]
pub(crate) struct Fields<'a>(pub &'a Map<String, Value>);

impl<'a> Fields<'a> {
    pub(crate) fn get(self, name: &str) -> Option<&'a Value> {
        self.0.get(name).filter(|v| !v.is_null())
    }

    pub(crate) fn boolean(self, name: &str) -> Result<Option<bool>, ApiError> {
        self.typed(name, "a boolean", Value::as_bool)
    }

    /// A boolean that is `default` when absent.
    pub(crate) fn flag(self, name: &str, default: bool) -> Result<bool, ApiError> {
        Ok(self.boolean(name)?.unwrap_or(default))
    }

    pub(crate) fn text(self, name: &str) -> Result<Option<&'a str>, ApiError> {
        self.typed(name, "a string", Value::as_str)
    }

    pub(crate) fn object(self, name: &str) -> Result<Option<&'a Map<String, Value>>, ApiError> {
        self.typed(name, "an object", Value::as_object)
    }

    pub(crate) fn list(self, name: &str) -> Result<Option<&'a [Value]>, ApiError> {
        self.typed(name, "an array", |v| v.as_array().map(Vec::as_slice))
    }

    pub(crate) fn number(self, name: &str, range: RangeInclusive<f64>) -> Result<Option<f64>, ApiError> {
        let Some(value) = self.typed(name, "a number", Value::as_f64)? else { return Ok(None) };
        if !range.contains(&value) {
            let message = format!("'{name}' must be between {} and {}, got {value}", range.start(), range.end());
            return Err(ApiError::invalid(name, message));
        }
        Ok(Some(value))
    }

    pub(crate) fn integer(self, name: &str, range: RangeInclusive<i64>) -> Result<Option<i64>, ApiError> {
        let Some(value) = self.typed(name, "an integer", integer)? else { return Ok(None) };
        if !range.contains(&value) {
            let message = format!("'{name}' must be between {} and {}, got {value}", range.start(), range.end());
            return Err(ApiError::invalid(name, message));
        }
        Ok(Some(value))
    }

    /// A list of at most `count_max` token ids below `vocab`.
    pub(crate) fn tokens(self, name: &str, vocab: u32, count_max: usize) -> Result<Option<Vec<u32>>, ApiError> {
        let Some(list) = self.list(name)? else { return Ok(None) };
        if list.len() > count_max {
            return Err(ApiError::invalid(name, format!("'{name}' may have at most {count_max} entries")));
        }
        tokens(list, name, vocab).map(Some)
    }

    fn typed<T>(self, name: &str, kind: &str, read: impl Fn(&'a Value) -> Option<T>) -> Result<Option<T>, ApiError> {
        let Some(value) = self.get(name) else { return Ok(None) };
        match read(value) {
            Some(value) => Ok(Some(value)),
            None => Err(ApiError::invalid(name, format!("'{name}' must be {kind}"))),
        }
    }
}

/// Token ids below `vocab`; `name` is the field to blame.
pub(crate) fn tokens(list: &[Value], name: &str, vocab: u32) -> Result<Vec<u32>, ApiError> {
    let token = |value: &Value| {
        let id = value.as_u64().and_then(|id| u32::try_from(id).ok()).filter(|id| *id < vocab);
        id.ok_or_else(|| ApiError::invalid(name, format!("'{name}' has an entry that is no token id below {vocab}")))
    };
    list.iter().map(token).collect()
}

/// An integer; clients of untyped languages also send `16.0`.
fn integer(value: &Value) -> Option<i64> {
    let whole = |f: &f64| f.fract() == 0.0 && f.abs() < 9.0e15;
    value.as_i64().or_else(|| value.as_f64().filter(whole).map(|f| f as i64))
}
