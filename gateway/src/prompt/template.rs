//! Chat templates as Hugging Face models carry them: Jinja with Python's methods, rendered without access to anything
//! but their input and with a bound on the work.

use baton_core::Clock;
use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Serde};
use minijinja::{Environment, Error, ErrorKind, Value};
use serde_json::Map;
use serde_json::Value as Json;
use std::sync::Arc;

/// Template instructions one rendering may take. A message costs a few dozen.
const FUEL: u64 = 5_000_000;
const NAME: &str = "chat";

/// A compiled chat template of one model.
pub(crate) struct Template {
    source: String,
    environment: Environment<'static>,
    bos_token: String,
    eos_token: String,
}

/// What one rendering sees.
pub(crate) struct Render<'a> {
    pub messages: &'a [Json],
    pub tools: Option<&'a Json>,
    pub documents: Option<&'a Json>,
    pub add_generation_prompt: bool,
    /// The client's `chat_template_kwargs`; they do not replace the names above.
    pub kwargs: &'a Map<String, Json>,
    pub clock: Arc<dyn Clock>,
}

impl Template {
    pub(crate) fn new(source: &str, bos_token: &str, eos_token: &str) -> Result<Template, Error> {
        let mut environment = Environment::new();
        environment.set_syntax(SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()?);
        environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.set_fuel(Some(FUEL));
        environment.add_filter("tojson", tojson);
        environment.add_function("raise_exception", raise_exception);
        environment.add_template_owned(NAME, without_generation_tags(source))?;
        Ok(Template { source: source.into(), environment, bos_token: bos_token.into(), eos_token: eos_token.into() })
    }

    /// The template as the model carries it.
    pub(crate) fn source(&self) -> &str {
        &self.source
    }

    /// The prompt's text. The error's message is for the client: it is the template's own or says what it misses.
    pub(crate) fn render(&self, render: &Render) -> Result<String, String> {
        let clock = render.clock.clone();
        let strftime_now = move |format: String| strftime(clock.unix_ms() / 1000, &format);
        let mut names: Vec<(String, Value)> =
            render.kwargs.iter().map(|(k, v)| (k.clone(), Value::from(Serde(v)))).collect();
        let own = [
            ("messages", Value::from(Serde(render.messages))),
            ("add_generation_prompt", Value::from(render.add_generation_prompt)),
            ("bos_token", Value::from(self.bos_token.as_str())),
            ("eos_token", Value::from(self.eos_token.as_str())),
            ("strftime_now", Value::from_function(strftime_now)),
        ];
        names.extend(own.map(|(name, value)| (name.to_string(), value)));
        for (name, value) in [("tools", render.tools), ("documents", render.documents)] {
            names.extend(value.map(|v| (name.to_string(), Value::from(Serde(v)))));
        }
        let template = self.environment.get_template(NAME).map_err(|e| e.to_string())?;
        template.render(Value::from_pairs(names)).map_err(message)
    }
}

fn message(error: Error) -> String {
    match error.detail() {
        Some(detail) => detail.to_string(),
        None => error.kind().to_string(),
    }
}

/// `{% generation %}` marks the assistant's tokens for training and renders nothing of its own.
fn without_generation_tags(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(start) = rest.find("{%") {
        let Some(len) = rest[start..].find("%}") else { break };
        let (before, tag) = (&rest[..start], &rest[start..start + len + 2]);
        out.push_str(before);
        match tag[2..tag.len() - 2].trim_matches(|c: char| c.is_whitespace() || c == '-' || c == '+') {
            "generation" => out.push_str(&tag.replace("generation", "if true")),
            "endgeneration" => out.push_str(&tag.replace("endgeneration", "endif")),
            _ => out.push_str(tag),
        }
        rest = &rest[start + len + 2..];
    }
    out.push_str(rest);
    out
}

fn raise_exception(message: String) -> Result<Value, Error> {
    Err(Error::new(ErrorKind::InvalidOperation, message))
}

/// Python's `json.dumps(value, ensure_ascii=False, indent=indent)`, as transformers defines the filter.
fn tojson(value: Value, kwargs: Kwargs) -> Result<String, Error> {
    let indent: Option<usize> = kwargs.get("indent")?;
    let _ignored: (Option<bool>, Option<Value>, Option<bool>) =
        (kwargs.get("ensure_ascii")?, kwargs.get("separators")?, kwargs.get("sort_keys")?);
    kwargs.assert_all_used()?;
    let bad = |e: serde_json::Error| Error::new(ErrorKind::BadSerialization, e.to_string());
    let json = serde_json::to_value(&value).map_err(bad)?;
    let mut out = Vec::new();
    let written = match indent {
        Some(n) => {
            let spaces = " ".repeat(n.min(16));
            let pretty = serde_json::ser::PrettyFormatter::with_indent(spaces.as_bytes());
            serde::Serialize::serialize(&json, &mut serde_json::Serializer::with_formatter(&mut out, pretty))
        }
        None => serde::Serialize::serialize(&json, &mut serde_json::Serializer::with_formatter(&mut out, Spaced)),
    };
    written.map_err(bad)?;
    String::from_utf8(out).map_err(|e| Error::new(ErrorKind::BadSerialization, e.to_string()))
}

/// JSON on one line with a space after `,` and `:`, as Python writes it.
struct Spaced;

impl serde_json::ser::Formatter for Spaced {
    fn begin_array_value<W: std::io::Write + ?Sized>(&mut self, w: &mut W, first: bool) -> std::io::Result<()> {
        if first { Ok(()) } else { w.write_all(b", ") }
    }

    fn begin_object_key<W: std::io::Write + ?Sized>(&mut self, w: &mut W, first: bool) -> std::io::Result<()> {
        if first { Ok(()) } else { w.write_all(b", ") }
    }

    fn begin_object_value<W: std::io::Write + ?Sized>(&mut self, w: &mut W) -> std::io::Result<()> {
        w.write_all(b": ")
    }
}

/// The directives of `strftime` that templates use, in UTC; others stay as they are.
fn strftime(unix_s: u64, format: &str) -> String {
    let (year, month, day) = civil(unix_s / 86_400);
    let (hour, minute, second) = (unix_s / 3600 % 24, unix_s / 60 % 60, unix_s % 60);
    let (month_name, day_name) = (MONTHS[month as usize - 1], DAYS[(unix_s / 86_400 % 7) as usize]);
    let mut out = String::new();
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        match chars.next() {
            Some('Y') => out.push_str(&year.to_string()),
            Some('y') => out.push_str(&format!("{:02}", year % 100)),
            Some('m') => out.push_str(&format!("{month:02}")),
            Some('d') => out.push_str(&format!("{day:02}")),
            Some('H') => out.push_str(&format!("{hour:02}")),
            Some('I') => out.push_str(&format!("{:02}", (hour + 11) % 12 + 1)),
            Some('p') => out.push_str(if hour < 12 { "AM" } else { "PM" }),
            Some('M') => out.push_str(&format!("{minute:02}")),
            Some('S') => out.push_str(&format!("{second:02}")),
            Some('B') => out.push_str(month_name),
            Some('b') => out.push_str(&month_name[..3]),
            Some('A') => out.push_str(day_name),
            Some('a') => out.push_str(&day_name[..3]),
            Some('%') => out.push('%'),
            Some(other) => out.extend(['%', other]),
            None => out.push('%'),
        }
    }
    out
}

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
/// The first day of 1970 was a Thursday.
const DAYS: [&str; 7] = ["Thursday", "Friday", "Saturday", "Sunday", "Monday", "Tuesday", "Wednesday"];

/// Year, month and day of a day counted from 1970-01-01 (Howard Hinnant, "chrono-compatible low-level date algorithms").
fn civil(days: u64) -> (u64, u64, u64) {
    let days = days + 719_468;
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_index = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_index + 2) / 5 + 1;
    let month = if month_index < 10 { month_index + 3 } else { month_index - 9 };
    (year_of_era + era * 400 + u64::from(month <= 2), month, day)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    struct Fixed(u64);
    impl Clock for Fixed {
        fn unix_ms(&self) -> u64 {
            self.0
        }
    }

    fn check(source: &str, messages: Json, expected: Result<&str, &str>) {
        let template = Template::new(source, "<s>", "</s>").unwrap();
        let messages = messages.as_array().unwrap().clone();
        let kwargs = json!({"thinking": false, "messages": "mine"}).as_object().unwrap().clone();
        let clock = Arc::new(Fixed(1_785_000_000_000));
        let tools = json!([{"name": "f<", "args": {"z": 1, "a": [true, null]}}]);
        let render = Render {
            messages: &messages,
            tools: Some(&tools),
            documents: None,
            add_generation_prompt: true,
            kwargs: &kwargs,
            clock,
        };
        let text = template.render(&render);
        assert_eq!(text.as_deref().map_err(|e| e.as_str()), expected, "{source}");
    }

    #[test]
    fn templates_render_as_in_python() {
        let hi = json!([{"role": "user", "content": "hi & <b>"}]);
        let chatml = "{% for m in messages %}\n    {{ '<|im_start|>' + m['role'] + '\\n' + m['content'] }}\n{% endfor %}\n{% if add_generation_prompt %}A{% endif %}";
        check(chatml, hi.clone(), Ok("    <|im_start|>user\nhi & <b>\nA"));
        check(
            "{{ bos_token }}{{ messages[0].content.upper().strip() }}{{ eos_token }}",
            hi.clone(),
            Ok("<s>HI & <B></s>"),
        );
        check("{{ tools | tojson }}", hi.clone(), Ok(r#"[{"name": "f<", "args": {"z": 1, "a": [true, null]}}]"#));
        check(
            "{{ tools[0].args | tojson(indent=1) }}",
            hi.clone(),
            Ok("{\n \"z\": 1,\n \"a\": [\n  true,\n  null\n ]\n}"),
        );
        check("{% generation %}x{%- endgeneration %} {{ thinking }}", hi.clone(), Ok("x False"));
        check("{{ strftime_now('%d %b %Y, %A %H:%M %%') }}", hi.clone(), Ok("25 Jul 2026, Saturday 17:20 %"));
        check("{% for x in [1,2,3] %}{% if x == 2 %}{% break %}{% endif %}{{ x }}{% endfor %}", hi.clone(), Ok("1"));
        check("{{ raise_exception('roles must alternate') }}", hi.clone(), Err("roles must alternate"));
        let endless = "{% for a in range(9999) %}{% for b in range(9999) %}{{ a }}{% endfor %}{% endfor %}";
        check(endless, hi, Err("engine ran out of fuel"));
    }

    #[test]
    fn dates_are_civil() {
        let check = |unix_s, expected: &str| assert_eq!(strftime(unix_s, "%Y-%m-%d %a %I%p"), expected);
        check(0, "1970-01-01 Thu 12AM");
        check(951_782_400, "2000-02-29 Tue 12AM");
        check(4107542400 + 13 * 3600, "2100-03-01 Mon 01PM");
    }
}
