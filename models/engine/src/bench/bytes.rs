//! What a decode step reads.

use bitnet_burn::{BitLinear, BitNet, Norm};
use serde::{Deserialize, Serialize};

/// Bytes that a decode step reads, by part, without the KV cache, which grows with the context.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BytesPerToken {
    /// Projections of all layers with their scales, in the layout that the chosen kernels read; of experts, those that compute
    /// a token.
    pub projections: u64,
    /// The output head, likewise. In tied models this is the embedding.
    pub head: u64,
    /// The weights of all norms, of routers to experts, and of the decays and write strengths of gated DeltaNets.
    pub norms: u64,
    /// One row of the embedding, if it is not the head.
    pub embedding_row: u64,
}

impl BytesPerToken {
    /// The bytes of a loaded model.
    pub fn of(model: &BitNet) -> Self {
        let config = model.config();
        let projections = model.blocks.iter().flat_map(|block| block.projections());
        let projections = projections.filter(|(which, _)| which.is_read(config));
        let projections = projections.map(|(_, layer)| BitLinear::weight_bytes(layer)).sum();
        let matrices = model.blocks.iter().flat_map(|block| block.float_matrices());
        let matrices = matrices.filter_map(|(_, matrix)| matrix.args().bytes()).sum::<usize>() as u64;
        let embedding = model.embedding.args();
        let embedding_row = embedding.format.row_bytes(embedding.k).unwrap_or(0) as u64;
        let (head, embedding_row) = match &model.output {
            None => (embedding_row * embedding.n as u64, 0),
            Some(output) => (output.weight_bytes(), embedding_row),
        };
        let of_layer = |layer| Norm::of_layer(layer, config).map(|norm| norm.len(config)).sum::<usize>();
        let norms = (0..config.n_layers).map(of_layer).sum::<usize>() + Norm::Output.len(config);
        Self { projections, head, norms: norms as u64 * 4 + matrices, embedding_row }
    }

    /// The sum of all parts.
    pub fn total(&self) -> u64 {
        self.projections + self.head + self.norms + self.embedding_row
    }
}
