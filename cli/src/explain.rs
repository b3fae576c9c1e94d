//! `baton explain`: what the leader remembers of one request: where it was assigned, what the other workers would have cost,
//! and what refused it.

use baton_core::RequestId;
use baton_proto::v1::{Decision, ExplainReply, ExplainRequest};
use clap::Args;
use serde_json::{Value, json};

use crate::admin::{self, ClusterFlags, ask};
use crate::exit::Failure;
use crate::out::{say, sayln};
use crate::table;

/// Show why a request was assigned where it was, or refused.
///
/// The leader remembers the last 16 decisions of the 4,096 requests it decided on last, since it leads: a new leader begins with
/// none.
#[derive(Args, Debug)]
#[command(
    after_help = "Exit codes:\n  0  shown\n  1  no coordinator that leads answered\n  2  this is no request's id, the leader remembers nothing of it, or there is no cluster"
)]
pub(crate) struct ExplainFlags {
    /// The request's id: 32 hexadecimal digits, or the "id" of an answer as its client saw it
    request: String,
    /// Print one JSON object: request, state, decisions
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    cluster: ClusterFlags,
}

pub(crate) fn run(flags: ExplainFlags) -> Result<(), Failure> {
    let request = parse(&flags.request)?;
    admin::run(async {
        let call = |mut client: admin::Client| {
            let asked = ExplainRequest { request: request.to_string() };
            async move { client.explain(asked).await }
        };
        let explained: ExplainReply = ask(&flags.cluster.coordinators()?, call).await?;
        if explained.decisions.is_empty() && explained.state == "unknown" {
            return Err(Failure::refuse(format!(
                "the leader knows no request {request}: it never came, its decisions are forgotten, or another coordinator led then"
            )));
        }
        match flags.json {
            true => sayln!("{}", as_json(request, &explained)),
            false => say!("{}", as_text(request, &explained)),
        }
        Ok(())
    })
}

/// An id as the ledger has it, or as it stands in answers: `chatcmpl-` or `cmpl-` before it.
fn parse(text: &str) -> Result<RequestId, Failure> {
    let digits = text.rsplit('-').next().unwrap_or(text);
    digits.parse().map_err(|_| {
        Failure::refuse(format!(
            "{text:?} is no request's id: it has 32 hexadecimal digits, as in an answer's \"id\": \"chatcmpl-…\""
        ))
    })
}

fn as_json(request: RequestId, explained: &ExplainReply) -> Value {
    let decision = |d: &Decision| {
        json!({
            "ledger_ms": d.ledger_ms, "attempt": d.attempt, "outcome": d.outcome, "reason": d.reason, "lines": d.lines,
        })
    };
    let decisions: Vec<Value> = explained.decisions.iter().map(decision).collect();
    json!({"request": request.to_string(), "state": explained.state, "decisions": decisions})
}

/// One row per decision and line: the verdict beside its decision, candidates and terms below it.
fn as_text(request: RequestId, explained: &ExplainReply) -> String {
    let mut rows = Vec::new();
    for decision in &explained.decisions {
        let outcome = match decision.reason.as_str() {
            "" => decision.outcome.clone(),
            reason => format!("{}: {reason}", decision.outcome),
        };
        let mut head = [decision.attempt.to_string(), decision.ledger_ms.to_string(), outcome];
        let none = [String::new()];
        let lines = if decision.lines.is_empty() { &none[..] } else { &decision.lines };
        for line in lines {
            rows.push([std::mem::take(&mut head).to_vec(), vec![line.clone()]].concat());
        }
    }
    let title = format!("request {request}: {}\n", explained.state);
    match rows.is_empty() {
        true => title + "no decision yet\n",
        false => title + &table::render(&["ATTEMPT", "LEDGER MS", "OUTCOME", "WHY"], &rows),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_taken_as_clients_see_them() {
        let digits = format!("{:032x}", 0xabc);
        for text in [digits.clone(), format!("chatcmpl-{digits}"), format!("cmpl-{digits}")] {
            assert_eq!(parse(&text).unwrap(), RequestId(0xabc), "{text}");
        }
        for text in ["", "abc", "chatcmpl-", &format!("{digits}0"), &format!("-{}+", &digits[1..])] {
            assert!(parse(text).unwrap_err().to_string().contains("32 hexadecimal digits"), "{text}");
        }
    }

    #[test]
    fn a_decision_stands_beside_its_first_line() {
        let decision = |attempt, outcome: &str, reason: &str, lines: &[&str]| Decision {
            ledger_ms: 7,
            attempt,
            outcome: outcome.into(),
            reason: reason.into(),
            lines: lines.iter().map(|line| line.to_string()).collect(),
        };
        let decisions =
            vec![decision(1, "assigned", "", &["to d", "decode d costs 5 us"]), decision(2, "refused", "expired", &[])];
        let explained = ExplainReply { decisions, state: "ended".into(), refused: None };
        let text = as_text(RequestId(1), &explained);
        let cells = |line: usize| text.lines().nth(line).unwrap().split_whitespace().collect::<Vec<_>>();
        assert_eq!(text.lines().next().unwrap(), format!("request {:032x}: ended", 1));
        assert_eq!(cells(2), ["1", "7", "assigned", "to", "d"]);
        assert_eq!(cells(3), ["decode", "d", "costs", "5", "us"]);
        assert_eq!(cells(4), ["2", "7", "refused:", "expired"]);
        assert_eq!(as_json(RequestId(1), &explained)["decisions"][1]["reason"], "expired");
    }
}
