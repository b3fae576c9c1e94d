//! A run as a timeline that a person can follow: text for the terminal, or one HTML page that needs nothing else.

use std::fmt::Write;

use crate::run::Report;

/// Lines of text, with what was violated at the end.
pub fn text(report: &Report) -> String {
    let mut out = String::new();
    for line in &report.lines {
        let host = if line.host.is_empty() { "--" } else { &line.host };
        let _infallible = writeln!(out, "{:>9.3} s  {host:<14} {}", line.at_us as f64 / 1e6, line.text);
    }
    out.push_str(&summary(report));
    out
}

/// How the run ended, in a few lines.
pub fn summary(report: &Report) -> String {
    let requests = report.requests;
    let mut out = format!(
        "seed {} (profile {}): {} hosts, {} faults, {:.1} virtual seconds, digest {}\n\
         requests: {} complete, {} refused, {} failed, {} broken off, {} cancelled\n",
        report.seed,
        report.profile,
        report.hosts,
        report.faults,
        report.virtual_ms as f64 / 1e3,
        report.digest,
        requests.complete,
        requests.refused,
        requests.failed,
        requests.broken,
        requests.cancelled
    );
    if let Some(violation) = &report.violation {
        let at = violation.at_ms as f64 / 1e3;
        let _infallible = writeln!(out, "VIOLATED {} at {at:.3} s: {}", violation.invariant, violation.what);
    }
    out
}

/// One page: a column per host, time downwards.
pub fn html(report: &Report) -> String {
    let mut hosts: Vec<&str> = report.lines.iter().map(|line| line.host.as_str()).collect();
    hosts.sort_unstable();
    hosts.dedup();
    let mut rows = String::new();
    for line in &report.lines {
        let _infallible = write!(rows, "<tr><td class=t>{:.3}</td>", line.at_us as f64 / 1e6);
        for host in &hosts {
            let text = if *host == line.host { escaped(&line.text) } else { String::new() };
            let class = if text.starts_with("fault") { " class=f" } else { "" };
            let _infallible = write!(rows, "<td{class}>{text}</td>");
        }
        rows.push_str("</tr>\n");
    }
    let heads: String =
        hosts.iter().map(|host| format!("<th>{}</th>", if host.is_empty() { "world" } else { host })).collect();
    format!(
        "<!doctype html><meta charset=utf-8><title>seed {seed}</title>\n<style>\n\
         body{{font:13px monospace;margin:1em}}table{{border-collapse:collapse}}\n\
         td,th{{border:1px solid #ddd;padding:2px 6px;vertical-align:top;text-align:left}}\n\
         th{{position:sticky;top:0;background:#eee}}td.t{{color:#666}}td.f{{background:#fdd}}pre{{background:#eef;padding:1em}}\n\
         </style>\n<pre>{summary}</pre>\n<table><tr><th>s</th>{heads}</tr>\n{rows}</table>\n",
        seed = report.seed,
        summary = escaped(&summary(report)),
    )
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}
