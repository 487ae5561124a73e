//! Compiles `kernels/*.cu` with nvcc, each to its own fat binary, and writes the list that `backend/cuda/kernels.rs`
//! embeds.
//!
//! Looks for nvcc in $NVCC, $CUDA_HOME, $CUDA_PATH, PATH, `.tools/cuda` (the target of `scripts/cuda-toolchain`),
//! $VIRTUAL_ENV (NVIDIA's wheels) and /usr/local/cuda. Without nvcc the build succeeds without kernels, and `--device
//! cuda` fails with an error. Unchanged kernels are not compiled again.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::{env, fs};

/// Compilers that run in parallel.
const PARALLEL: usize = 2;

const FLAGS: [&str; 11] = [
    "-fatbin",
    // reduces the size to a sixth; the driver decompresses the binary when it loads a module
    "-Xfatbin=-compress-all",
    "-O3",
    "-std=c++17",
    "--expt-relaxed-constexpr",
    "-lineinfo",
    // machine code for Hopper, and PTX that drivers compile for later architectures
    "-gencode=arch=compute_90a,code=sm_90a",
    "-gencode=arch=compute_90,code=compute_90",
    "-Werror",
    "all-warnings",
    "--threads=1",
];

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-changed=kernels");
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    for variable in ["NVCC", "CUDA_HOME", "CUDA_PATH", "VIRTUAL_ENV"] {
        println!("cargo:rerun-if-env-changed={variable}");
    }
    let toolchain = Path::new(env!("CARGO_MANIFEST_DIR")).join("../.tools/cuda/nvidia/cu13/bin/nvcc");
    // cargo would rerun the script each time if a missing path were named; scripts/cuda-toolchain touches this file
    // instead
    println!(
        "cargo:rerun-if-changed={}",
        if toolchain.is_file() { toolchain.display().to_string() } else { "build.rs".into() }
    );

    let mut list = String::from(
        "/// (file, fat binary) of each kernel file; empty if the build found no nvcc.\npub(super) static FAT_BINARIES: &[(&str, &[u8])] = &[\n",
    );
    if let Some(nvcc) = find_nvcc(&toolchain) {
        for (name, image) in compile(&nvcc, &out) {
            list.push_str(&format!("    ({name:?}, include_bytes!({:?})),\n", image.display().to_string()));
        }
    }
    list.push_str("];\n");
    fs::write(out.join("kernels.rs"), list).expect("OUT_DIR is writable");
}

fn find_nvcc(toolchain: &Path) -> Option<PathBuf> {
    let mut candidates: Vec<PathBuf> = Vec::new();
    candidates.extend(env::var_os("NVCC").map(PathBuf::from));
    for variable in ["CUDA_HOME", "CUDA_PATH"] {
        candidates.extend(env::var_os(variable).map(|home| Path::new(&home).join("bin/nvcc")));
    }
    for folder in env::var_os("PATH").iter().flat_map(env::split_paths) {
        candidates.push(folder.join("nvcc"));
    }
    candidates.push(toolchain.to_path_buf());
    if let Some(environment) = env::var_os("VIRTUAL_ENV") {
        for entry in fs::read_dir(Path::new(&environment).join("lib")).into_iter().flatten().flatten() {
            candidates.push(entry.path().join("site-packages/nvidia/cu13/bin/nvcc"));
        }
    }
    candidates.push("/usr/local/cuda/bin/nvcc".into());
    candidates.into_iter().find(|path| path.is_file())
}

/// Compiles changed kernels; returns (file stem, fat binary) in the order of the names.
fn compile(nvcc: &Path, out: &Path) -> Vec<(String, PathBuf)> {
    let mut sources: Vec<PathBuf> = fs::read_dir("kernels")
        .expect("kernels is a folder")
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "cu"))
        .collect();
    sources.sort();
    let shared = fs::read("kernels/device.cuh").expect("kernels/device.cuh is there");
    let mut images = Vec::new();
    let mut running: Vec<(PathBuf, PathBuf, Vec<u8>, Child)> = Vec::new();
    for source in sources {
        let name = source.file_stem().expect("a .cu file has a name").to_string_lossy().into_owned();
        let image = out.join(format!("{name}.fatbin"));
        // the stamp file beside the fat binary holds everything that the binary depends on
        let mut made_from = fs::read(&source).expect("a listed file is readable");
        made_from.extend_from_slice(&shared);
        made_from.extend_from_slice(format!("{} {FLAGS:?}", nvcc.display()).as_bytes());
        let stamp = out.join(format!("{name}.source"));
        if !image.is_file() || fs::read(&stamp).ok().as_ref() != Some(&made_from) {
            while running.len() >= PARALLEL {
                finish(running.remove(0));
            }
            let child = Command::new(nvcc)
                .args(FLAGS)
                .arg(&source)
                .arg("-o")
                .arg(&image)
                .stderr(Stdio::piped())
                .spawn()
                .unwrap_or_else(|error| panic!("{} does not start: {error}", nvcc.display()));
            running.push((source, stamp, made_from, child));
        }
        images.push((name, image));
    }
    running.into_iter().for_each(finish);
    images
}

fn finish((source, stamp, made_from, child): (PathBuf, PathBuf, Vec<u8>, Child)) {
    let output = child.wait_with_output().expect("a started compiler ends");
    if !output.status.success() {
        panic!("nvcc could not compile {}:\n{}", source.display(), String::from_utf8_lossy(&output.stderr));
    }
    fs::write(stamp, made_from).expect("OUT_DIR is writable");
}
