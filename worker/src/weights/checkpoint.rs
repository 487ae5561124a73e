//! The files of a checkpoint: mapped into memory, with every tensor identified and every shape checked before a weight
//! is read.
#![allow(unsafe_code)] // memory maps: see `map`

use std::collections::{BTreeSet, HashMap};
use std::ops::Range;
use std::path::{Path, PathBuf};

use bora_common::model::{ModelConfig, Quantization};
use memmap2::Mmap;
use safetensors::SafeTensors;
use tracing::{info, warn};
use xxhash_rust::xxh3::Xxh3;

use super::names::{CheckpointFormat, Meaning, Part, Projection, meaning};
use super::shard::ShardPlan;
use super::slice::{Dtype, Fp8Scales, LinearShard, RowOrder, Slice, Source, VocabularyShard};
use super::{WeightError, dummy};

/// The weights of a model, opened once per process and shared by its ranks.
pub struct Weights {
    config: ModelConfig,
    tied: bool,
    origin: Origin,
    fingerprint: String,
}

enum Origin {
    Files { files: Vec<MappedFile>, tensors: HashMap<Part, Tensor>, checkpoint_format: CheckpointFormat },
    Random { seed: u64 },
}

struct MappedFile {
    path: PathBuf,
    map: Mmap,
}

/// Location of a tensor.
struct Tensor {
    name: String,
    file: usize,
    bytes: Range<usize>,
    dtype: Dtype,
    shape: Vec<usize>,
}

impl Weights {
    /// Opens the checkpoint in a folder: `model.safetensors`, shards with an index, or Mistral's
    /// `consolidated*.safetensors`. Every tensor must be known, occur once and have the right shape. Vision tensors are
    /// only known for a vision model.
    pub fn open(folder: &Path, config: &ModelConfig) -> Result<Self, WeightError> {
        let paths = weight_files(folder)?;
        let mut files = Vec::with_capacity(paths.len());
        let mut tensors: HashMap<Part, Tensor> = HashMap::new();
        let mut checkpoint_format = CheckpointFormat::HuggingFace;
        for path in paths {
            let map = map(&path)?;
            for tensor in read_header(&path, &map, files.len())? {
                let (meaning, tensor_format) = meaning(&tensor.name)
                    .ok_or_else(|| WeightError::Unknown { path: path.clone(), name: tensor.name.clone() })?;
                match meaning {
                    Meaning::Decoder(part) => {
                        checkpoint_format = tensor_format;
                        if let Some(other) = tensors.get(&part) {
                            return Err(WeightError::Twice { first: other.name.clone(), second: tensor.name });
                        }
                        tensors.insert(part, tensor);
                    }
                    Meaning::Vision if config.vision.is_some() => {}
                    Meaning::Vision => return Err(WeightError::Unknown { path, name: tensor.name }),
                    Meaning::Derived => {}
                }
            }
            files.push(MappedFile { path, map });
        }
        let tied = config.tie_word_embeddings.unwrap_or(!tensors.contains_key(&Part::Head));
        let fingerprint = fingerprint(config, &files);
        info!(files = files.len(), tensors = tensors.len(), tied, fingerprint, "opened the checkpoint");
        let origin = Origin::Files { files, tensors, checkpoint_format };
        let weights = Self { config: config.clone(), tied, origin, fingerprint };
        weights.check()?;
        Ok(weights)
    }

    /// Random weights with the shapes of the model: see [`super::dummy`].
    pub fn dummy(config: &ModelConfig, seed: u64) -> Self {
        let tied = config.tie_word_embeddings.unwrap_or(false);
        let mut hasher = Xxh3::new();
        hasher.update(format!("{config:?} {seed}").as_bytes());
        let fingerprint = format!("dummy-{:032x}", hasher.digest128());
        warn!(seed, "serving random weights: the output is noise");
        Self { config: config.clone(), tied, origin: Origin::Random { seed }, fingerprint }
    }

    /// Configuration of the model.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Weights fingerprint, equal for equal checkpoints: a hash of the configuration, the sizes and headers of the
    /// files, and samples of their contents. It is cheap, and no protection against forged files.
    pub fn fingerprint(&self) -> &str {
        &self.fingerprint
    }

    /// The rank's rows of the token embedding.
    pub fn embedding(&self, plan: &ShardPlan) -> VocabularyShard<'_> {
        self.vocabulary(Part::Embedding, plan)
    }

    /// The rank's rows of the language-model head, which are those of the embedding if the two are tied.
    pub fn head(&self, plan: &ShardPlan) -> VocabularyShard<'_> {
        self.vocabulary(if self.tied { Part::Embedding } else { Part::Head }, plan)
    }

    /// Gain of the norm before attention: one row of hidden_size.
    pub fn attention_norm(&self, layer: usize) -> Slice<'_> {
        self.gain(Part::AttentionNorm(layer))
    }

    /// Gain of the norm before the MLP: one row of hidden_size.
    pub fn mlp_norm(&self, layer: usize) -> Slice<'_> {
        self.gain(Part::MlpNorm(layer))
    }

    /// Gain of the norm before the head: one row of hidden_size.
    pub fn final_norm(&self) -> Slice<'_> {
        self.gain(Part::FinalNorm)
    }

    /// The rank's rows (q, k, v, gate, up) or columns (o, down) of a linear layer.
    pub fn projection(
        &self,
        layer: usize,
        projection: Projection,
        plan: &ShardPlan,
    ) -> Result<LinearShard<'_>, WeightError> {
        let (outputs, inputs) = self.projection_shape(projection);
        let head_dim = self.config.head_dim;
        let heads = |range: &Range<usize>| range.start * head_dim..range.end * head_dim;
        let (rows, columns) = match projection {
            Projection::Q => (heads(&plan.heads), 0..inputs),
            Projection::K | Projection::V => (heads(&plan.kv_heads), 0..inputs),
            Projection::Gate | Projection::Up => (plan.intermediate.clone(), 0..inputs),
            Projection::O => (0..outputs, heads(&plan.heads)),
            Projection::Down => (0..outputs, plan.intermediate.clone()),
        };
        let order = match (projection, &self.origin) {
            (Projection::Q | Projection::K, Origin::Files { checkpoint_format: CheckpointFormat::Mistral, .. }) => {
                RowOrder::InterleavedPairs { head_dim }
            }
            _ => RowOrder::Plain,
        };
        let part = Part::Weight(layer, projection);
        let weight = self.rectangle(part, rows, columns, inputs, order);
        let scales = match (weight.dtype, &self.origin) {
            (Dtype::F8E4M3, Origin::Files { .. }) => Some(Fp8Scales {
                weight: self.scale(Part::WeightScale(layer, projection))?,
                input: self.scale(Part::InputScale(layer, projection))?,
            }),
            (Dtype::F8E4M3, Origin::Random { .. }) => Some(dummy::scales(projection)),
            _ => None,
        };
        Ok(LinearShard { weight, scales })
    }

    /// Bytes of the rank's weights on a GPU: e4m3 unchanged, everything else as bf16.
    pub fn bytes(&self, plan: &ShardPlan) -> Result<u64, WeightError> {
        let size =
            |slice: &Slice<'_>| (slice.rows * slice.columns * if slice.dtype == Dtype::F8E4M3 { 1 } else { 2 }) as u64;
        let mut bytes = size(&self.embedding(plan).rows) + size(&self.head(plan).rows);
        for layer in 0..self.config.num_hidden_layers {
            for projection in Projection::ALL {
                bytes += size(&self.projection(layer, projection, plan)?.weight);
            }
        }
        Ok(bytes)
    }

    /// Shape [outputs, inputs] of the whole linear layer.
    fn projection_shape(&self, projection: Projection) -> (usize, usize) {
        let config = &self.config;
        let queries = config.num_attention_heads * config.head_dim;
        let keys = config.num_key_value_heads * config.head_dim;
        match projection {
            Projection::Q => (queries, config.hidden_size),
            Projection::K | Projection::V => (keys, config.hidden_size),
            Projection::O => (config.hidden_size, queries),
            Projection::Gate | Projection::Up => (config.intermediate_size, config.hidden_size),
            Projection::Down => (config.hidden_size, config.intermediate_size),
        }
    }

    fn vocabulary(&self, part: Part, plan: &ShardPlan) -> VocabularyShard<'_> {
        let width = self.config.hidden_size;
        VocabularyShard {
            rows: self.rectangle(part, plan.vocabulary.clone(), 0..width, width, RowOrder::Plain),
            first_id: plan.vocabulary.start,
            rows_per_rank: plan.vocabulary_per_rank,
            vocabulary_size: self.config.vocab_size,
        }
    }

    fn gain(&self, part: Part) -> Slice<'_> {
        let width = self.config.hidden_size;
        match &self.origin {
            Origin::Files { .. } => self.rectangle(part, 0..1, 0..width, width, RowOrder::Plain),
            Origin::Random { .. } => {
                Slice { name: "dummy norm", dtype: Dtype::Bf16, rows: 1, columns: width, source: Source::Constant(1.0) }
            }
        }
    }

    /// `tensor_columns` is the width of the whole tensor. `check` has verified that the tensor exists and has the shape
    /// that the ranges assume.
    fn rectangle(
        &self,
        part: Part,
        rows: Range<usize>,
        columns: Range<usize>,
        tensor_columns: usize,
        order: RowOrder,
    ) -> Slice<'_> {
        match &self.origin {
            Origin::Files { files, tensors, .. } => {
                let tensor = &tensors[&part];
                let size = tensor.dtype.size();
                let row_stride = tensor_columns * size;
                let all = &files[tensor.file].map[tensor.bytes.clone()];
                let bytes = if rows.is_empty() { &[] } else { &all[rows.start * row_stride + columns.start * size..] };
                Slice {
                    name: &tensor.name,
                    dtype: tensor.dtype,
                    rows: rows.len(),
                    columns: columns.len(),
                    source: Source::Stored { bytes, row_stride, order },
                }
            }
            Origin::Random { seed } => {
                let fp8 = self.config.quantization == Quantization::Fp8Static && matches!(part, Part::Weight(_, _));
                let mut fill = dummy::fill(*seed, part, fp8, tensor_columns);
                fill.first_row = rows.start;
                fill.first_column = columns.start;
                Slice {
                    name: "dummy weight",
                    dtype: if fp8 { Dtype::F8E4M3 } else { Dtype::Bf16 },
                    rows: rows.len(),
                    columns: columns.len(),
                    source: Source::Random(fill),
                }
            }
        }
    }

    fn scale(&self, part: Part) -> Result<f32, WeightError> {
        let slice = self.rectangle(part, 0..1, 0..1, 1, RowOrder::Plain);
        let value = slice.to_f32(1.0)[0];
        if !value.is_finite() || value <= 0.0 {
            return Err(WeightError::Scale { name: slice.name.to_owned(), value });
        }
        Ok(value)
    }

    /// Checks that the files hold all tensors of the model, with the right shapes and supported types.
    fn check(&self) -> Result<(), WeightError> {
        let Origin::Files { tensors, files, .. } = &self.origin else { return Ok(()) };
        let config = &self.config;
        let width = config.hidden_size;
        let mut expected: Vec<(Part, Vec<usize>)> =
            vec![(Part::Embedding, vec![config.vocab_size, width]), (Part::FinalNorm, vec![width])];
        // a tied checkpoint may hold the head as well, whose shape must then be right
        if !self.tied || tensors.contains_key(&Part::Head) {
            expected.push((Part::Head, vec![config.vocab_size, width]));
        }
        for layer in 0..config.num_hidden_layers {
            expected.push((Part::AttentionNorm(layer), vec![width]));
            expected.push((Part::MlpNorm(layer), vec![width]));
            for projection in Projection::ALL {
                let (outputs, inputs) = self.projection_shape(projection);
                let part = Part::Weight(layer, projection);
                expected.push((part, vec![outputs, inputs]));
                if tensors.get(&part).is_some_and(|tensor| tensor.dtype == Dtype::F8E4M3) {
                    expected.push((Part::WeightScale(layer, projection), vec![]));
                    expected.push((Part::InputScale(layer, projection), vec![]));
                }
            }
        }
        let mut left: BTreeSet<&str> = tensors.values().map(|tensor| tensor.name.as_str()).collect();
        for (part, shape) in expected {
            let Some(tensor) = tensors.get(&part) else {
                return Err(WeightError::Missing { name: part.to_string() });
            };
            let scalar = shape.is_empty();
            if tensor.shape != shape && !(scalar && tensor.shape == [1]) {
                let (name, found) = (tensor.name.clone(), tensor.shape.clone());
                return Err(WeightError::Shape { name, found, expected: shape });
            }
            if tensor.dtype == Dtype::F8E4M3 && !matches!(part, Part::Weight(_, _)) {
                let (name, found) = (tensor.name.clone(), "F8_E4M3".to_owned());
                return Err(WeightError::Type { name, found, expected: "BF16, F16 or F32".to_owned() });
            }
            left.remove(tensor.name.as_str());
        }
        // remaining tensors: layers beyond the configured number, or scales of weights that are not FP8
        match left.first() {
            None => Ok(()),
            Some(name) => {
                let file = tensors.values().find(|tensor| tensor.name == *name).map_or(0, |tensor| tensor.file);
                Err(WeightError::Unknown { path: files[file].path.clone(), name: (*name).to_owned() })
            }
        }
    }
}

/// The files with weights, in the order of their names.
fn weight_files(folder: &Path) -> Result<Vec<PathBuf>, WeightError> {
    for index in ["model.safetensors.index.json", "consolidated.safetensors.index.json"] {
        let path = folder.join(index);
        match std::fs::read_to_string(&path) {
            Ok(text) => return indexed_files(folder, &path, &text),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => return Err(WeightError::Unreadable { path, reason: error.to_string() }),
        }
    }
    let single = folder.join("model.safetensors");
    if single.is_file() {
        return Ok(vec![single]);
    }
    let unreadable =
        |error: std::io::Error| WeightError::Unreadable { path: folder.to_owned(), reason: error.to_string() };
    let mut consolidated = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(unreadable)? {
        let entry = entry.map_err(unreadable)?;
        let name = entry.file_name();
        let name = name.to_string_lossy();
        if name.starts_with("consolidated") && name.ends_with(".safetensors") {
            consolidated.push(entry.path());
        }
    }
    consolidated.sort();
    if consolidated.is_empty() {
        return Err(WeightError::NoWeights { folder: folder.to_owned() });
    }
    Ok(consolidated)
}

fn indexed_files(folder: &Path, path: &Path, text: &str) -> Result<Vec<PathBuf>, WeightError> {
    let unreadable = |reason: String| WeightError::Unreadable { path: path.to_owned(), reason };
    let index: serde_json::Value = serde_json::from_str(text).map_err(|error| unreadable(error.to_string()))?;
    let Some(weight_map) = index.get("weight_map").and_then(|map| map.as_object()) else {
        return Err(unreadable("it has no `weight_map`".to_owned()));
    };
    let mut names = BTreeSet::new();
    for (tensor, file) in weight_map {
        match file.as_str() {
            // an index only names files in its own folder
            Some(name) if !name.contains(['/', '\\']) => names.insert(name),
            _ => return Err(unreadable(format!("`weight_map.{tensor}` is not the name of a file beside it"))),
        };
    }
    if names.is_empty() {
        return Err(unreadable("`weight_map` is empty".to_owned()));
    }
    Ok(names.into_iter().map(|name| folder.join(name)).collect())
}

fn map(path: &Path) -> Result<Mmap, WeightError> {
    let unreadable =
        |error: std::io::Error| WeightError::Unreadable { path: path.to_owned(), reason: error.to_string() };
    let file = std::fs::File::open(path).map_err(unreadable)?;
    // SAFETY: the map is read-only, and checkpoints are written once and replaced whole, never changed in
    // place; an operator who truncates one under a running server ends it (SIGBUS), as with any loader.
    unsafe { Mmap::map(&file) }.map_err(unreadable)
}

fn read_header(path: &Path, map: &Mmap, file: usize) -> Result<Vec<Tensor>, WeightError> {
    let unreadable = |reason: String| WeightError::Unreadable { path: path.to_owned(), reason };
    let (header_length, metadata) = SafeTensors::read_metadata(map).map_err(|error| unreadable(error.to_string()))?;
    let data_start = 8 + header_length;
    let mut tensors = Vec::new();
    for (name, info) in metadata.tensors() {
        let dtype = match info.dtype {
            safetensors::Dtype::F8_E4M3 => Dtype::F8E4M3,
            safetensors::Dtype::BF16 => Dtype::Bf16,
            safetensors::Dtype::F16 => Dtype::F16,
            safetensors::Dtype::F32 => Dtype::F32,
            other => {
                let expected = "F8_E4M3, BF16, F16 or F32".to_owned();
                return Err(WeightError::Type { name, found: format!("{other:?}"), expected });
            }
        };
        let (start, end) = info.data_offsets;
        let length = info.shape.iter().product::<usize>() * dtype.size();
        if end - start != length || data_start + end > map.len() {
            return Err(unreadable(format!("tensor `{name}` does not fit its shape or the file")));
        }
        tensors.push(Tensor {
            name,
            file,
            bytes: data_start + start..data_start + end,
            dtype,
            shape: info.shape.clone(),
        });
    }
    tensors.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(tensors)
}

fn fingerprint(config: &ModelConfig, files: &[MappedFile]) -> String {
    const SAMPLES: usize = 64;
    const SAMPLE_BYTES: usize = 4096;
    let mut hasher = Xxh3::new();
    hasher.update(format!("{config:?}").as_bytes());
    for file in files {
        let bytes = &file.map[..];
        hasher.update(&(bytes.len() as u64).to_le_bytes());
        let header = bytes.first_chunk::<8>().map_or(0, |length| u64::from_le_bytes(*length) as usize + 8);
        hasher.update(&bytes[..header.min(bytes.len())]);
        for sample in 0..SAMPLES {
            let start = bytes.len() / SAMPLES * sample;
            hasher.update(&bytes[start..(start + SAMPLE_BYTES).min(bytes.len())]);
        }
    }
    format!("{:032x}", hasher.digest128())
}
