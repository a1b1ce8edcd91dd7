//! Dense matrices: the output projection (lm_head), embeddings, and other layers that are not ternary.

pub mod floats;
pub mod int8;
