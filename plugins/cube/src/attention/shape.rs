//! The shape of an attention, and what a launch can have of it.

use cubecl::server::Handle;

/// Type of a cache's values.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Cached {
    /// A word each.
    F32,
    /// Two IEEE halves a word.
    F16,
    /// Four int8 a word, and a scale for each position and head: absmax / 127.
    Int8,
}

impl Cached {
    /// Values in a word.
    pub const fn values(self) -> u32 {
        match self {
            Self::F32 => 1,
            Self::F16 => 2,
            Self::Int8 => 4,
        }
    }
}

/// Keys or values of one sequence and layer, [kv heads, capacity, d].
#[derive(Clone, Debug)]
pub struct Cache {
    /// The values, as words.
    pub words: Handle,
    /// f32 [kv heads, capacity], for int8.
    pub scale: Option<Handle>,
}

/// Heads, and the room of a cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Query heads.
    pub n_heads: usize,
    /// Key and value heads; query head h reads kv head h / (n_heads / n_kv_heads).
    pub n_kv_heads: usize,
    /// Values a head.
    pub head_dim: usize,
    /// Positions that the cache has room for.
    pub capacity: usize,
    /// Type of its values.
    pub cached: Cached,
    /// Positions that a row sees, up to its own; `None`: all of them.
    pub window: Option<usize>,
}

/// Positions that are attended to at once.
pub(super) const CHUNK: u32 = 64;
/// Threads of a workgroup.
pub(crate) const THREADS: u32 = 128;
/// Threads that share a dot product.
pub(super) const LANES: u32 = 8;
/// Queries that a workgroup has at most: its threads keep a sum for each.
const MAX_QUERIES: usize = 16;
/// Words of memory that a workgroup may share: what WebGPU promises, 16 KiB.
const SHARED_WORDS: usize = 4096;
/// Workgroups in one dimension, at most.
const MAX_COUNT: usize = 65_535;
/// Rows beyond which the chunks of a row follow each other in one workgroup.
pub(super) const FEW_ROWS: usize = 16;
/// Values that chunks may leave until they are joined; for more, they follow each other, too.
pub(super) const MOST_PARTIAL: usize = 1 << 24;

impl Shape {
    /// Whether the kernels can be launched for m rows.
    pub fn supported(&self, m: usize) -> bool {
        let values = self.n_kv_heads.saturating_mul(self.capacity).saturating_mul(self.head_dim);
        let words = values / self.cached.values() as usize;
        let width = (self.n_heads + 2 * self.n_kv_heads) * self.head_dim;
        self.head_dim.is_multiple_of(4)
            && self.shared_words(1) <= SHARED_WORDS
            && words < u32::MAX as usize
            && (1..=MAX_COUNT).contains(&m)
            && m.checked_mul(width).is_some_and(|values| values < u32::MAX as usize)
            && self.n_heads + 2 * self.n_kv_heads <= MAX_COUNT
            && self.capacity.div_ceil(CHUNK as usize) <= MAX_COUNT
    }

    fn group(&self) -> usize {
        self.n_heads / self.n_kv_heads
    }

    /// Memory that the threads of a workgroup share, by its number of queries: the queries, their scores, sums on the way, and three
    /// figures each.
    fn shared_words(&self, queries: usize) -> usize {
        queries * (self.head_dim + CHUNK as usize + 3) + 4 * THREADS as usize
    }

    /// Heads of a kv head, and rows, that a workgroup has the queries of.
    pub(super) fn queries(&self, m: usize) -> (u32, u32) {
        let fits = |queries: usize| queries <= MAX_QUERIES && self.shared_words(queries) <= SHARED_WORDS;
        let group = self.group();
        let heads = (1..=group).rev().find(|&heads| group.is_multiple_of(heads) && fits(heads)).unwrap_or(1);
        let rows = if m <= FEW_ROWS { 1 } else { [4, 2].into_iter().find(|r| fits(heads * r)).unwrap_or(1) };
        (heads as u32, rows as u32)
    }

    /// The parameters of the kernels for m rows, of which the first is at `position`.
    pub fn params(&self, m: usize, position: usize) -> [u32; 8] {
        let chunks = (position + m).div_ceil(CHUNK as usize);
        // Without a window the kernels do not read it.
        let window = self.window.map_or(0, |window| window.min(u32::MAX as usize));
        [m, position, self.capacity, self.n_heads, self.n_kv_heads, chunks, window, 0]
            .map(|value| value as u32)
    }
}
