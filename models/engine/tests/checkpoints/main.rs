//! Model files: what is read of them, and which of them are refused.

mod delta_net;
mod experts;
mod gguf;
mod hf;
mod hostile_gguf;
mod hostile_hf;
mod other_programs_gguf;
mod other_programs_hf;
mod projection_norms;
mod shared_expert;
