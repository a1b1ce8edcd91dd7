//! Causal attention over a KV cache that stays on the device: rotary position embedding, the cache's own types, and
//! softmax over chunks of positions (Dao et al., "FlashAttention", arXiv 2205.14135; for one row the chunks are spread
//! over workgroups and brought together afterwards).
//!
//! A chunk begins at a multiple of 64 positions of the cache, and rows see chunks in their order, so that a row's result
//! depends on how its prompt was cut in its last bits at most: few rows join chunks behind the sums over each, many rows
//! go on from chunk to chunk.

mod shape;

use cubecl::client::Client;
use cubecl::prelude::*;
use cubecl::server::Handle;

pub(crate) use self::shape::THREADS;
use self::shape::{CHUNK, FEW_ROWS, LANES, MOST_PARTIAL};
pub use self::shape::{Cache, Cached, Shape};
use crate::bits::{half, to_half};
use crate::rows::{Absmax, byte, odd};

/// One workgroup for each row, and head of queries, keys and values: turns queries and keys by half rotation, and writes
/// keys and values into caches of floats. Parameters as [`Shape::params`] has them.
#[cube(launch_unchecked)]
pub(crate) fn rope_append(
    qkv: &[f32],
    cos: &[f32],
    sin: &[f32],
    q: &mut [f32],
    keys: &mut [u32],
    values: &mut [u32],
    params: &[u32],
    #[comptime] head_dim: u32,
    #[comptime] cached: Cached,
) {
    let n_heads = params[3];
    let n_kv_heads = params[4];
    let head = CUBE_POS_X;
    let row = CUBE_POS_Y;
    let half_dim = comptime!(head_dim / 2);
    let from = (row * (n_heads + 2 * n_kv_heads) + head) * head_dim;
    let kv_head = (head - n_heads) % n_kv_heads;
    let to = (kv_head * params[2] + params[1] + row) * head_dim;
    let mut j = UNIT_POS_X * 2;
    while j < half_dim {
        let mut low = Array::<f32>::new(2usize);
        let mut high = Array::<f32>::new(2usize);
        #[unroll]
        for i in 0..2u32 {
            low[i as usize] = qkv[(from + j + i) as usize];
            high[i as usize] = qkv[(from + half_dim + j + i) as usize];
        }
        if head < n_heads + n_kv_heads {
            #[unroll]
            for i in 0..2u32 {
                let c = cos[(row * half_dim + j + i) as usize];
                let s = sin[(row * half_dim + j + i) as usize];
                let (a, b) = (low[i as usize], high[i as usize]);
                low[i as usize] = a * c - b * s;
                high[i as usize] = b * c + a * s;
            }
        }
        if head < n_heads {
            let to = (row * n_heads + head) * head_dim + j;
            #[unroll]
            for i in 0..2u32 {
                q[(to + i) as usize] = low[i as usize];
                q[(to + half_dim + i) as usize] = high[i as usize];
            }
        } else if head < n_heads + n_kv_heads {
            write_two(keys, to + j, low[0], low[1], cached);
            write_two(keys, to + half_dim + j, high[0], high[1], cached);
        } else {
            write_two(values, to + j, low[0], low[1], cached);
            write_two(values, to + half_dim + j, high[0], high[1], cached);
        }
        j += CUBE_DIM_X * 2;
    }
}

/// Two values that follow each other, of which the first has an even number.
#[cube]
fn write_two(cache: &mut [u32], at: u32, first: f32, second: f32, #[comptime] cached: Cached) {
    if comptime!(cached == Cached::F16) {
        cache[(at / 2u32) as usize] = to_half(first) | (to_half(second) << 16u32);
    } else {
        cache[at as usize] = u32::reinterpret(first);
        cache[(at + 1u32) as usize] = u32::reinterpret(second);
    }
}

/// One workgroup for each row and kv head: keys, which are turned, or values, quantised by absmax into a cache of int8.
#[cube(launch_unchecked)]
pub(crate) fn append_int8(
    qkv: &[f32],
    cos: &[f32],
    sin: &[f32],
    cache: &mut [u32],
    scale: &mut [f32],
    params: &[u32],
    #[comptime] head_dim: u32,
    #[comptime] turned: bool,
) {
    let n_heads = params[3];
    let n_kv_heads = params[4];
    let head = CUBE_POS_X;
    let row = CUBE_POS_Y;
    let unit = UNIT_POS_X;
    let half_dim = comptime!(head_dim / 2);
    let part = if comptime!(turned) { n_heads } else { n_heads + n_kv_heads };
    let from = (row * (n_heads + 2 * n_kv_heads) + part + head) * head_dim;
    let mut own = Shared::<[f32]>::new_slice(head_dim as usize);
    let mut largest = 0.0f32;
    let mut not_finite = 0u32;
    let mut j = unit;
    while j < half_dim {
        let (x, y) = (qkv[(from + j) as usize], qkv[(from + half_dim + j) as usize]);
        let mut low = x;
        let mut high = y;
        if comptime!(turned) {
            let c = cos[(row * half_dim + j) as usize];
            let s = sin[(row * half_dim + j) as usize];
            low = x * c - y * s;
            high = y * c + x * s;
        }
        own[j as usize] = low;
        own[(half_dim + j) as usize] = high;
        largest = largest.max(low.abs().max(high.abs()));
        not_finite |= odd(low) | odd(high);
        j += THREADS;
    }
    // Behind its barriers all threads see `own`.
    let absmax = Absmax::of_all(largest, not_finite, THREADS);
    let at = head * params[2] + params[1] + row;
    let mut word = unit;
    while word < comptime!(head_dim / 4) {
        let mut packed = 0u32;
        #[unroll]
        for i in 0..4u32 {
            packed |= byte(absmax.code(own[(word * 4 + i) as usize]), i);
        }
        cache[(at * comptime!(head_dim / 4) + word) as usize] = packed;
        word += THREADS;
    }
    if unit == 0 {
        scale[at as usize] = f32::reinterpret(absmax.scale());
    }
}

/// Value i of a word; those of int8 without their scale.
#[cube]
fn value(word: u32, #[comptime] i: u32, #[comptime] cached: Cached) -> f32 {
    if comptime!(cached == Cached::F32) {
        f32::reinterpret(word)
    } else if comptime!(cached == Cached::F16) {
        half((word >> comptime!(16 * i)) & 0xffffu32)
    } else {
        f32::cast_from(i32::reinterpret(word << comptime!(24 - 8 * i)) >> 24i32)
    }
}

/// What [`attend_chunks`] is made for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Plan {
    pub head_dim: u32,
    pub cached: Cached,
    /// Heads of a kv head in one workgroup.
    pub heads: u32,
    /// Rows in one workgroup.
    pub rows: u32,
    /// Whether a workgroup has one chunk, and leaves its part of the result.
    pub split: bool,
    /// Whether rows see the positions of a window only.
    pub windowed: bool,
}

impl Plan {
    const fn queries(self) -> u32 {
        self.heads * self.rows
    }

    /// Words of a position.
    const fn words(self) -> u32 {
        self.head_dim / self.cached.values()
    }

    /// Threads that have a word of all values of a chunk, or some.
    const fn columns(self) -> u32 {
        if self.words() < THREADS { self.words() } else { THREADS }
    }

    /// Words that a thread has.
    const fn words_each(self) -> u32 {
        self.words().div_ceil(THREADS)
    }

    /// Parts that the positions of a chunk are in, for the sums over them.
    const fn parts(self) -> u32 {
        THREADS / self.columns()
    }

    /// Sums that a thread keeps.
    const fn sums(self) -> u32 {
        self.queries() * self.words_each() * self.cached.values()
    }
}

/// Workgroups are kv heads by parts of their queries' heads, rows by `rows`, and with `split` chunks. The output is
/// [rows, heads, d], or with `split` [rows, heads, chunks, d + 2]: sums of values, then their largest score and the sum
/// of weights.
#[cube(launch_unchecked)]
pub(crate) fn attend_chunks(
    q: &[f32],
    keys: &[u32],
    values: &[u32],
    key_scale: &[f32],
    value_scale: &[f32],
    out: &mut [f32],
    params: &[u32],
    #[comptime] plan: Plan,
) {
    let head_dim = comptime!(plan.head_dim);
    let cached = comptime!(plan.cached);
    let queries = comptime!(plan.queries());
    let words = comptime!(plan.words());
    let columns = comptime!(plan.columns());
    let parts = comptime!(plan.parts());
    let each = comptime!(plan.words_each());
    let in_word = comptime!(plan.cached.values());

    let m = params[0];
    let position = params[1];
    let capacity = params[2];
    let n_heads = params[3];
    let n_kv_heads = params[4];
    let unit = UNIT_POS_X;
    let group = n_heads / n_kv_heads;
    let parts_of_group = group / comptime!(plan.heads);
    let kv_head = CUBE_POS_X / parts_of_group;
    let first_head = kv_head * group + CUBE_POS_X % parts_of_group * comptime!(plan.heads);
    let first_row = CUBE_POS_Y * comptime!(plan.rows);
    // Behind the last row's own position there is nothing.
    let length = position + (first_row + comptime!(plan.rows)).min(m);

    let mut own = Shared::<[f32]>::new_slice((queries * head_dim) as usize);
    let mut scores = Shared::<[f32]>::new_slice((queries * CHUNK) as usize);
    let mut shared = Shared::<[f32]>::new_slice((4 * THREADS) as usize);
    let mut largest = Shared::<[f32]>::new_slice(queries as usize);
    let mut total = Shared::<[f32]>::new_slice(queries as usize);
    let mut shrink = Shared::<[f32]>::new_slice(queries as usize);

    let mut i = unit;
    while i < queries * head_dim {
        let query = i / head_dim;
        let row = (first_row + query / comptime!(plan.heads)).min(m - 1);
        let head = first_head + query % comptime!(plan.heads);
        own[i as usize] = q[((row * n_heads + head) * head_dim + i % head_dim) as usize];
        i += THREADS;
    }
    if unit < queries {
        largest[unit as usize] = f32::new(-1e30);
        total[unit as usize] = 0.0f32;
    }
    let mut sums = Array::<f32>::new(comptime!(plan.sums() as usize));
    #[unroll]
    for i in 0..comptime!(plan.sums()) {
        sums[i as usize] = 0.0f32;
    }
    let scale = 1.0f32 / f32::cast_from(head_dim).sqrt();
    sync_cube();

    let window = params[6];
    let mut chunk = 0u32;
    let mut end = length.div_ceil(CHUNK);
    if comptime!(plan.windowed) {
        // That of the first row's first position.
        let seen = position + first_row + 1;
        chunk = (seen - window.min(seen)) / CHUNK;
    }
    if comptime!(plan.split) {
        // Of a chunk before the window there are zeros.
        chunk = chunk.max(CUBE_POS_Z);
        end = (CUBE_POS_Z + 1).min(end);
    }
    while chunk < end {
        let begin = chunk * CHUNK;
        // Scores: 8 threads share a position, 16 positions at a time, 4 queries at a time.
        let lane = unit % LANES;
        let slot = unit / LANES;
        let mut base = 0u32;
        while base < CHUNK {
            let at = begin + base + slot;
            let mut dots = Array::<f32>::new(queries as usize);
            #[unroll]
            for query in 0..queries {
                dots[query as usize] = 0.0f32;
            }
            if at < length {
                let from = (kv_head * capacity + at) * words;
                let mut word = lane;
                while word < words {
                    let packed = keys[(from + word) as usize];
                    #[unroll]
                    for i in 0..in_word {
                        let key = value(packed, i, cached);
                        #[unroll]
                        for query in 0..queries {
                            let value = own[(query * head_dim + word * in_word + i) as usize];
                            dots[query as usize] += key * value;
                        }
                    }
                    word += LANES;
                }
                if comptime!(cached == Cached::Int8) {
                    let scale = key_scale[(kv_head * capacity + at) as usize];
                    #[unroll]
                    for query in 0..queries {
                        dots[query as usize] *= scale;
                    }
                }
            }
            #[unroll]
            for four in 0..comptime!(queries.div_ceil(4)) {
                #[unroll]
                for i in 0..4u32 {
                    let query = comptime!(four * 4 + i);
                    if comptime!(query < queries) {
                        shared[(unit * 4 + i) as usize] = dots[query as usize];
                    }
                }
                sync_cube();
                // Of 16 positions and 4 queries.
                let slot = unit / 4;
                let query = comptime!(four * 4) + unit % 4;
                if slot < comptime!(THREADS / LANES) && query < queries {
                    let mut dot = 0.0f32;
                    #[unroll]
                    for lane in 0..LANES {
                        dot += shared[((slot * LANES + lane) * 4 + unit % 4) as usize];
                    }
                    let at = begin + base + slot;
                    let row = first_row + query / comptime!(plan.heads);
                    let mut seen = at <= position + row && at < length;
                    if comptime!(plan.windowed) {
                        seen = seen && position + row - at < window;
                    }
                    scores[(query * CHUNK + base + slot) as usize] =
                        select(seen, dot * scale, f32::new(-1e30));
                }
                sync_cube();
            }
            base += comptime!(THREADS / LANES);
        }
        // The largest score, and weights relative to it: 8 threads a query.
        let query = unit / LANES;
        let mut most = f32::new(-1e30);
        if query < queries {
            #[unroll]
            for i in 0..comptime!(CHUNK / LANES) {
                most = most.max(scores[(query * CHUNK + lane + i * LANES) as usize]);
            }
        }
        shared[unit as usize] = most;
        sync_cube();
        let mut weights = 0.0f32;
        if query < queries {
            #[unroll]
            for i in 0..LANES {
                most = most.max(shared[(query * LANES + i) as usize]);
            }
            most = most.max(largest[query as usize]);
            #[unroll]
            for i in 0..comptime!(CHUNK / LANES) {
                let at = query * CHUNK + lane + i * LANES;
                let score = scores[at as usize];
                // Far behind the row, or the row is there no more.
                let weight = select(score <= f32::new(-1e29), 0.0f32, (score - most).exp());
                scores[at as usize] = weight;
                weights += weight;
            }
        }
        shared[(THREADS + unit) as usize] = weights;
        sync_cube();
        if query < queries && lane == 0 {
            let mut weights = 0.0f32;
            #[unroll]
            for i in 0..LANES {
                weights += shared[(THREADS + query * LANES + i) as usize];
            }
            let less = (largest[query as usize] - most).exp();
            shrink[query as usize] = less;
            total[query as usize] = total[query as usize] * less + weights;
            largest[query as usize] = most;
        }
        sync_cube();
        // Sums of values.
        let part = unit / columns;
        if part < parts {
            #[unroll]
            for query in 0..queries {
                let less = shrink[query as usize];
                #[unroll]
                for i in 0..comptime!(each * in_word) {
                    let at = comptime!(query * each * in_word + i);
                    sums[at as usize] *= less;
                }
            }
            let mut slot = part;
            while slot < CHUNK && begin + slot < length {
                let from = kv_head * capacity + begin + slot;
                let mut scale = 1.0f32;
                if comptime!(cached == Cached::Int8) {
                    scale = value_scale[from as usize];
                }
                #[unroll]
                for w in 0..each {
                    let word = unit % columns + w * THREADS;
                    if word < words {
                        let packed = values[(from * words + word) as usize];
                        #[unroll]
                        for i in 0..in_word {
                            let mut value = value(packed, i, cached);
                            if comptime!(cached == Cached::Int8) {
                                value *= scale;
                            }
                            #[unroll]
                            for query in 0..queries {
                                let at = comptime!((query * each + w) * in_word + i);
                                let weight = scores[(query * CHUNK + slot) as usize];
                                if comptime!(plan.rows > 1 || plan.windowed) {
                                    // Of a later row, or before the window: it may be infinite.
                                    sums[at as usize] += select(weight == 0.0f32, 0.0f32, weight * value);
                                } else {
                                    sums[at as usize] += weight * value;
                                }
                            }
                        }
                    }
                }
                slot += parts;
            }
        }
        sync_cube();
        chunk += 1;
    }

    // The parts together, a query and a word of each thread at a time.
    #[unroll]
    for query in 0..queries {
        let row = first_row + comptime!(query / plan.heads);
        let head = first_head + comptime!(query % plan.heads);
        // Of rows before the chunk's only.
        let mut wanted = row < m;
        let mut to = (row * n_heads + head) * head_dim;
        let mut divisor = total[query as usize];
        if comptime!(plan.split) {
            wanted = wanted && CUBE_POS_Z * CHUNK <= position + row;
            to = ((row * n_heads + head) * params[5] + CUBE_POS_Z) * (head_dim + 2);
            divisor = 1.0f32;
        }
        #[unroll]
        for w in 0..each {
            #[unroll]
            for i in 0..in_word {
                let at = comptime!((query * each + w) * in_word + i);
                shared[(unit * in_word + i) as usize] = sums[at as usize];
            }
            sync_cube();
            let mut j = unit;
            while j < columns * in_word {
                let column = w * (THREADS * in_word) + j;
                if wanted && column < head_dim {
                    let mut sum = 0.0f32;
                    #[unroll]
                    for part in 0..parts {
                        sum += shared[(part * (columns * in_word) + j) as usize];
                    }
                    out[(to + column) as usize] = sum / divisor;
                }
                j += THREADS;
            }
            sync_cube();
        }
        if comptime!(plan.split) && wanted && unit == 0 {
            out[(to + head_dim) as usize] = largest[query as usize];
            out[(to + head_dim + 1) as usize] = total[query as usize];
        }
    }
}

/// One workgroup for each head and row: what the chunks left, in their order.
#[cube(launch_unchecked)]
pub(crate) fn join_chunks(partial: &[f32], out: &mut [f32], params: &[u32], #[comptime] head_dim: u32) {
    let head = CUBE_POS_X;
    let row = CUBE_POS_Y;
    let query = row * params[3] + head;
    let chunks = (params[1] + row) / CHUNK + 1;
    let mut j = UNIT_POS_X;
    while j < head_dim {
        let mut largest = f32::new(-1e30);
        let mut total = 0.0f32;
        let mut sum = 0.0f32;
        let mut chunk = 0u32;
        while chunk < chunks {
            let from = (query * params[5] + chunk) * (head_dim + 2);
            let most = largest.max(partial[(from + head_dim) as usize]);
            let (old, new) = ((largest - most).exp(), (partial[(from + head_dim) as usize] - most).exp());
            total = total * old + partial[(from + head_dim + 1) as usize] * new;
            sum = sum * old + partial[(from + j) as usize] * new;
            largest = most;
            chunk += 1;
        }
        out[(query * head_dim + j) as usize] = sum / total;
        j += THREADS;
    }
}

/// Turns rows qkv [m, (heads + 2 * kv heads) * d] of queries, keys and values by cos and sin [m, d / 2], writes keys and
/// values into the caches from `position` on, and attends: the context [m, heads * d].
///
/// # Safety
/// All handles hold f32 of these shapes, without gaps; the caches are of the shape's type, with room for the rows behind
/// `position`, and nobody else reads them; `params` has the [parameters](Shape::params) for m and the position; and the
/// shape is [supported](Shape::supported).
pub unsafe fn attend(
    client: &Client,
    shape: &Shape,
    (qkv, cos, sin): (Handle, Handle, Handle),
    (keys, values): (&Cache, &Cache),
    params: Handle,
    (m, position): (usize, usize),
) -> Handle {
    let Shape { n_heads, n_kv_heads, head_dim, capacity, cached, window } = *shape;
    let d = head_dim as u32;
    let all_heads = n_heads + 2 * n_kv_heads;
    let angles = m * head_dim / 2;
    let positions = n_kv_heads * capacity;
    let words = positions * head_dim / cached.values() as usize;
    let q = client.empty(m * n_heads * head_dim * 4);
    let out = client.empty(m * n_heads * head_dim * 4);
    let argument = |handle: &Handle, elements: usize| {
        // SAFETY: the caller's promise.
        unsafe { BufferArg::from_raw_parts(handle.clone(), elements) }
    };
    // What is int8 is written by a kernel of its own; this one turns the queries alone.
    let turned = if cached == Cached::Int8 { n_heads } else { all_heads };
    // SAFETY: the handles hold as many elements as is said, and the kernels stay within them: rows below m, heads below
    // all heads, positions below `position` + m, which the caches have room for.
    unsafe {
        rope_append::launch_unchecked(
            client,
            CubeCount::Static(turned as u32, m as u32, 1),
            CubeDim::new_1d(32),
            argument(&qkv, m * all_heads * head_dim),
            argument(&cos, angles),
            argument(&sin, angles),
            argument(&q, m * n_heads * head_dim),
            argument(&keys.words, words),
            argument(&values.words, words),
            argument(&params, 8),
            d,
            cached,
        );
    }
    if cached == Cached::Int8 {
        for (cache, turned) in [(keys, true), (values, false)] {
            // SAFETY: as above; a cache of int8 has scales.
            unsafe {
                append_int8::launch_unchecked(
                    client,
                    CubeCount::Static(n_kv_heads as u32, m as u32, 1),
                    CubeDim::new_1d(THREADS),
                    argument(&qkv, m * all_heads * head_dim),
                    argument(&cos, angles),
                    argument(&sin, angles),
                    argument(&cache.words, words),
                    argument(cache.scale.as_ref().expect("int8 has scales"), positions),
                    argument(&params, 8),
                    d,
                    turned,
                );
            }
        }
    }
    let (heads, rows) = shape.queries(m);
    let chunks = (position + m).div_ceil(CHUNK as usize);
    let partial_values = m * n_heads * chunks * (head_dim + 2);
    let split = m <= FEW_ROWS && chunks > 1 && partial_values <= MOST_PARTIAL;
    let plan = Plan { head_dim: d, cached, heads, rows, split, windowed: window.is_some() };
    let partial = match split {
        true => client.empty(partial_values * 4),
        false => out.clone(),
    };
    let count_x = n_heads as u32 / heads;
    let count_z = if split { chunks as u32 } else { 1 };
    // The scales of a cache without any are not read.
    let scale = |cache: &Cache| match &cache.scale {
        Some(scale) => argument(scale, positions),
        None => argument(&q, m * n_heads * head_dim),
    };
    // SAFETY: as above; the partial results have the room that their shape says.
    unsafe {
        attend_chunks::launch_unchecked(
            client,
            CubeCount::Static(count_x, (m as u32).div_ceil(rows), count_z),
            CubeDim::new_1d(THREADS),
            argument(&q, m * n_heads * head_dim),
            argument(&keys.words, words),
            argument(&values.words, words),
            scale(keys),
            scale(values),
            argument(&partial, partial.size() as usize / 4),
            argument(&params, 8),
            plan,
        );
        if split {
            join_chunks::launch_unchecked(
                client,
                CubeCount::Static(n_heads as u32, m as u32, 1),
                CubeDim::new_1d(THREADS),
                argument(&partial, partial.size() as usize / 4),
                argument(&out, m * n_heads * head_dim),
                argument(&params, 8),
                d,
            );
        }
    }
    out
}
