//! What the benches share: the yardsticks, loops that do nothing but move memory, on bytes, with the threads of the pool
//! that they run in; and how results are condensed and kept.

use batchnorm::Element;
use rayon::prelude::*;
use serde::Serialize;

/// The bytes of a tensor.
pub fn bytes<E: Element>(of: &[E]) -> &[u8] {
    // SAFETY: the element types are plain numbers without padding.
    unsafe { core::slice::from_raw_parts(of.as_ptr().cast(), size_of_val(of)) }
}

/// The bytes of a tensor, to be written.
pub fn bytes_mut<E: Element>(of: &mut [E]) -> &mut [u8] {
    // SAFETY: the element types are plain numbers without padding, and any bits are a value.
    unsafe { core::slice::from_raw_parts_mut(of.as_mut_ptr().cast(), size_of_val(of)) }
}

/// The median of some times.
pub fn median(mut times: Vec<f64>) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

/// The geometric mean of some ratios.
pub fn geometric_mean(ratios: impl ExactSizeIterator<Item = f64>) -> f64 {
    let n = ratios.len() as f64;
    (ratios.map(f64::ln).sum::<f64>() / n).exp()
}

/// A pool whose threads keep to a core each: two on one core would halve the speed of what is measured by chance.
pub fn pool(threads: usize) -> Result<rayon::ThreadPool, rayon::ThreadPoolBuildError> {
    let cores = core_affinity::get_core_ids().unwrap_or_default();
    let pin = move |i: usize| {
        if let Some(core) = cores.get(i % cores.len().max(1)) {
            core_affinity::set_for_current(*core);
        }
    };
    rayon::ThreadPoolBuilder::new().num_threads(threads).start_handler(pin).build()
}

/// Writes a result into the target directory.
pub fn save(name: &str, lines: &[impl Serialize]) -> Result<(), Box<dyn std::error::Error>> {
    let target =
        std::env::var("CARGO_TARGET_DIR").unwrap_or_else(|_| concat!(env!("CARGO_MANIFEST_DIR"), "/target").into());
    let path = std::path::Path::new(&target).join(name);
    std::fs::write(&path, serde_json::to_string_pretty(lines)?)?;
    println!("\nwritten to {}", path.display());
    Ok(())
}

/// How results go to memory.
#[derive(Clone, Copy, PartialEq)]
pub enum Store {
    /// Through the caches, which reads the line first.
    Plain,
    /// Past the caches.
    Streaming,
}

/// Bytes that a thread takes at a time: a multiple of a page.
const CHUNK: usize = 64 * 1024;

/// Runs `work` over the chunks, on the calling thread if it is the only one.
fn over_chunks(threads: usize, len: usize, work: impl Fn(usize, usize) + Sync) {
    let chunks = len.div_ceil(CHUNK);
    let chunk = |i: usize| work(i * CHUNK, CHUNK.min(len - i * CHUNK));
    if threads == 1 || len <= 2 * CHUNK {
        (0..chunks).for_each(chunk);
    } else {
        let each = chunks.div_ceil(4 * threads);
        (0..chunks).into_par_iter().with_min_len(each).for_each(chunk);
    }
}

/// Reads one or two tensors.
pub fn read(threads: usize, a: &[u8], b: Option<&[u8]>) {
    over_chunks(threads, a.len(), |at, len| {
        let sum = |of: &[u8]| imp::sum(&of[at..at + len]);
        std::hint::black_box((sum(a), b.map(sum)));
    });
}

/// Copies `a`, or adds `a` and `b` as f32.
pub fn write(threads: usize, a: &[u8], b: Option<&[u8]>, to: &mut [u8], store: Store) {
    struct Shared(*mut u8);
    // SAFETY: the chunks do not overlap.
    unsafe impl Sync for Shared {}
    impl Shared {
        fn at(&self, i: usize) -> *mut u8 {
            self.0.wrapping_add(i)
        }
    }
    assert!(to.len() == a.len() && b.is_none_or(|b| b.len() == a.len()));
    let to = Shared(to.as_mut_ptr());
    over_chunks(threads, a.len(), |at, len| {
        // SAFETY: inside the tensor, and no other thread has this chunk.
        let to = unsafe { core::slice::from_raw_parts_mut(to.at(at), len) };
        imp::write(&a[at..at + len], b.map(|b| &b[at..at + len]), to, store);
    });
}

#[cfg(target_arch = "x86_64")]
mod imp {
    use super::Store;
    use core::arch::x86_64::*;

    /// Sums the bytes as f32, 32 at a time.
    pub fn sum(of: &[u8]) -> f32 {
        assert!(is_x86_feature_detected!("avx"), "the yardstick needs AVX");
        // SAFETY: AVX was detected.
        unsafe { sum_avx(of) }
    }

    #[target_feature(enable = "avx")]
    fn sum_avx(of: &[u8]) -> f32 {
        let mut sums = [_mm256_setzero_ps(); 8];
        let chunks = of.chunks_exact(256);
        for chunk in chunks {
            for (i, sum) in sums.iter_mut().enumerate() {
                // SAFETY: 32 bytes inside the chunk.
                *sum = _mm256_add_ps(*sum, unsafe { _mm256_loadu_ps(chunk.as_ptr().add(32 * i).cast()) });
            }
        }
        let mut lanes = [0f32; 8];
        for sum in sums {
            // SAFETY: 32 bytes of an array.
            unsafe {
                let total = _mm256_add_ps(sum, _mm256_loadu_ps(lanes.as_ptr()));
                _mm256_storeu_ps(lanes.as_mut_ptr(), total);
            }
        }
        lanes[0]
    }

    /// Copies or adds, 32 bytes at a time.
    pub fn write(a: &[u8], b: Option<&[u8]>, to: &mut [u8], store: Store) {
        assert!(is_x86_feature_detected!("avx"), "the yardstick needs AVX");
        // SAFETY: AVX was detected.
        unsafe {
            match (b, store) {
                (None, Store::Plain) => write_avx::<false, false>(a, a, to),
                (None, Store::Streaming) => write_avx::<false, true>(a, a, to),
                (Some(b), Store::Plain) => write_avx::<true, false>(a, b, to),
                (Some(b), Store::Streaming) => write_avx::<true, true>(a, b, to),
            }
        }
    }

    #[target_feature(enable = "avx")]
    fn write_avx<const ADD: bool, const STREAM: bool>(a: &[u8], b: &[u8], to: &mut [u8]) {
        // What lies before the first aligned place, and after the last, is copied apart.
        let head = if STREAM { to.as_ptr().align_offset(32).min(to.len()) } else { 0 };
        let body = (to.len() - head) / 32 * 32;
        to[..head].copy_from_slice(&a[..head]);
        to[head + body..].copy_from_slice(&a[head + body..]);
        for i in (head..head + body).step_by(32) {
            // SAFETY: 32 bytes inside the three slices, aligned where they are streamed.
            unsafe {
                let mut value = _mm256_loadu_ps(a.as_ptr().add(i).cast());
                if ADD {
                    value = _mm256_add_ps(value, _mm256_loadu_ps(b.as_ptr().add(i).cast()));
                }
                let to = to.as_mut_ptr().add(i).cast();
                if STREAM { _mm256_stream_ps(to, value) } else { _mm256_storeu_ps(to, value) }
            }
        }
        if STREAM {
            _mm_sfence();
        }
    }
}

#[cfg(not(target_arch = "x86_64"))]
mod imp {
    use super::Store;

    fn word(of: &[u8]) -> f32 {
        f32::from_ne_bytes(of.try_into().expect("four bytes"))
    }

    /// Sums the bytes as f32.
    pub fn sum(of: &[u8]) -> f32 {
        let mut sums = [0f32; 64];
        for chunk in of.chunks_exact(256) {
            for (sum, value) in sums.iter_mut().zip(chunk.chunks_exact(4)) {
                *sum += word(value);
            }
        }
        sums.iter().sum()
    }

    /// Copies or adds; there is one kind of store.
    pub fn write(a: &[u8], b: Option<&[u8]>, to: &mut [u8], _: Store) {
        let Some(b) = b else { return to.copy_from_slice(a) };
        for ((to, a), b) in to.chunks_exact_mut(4).zip(a.chunks_exact(4)).zip(b.chunks_exact(4)) {
            to.copy_from_slice(&(word(a) + word(b)).to_ne_bytes());
        }
    }
}
