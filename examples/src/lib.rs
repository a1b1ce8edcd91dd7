//! Programs to copy from, one file each, beside this folder. From the root of the repository:
//!
//! | command | shows |
//! | --- | --- |
//! | `cargo run --release --example mlp` | `BitLinear` in a network of your own: training, packing, inference |
//! | `cargo run --release --example generate -- MODEL PROMPT` | loading a checkpoint and streaming text |
//! | `cargo run --release --example classifier --features learner` | training by Burn's `Learner`, beside an f32 twin; saving and loading a packed model |
//! | `cargo run --release --example fine_tune` | `Linear` layers of an existing model becoming `BitLinear` layers |
//! | `cargo run --release --example train_export_serve` | from text to a trained BitNet, to a GGUF file, to several prompts at once |
//! | `cargo run --release --example stories -- --out stories.txt` | making the text that the small model learns from, and checking text against its grammar |
//!
//! Here is what several of them share.

pub mod digits;
pub mod stories;
