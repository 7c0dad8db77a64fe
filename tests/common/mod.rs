//! What the tests share: the tiers to run, data of many kinds, and comparison bit for bit.
#![allow(dead_code, reason = "each test binary uses a part")]

use batchnorm::{BatchNorm, Element, Error, Layout, Parallelism, Real, Shape, Tier};
use proptest::prelude::*;
use rand::{Rng, RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// The tiers to test: all that this machine has, or those that `BATCHNORM_TEST_TIERS` lists, which must exist.
pub fn tiers() -> Vec<Tier> {
    let Ok(forced) = std::env::var("BATCHNORM_TEST_TIERS") else {
        return Tier::available().collect();
    };
    let forced: Vec<Tier> = forced.split(',').map(|name| name.parse().unwrap()).collect();
    for tier in &forced {
        assert!(tier.is_available(), "told to test the {tier} tier, which this machine does not have");
    }
    forced
}

/// A plan that is certain to run on `tier`.
pub fn plan<E: Element>(shape: Shape, tier: Tier, parallelism: Parallelism) -> BatchNorm<E> {
    let bn = BatchNorm::new(shape).and_then(|bn| bn.with_tier(tier)).unwrap().with_parallelism(parallelism);
    assert_eq!(bn.tier(), tier);
    bn
}

/// Runs `body` in a pool of `threads` threads, where there are pools.
pub fn in_pool<T: Send>(threads: usize, body: impl FnOnce() -> T + Send) -> T {
    #[cfg(feature = "rayon")]
    return rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap().install(body);
    #[cfg(not(feature = "rayon"))]
    {
        let _ = threads;
        body()
    }
}

/// The bits of a value, all NaNs alike.
pub trait Bits: Element {
    fn bits(self) -> u64;
}

macro_rules! bits {
    ($($t:ty),*) => {$(
        impl Bits for $t {
            fn bits(self) -> u64 {
                if self.is_nan() { u64::MAX } else { self.to_bits().into() }
            }
        }
    )*};
}

bits!(f32, f64);
#[cfg(feature = "half")]
bits!(half::bf16, half::f16);

/// Asserts that two slices have the same bits.
#[track_caller]
pub fn assert_bits<T: Bits>(what: &str, got: &[T], expected: &[T]) {
    assert_eq!(got.len(), expected.len(), "{what}");
    if let Some(i) = (0..got.len()).find(|&i| got[i].bits() != expected[i].bits()) {
        panic!("{what}: element {i} of {} is {:?}, expected {:?}", got.len(), got[i], expected[i]);
    }
}

/// What the values of a tensor are like.
#[derive(Debug, Clone, Copy)]
pub enum Data {
    /// About normal, mean 0, deviation 1.
    Normal,
    /// The mean a thousand deviations away.
    Offset,
    /// One value per channel.
    Constant,
    /// Few huge values among small ones, so that shifts go wrong.
    Outliers,
    /// Squares overflow f32.
    Huge,
    /// From one end of f32 to the other, so that differences overflow.
    Largest,
    /// Squares underflow f32, values are subnormal at times.
    Tiny,
    /// Infinities and NaNs at some places.
    Special,
    /// Stretches of all magnitudes, of zeros, and of values whose squares are just about to lose bits, so that one block does not tell
    /// what the next one is like.
    Changing,
}

impl Data {
    pub const ALL: [Data; 9] = [
        Data::Normal,
        Data::Offset,
        Data::Constant,
        Data::Outliers,
        Data::Huge,
        Data::Largest,
        Data::Tiny,
        Data::Special,
        Data::Changing,
    ];

    pub fn fill<E: Element>(self, len: usize, seed: u64) -> Vec<E> {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let mut normal = move || (0..12).map(|_| rng.random::<f64>()).sum::<f64>() - 6.0;
        let mut rng = ChaCha8Rng::seed_from_u64(!seed);
        let level = rng.random_range(-100.0..100.0);
        let (mut stretch, mut scale) = (0, 0.0);
        let value = |_| {
            let v = match self {
                Data::Normal => normal(),
                Data::Offset => 1000.0 + normal(),
                Data::Constant => level,
                Data::Outliers if rng.random_ratio(1, 50) => 1e6 * normal(),
                Data::Outliers => normal(),
                Data::Huge => 1e30 * normal(),
                Data::Largest => f64::from(f32::MAX) * rng.random_range(-1.0..1.0),
                Data::Tiny => 1e-39 * normal(),
                Data::Special if rng.random_ratio(1, 1000) => {
                    [f64::NAN, f64::INFINITY, f64::NEG_INFINITY, -0.0][(rng.next_u32() % 4) as usize]
                }
                Data::Special => normal(),
                Data::Changing => {
                    if stretch == 0 {
                        let longest = 2 << rng.random_range(0..18);
                        stretch = rng.random_range(1..longest);
                        scale = [1.0, 0.0, 1e-17, 8e-16, 1e-39, 1e5, 1e22][rng.random_range(0..7)];
                    }
                    stretch -= 1;
                    scale * normal()
                }
            };
            E::from_param(E::Param::from_f64(v))
        };
        (0..len).map(value).collect()
    }
}

/// Sizes around the boundaries of vectors (8, 16), groups (32, 64), joins (128) and blocks (8192).
pub fn shapes() -> impl Strategy<Value = Shape> {
    let edge = |at: usize| (at.saturating_sub(1)).max(1)..=at + 1;
    let small = prop_oneof![1usize..=9, edge(16), edge(32), edge(64)];
    let channels = prop_oneof![4 => 1usize..=20, 1 => edge(32), 1 => edge(64), 1 => edge(128), 1 => edge(300)];
    let spatial = prop_oneof![3 => 1usize..=70, 2 => edge(128), 2 => edge(512), 1 => edge(2048)];
    let moderate = (0..2usize, small, channels, spatial);
    let plane = prop_oneof![edge(2048), edge(4096), edge(8192), edge(16384), 20000usize..=25000];
    let long = (0..2usize, 1usize..=9, 1usize..=3, plane);
    prop_oneof![6 => moderate.boxed(), 1 => long.boxed()].prop_map(|(layout, n, c, s)| {
        let layout = [Layout::ChannelsFirst, Layout::ChannelsLast][layout];
        // Trims the batch, so that a case stays quick.
        let n = n.min((60_000 / (c * s)).max(1));
        Shape::new(layout, n, c, &[s]).unwrap()
    })
}

/// `len` elements that begin `offset` elements into an allocation.
pub struct Misaligned<E>(Vec<E>, usize);

impl<E: Element> Misaligned<E> {
    pub fn new(values: &[E], offset: usize) -> Self {
        Self([&vec![E::default(); offset], values].concat(), offset)
    }
    pub fn get(&self) -> &[E] {
        &self.0[self.1..]
    }
    pub fn get_mut(&mut self) -> &mut [E] {
        &mut self.0[self.1..]
    }
}

/// The length error of an argument.
pub fn length(what: &'static str, expected: usize, got: usize) -> Error {
    Error::Length { what, expected, got }
}
