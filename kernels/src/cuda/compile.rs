//! From the `.cu` sources to machine code of one architecture: by NVRTC at start, kept on disk under a name that holds the
//! hash of the sources, the architecture and the compiler's version.

use std::ffi::CString;
use std::fs;
use std::path::{Path, PathBuf};

use cudarc::nvrtc;

use super::error::GpuError;

pub(crate) const COMMON: &str = include_str!("src/common.cuh");
const INCLUDE: &str = "#include \"common.cuh\"\n";
pub(crate) const FILES: [(&str, &str); 9] = [
    ("attention.cu", include_str!("src/attention.cu")),
    ("blocks.cu", include_str!("src/blocks.cu")),
    ("matmul.cu", include_str!("src/matmul.cu")),
    ("matmul_f8.cu", include_str!("src/matmul_f8.cu")),
    ("matmul_hopper.cu", include_str!("src/matmul_hopper.cu")),
    ("matmul_f8_hopper.cu", include_str!("src/matmul_f8_hopper.cu")),
    ("experts.cu", include_str!("src/experts.cu")),
    ("rows.cu", include_str!("src/rows.cu")),
    ("sampling.cu", include_str!("src/sampling.cu")),
];
/// Contraction is off, so that the sources alone say which operations are fused.
const OPTIONS: [&str; 3] = ["--std=c++17", "-default-device", "--fmad=false"];
/// Bytes of a compiler's log that an error shows.
const LOG_MAX: usize = 2000;

/// Where CUDA's libraries lie when the loader does not know them.
const FOLDERS: [&str; 3] = ["/usr/local/cuda/lib64", "/usr/local/cuda/targets/x86_64-linux/lib", "/opt/cuda/lib64"];
const NAMES: [&str; 2] = ["libnvrtc.so.13", "libnvrtc.so.12"];

/// All sources as one.
pub(crate) fn source() -> String {
    let mut whole = format!("#line 1 \"common.cuh\"\n{COMMON}");
    for (name, text) in FILES {
        whole += &format!("#line 1 \"{name}\"\n{}", text.replacen(INCLUDE, "\n", 1));
    }
    whole
}

/// Names the arithmetic: equal for equal sources and options.
pub fn source_hash() -> String {
    let mut hasher = blake3::Hasher::new();
    hasher.update(source().as_bytes());
    for option in OPTIONS {
        hasher.update(option.as_bytes());
    }
    hasher.finalize().to_hex()[..16].to_string()
}

/// Major and minor version of the NVRTC that can be loaded.
pub fn compiler() -> Option<(i32, i32)> {
    static FOUND: std::sync::OnceLock<Option<(i32, i32)>> = std::sync::OnceLock::new();
    *FOUND.get_or_init(|| {
        load_from_known_folders();
        // SAFETY: asks the loader only.
        if !unsafe { nvrtc::sys::is_culib_present() } {
            return None;
        }
        let (mut major, mut minor) = (0, 0);
        // SAFETY: the library is there; both are places for a number.
        let status = unsafe { nvrtc::sys::nvrtcVersion(&mut major, &mut minor) };
        (status.result().is_ok()).then_some((major, minor))
    })
}

/// A library once loaded is found again by its name alone.
fn load_from_known_folders() {
    for (folder, name) in FOLDERS.iter().flat_map(|folder| NAMES.map(|name| (folder, name))) {
        let path = Path::new(folder).join(name);
        if !path.exists() {
            continue;
        }
        if let Ok(path) = CString::new(path.to_string_lossy().as_bytes()) {
            // SAFETY: loads CUDA's compiler, which stays loaded.
            unsafe { libc::dlopen(path.as_ptr(), libc::RTLD_NOW | libc::RTLD_GLOBAL) };
        }
    }
}

/// The folder of compiled kernels.
#[derive(Clone, Debug)]
pub struct Cubins {
    folder: PathBuf,
}

impl Cubins {
    pub fn new(folder: impl Into<PathBuf>) -> Cubins {
        Cubins { folder: folder.into() }
    }

    /// The kernels for `arch` (`sm_90a`) and whether they were on disk. Without a compiler, those of any version serve.
    pub(crate) fn get(&self, arch: &str) -> Result<(Vec<u8>, bool), GpuError> {
        let Some((major, minor)) = compiler() else {
            let folder = self.folder.display().to_string();
            return self
                .of_any_version(arch)
                .map(|cubin| (cubin, true))
                .ok_or(GpuError::NoCompiler { arch: arch.to_string(), folder });
        };
        let path = self.path(arch, &format!("{major}.{minor}"));
        if let Ok(cubin) = fs::read(&path)
            && whole(&cubin)
        {
            return Ok((cubin, true));
        }
        let cubin = compile(arch)?;
        self.keep(&path, &cubin);
        Ok((cubin, false))
    }

    /// Compiles for `arch` and keeps the result, which is returned.
    pub fn make(&self, arch: &str) -> Result<PathBuf, GpuError> {
        let Some((major, minor)) = compiler() else {
            let folder = self.folder.display().to_string();
            return Err(GpuError::NoCompiler { arch: arch.to_string(), folder });
        };
        let path = self.path(arch, &format!("{major}.{minor}"));
        self.keep(&path, &compile(arch)?);
        Ok(path)
    }

    /// Forgets what is kept for `arch`, after it turned out not to load.
    pub(crate) fn forget(&self, arch: &str) {
        if let Some((major, minor)) = compiler() {
            let _ = fs::remove_file(self.path(arch, &format!("{major}.{minor}")));
        }
    }

    fn path(&self, arch: &str, version: &str) -> PathBuf {
        self.folder.join(format!("{}-{arch}-{version}.cubin", source_hash()))
    }

    fn of_any_version(&self, arch: &str) -> Option<Vec<u8>> {
        let start = format!("{}-{arch}-", source_hash());
        let entries = fs::read_dir(&self.folder).ok()?.flatten().map(|entry| entry.path());
        let mut paths: Vec<PathBuf> = entries
            .filter(|path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(&start)))
            .collect();
        paths.sort();
        paths.into_iter().rev().filter_map(|path| fs::read(path).ok()).find(|cubin| whole(cubin))
    }

    /// Kept is good, not kept costs the next start some seconds.
    fn keep(&self, path: &Path, cubin: &[u8]) {
        let partly = path.with_extension(format!("{}.part", std::process::id()));
        let written = fs::create_dir_all(&self.folder).and_then(|()| fs::write(&partly, cubin));
        let _ = written.and_then(|()| fs::rename(&partly, path));
    }
}

/// A cubin is an ELF file.
fn whole(cubin: &[u8]) -> bool {
    cubin.starts_with(b"\x7fELF")
}

fn compile(arch: &str) -> Result<Vec<u8>, GpuError> {
    let version = compiler().map_or_else(|| "?".to_string(), |(major, minor)| format!("{major}.{minor}"));
    let failed = |log: String| GpuError::Compile { arch: arch.to_string(), version: version.clone(), log };
    let text = CString::new(source()).expect("sources have no zeros");
    let program =
        nvrtc::result::create_program(&text, Some(c"kernels.cu")).map_err(|error| failed(error.to_string()))?;
    let options: Vec<String> =
        OPTIONS.iter().map(|option| option.to_string()).chain([format!("--gpu-architecture={arch}")]).collect();
    // SAFETY: the program was created above and is destroyed below.
    let compiled = unsafe { nvrtc::result::compile_program(program, &options) };
    let cubin = match compiled {
        // SAFETY: as above.
        Err(error) => Err(failed(unsafe { nvrtc::result::get_program_log(program) }.map_or_else(
            |_| error.to_string(),
            |log| {
                String::from_utf8_lossy(
                    &log.iter().map(|c| *c as u8).take_while(|c| *c != 0).take(LOG_MAX).collect::<Vec<_>>(),
                )
                .into_owned()
            },
        ))),
        Ok(()) => cubin(program).map_err(|error| failed(error.to_string())),
    };
    // SAFETY: nothing uses the program after this.
    let _ = unsafe { nvrtc::result::destroy_program(program) };
    cubin
}

fn cubin(program: nvrtc::sys::nvrtcProgram) -> Result<Vec<u8>, nvrtc::result::NvrtcError> {
    let mut bytes = 0;
    // SAFETY: the program is compiled; the buffer has the size that the compiler says.
    unsafe {
        nvrtc::sys::nvrtcGetCUBINSize(program, &mut bytes).result()?;
        let mut cubin = vec![0u8; bytes];
        nvrtc::sys::nvrtcGetCUBIN(program, cubin.as_mut_ptr().cast()).result()?;
        Ok(cubin)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// No file is left out, none includes what NVRTC would have to look for, and line numbers in its log are those of the files.
    #[test]
    fn the_sources_are_one_text() {
        let whole = source();
        assert!(!whole.lines().any(|line| line.starts_with("#include \"common")), "an include is left");
        let kernels = whole.matches("KERNEL void").count();
        assert!(kernels >= 18, "{kernels} kernels");
        assert_eq!(source_hash(), source_hash());
    }

    /// Without a compiler, what is on disk serves whatever compiled it; what is no cubin does not.
    #[test]
    fn kept_cubins_are_found_by_source_and_architecture() {
        let folder = std::env::temp_dir().join(format!("baton-cubins-{}", std::process::id()));
        let cubins = Cubins::new(&folder);
        assert!(cubins.of_any_version("sm_90a").is_none());
        cubins.keep(&cubins.path("sm_90a", "12.8"), b"\x7fELF old");
        cubins.keep(&cubins.path("sm_90a", "13.0"), b"torn");
        cubins.keep(&cubins.path("sm_80", "13.0"), b"\x7fELF other");
        assert_eq!(cubins.of_any_version("sm_90a").as_deref(), Some(&b"\x7fELF old"[..]));
        assert!(cubins.of_any_version("sm_9").is_none());
        let _ = fs::remove_dir_all(folder);
    }
}
