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

    /// Each name stands in one of the modules.
    fn find(&self, name: &str, shared: u32) -> Result<Kernel> {
        let mut outcome = Err(CudaUnavailable::NoKernels.into());
        for module in &self.modules {
            outcome = module.kernel(name, shared);
            if outcome.is_ok() {
                break;
            }
        }
        outcome
    }
}
