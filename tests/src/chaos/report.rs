//! What a trial found: one row of the table, and figures with their targets.

use serde_json::json;

use super::load::{Observed, Verdict};

/// A number with its unit and, where there is one, the most it may be.
#[derive(Clone, Debug, PartialEq)]
pub struct Figure {
    pub name: String,
    pub value: f64,
    pub unit: &'static str,
    pub target: Option<f64>,
    pub ok: bool,
}

/// One fault, met so many times.
#[derive(Clone, Debug, Default)]
pub struct Report {
    pub fault: String,
    pub times: usize,
    pub streams: usize,
    /// Of which the text was compared with the undisturbed run.
    pub compared: usize,
    pub lost: usize,
    pub hung: usize,
    pub doubled: usize,
    pub wrong: usize,
    pub failed: usize,
    /// What the fault's effect is measured by, sorted.
    pub gaps_ms: Vec<f64>,
    pub figures: Vec<Figure>,
    /// The first few streams that did not end as they should.
    pub remarks: Vec<String>,
}

/// Remarks kept.
const REMARKS: usize = 5;

impl Report {
    pub fn new(fault: &str, times: usize, observed: &[Observed]) -> Report {
        let mut report = Report { fault: fault.into(), times, streams: observed.len(), ..Report::default() };
        observed.iter().for_each(|stream| report.judged(stream.number, &stream.verdict));
        report
    }

    /// Counts a stream that was compared.
    pub fn judged(&mut self, number: usize, verdict: &Verdict) {
        self.compared += 1;
        let count = match verdict {
            Verdict::Same => return,
            Verdict::Lost => &mut self.lost,
            Verdict::Hung => &mut self.hung,
            Verdict::Doubled(_) => &mut self.doubled,
            Verdict::Wrong(_) => &mut self.wrong,
            Verdict::Failed(_) => &mut self.failed,
        };
        *count += 1;
        self.remark(format!("request {number}: {verdict:?}"));
    }

    pub fn remark(&mut self, remark: String) {
        if self.remarks.len() < REMARKS {
            self.remarks.push(remark);
        }
    }

    pub fn gaps(&mut self, gaps_ms: impl IntoIterator<Item = f64>) {
        self.gaps_ms = sorted(gaps_ms);
    }

    /// A figure that must not be above its target.
    pub fn at_most(&mut self, name: &str, value: f64, unit: &'static str, target: f64) {
        self.figure(name, value, unit, Some(target), value <= target);
    }

    /// A figure that must not be below its target.
    pub fn at_least(&mut self, name: &str, value: f64, unit: &'static str, target: f64) {
        self.figure(name, value, unit, Some(target), value >= target);
    }

    /// A figure that is only told.
    pub fn tell(&mut self, name: &str, value: f64, unit: &'static str) {
        self.figure(name, value, unit, None, true);
    }

    fn figure(&mut self, name: &str, value: f64, unit: &'static str, target: Option<f64>, ok: bool) {
        let name = format!("{} {name}", self.fault);
        self.figures.push(Figure { name, value, unit, target, ok });
    }

    /// Nothing may be lost, hung, doubled, wrong or failed.
    pub fn expect_whole(&mut self) {
        let counts = [
            ("lost", self.lost),
            ("hung", self.hung),
            ("doubled", self.doubled),
            ("wrong", self.wrong),
            ("failed", self.failed),
        ];
        for (name, count) in counts {
            self.at_most(name, count as f64, "streams", 0.0);
        }
    }

    pub fn is_ok(&self) -> bool {
        self.figures.iter().all(|figure| figure.ok)
    }
}

/// Sorted values without those that are no numbers.
pub fn sorted(values: impl IntoIterator<Item = f64>) -> Vec<f64> {
    let mut values: Vec<f64> = values.into_iter().filter(|value| value.is_finite()).collect();
    values.sort_by(f64::total_cmp);
    values
}

/// The smallest value that at least `share` of all are not above; 0 without any.
pub fn quantile(sorted: &[f64], share: f64) -> f64 {
    let rank = (sorted.len() as f64 * share).ceil() as usize;
    sorted.get(rank.saturating_sub(1)).copied().unwrap_or(0.0)
}

pub fn print_table(reports: &[Report]) {
    let head = ["FAULT", "TIMES", "STREAMS", "LOST", "HUNG", "DOUBLED", "WRONG", "FAILED", "GAP P50", "P99", "MAX MS"];
    println!("{:<28}{}", head[0], head[1..].iter().map(|h| format!("{h:>9}")).collect::<String>());
    for report in reports {
        let told = [report.times, report.streams].map(|count| format!("{count:>9}")).concat();
        let judged = [report.lost, report.hung, report.doubled, report.wrong, report.failed];
        // Where nothing was compared, nothing is known.
        let judged =
            judged.map(|count| if report.compared > 0 { format!("{count:>9}") } else { format!("{:>9}", "–") });
        let counts = told + &judged.concat();
        let gaps = [0.5, 0.99, 1.0].map(|share| format!("{:>9.0}", quantile(&report.gaps_ms, share)));
        println!("{:<28}{counts}{}", report.fault, gaps.concat());
    }
    for figure in reports.iter().flat_map(|report| &report.figures).filter(|figure| !figure.ok) {
        let target = figure.target.unwrap_or_default();
        println!("missed: {} is {:.1} {}, target {target}", figure.name, figure.value, figure.unit);
    }
    for report in reports {
        for remark in &report.remarks {
            println!("{}: {}", report.fault, remark.chars().take(600).collect::<String>());
        }
    }
}

/// One JSON object a line.
pub fn print_figures(reports: &[Report]) {
    for figure in reports.iter().flat_map(|report| &report.figures) {
        let Figure { name, value, unit, target, ok } = figure;
        println!("{}", json!({"name": name, "value": value, "unit": unit, "target": target, "ok": ok}));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_values_that_occurred() {
        let values = sorted([3.0, 1.0, f64::NAN, 2.0, 4.0]);
        assert_eq!([0.5, 0.75, 0.99, 1.0].map(|share| quantile(&values, share)), [2.0, 3.0, 4.0, 4.0]);
        assert_eq!(quantile(&[], 0.5), 0.0);
    }

    #[test]
    fn a_target_that_is_missed_is_told() {
        let mut report = Report::new("f", 1, &[]);
        report.at_most("wait", 2.0, "ms", 2.0);
        report.at_least("rate", 3.0, "1/s", 2.0);
        assert!(report.is_ok());
        report.at_most("more", 2.1, "ms", 2.0);
        assert!(!report.is_ok());
    }
}
