//! A role's configuration: a TOML file, with flags laid over it. Unknown keys are refused where it is read out.

use std::path::{Path, PathBuf};

use anyhow::Context;
use serde::de::DeserializeOwned;
use toml::{Table, Value};

use crate::exit::Failure;

/// Keys and values on their way to a checked struct.
#[derive(Debug, Default)]
pub(crate) struct Settings {
    table: Table,
    file: Option<PathBuf>,
}

impl Settings {
    /// The file's keys; none without a file.
    pub(crate) fn read(file: Option<&Path>) -> Result<Settings, Failure> {
        let Some(path) = file else { return Ok(Settings::default()) };
        let text = std::fs::read_to_string(path);
        let text = text.with_context(|| format!("read {}", path.display())).map_err(Failure::refused)?;
        let table = text.parse::<Table>();
        let table = table.with_context(|| format!("{} is no TOML", path.display())).map_err(Failure::refused)?;
        Ok(Settings { table, file: Some(path.to_path_buf()) })
    }

    /// A flag, if it was given, replaces the file's key. `key` may name one in a table: `engine.blocks`.
    pub(crate) fn flag(&mut self, key: &str, value: Option<impl Into<Value>>) {
        let Some(value) = value else { return };
        if let Some((table, last)) = self.place(key) {
            table.insert(last.to_string(), value.into());
        }
    }

    /// A value for a key that neither file nor flag has set.
    pub(crate) fn fallback(&mut self, key: &str, value: impl Into<Value>) {
        if let Some((table, last)) = self.place(key) {
            table.entry(last).or_insert_with(|| value.into());
        }
    }

    /// What a key of the outermost table is now, as text; empty if it is not set.
    pub(crate) fn get(&self, key: &str) -> String {
        self.table.get(key).map(Value::to_string).unwrap_or_default()
    }

    /// A number that file or flag has set; whether it may stand there, reading out tells.
    pub(crate) fn count(&self, key: &str) -> Option<u64> {
        let (table, last) = key.split_once('.')?;
        self.table.get(table)?.get(last)?.as_integer()?.try_into().ok()
    }

    /// The table a key stands in, made if it is missing; None if the file holds no table there, which reading out tells.
    fn place<'a>(&mut self, key: &'a str) -> Option<(&mut Table, &'a str)> {
        match key.split_once('.') {
            None => Some((&mut self.table, key)),
            Some((outer, last)) => {
                let inner = self.table.entry(outer).or_insert_with(|| Value::Table(Table::new()));
                Some((inner.as_table_mut()?, last))
            }
        }
    }

    /// Takes out a key that the process itself reads, not the role's crate.
    pub(crate) fn take<T: DeserializeOwned>(&mut self, key: &str) -> Result<Option<T>, Failure> {
        let Some(value) = self.table.remove(key) else { return Ok(None) };
        let read = value.try_into::<T>();
        read.with_context(|| format!("{}, key `{key}`", self.origin())).map(Some).map_err(Failure::refused)
    }

    /// Everything that is left.
    pub(crate) fn finish<T: DeserializeOwned>(self) -> Result<T, Failure> {
        let origin = self.origin();
        Value::Table(self.table).try_into::<T>().context(origin).map_err(Failure::refused)
    }

    fn origin(&self) -> String {
        match &self.file {
            Some(path) => format!("configuration ({} and flags)", path.display()),
            None => "configuration (flags)".to_string(),
        }
    }
}

/// A list of texts as a value.
pub(crate) fn texts(list: &[String]) -> Option<Value> {
    (!list.is_empty()).then(|| Value::Array(list.iter().cloned().map(Value::String).collect()))
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;

    use super::*;

    #[derive(Debug, Deserialize, PartialEq)]
    #[serde(deny_unknown_fields)]
    struct Config {
        listen: String,
        engine: Engine,
    }

    #[derive(Debug, Deserialize, PartialEq)]
    #[serde(deny_unknown_fields)]
    struct Engine {
        blocks: u64,
        queue: u64,
    }

    fn read(file: &str, listen: Option<&str>, blocks: Option<i64>) -> Result<Config, String> {
        let mut settings = Settings { table: file.parse().unwrap(), file: None };
        settings.flag("listen", listen);
        settings.flag("engine.blocks", blocks);
        settings.fallback("engine.queue", 9);
        settings.finish().map_err(|failure| failure.to_string())
    }

    #[test]
    fn flags_override_the_file_and_defaults_fill_it() {
        let of = |listen: &str, blocks, queue| Ok(Config { listen: listen.into(), engine: Engine { blocks, queue } });
        assert_eq!(read("listen='a'\nengine={blocks=1,queue=2}", None, None), of("a", 1, 2));
        assert_eq!(read("listen='a'\nengine={blocks=1,queue=2}", Some("b"), Some(3)), of("b", 3, 2));
        assert_eq!(read("", Some("b"), Some(3)), of("b", 3, 9));
    }

    /// A table whose absence means something is not there because a flag of it could have been given.
    #[test]
    fn a_flag_that_is_not_given_makes_no_table() {
        let mut settings = Settings::default();
        settings.flag("kv_tls.ca", None::<String>);
        assert!(settings.table.is_empty());
        settings.flag("kv_tls.ca", Some("a"));
        assert_eq!(settings.table.to_string(), "[kv_tls]\nca = \"a\"\n");
    }

    #[test]
    fn what_is_wrong_is_named() {
        let error = |file: &str| read(file, None, Some(1)).unwrap_err();
        assert!(error("").contains("listen"), "{}", error(""));
        assert!(error("listen='a'\nlisten_on='b'").contains("listen_on"));
        assert!(error("listen='a'\nengine=3").contains("engine"));
    }

    #[test]
    fn a_key_taken_out_is_unknown_to_nobody() {
        let mut settings = Settings { table: "model='m'".parse().unwrap(), file: None };
        assert_eq!(settings.take::<String>("model").unwrap(), Some("m".to_string()));
        assert_eq!(settings.take::<String>("model").unwrap(), None);
        let mut settings = Settings { table: "model=3".parse().unwrap(), file: None };
        assert!(settings.take::<String>("model").unwrap_err().to_string().contains("`model`"));
    }
}
