//! The model that ships inside the binary, and where it is unpacked.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Context;

/// Name the shipped model is served under.
pub(crate) const NAME: &str = "baton-3m";

const FILES: &[(&str, &[u8])] = &[
    ("config.json", include_bytes!("../../models/baton-3m/config.json")),
    ("generation_config.json", include_bytes!("../../models/baton-3m/generation_config.json")),
    ("model.safetensors", include_bytes!("../../models/baton-3m/model.safetensors")),
    ("tokenizer.json", include_bytes!("../../models/baton-3m/tokenizer.json")),
    ("tokenizer_config.json", include_bytes!("../../models/baton-3m/tokenizer_config.json")),
];

/// Size of the shipped model.
pub(crate) fn bytes() -> usize {
    FILES.iter().map(|(_, bytes)| bytes.len()).sum()
}

/// Content hash over names and bytes; the folder's name, so that a newer binary never serves an older model.
fn hash() -> String {
    let mut hasher = blake3::Hasher::new();
    for (name, bytes) in FILES {
        hasher.update(name.as_bytes()).update(&(bytes.len() as u64).to_le_bytes()).update(bytes);
    }
    hasher.finalize().to_hex()[..16].to_string()
}

/// Unpacks the shipped model below `data`, unless it is there already, and gives its directory,
/// `<data>/models/<hash>/baton-3m`. It appears whole or not at all: files are written aside and renamed.
pub(crate) fn unpack(data: &Path) -> anyhow::Result<PathBuf> {
    let parent = data.join("models").join(hash());
    let directory = parent.join(NAME);
    if whole(&directory) {
        return Ok(directory);
    }
    let aside = parent.join(format!("{NAME}.{}.tmp", std::process::id()));
    let wrote = write(&aside).and_then(|()| replace(&aside, &directory));
    if wrote.is_err() {
        let _ = fs::remove_dir_all(&aside);
    }
    wrote.with_context(|| format!("unpack the shipped model into {}", directory.display()))?;
    Ok(directory)
}

fn whole(directory: &Path) -> bool {
    let same = |(name, bytes): &(&str, &[u8])| {
        fs::metadata(directory.join(name)).is_ok_and(|found| found.len() == bytes.len() as u64)
    };
    FILES.iter().all(same)
}

fn write(directory: &Path) -> std::io::Result<()> {
    fs::create_dir_all(directory)?;
    FILES.iter().try_for_each(|(name, bytes)| fs::write(directory.join(name), bytes))
}

fn replace(aside: &Path, directory: &Path) -> std::io::Result<()> {
    if directory.exists() {
        fs::remove_dir_all(directory)?;
    }
    fs::rename(aside, directory)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unpacks_once_and_repairs_what_is_damaged() {
        let data = std::env::temp_dir().join(format!("baton-model-test-{}", std::process::id()));
        let directory = unpack(&data).unwrap();
        assert_eq!(directory.file_name().unwrap(), NAME);
        let config = directory.join("config.json");
        let written = fs::metadata(&config).unwrap().modified().unwrap();
        assert_eq!(unpack(&data).unwrap(), directory);
        assert_eq!(fs::metadata(&config).unwrap().modified().unwrap(), written);
        fs::write(&config, "{").unwrap();
        unpack(&data).unwrap();
        assert_eq!(fs::read(&config).unwrap(), FILES[0].1);
        fs::remove_dir_all(&data).unwrap();
    }
}
