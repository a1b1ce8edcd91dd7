//! Programs to copy from, one file each, beside this folder. From the root of the repository:
//!
//! | command | shows |
//! | --- | --- |
//! | `cargo run --release --example mlp` | `BitLinear` in a network of your own: training, packing, inference |
//! | `cargo run --release --example generate -- MODEL PROMPT` | loading a checkpoint and streaming text |
//! | `cargo run --release --example stories -- --out stories.txt` | writing the text that the small model learns from |

pub mod digits;
pub mod stories;
