#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    bitnet_burn_fuzz::core::caches::tuning(data);
});
