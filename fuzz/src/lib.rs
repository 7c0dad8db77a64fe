//! What the fuzz targets share: shapes and values made of the fuzzer's bytes, plans for every tier, and comparison
//! bit for bit.

use arbitrary::Arbitrary;
use batchnorm::{
    Affine, BatchNorm, Element, GradientSums, Layout, Moments, Parallelism, Real, Saved, Shape, Stores, Tier,
};

pub use half;

/// Elements of the largest tensor: enough for two blocks of each geometry, few enough for many runs a second.
const MOST: usize = 40_000;

/// The element types.
#[derive(Arbitrary, Debug, Clone, Copy)]
pub enum Kind {
    /// `f32`
    F32,
    /// `f64`
    F64,
    /// `half::bf16`
    Bf16,
    /// `half::f16`
    F16,
}

/// Calls a function that is generic over the element with the type that the [`Kind`] says.
#[macro_export]
macro_rules! with_element {
    ($kind:expr, $check:ident($($argument:expr),*)) => {
        match $kind {
            $crate::Kind::F32 => $check::<f32>($($argument),*),
            $crate::Kind::F64 => $check::<f64>($($argument),*),
            $crate::Kind::Bf16 => $check::<$crate::half::bf16>($($argument),*),
            $crate::Kind::F16 => $check::<$crate::half::f16>($($argument),*),
        }
    };
}

/// An element by its bits.
pub trait Bits: Element {
    /// The bits, those of all NaNs alike: sign and payload of a NaN are left open.
    fn bits(self) -> u64;
    /// The element of the low bits of `raw`.
    fn from_raw(raw: u64) -> Self;

    /// A value that no computation here gives but by a rare chance: what is left of it was not written.
    fn sentinel() -> Self {
        Self::from_raw(0x5a5a_5a5a_5a5a_5a5a)
    }
}

/// An element whose parameters are known by their bits too.
pub trait Tested: Bits + Element<Param: Bits> {}

impl<E: Bits + Element<Param: Bits>> Tested for E {}

macro_rules! bits {
    ($($element:ty: $raw:ty),*) => {$(
        impl Bits for $element {
            fn bits(self) -> u64 {
                if self.is_nan() { u64::MAX } else { self.to_bits().into() }
            }
            fn from_raw(raw: u64) -> Self {
                Self::from_bits(raw as $raw)
            }
        }
    )*};
}

bits!(f32: u32, f64: u64, half::bf16: u16, half::f16: u16);

/// The first index at which the bits differ.
fn difference<T: Bits>(a: &[T], b: &[T]) -> Option<usize> {
    a.iter().zip(b).position(|(a, b)| a.bits() != b.bits())
}

/// Whether two slices have the same bits.
pub fn same_bits<T: Bits>(a: &[T], b: &[T]) -> bool {
    a.len() == b.len() && difference(a, b).is_none()
}

/// Panics unless two slices have the same bits.
#[track_caller]
pub fn assert_bits<T: Bits>(what: &str, tier: Tier, got: &[T], expected: &[T]) {
    assert_eq!(got.len(), expected.len(), "{what} on {tier}");
    if let Some(i) = difference(got, expected) {
        panic!(
            "{what} on {tier}: element {i} of {} is {:?} ({:#x}), expected {:?} ({:#x})",
            got.len(),
            got[i],
            got[i].bits(),
            expected[i],
            expected[i].bits()
        );
    }
}

/// The numbers in moments, for comparison.
pub fn moments_parts(moments: &[Moments]) -> Vec<f64> {
    moments.iter().flat_map(|m| [f64::from_bits(m.count), m.mean, m.residue, m.m2]).collect()
}

/// The numbers in gradient sums, for comparison.
pub fn sums_parts(sums: &[GradientSums]) -> Vec<f64> {
    sums.iter().flat_map(|s| [s.dy, s.dy_xhat]).collect()
}

/// The numbers in statistics but for the count, for comparison.
pub fn saved_parts<P: Real>(saved: &Saved<P>) -> Vec<P> {
    [saved.mean(), saved.residue(), saved.var(), saved.inv_std()].concat()
}

/// Panics unless two sets of statistics have the same bits.
#[track_caller]
pub fn assert_saved<P: Real + Bits>(what: &str, tier: Tier, got: &Saved<P>, expected: &Saved<P>) {
    assert_eq!(got.count(), expected.count(), "{what} on {tier}");
    assert_bits(what, tier, &saved_parts(got), &saved_parts(expected));
}

/// One size of a tensor.
#[derive(Arbitrary, Debug, Clone, Copy)]
enum Size {
    /// 1 to 256.
    Small(u8),
    /// One below, at or above a boundary of vectors, groups, joined rows or blocks.
    Edge(u8),
    /// 1 to 65536, before the limit on the tensor.
    Any(u16),
}

impl Size {
    fn at_most(self, most: usize) -> usize {
        const EDGES: [usize; 12] = [4, 8, 16, 32, 64, 128, 256, 512, 2048, 4096, 8192, 16384];
        let size = match self {
            Self::Small(size) => 1 + usize::from(size),
            Self::Edge(size) => EDGES[usize::from(size) / 3 % EDGES.len()] + usize::from(size) % 3 - 1,
            Self::Any(size) => 1 + usize::from(size),
        };
        size.min(most)
    }
}

/// A shape with values, of a size that a run can afford.
#[derive(Arbitrary, Debug, Clone, Copy)]
struct Sizes {
    last: bool,
    /// Halvings of the limit: most tensors are small, so that most runs are short.
    halvings: u8,
    channels: Size,
    spatial: Size,
    batch: Size,
}

impl Sizes {
    fn shape(self) -> Shape {
        let most = MOST >> (self.halvings % 12);
        let channels = self.channels.at_most(most);
        let spatial = self.spatial.at_most(most / channels);
        let batch = self.batch.at_most(most / channels / spatial);
        let layout = if self.last { Layout::ChannelsLast } else { Layout::ChannelsFirst };
        Shape::new(layout, batch, channels, &[spatial]).expect("a small shape")
    }
}

/// A valid `eps`.
#[derive(Arbitrary, Debug, Clone, Copy)]
enum Eps {
    Usual,
    Zero,
    Bits(u64),
}

impl Eps {
    fn value(self) -> f64 {
        match self {
            Self::Usual => 1e-5,
            Self::Zero => 0.0,
            // The lowest bit of the exponent alone cannot make an infinity or a NaN.
            Self::Bits(bits) => Some(f64::from_bits(bits).abs())
                .filter(|eps| eps.is_finite())
                .unwrap_or(f64::from_bits(bits & 0x801f_ffff_ffff_ffff).abs()),
        }
    }
}

/// The use of threads.
#[derive(Arbitrary, Debug, Clone, Copy)]
enum Threads {
    Auto,
    Sequential,
    Cut(u8),
}

impl Threads {
    fn parallelism(self) -> Parallelism {
        match self {
            Self::Auto => Parallelism::Auto,
            Self::Sequential => Parallelism::Sequential,
            Self::Cut(threads) => Parallelism::Threads(usize::from(threads) % 12),
        }
    }
}

/// How results go to memory.
#[derive(Arbitrary, Debug, Clone, Copy)]
enum Storing {
    Auto,
    Cached,
    Streaming,
}

impl Storing {
    fn stores(self) -> Stores {
        match self {
            Self::Auto => Stores::Auto,
            Self::Cached => Stores::Cached,
            Self::Streaming => Stores::Streaming,
        }
    }
}

/// How values are made of bytes.
#[derive(Arbitrary, Debug, Clone, Copy)]
pub enum Values {
    /// The bytes are the bits: NaNs, infinities, subnormals, and all magnitudes beside each other.
    Raw,
    /// `(64 level + byte) * 2^exponent`: one magnitude, the mean many deviations away if the level is high.
    Tame {
        /// Sets the magnitude.
        exponent: i8,
        /// Sets the mean.
        level: i16,
    },
    /// As tame, but where the byte is 128, a raw one follows, and where it is 127, the end of a range.
    Mixed {
        /// Sets the magnitude.
        exponent: i8,
        /// Sets the mean.
        level: i16,
    },
}

impl Values {
    /// `len` values, made of the bytes over and over; a different `salt` begins at a different place.
    pub fn fill<E: Bits>(self, bytes: &[u8], salt: usize, len: usize) -> Vec<E> {
        let bytes = if bytes.is_empty() { &[0] } else { bytes };
        // Each time around begins a byte later, lest all channels or rows be alike.
        let mut stream = (11 * salt..).map(|at| bytes[(at + at / bytes.len()) % bytes.len()]);
        let mut next = move || stream.next().unwrap_or(0);
        let value = |_| match self {
            Self::Raw => raw(&mut next),
            Self::Tame { exponent, level } => tame(next(), exponent, level),
            Self::Mixed { exponent, level } => match next() {
                128 => raw(&mut next),
                127 => extreme(next()),
                byte => tame(byte, exponent, level),
            },
        };
        (0..len).map(value).collect()
    }
}

/// An element of the bits that come next.
fn raw<E: Bits>(mut next: impl FnMut() -> u8) -> E {
    E::from_raw((0..size_of::<E>()).fold(0, |raw, _| raw << 8 | u64::from(next())))
}

/// A zero, infinity, NaN, or a number around the end of the range of one of the types.
fn extreme<E: Bits>(which: u8) -> E {
    const ENDS: [f64; 8] = [0.0, f64::INFINITY, f64::NAN, f64::MAX, 3.4e38, 65504.0, 6e-5, 1e-45];
    let end = ENDS[usize::from(which / 2) % ENDS.len()];
    E::from_param(E::Param::from_f64(if which.is_multiple_of(2) { end } else { -end }))
}

/// See [`Values::Tame`].
fn tame<E: Bits>(byte: u8, exponent: i8, level: i16) -> E {
    let value = f64::from(level) * 64.0 + f64::from(byte.cast_signed());
    E::from_param(E::Param::from_f64(value * f64::from(exponent).exp2()))
}

/// Values that are variances: not negative, not NaN.
pub fn variances<P: Real>(values: Vec<P>) -> Vec<P> {
    let variance = |v: P| {
        let v = v.to_f64().abs();
        P::from_f64(if v.is_nan() { 1.0 } else { v })
    };
    values.into_iter().map(variance).collect()
}

/// Everything of a call but its tensors.
#[derive(Arbitrary, Debug, Clone, Copy)]
pub struct Setting {
    /// The element type.
    pub kind: Kind,
    sizes: Sizes,
    eps: Eps,
    offset: u8,
    threads: Threads,
    storing: Storing,
    gamma: bool,
    beta: bool,
    /// How gamma, beta and given statistics are made.
    pub params: Values,
}

impl Setting {
    /// The shape.
    pub fn shape(&self) -> Shape {
        self.sizes.shape()
    }

    /// The number added to the variance.
    pub fn eps(&self) -> f64 {
        self.eps.value()
    }

    /// The plans for the shape: one per tier of this machine.
    pub fn plans<E: Element>(&self) -> impl Iterator<Item = BatchNorm<E>> {
        Tier::available().map(|tier| {
            let bn = BatchNorm::new(self.shape()).and_then(|bn| bn.with_eps(self.eps())?.with_tier(tier));
            let bn = bn.expect("valid options").with_parallelism(self.threads.parallelism());
            let bn = bn.with_stores(self.storing.stores());
            assert_eq!(bn.tier(), tier);
            bn
        })
    }

    /// `values` at this setting's place relative to a vector.
    pub fn placed<T: Bits>(&self, values: &[T]) -> Placed<T> {
        let offset = usize::from(self.offset % 16);
        Placed { buffer: [&vec![T::sentinel(); offset], values].concat(), offset }
    }

    /// Room for an output of `len` values, to be overwritten.
    pub fn room<T: Bits>(&self, len: usize) -> Placed<T> {
        self.placed(&vec![T::sentinel(); len])
    }

    /// Gamma and beta.
    pub fn affine<P: Bits>(&self, bytes: &[u8]) -> Params<P> {
        let channels = self.shape().channels();
        let params = |salt| self.params.fill(bytes, salt, channels);
        Params { gamma: self.gamma.then(|| params(1)), beta: self.beta.then(|| params(2)) }
    }
}

/// Values that end with their allocation, so that the address sanitizer sees a step beyond.
pub struct Placed<T> {
    buffer: Vec<T>,
    offset: usize,
}

impl<T: Bits> Placed<T> {
    /// The values.
    pub fn get(&self) -> &[T] {
        assert!(same_bits(&self.buffer[..self.offset], &vec![T::sentinel(); self.offset]), "written before the slice");
        &self.buffer[self.offset..]
    }

    /// The values, to write.
    pub fn get_mut(&mut self) -> &mut [T] {
        &mut self.buffer[self.offset..]
    }
}

/// Gamma and beta, where there are.
pub struct Params<P> {
    gamma: Option<Vec<P>>,
    beta: Option<Vec<P>>,
}

impl<P> Params<P> {
    /// As the calls take them.
    pub fn get<E: Element<Param = P>>(&self) -> Affine<'_, E> {
        Affine::of(self.gamma.as_deref(), self.beta.as_deref())
    }
}

/// Statistics to normalize with that may be of other values than the tensor's.
#[derive(Arbitrary, Debug, Clone, Copy)]
pub struct Foreign {
    values: Values,
    /// The number of values behind them, or that of the shape.
    count: Option<u64>,
}

impl Foreign {
    /// Statistics of the setting's channels.
    pub fn saved<P: Real + Bits>(&self, setting: &Setting, bytes: &[u8]) -> Saved<P> {
        let shape = setting.shape();
        let values = |salt| self.values.fill(bytes, salt, shape.channels());
        let count = self.count.unwrap_or(shape.count() as u64).max(1);
        Saved::from_parts(count, values(5), as_inv_std(values(6)), setting.eps()).expect("valid parts")
    }
}

/// The values as far as an inv_std can have them: finite and without a sign, or NaN.
pub fn as_inv_std<P: Real>(mut values: Vec<P>) -> Vec<P> {
    for value in &mut values {
        let size = value.to_f64().abs();
        *value = P::from_f64(if size.is_infinite() { 1.0 } else { size });
    }
    values
}
