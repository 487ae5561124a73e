//! GEMMs through cuBLASLt: `y [m, n] = x [m, k] w [n, k]^T`, all row-major.
//!
//! cuBLASLt is column-major, and its FP8 GEMMs on Hopper exist only with the first operand transposed;
//! with w as that operand nothing has to be repacked. Scales are left out: the kernel that consumes the
//! GEMM multiplies by them, each part of a stack by its own.

use std::collections::HashMap;
use std::ffi::c_void;

use cudarc::cublaslt::{result as lt, sys};

use super::driver::{Address, Buffer, Device, Event};
use super::machine::load_cublaslt;
use crate::backend::{BackendError, Result};

/// NVIDIA's advice for Hopper.
const WORKSPACE_BYTES: usize = 32 << 20;
/// Algorithms that are timed for a shape, of those that the library proposes.
const CANDIDATES: usize = 8;
/// Timings of a candidate; the median counts.
const TIMINGS: usize = 3;

/// Formats of a GEMM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Formats {
    /// e4m3 times e4m3 to bf16.
    E4m3ToBf16,
    /// bf16 times bf16 to bf16.
    Bf16ToBf16,
    /// bf16 times bf16 to f32.
    Bf16ToF32,
}

/// `y [m, n] = x [m, k] w [n, k]^T`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct GemmShape {
    pub(super) m: usize,
    pub(super) n: usize,
    pub(super) k: usize,
    pub(super) formats: Formats,
}

/// Addresses of a GEMM's matrices.
#[derive(Clone, Copy, Debug)]
pub(super) struct Operands {
    pub(super) x: Address,
    pub(super) w: Address,
    pub(super) y: Address,
}

/// The library, its workspace, and the algorithm chosen for each shape seen.
pub(super) struct Matmul {
    handle: sys::cublasLtHandle_t,
    workspace: Buffer,
    plans: HashMap<GemmShape, Plan>,
    tuned: Vec<GemmShape>,
}

// SAFETY: a cuBLASLt handle may be used from any thread, one at a time.
unsafe impl Send for Matmul {}

struct Plan {
    description: sys::cublasLtMatmulDesc_t,
    w: sys::cublasLtMatrixLayout_t,
    x: sys::cublasLtMatrixLayout_t,
    y: sys::cublasLtMatrixLayout_t,
    algorithm: sys::cublasLtMatmulAlgo_t,
}

fn during(doing: &'static str) -> impl Fn(lt::CublasError) -> BackendError {
    move |error| BackendError::Device(format!("{doing}: {error:?}"))
}

impl Matmul {
    pub(super) fn new() -> Result<Self> {
        load_cublaslt()?;
        let workspace = Buffer::new(WORKSPACE_BYTES, "the workspace of cuBLASLt")?;
        Ok(Self {
            handle: lt::create_handle().map_err(during("opening cuBLASLt"))?,
            workspace,
            plans: HashMap::new(),
            tuned: Vec::new(),
        })
    }

    /// Rows that a GEMM of `m` rows is computed with: shapes are few, so that each can be tuned once. The
    /// rows behind `m` are read and written too; buffers have room for them.
    pub(super) fn padded_rows(m: usize) -> usize {
        match m {
            0..=64 => m.next_multiple_of(16),
            65..=2048 => m.next_multiple_of(64),
            _ => m.next_multiple_of(256),
        }
    }

    /// Rows that algorithms are timed for, up to `most`; in between, the next larger one's algorithm is taken.
    pub(super) fn tuned_rows(most: usize) -> Vec<usize> {
        let few = [16, 32, 48, 64, 128, 192, 256, 384, 512];
        let more = (640..=2048).step_by(128);
        let many = [3072, 4096, 6144, 8192, 12_288, 16_384];
        let mut rows: Vec<usize> = few.into_iter().chain(more).chain(many).take_while(|rows| *rows < most).collect();
        rows.push(Self::padded_rows(most));
        rows
    }

    /// Times the algorithms for a shape. Not to be recorded.
    pub(super) fn tune(&mut self, device: &Device, shape: GemmShape, operands: Operands) -> Result<()> {
        if !self.plans.contains_key(&shape) {
            let plan = self.choose(device, shape, operands)?;
            self.plans.insert(shape, plan);
            self.tuned.push(shape);
        }
        Ok(())
    }

    /// Submits a GEMM.
    pub(super) fn run(&mut self, device: &Device, wanted: GemmShape, operands: Operands) -> Result<()> {
        let shape = GemmShape { m: Self::padded_rows(wanted.m), ..wanted };
        if !self.plans.contains_key(&shape) {
            let plan = self.derive(shape)?;
            self.plans.insert(shape, plan);
        }
        self.submit(device, &self.plans[&shape], operands)
    }

    /// A plan without timing: the algorithm of the next larger shape that was timed, where it works for this one, else
    /// the library's first proposal.
    fn derive(&self, shape: GemmShape) -> Result<Plan> {
        let (mut plan, _) = self.propose(shape)?;
        let near = self.tuned.iter().filter(|tuned| GemmShape { m: shape.m, ..**tuned } == shape && tuned.m > shape.m);
        if let Some(tuned) = near.min_by_key(|tuned| tuned.m).and_then(|tuned| self.plans.get(tuned)) {
            // SAFETY: a plain struct to be written by the call; handles are live, the algorithm came from the library.
            let works = unsafe {
                let mut result = std::mem::zeroed::<sys::cublasLtMatmulHeuristicResult_t>();
                sys::cublasLtMatmulAlgoCheck(
                    self.handle,
                    plan.description,
                    plan.w,
                    plan.x,
                    plan.y,
                    plan.y,
                    &raw const tuned.algorithm,
                    &raw mut result,
                )
                .result()
                .is_ok_and(|()| result.workspaceSize <= WORKSPACE_BYTES)
            };
            if works {
                plan.algorithm = tuned.algorithm;
            }
        }
        Ok(plan)
    }

    fn submit(&self, device: &Device, plan: &Plan, operands: Operands) -> Result<()> {
        let (one, zero) = (1f32, 0f32);
        let Operands { x, w, y } = operands;
        // SAFETY: the addresses are of live buffers of the plan's shapes; alpha and beta are read before the call returns.
        unsafe {
            lt::matmul(
                self.handle,
                plan.description,
                (&raw const one).cast(),
                (&raw const zero).cast(),
                w as *const c_void,
                plan.w,
                x as *const c_void,
                plan.x,
                y as *const c_void,
                plan.y,
                y as *mut c_void,
                plan.y,
                &raw const plan.algorithm,
                self.workspace.address as *mut c_void,
                WORKSPACE_BYTES,
                device.stream.cast(),
            )
        }
        .map_err(during("multiplying matrices"))
    }

    fn choose(&self, device: &Device, shape: GemmShape, operands: Operands) -> Result<Plan> {
        let (mut plan, candidates) = self.propose(shape)?;
        let mut best = f32::INFINITY;
        let (start, end) = (Event::new(true)?, Event::new(true)?);
        let mut chosen = None;
        for candidate in candidates {
            plan.algorithm = candidate;
            let mut times = Vec::with_capacity(TIMINGS);
            for _ in 0..=TIMINGS {
                start.record(device)?;
                if self.submit(device, &plan, operands).is_err() {
                    break;
                }
                end.record(device)?;
                end.wait()?;
                times.push(end.since(&start)?);
            }
            if times.len() <= TIMINGS {
                continue;
            }
            // the first one paid for loading the kernel
            let mut times = times.split_off(1);
            times.sort_by(f32::total_cmp);
            if times[TIMINGS / 2] < best {
                best = times[TIMINGS / 2];
                chosen = Some(candidate);
            }
        }
        plan.algorithm =
            chosen.ok_or_else(|| BackendError::Device(format!("cuBLASLt runs no algorithm for {shape:?}")))?;
        tracing::debug!(?shape, milliseconds = best, "chose a GEMM algorithm");
        Ok(plan)
    }

    fn propose(&self, shape: GemmShape) -> Result<(Plan, Vec<sys::cublasLtMatmulAlgo_t>)> {
        use sys::cublasLtMatmulDescAttributes_t as Attribute;
        use sys::cudaDataType_t as Type;
        let (input, output) = match shape.formats {
            Formats::E4m3ToBf16 => (Type::CUDA_R_8F_E4M3, Type::CUDA_R_16BF),
            Formats::Bf16ToBf16 => (Type::CUDA_R_16BF, Type::CUDA_R_16BF),
            Formats::Bf16ToF32 => (Type::CUDA_R_16BF, Type::CUDA_R_32F),
        };
        let description = lt::create_matmul_desc(sys::cublasComputeType_t::CUBLAS_COMPUTE_32F, Type::CUDA_R_32F)
            .map_err(during("describing a GEMM"))?;
        let layout = |kind, rows: usize, columns: usize| {
            lt::create_matrix_layout(kind, rows as u64, columns as u64, rows as i64)
                .map_err(during("describing a matrix"))
        };
        let (w, x, y) =
            (layout(input, shape.k, shape.n)?, layout(input, shape.k, shape.m)?, layout(output, shape.n, shape.m)?);
        let (transposed, plain) = (1i32, 0i32);
        // faster on FP8; rounds partial sums less often to full precision (relative error 2.6e-3 instead of 1.7e-3)
        let fast = i8::from(shape.formats == Formats::E4m3ToBf16);
        // SAFETY: each attribute is given a live value of its own size; all handles are fresh.
        let candidates = unsafe {
            lt::set_matmul_desc_attribute(
                description,
                Attribute::CUBLASLT_MATMUL_DESC_TRANSA,
                (&raw const transposed).cast(),
                4,
            )
            .map_err(during("describing a GEMM"))?;
            lt::set_matmul_desc_attribute(
                description,
                Attribute::CUBLASLT_MATMUL_DESC_TRANSB,
                (&raw const plain).cast(),
                4,
            )
            .map_err(during("describing a GEMM"))?;
            lt::set_matmul_desc_attribute(
                description,
                Attribute::CUBLASLT_MATMUL_DESC_FAST_ACCUM,
                (&raw const fast).cast(),
                1,
            )
            .map_err(during("describing a GEMM"))?;
            let preference = lt::create_matmul_pref().map_err(during("describing a GEMM"))?;
            let bytes = WORKSPACE_BYTES;
            let limit = sys::cublasLtMatmulPreferenceAttributes_t::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES;
            lt::set_matmul_pref_attribute(preference, limit, (&raw const bytes).cast(), 8)
                .map_err(during("describing a GEMM"))?;
            let mut found: Vec<sys::cublasLtMatmulHeuristicResult_t> = Vec::with_capacity(CANDIDATES);
            let mut count = 0;
            let status = sys::cublasLtMatmulAlgoGetHeuristic(
                self.handle,
                description,
                w,
                x,
                y,
                y,
                preference,
                CANDIDATES as i32,
                found.as_mut_ptr(),
                &raw mut count,
            );
            let _ = lt::destroy_matmul_pref(preference);
            status.result().map_err(during("selecting a GEMM algorithm"))?;
            found.set_len(count as usize);
            found
                .into_iter()
                .filter(|result| result.state == sys::cublasStatus_t::CUBLAS_STATUS_SUCCESS)
                .map(|result| result.algo)
                .collect::<Vec<_>>()
        };
        let Some(first) = candidates.first() else {
            return Err(BackendError::Device(format!("cuBLASLt has no algorithm for {shape:?}")));
        };
        Ok((Plan { description, w, x, y, algorithm: *first }, candidates))
    }
}

impl Drop for Matmul {
    fn drop(&mut self) {
        self.plans.clear();
        // SAFETY: opened in `new`, closed once.
        let _ = unsafe { lt::destroy_handle(self.handle) };
    }
}

impl Drop for Plan {
    fn drop(&mut self) {
        // SAFETY: made in `propose`, destroyed once.
        unsafe {
            let _ = lt::destroy_matrix_layout(self.w);
            let _ = lt::destroy_matrix_layout(self.x);
            let _ = lt::destroy_matrix_layout(self.y);
            let _ = lt::destroy_matmul_desc(self.description);
        }
    }
}
