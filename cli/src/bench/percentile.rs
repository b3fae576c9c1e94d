//! Distributions of measured values.

/// Values of one quantity, sorted.
#[derive(Clone, Debug, Default)]
pub(crate) struct Distribution {
    sorted: Vec<f64>,
}

impl FromIterator<f64> for Distribution {
    fn from_iter<I: IntoIterator<Item = f64>>(values: I) -> Distribution {
        let mut sorted: Vec<f64> = values.into_iter().filter(|value| value.is_finite()).collect();
        sorted.sort_by(f64::total_cmp);
        Distribution { sorted }
    }
}

impl Distribution {
    pub(crate) fn mean(&self) -> Option<f64> {
        (!self.sorted.is_empty()).then(|| self.sorted.iter().sum::<f64>() / self.sorted.len() as f64)
    }

    pub(crate) fn max(&self) -> Option<f64> {
        self.sorted.last().copied()
    }

    /// The value below which `percent` of all values lie, interpolated linearly between the two nearest.
    pub(crate) fn percentile(&self, percent: f64) -> Option<f64> {
        let last = self.sorted.len().checked_sub(1)?;
        let rank = (percent / 100.0).clamp(0.0, 1.0) * last as f64;
        let (below, above) = (self.sorted[rank.floor() as usize], self.sorted[rank.ceil() as usize]);
        Some(below + (above - below) * rank.fract())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(values: &[f64]) -> Distribution {
        values.iter().copied().collect()
    }

    #[test]
    fn percentiles_interpolate() {
        let five = of(&[30.0, 10.0, 50.0, 20.0, 40.0]);
        for (percent, expected) in [(0.0, 10.0), (50.0, 30.0), (90.0, 46.0), (100.0, 50.0), (120.0, 50.0)] {
            assert_eq!(five.percentile(percent), Some(expected), "p{percent}");
        }
        assert_eq!((five.mean(), five.max()), (Some(30.0), Some(50.0)));
    }

    #[test]
    fn one_value_and_none() {
        assert_eq!(of(&[7.0]).percentile(99.0), Some(7.0));
        assert_eq!(of(&[]).percentile(50.0), None);
        assert_eq!((of(&[]).mean(), of(&[f64::NAN]).max()), (None, None));
    }
}
