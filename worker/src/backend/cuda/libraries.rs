//! Finding NVIDIA's libraries, none of which is linked: a machine without them runs everything else.
//!
//! cudarc opens libraries by their bare names when they are first used, and panics where it finds none. The
//! loader returns a library of that name that is already loaded, so loading the right file first, by
//! its path where need be, is enough, and a missing one is an error instead of a panic.

use std::path::{Path, PathBuf};
use std::sync::Mutex;

use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW};

/// Loads `file` for good. `wheel` is its folder below `nvidia/` in a Python environment that has NVIDIA's
/// wheels. Says where it came from.
pub(super) fn load(file: &str, wheel: &str) -> Result<String, String> {
    static LOADED: Mutex<Vec<(String, String)>> = Mutex::new(Vec::new());
    let mut loaded = LOADED.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    if let Some((_, from)) = loaded.iter().find(|(name, _)| name == file) {
        return Ok(from.clone());
    }
    let mut reason = String::new();
    let by_name = std::iter::once(PathBuf::from(file));
    for path in by_name.chain(folders(wheel).into_iter().map(|folder| folder.join(file)).filter(|path| path.is_file()))
    {
        // SAFETY: NVIDIA's libraries run no initialiser that relies on anything of this program.
        match unsafe { Library::open(Some(&path), RTLD_NOW | RTLD_GLOBAL) } {
            Ok(library) => {
                // never unloaded: cudarc keeps the addresses of its functions
                std::mem::forget(library);
                let from = path.display().to_string();
                loaded.push((file.to_owned(), from.clone()));
                return Ok(from);
            }
            Err(error) => reason = std::error::Error::source(&error).map_or(error.to_string(), ToString::to_string),
        }
    }
    Err(reason)
}

/// Folders that may hold a library, most specific first.
fn folders(wheel: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let environments = std::env::var_os("VIRTUAL_ENV").map(PathBuf::from).into_iter();
    let usual = ["/opt/torch/.venv", "/opt/venv", "/usr/local", "/usr"].map(PathBuf::from);
    for environment in environments.chain(usual) {
        for entry in std::fs::read_dir(environment.join("lib")).into_iter().flatten().flatten() {
            if entry.file_name().to_string_lossy().starts_with("python3") {
                for packages in ["site-packages", "dist-packages"] {
                    found.push(entry.path().join(packages).join("nvidia").join(wheel));
                }
            }
        }
    }
    found.extend(
        ["/usr/local/cuda/lib64", "/usr/local/cuda-13.0/lib64", "/usr/lib/x86_64-linux-gnu"]
            .map(Path::new)
            .map(Path::to_path_buf),
    );
    found
}
