#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    bitnet_burn_fuzz::engine::texts::template(data);
});
