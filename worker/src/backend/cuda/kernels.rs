//! The kernels of `worker/kernels`, embedded by the build script, by name.

use std::collections::HashMap;

use super::CudaUnavailable;
use super::driver::{Arguments, Device, Kernel, Module, Shape};
use crate::backend::Result;

include!(concat!(env!("OUT_DIR"), "/kernels.rs"));

/// Whether the build had a compiler for them.
pub(super) fn built() -> bool {
    !FAT_BINARIES.is_empty()
}

/// Every kernel, loaded.
pub(super) struct Kernels {
    modules: Vec<Module>,
    kernels: HashMap<String, (Kernel, u32)>,
}

impl Kernels {
    /// Loads the modules. Kernels are looked up when first asked for.
    pub(super) fn load() -> Result<Self> {
        if !built() {
            return Err(CudaUnavailable::NoKernels.into());
        }
        let modules = FAT_BINARIES.iter().map(|(name, image)| Module::load(image, name)).collect::<Result<_>>()?;
        Ok(Self { modules, kernels: HashMap::new() })
    }

    /// Submits a kernel by its name.
    pub(super) fn launch(
        &mut self,
        device: &Device,
        name: &str,
        shape: Shape,
        arguments: Arguments,
        overlap: bool,
    ) -> Result<()> {
        if shape.grid.contains(&0) {
            return Ok(());
        }
        let kernel = match self.kernels.get(name) {
            Some((kernel, shared)) if *shared >= shape.shared => *kernel,
            _ => {
                let kernel = self.find(name, shape.shared)?;
                self.kernels.insert(name.to_owned(), (kernel, shape.shared));
                kernel
            }
        };
        device.launch(kernel, shape, arguments, overlap, name)
    }

    fn find(&self, name: &str, shared: u32) -> Result<Kernel> {
        let file = file_of(name);
        let index = FAT_BINARIES.iter().position(|(stem, _)| *stem == file);
        let module = index.and_then(|index| self.modules.get(index));
        module.ok_or(CudaUnavailable::NoKernels)?.kernel(name, shared)
    }
}

/// The file of `worker/kernels` that holds a kernel.
fn file_of(kernel: &str) -> &'static str {
    const FILES: [(&str, &str); 11] = [
        ("embed", "rows"),
        ("prepare_rows", "rows"),
        ("rope", "rope"),
        ("gate", "gate"),
        ("linear", "linear"),
        ("decode_attention", "attention_decode"),
        ("prefill_attention", "attention_prefill"),
        ("hopper_attention", "attention_prefill_hopper"),
        ("random", "fill"),
        ("read_ceiling", "fill"),
        ("sample_rows", "sample"),
    ];
    let file = FILES.iter().find(|(prefix, _)| kernel.starts_with(prefix)).map(|(_, file)| *file);
    // add_..._norm_to_..., count_ids
    file.unwrap_or(if kernel == "count_ids" { "sample" } else { "norm" })
}
