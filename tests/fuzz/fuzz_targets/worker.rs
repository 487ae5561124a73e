#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| bora_fuzz::worker(input));
