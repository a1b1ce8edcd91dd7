//! The model that the program carries, so that there is something to run: a teller of small stories, of
//! three million parameters, trained by this project on text of its own grammar. (docs/training.md tells how,
//! and what it is worth.)

use std::path::Path;

use bytes::Bytes;

use crate::checkpoint::{Checkpoint, LoadError, OpenOptions};

/// Its name where others have a path.
pub const NAME: &str = "(built-in) stories";

/// Aligned as a file's tensors are.
#[repr(align(64))]
struct Aligned<T: ?Sized>(T);

static MODEL: &Aligned<[u8]> = &Aligned(*include_bytes!("../assets/stories.gguf"));

/// The model, in memory already.
///
/// ```
/// let stories = bitnet_burn_engine::embedded::checkpoint()?;
/// assert!(stories.config().ternary_parameters() > 1_000_000);
/// # Ok::<(), bitnet_burn_engine::checkpoint::LoadError>(())
/// ```
///
/// # Errors
/// None that a build which passed its tests can have.
pub fn checkpoint() -> Result<Checkpoint, LoadError> {
    Checkpoint::from_gguf(Path::new(NAME), Bytes::from_static(&MODEL.0), &OpenOptions::default())
}
