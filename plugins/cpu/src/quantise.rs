//! pub placeholder
