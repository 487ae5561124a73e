//! Flags that every command with an engine of its own has, named as vLLM's.

use std::time::Duration;

use bora_common::config::ByteSize;
use bora_worker::{DeviceChoice, Fp8Mode, KvDtype, LoadFormat, SpeculativeOptions, WorkerOptions};
use clap::Args;

/// How the engine runs the model.
#[derive(Args, Clone, Debug)]
pub(crate) struct EngineFlags {
    /// where weights come from
    #[arg(long, value_enum, default_value = "auto")]
    pub(crate) load_format: LoadFormat,
    /// what to run on
    #[arg(long, value_enum, default_value = "auto")]
    pub(crate) device: DeviceChoice,
    /// ranks that the model is split over
    #[arg(long, short = 't', visible_alias = "tp", default_value_t = 1)]
    pub(crate) tensor_parallel_size: u32,
    /// sequences that run at once
    #[arg(long)]
    max_num_seqs: Option<u32>,
    /// tokens in one step
    #[arg(long)]
    max_num_batched_tokens: Option<u32>,
    /// seconds that a step may take while streams are being decoded: prompts are cut into chunks that fit
    #[arg(long)]
    step_seconds: Option<f64>,
    /// type of the KV cache's numbers
    #[arg(long, value_enum, default_value = "auto")]
    pub(crate) kv_cache_dtype: KvDtype,
    /// blocks of 64 tokens in the KV cache
    #[arg(long, visible_alias = "num-gpu-blocks-override")]
    num_kv_blocks: Option<u32>,
    /// memory of the KV cache on each rank, for example 4GiB
    #[arg(long)]
    kv_cache_memory: Option<ByteSize>,
    /// share of a GPU's memory that is used, weights included
    #[arg(long)]
    gpu_memory_utilization: Option<f32>,
    /// GiB of host memory, of all ranks together, that cached blocks go to before they are given up
    #[arg(long, visible_alias = "swap-space")]
    kv_offloading_size: Option<f64>,
    /// sum over the ranks by NCCL alone, not through the GPUs' view of each other's memory
    #[arg(long)]
    disable_custom_all_reduce: bool,
    /// how FP8 weights are multiplied on the CPU
    #[arg(long, value_enum, default_value = "dequantized")]
    cpu_fp8: Fp8Mode,
    /// speculation as JSON, for example {"method": "ngram", "num_speculative_tokens": 8};
    /// {"num_speculative_tokens": 0} turns it off
    #[arg(long)]
    pub(crate) speculative_config: Option<SpeculativeOptions>,
}

impl EngineFlags {
    /// Writes what was given over the options.
    pub(crate) fn apply(self, options: &mut WorkerOptions) {
        options.device = self.device;
        options.tensor_parallel_size = self.tensor_parallel_size;
        options.load_format = self.load_format;
        options.cpu_fp8 = self.cpu_fp8;
        options.disable_custom_all_reduce = self.disable_custom_all_reduce;
        let cache = &mut options.kv_cache;
        cache.blocks = self.num_kv_blocks;
        cache.memory = self.kv_cache_memory;
        cache.dtype = self.kv_cache_dtype;
        cache.device_share = self.gpu_memory_utilization.unwrap_or(cache.device_share);
        let of_each_rank = |gib: f64| {
            ByteSize((gib.max(0.0) * f64::from(1 << 30)) as u64 / u64::from(self.tensor_parallel_size.max(1)))
        };
        cache.host_memory = self.kv_offloading_size.map(of_each_rank);
        let schedule = &mut options.schedule;
        schedule.max_num_seqs = self.max_num_seqs.unwrap_or(schedule.max_num_seqs);
        schedule.max_num_batched_tokens = self.max_num_batched_tokens.unwrap_or(schedule.max_num_batched_tokens);
        let seconds = self.step_seconds.and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
        schedule.step_seconds = seconds.or(schedule.step_seconds);
        schedule.speculative = self.speculative_config.or(schedule.speculative.take());
    }
}

#[cfg(test)]
mod tests {
    use clap::{CommandFactory as _, Parser};

    use super::*;

    #[derive(Parser)]
    struct Command {
        #[command(flatten)]
        engine: EngineFlags,
    }

    fn parse(value: &str) -> Result<Option<SpeculativeOptions>, clap::Error> {
        Command::try_parse_from(["bora", "--speculative-config", value])
            .map(|command| command.engine.speculative_config)
    }

    #[test]
    fn what_the_help_of_speculation_shows_is_taken() {
        let command = Command::command();
        let argument = command.get_arguments().find(|argument| argument.get_id() == "speculative_config");
        let help = argument.and_then(clap::Arg::get_help).expect("a help").to_string();
        let shown: Vec<&str> =
            help.match_indices('{').filter_map(|(at, _)| Some(&help[at..=at + help[at..].find('}')?])).collect();
        assert_eq!(shown.len(), 2, "{help}");
        for example in shown {
            assert!(parse(example).is_ok_and(|options| options.is_some()), "{example}");
        }
        assert_eq!(parse(r#"{"num_speculative_tokens": 0}"#).ok().flatten(), Some(SpeculativeOptions::off()));
        assert!(parse("0").is_err(), "a number alone is not shown");
    }
}
