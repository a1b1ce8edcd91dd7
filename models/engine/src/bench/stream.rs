//! The limits of the machine: how fast memory is read, and how fast registers multiply.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use bitnet_burn_backends::peak;
use bitnet_burn_manager::cpu;
use bitnet_burn_manager::pool::Pool;
use memmap2::MmapMut;
use serde::Serialize;

/// A buffer in huge pages, to measure the bandwidth of reading it.
#[derive(Debug)]
pub struct ReadStream {
    map: MmapMut,
    /// The quarter of it that is read next.
    quarter: AtomicUsize,
}

/// Bytes per task: large enough for the prefetcher, small enough to spread over the threads.
const PIECE: usize = 2 << 20;

impl ReadStream {
    /// Eight times the last-level cache, between 256 MiB and 4 GiB; 512 MiB if the system does not report the
    /// cache's size.
    pub fn default_bytes() -> usize {
        match cpu::last_level_cache() {
            Some(cache) => cache.saturating_mul(8).clamp(256 << 20, 4 << 30),
            None => 512 << 20,
        }
    }

    /// Allocates a buffer of `bytes` and writes it once, so that the system allocates the pages now.
    ///
    /// # Errors
    /// If there is not enough memory.
    pub fn new(bytes: usize, pool: &Pool) -> std::io::Result<Self> {
        let mut map = MmapMut::map_anon(bytes.max(PIECE).next_multiple_of(PIECE))?;
        // Only advice: without huge pages, this measures the bandwidth with 4 KiB pages.
        #[cfg(target_os = "linux")]
        let _ = map.advise(memmap2::Advice::HugePage);
        let pieces = map.len() / PIECE;
        let parts = Mutex::new(map.chunks_mut(PIECE));
        pool.run(pieces, &|_| {
            let piece = parts.lock().unwrap_or_else(PoisonError::into_inner).next();
            if let Some(piece) = piece {
                piece.fill(0x5a);
            }
        });
        Ok(Self { map, quarter: AtomicUsize::new(0) })
    }

    /// Size of the buffer.
    pub(super) fn bytes(&self) -> usize {
        self.map.len()
    }

    fn pieces(&self) -> usize {
        self.map.len() / PIECE
    }

    fn read(&self, piece: usize) {
        std::hint::black_box(peak::read(&self.map[piece * PIECE..(piece + 1) * PIECE]));
    }

    /// Reads the buffer once on the pool's threads. Returns 10^9 bytes a second.
    pub fn gb_per_s(&self, pool: &Pool) -> f64 {
        let clock = Instant::now();
        pool.run(self.pieces(), &|i| self.read(i));
        self.map.len() as f64 / clock.elapsed().as_secs_f64() / 1e9
    }

    /// Reads the next quarter of the buffer on the pool's threads. Returns 10^9 bytes a second. Of a buffer of the
    /// [default size](Self::default_bytes), no cache holds a quarter any more when its turn comes again.
    pub(super) fn quarter_gb_per_s(&self, pool: &Pool) -> f64 {
        let pieces = self.pieces();
        let count = pieces.div_ceil(4);
        let first = self.quarter.fetch_add(1, Ordering::Relaxed) * count;
        let clock = Instant::now();
        pool.run(count, &|i| self.read((first + i) % pieces));
        (count * PIECE) as f64 / clock.elapsed().as_secs_f64() / 1e9
    }
}

/// The limits of this machine, with the threads of a pool.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Roof {
    /// Bandwidth of a read-only stream, in 10^9 bytes a second.
    pub read_gb_per_s: f64,
    /// int8 multiply-adds on registers alone, with the instruction that the built-in kernels use, in 10^9 a
    /// second. Absent if they use none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub multiply_adds_g_per_s: Option<f64>,
}

impl Roof {
    /// Measures both limits. The stream reads a buffer of `bytes`, which should be as large as the data of the
    /// computation that is compared with it.
    ///
    /// # Errors
    /// If there is not enough memory for the buffer.
    pub fn measure(pool: &Pool, bytes: usize) -> std::io::Result<Self> {
        let stream = ReadStream::new(bytes, pool)?;
        let read = undisturbed(pool, stream.pieces(), &|i| stream.read(i));
        let multiply = |_| peak::multiply_adds(ROUNDS);
        let multiply_adds = peak::multiply_adds(1).and_then(|_| multiply(0));
        Ok(Self {
            read_gb_per_s: PIECE as f64 * read,
            multiply_adds_g_per_s: multiply_adds.map(|products| {
                products as f64
                    * undisturbed(pool, pool.threads() * 32, &|i| {
                        std::hint::black_box(multiply(i));
                    })
            }),
        })
    }
}

/// Number of rounds of products, which take 20 to 200 microseconds together.
const ROUNDS: u32 = 10_000;

/// Tasks per nanosecond of the pool, computed from the fastest tenth of them. Tasks are much shorter than the
/// scheduler's time slices, so the fastest ones were not interrupted by other programs.
fn undisturbed(pool: &Pool, tasks: usize, task: &(dyn Fn(usize) + Sync)) -> f64 {
    const PASSES: usize = 5;
    let times = Mutex::new(Vec::with_capacity(PASSES * tasks));
    for _ in 0..PASSES {
        pool.run(tasks, &|i| {
            let clock = Instant::now();
            task(i);
            times.lock().unwrap_or_else(PoisonError::into_inner).push(clock.elapsed());
        });
    }
    let mut times = times.into_inner().unwrap_or_else(PoisonError::into_inner);
    times.sort_unstable();
    let time = times.get(times.len() / 10).map_or(1, |time| time.as_nanos().max(1));
    pool.threads() as f64 / time as f64
}

/// int8 multiply-adds on registers in 10^9 a second, over all threads of the pool; `None` if the built-in kernels use no
/// instruction for them. Other programs slow this down as they slow the kernels down: it is no peak, unlike
/// [`Roof::multiply_adds_g_per_s`].
pub(super) fn multiply_adds_g_per_s(pool: &Pool) -> Option<f64> {
    let products = peak::multiply_adds(ROUNDS)?;
    let tasks = pool.threads() * 64;
    let (clock, mut passes) = (Instant::now(), 0);
    while passes == 0 || clock.elapsed() < LONG_ENOUGH {
        pool.run(tasks, &|_| {
            std::hint::black_box(peak::multiply_adds(ROUNDS));
        });
        passes += 1;
    }
    Some((products * (tasks * passes) as u64) as f64 / clock.elapsed().as_nanos().max(1) as f64)
}

/// Longer than the time slices of a busy machine's scheduler.
const LONG_ENOUGH: Duration = Duration::from_millis(60);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_stream_reads_what_it_says() {
        let pool = Pool::new(2).unwrap();
        let stream = ReadStream::new(3 * PIECE - 5, &pool).unwrap();
        assert_eq!(stream.map.len(), 3 * PIECE);
        let word = u64::from_ne_bytes([0x5a; 8]);
        assert_eq!(peak::read(&stream.map), word.wrapping_mul((stream.map.len() / 8) as u64));
        assert!(stream.gb_per_s(&pool) > 0.0);
        // More quarters than there are, of pieces that four do not divide.
        assert!((0..9).all(|_| stream.quarter_gb_per_s(&pool) > 0.0));
    }
}
