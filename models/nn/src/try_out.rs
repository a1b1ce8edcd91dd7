//! Whether a model's devices have the memory for it.

use bitnet_burn_backends::{devices, ops};
use burn::tensor::Device;

use crate::{BitNet, CacheType, DenseWeight, ForwardError, Row};

impl BitNet {
    /// Whether its devices have the memory for it: computes the last `rows` rows of a sequence that fills `context`
    /// positions, and forgets them. What a device says against it, in words; a device that panics says something, too.
    ///
    /// # Errors
    /// That.
    pub fn try_out(&self, rows: usize, context: usize, cache_type: CacheType) -> Result<(), String> {
        let compute = || -> Result<(), String> {
            self.arrived()?;
            let words = |error: ForwardError| error.to_string();
            let mut cache = self.cache(context, cache_type).map_err(|error| words(error.into()))?;
            let sequence = cache.add_sequence(cache.capacity());
            let rows = rows.clamp(1, cache.capacity());
            let first = cache.capacity() - rows;
            cache.advance(sequence, first).map_err(|error| words(error.into()))?;
            let rows: Vec<Row> =
                (first..first + rows).map(|position| Row { token: 0, sequence, position }).collect();
            let logits = self.forward(&rows, &[rows.len() - 1], &mut cache).map_err(words)?;
            devices::read(logits).map(|_| ())
        };
        devices::catching_panics(compute)?
    }

    /// That the weights which are not in host memory are where they were sent: a device that had no room for them says so
    /// when they are read, and kernels that read them would be blamed for it. (A worker that had no room for them is
    /// gone.)
    fn arrived(&self) -> Result<(), String> {
        let words = |what: &str, error: &dyn std::fmt::Display| format!("{what}: {error}");
        let tells = |device: &Device| !ops::is_host(device) && !devices::is_remote(device);
        if tells(&self.device()) {
            for (what, matrix) in [("the embedding", Some(&self.embedding)), ("the output", self.head())] {
                if let Some(DenseWeight::Stored(stored)) = matrix.map(|matrix| &matrix.weight) {
                    let first = stored.val().slice([0..1, 0..1]);
                    first.try_into_data().map_err(|error| words(what, &error))?;
                }
            }
        }
        for (i, block) in self.blocks.iter().enumerate().filter(|(_, block)| tells(&block.device())) {
            for matrix in block.projections().iter().filter_map(|(_, layer)| layer.matrix()) {
                let first = matrix.codes.slice([0..1, 0..1]);
                first.try_into_data().map_err(|error| words(&format!("layer {i}"), &error))?;
            }
        }
        Ok(())
    }
}
