//! One measured figure, as `--json` prints it: an object a line.

use serde::Serialize;

use crate::out::sayln;

/// A number with its unit and, where there is one, the target it must reach.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(crate) struct Figure {
    pub(crate) name: String,
    pub(crate) value: f64,
    pub(crate) unit: &'static str,
    pub(crate) target: Option<f64>,
    pub(crate) ok: bool,
}

impl Figure {
    /// A figure without a target.
    pub(crate) fn new(name: impl Into<String>, value: f64, unit: &'static str) -> Figure {
        Figure { name: name.into(), value, unit, target: None, ok: true }
    }

    /// A figure that must reach `target`.
    pub(crate) fn at_least(name: impl Into<String>, value: f64, unit: &'static str, target: f64) -> Figure {
        Figure { name: name.into(), value, unit, target: Some(target), ok: value >= target }
    }

    /// A figure that must not exceed `target`.
    pub(crate) fn at_most(name: impl Into<String>, value: f64, unit: &'static str, target: f64) -> Figure {
        Figure { name: name.into(), value, unit, target: Some(target), ok: value <= target }
    }
}

/// Prints each as a JSON line.
pub(crate) fn print(figures: &[Figure]) {
    for figure in figures {
        sayln!("{}", serde_json::to_string(figure).expect("a figure is plain data"));
    }
}
