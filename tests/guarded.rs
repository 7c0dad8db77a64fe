//! Every operation on slices that lie against pages that may not be touched: one element read or written past an end, by any
//! tier, is a fault. Each slice ends at such a page, and then begins after one; results are those of ordinary memory.
//!
//! A fault ends the process. `BATCHNORM_TEST_TRACE=1` and `--nocapture --test-threads=1` have the case printed before it.
#![cfg(unix)]

mod common;

use std::cell::RefCell;
use std::ops::{Deref, DerefMut};

use batchnorm::{Activation, Affine, BatchNorm, Cotangents, Element, GradientSums, Gradients, Layer, Layout};
use batchnorm::{Moments, Momentum, Parallelism, Population, Quantization, Real, RenormLimits, Result, Saved};
use batchnorm::{SecondGradients, Shape, Stores, Tier, Variance, View};
use common::{Bits, Data, plan, tiers};

/// Pages of which the first and the last may not be touched.
struct Pages {
    base: *mut u8,
    /// Bytes of all, and of one.
    len: usize,
    page: usize,
}

/// What the bytes beside a slice are, and how many of them are looked at: a few vectors.
const AROUND: u8 = 0xa5;
const NEAR: usize = 256;

thread_local! {
    /// Pages that wait to be used again.
    static FREE: RefCell<Vec<Pages>> = const { RefCell::new(Vec::new()) };
}

impl Pages {
    /// Room for so many bytes, filled with [`AROUND`].
    fn with_room_for(bytes: usize) -> Self {
        // SAFETY: asks for a number.
        let page = unsafe { libc::sysconf(libc::_SC_PAGESIZE) } as usize;
        let len = bytes.max(1).next_multiple_of(page) + 2 * page;
        let used = FREE.with_borrow_mut(|free| {
            let at = free.iter().position(|pages| pages.len == len)?;
            Some(free.swap_remove(at))
        });
        let mut pages = used.unwrap_or_else(|| Self::new(page, len));
        pages.inner().fill(AROUND);
        pages
    }

    fn new(page: usize, len: usize) -> Self {
        // SAFETY: new memory, at an address that the system chooses.
        let base = unsafe {
            libc::mmap(std::ptr::null_mut(), len, libc::PROT_NONE, libc::MAP_PRIVATE | libc::MAP_ANON, -1, 0)
        };
        assert_ne!(base, libc::MAP_FAILED);
        let pages = Self { base: base.cast(), len, page };
        let inner = pages.base.wrapping_add(page);
        // SAFETY: whole pages of the memory above.
        let status = unsafe { libc::mprotect(inner.cast(), len - 2 * page, libc::PROT_READ | libc::PROT_WRITE) };
        assert_eq!(status, 0);
        pages
    }

    /// The element at a byte of what may be touched.
    fn at<T>(&self, from: usize) -> *mut T {
        let at = self.base.wrapping_add(self.page + from).cast::<T>();
        assert!(at.is_aligned());
        at
    }

    /// What may be touched.
    fn inner(&mut self) -> &mut [u8] {
        // SAFETY: readable and writable, and borrowed with the pages; no reference to a slice in it lives, see `Slice`.
        unsafe { std::slice::from_raw_parts_mut(self.base.add(self.page), self.len - 2 * self.page) }
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        // SAFETY: what `new` asked for.
        unsafe { libc::munmap(self.base.cast(), self.len) };
    }
}

/// Where a slice lies.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Place {
    /// In memory like any other.
    Ordinary,
    /// Its first element after a guard page.
    Start,
    /// Its last element before one.
    End,
}

/// A slice in a place, of numbers without padding.
enum Slice<T> {
    Ordinary(Vec<T>),
    /// From this byte of the pages on, so many elements. The pages are there until it is dropped.
    Guarded(Option<Pages>, usize, usize),
}

impl<T: Copy> Slice<T> {
    fn new(values: &[T], place: Place) -> Self {
        let bytes = size_of_val(values);
        if place == Place::Ordinary {
            return Self::Ordinary(values.to_vec());
        }
        let mut pages = Pages::with_room_for(bytes);
        let inner = pages.inner();
        let from = if place == Place::Start { 0 } else { inner.len() - bytes };
        let at = pages.at(from);
        // SAFETY: inside the pages, and aligned, see `Pages::at`.
        unsafe { values.as_ptr().copy_to_nonoverlapping(at, values.len()) };
        Self::Guarded(Some(pages), from, values.len())
    }

    fn bytes(&self) -> &[u8] {
        // SAFETY: those of the slice, all of them initialized: there is no padding.
        unsafe { std::slice::from_raw_parts(self.as_ptr().cast(), size_of_val::<[T]>(self)) }
    }

    /// Asserts that it has the same bits, all NaNs alike, and that what lies beside it was not written.
    fn check(&mut self, what: impl Fn() -> String, expected: &Self)
    where
        T: PartialEq,
    {
        if self.bytes() != expected.bytes() {
            let of = |slice: &Self, i: usize| slice.bytes()[i * size_of::<T>()..][..size_of::<T>()].to_vec();
            #[expect(clippy::eq_op, reason = "a NaN is not itself")]
            let is_nan = |value: T| value != value;
            let differs = |&i: &usize| of(self, i) != of(expected, i) && !(is_nan(self[i]) && is_nan(expected[i]));
            if let Some(at) = (0..self.len()).find(differs) {
                panic!("{}: element {at} of {} differs", what(), self.len());
            }
        }
        let bytes = self.bytes().len();
        if let Self::Guarded(Some(pages), from, _) = self {
            let (before, rest) = pages.inner().split_at(*from);
            let near = before.iter().rev().take(NEAR).chain(rest[bytes..].iter().take(NEAR));
            assert!(near.into_iter().all(|&byte| byte == AROUND), "{}: written beside the slice", what());
        }
    }
}

impl<T> Deref for Slice<T> {
    type Target = [T];
    fn deref(&self) -> &[T] {
        match self {
            Self::Ordinary(values) => values,
            Self::Guarded(None, ..) => &[],
            // SAFETY: the elements that `new` wrote there.
            Self::Guarded(Some(pages), from, len) => unsafe { std::slice::from_raw_parts(pages.at(*from), *len) },
        }
    }
}

impl<T> DerefMut for Slice<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        match self {
            Self::Ordinary(values) => values,
            Self::Guarded(None, ..) => &mut [],
            // SAFETY: the elements that `new` wrote there, borrowed exclusively.
            Self::Guarded(Some(pages), from, len) => unsafe { std::slice::from_raw_parts_mut(pages.at(*from), *len) },
        }
    }
}

impl<T> Drop for Slice<T> {
    fn drop(&mut self) {
        if let Self::Guarded(pages, ..) = self {
            FREE.with_borrow_mut(|free| free.extend(pages.take()));
        }
    }
}

/// How long the arguments are.
struct Sizes {
    x: usize,
    y: usize,
    /// Elements of a dense tensor, channels, samples, and positions of all samples.
    dense: usize,
    c: usize,
    n: usize,
    positions: usize,
    spatial: usize,
    /// Bytes for bits of elements.
    gates: usize,
}

/// Makes the struct of all arguments: for each its type and its first values.
macro_rules! memory {
    ($($name:ident: $t:ty = $values:expr),* $(,)?) => {
        /// All that any operation reads or writes.
        struct Memory<E: Element> {
            $($name: Slice<$t>,)*
            saved: Saved<E::Param>,
            /// What the last operation returned.
            result: Result<()>,
        }

        impl<E: Tested> Memory<E> {
            fn new(sizes: &Sizes) -> Self {
                fn first<T: Copy>(sizes: &Sizes, values: fn(&Sizes) -> Vec<T>) -> Slice<T> {
                    Slice::new(&values(sizes), Place::Ordinary)
                }
                Self {
                    $($name: first::<$t>(sizes, $values),)*
                    saved: Saved::new(sizes.c),
                    result: Ok(()),
                }
            }

            /// The same in another place.
            fn placed(&self, place: Place) -> Self {
                Self { $($name: Slice::new(&self.$name, place),)* saved: self.saved.clone(), result: Ok(()) }
            }

            fn check(&mut self, what: &dyn Fn() -> String, expected: &Self) {
                assert_eq!(self.result, expected.result, "{}", what());
                assert_eq!(self.saved, expected.saved, "{}", what());
                $(self.$name.check(|| format!("{} after {}", stringify!($name), what()), &expected.$name);)*
            }
        }
    };
}

fn normal<E: Element>(len: usize, seed: u64) -> Vec<E> {
    Data::Normal.fill(len, seed)
}

/// Away from zero, so that what is divided by it stays finite; of both signs.
fn scales<P: Real>(len: usize, seed: u64) -> Vec<P> {
    normal::<f64>(len, seed).into_iter().map(|v| P::from_f64(v + 1f64.copysign(v))).collect()
}

fn variances<P: Real>(len: usize) -> Vec<P> {
    normal::<f64>(len, 90).into_iter().map(|v| P::from_f64(v * v)).collect()
}

fn bytes(len: usize) -> Vec<i8> {
    (0..len).map(|i| (i * 37 % 256) as u8 as i8).collect()
}

/// Weights of a pair of channels of a layer beside.
const TAPS: usize = 3;

memory! {
    x: E = |s| normal(s.x, 1),
    y: E = |s| normal(s.y, 2),
    dy: E = |s| normal(s.y, 3),
    dx: E = |s| normal(s.x, 4),
    residual: E = |s| normal(s.y, 5),
    output: E = |s| normal(s.y, 6),
    dresidual: E = |s| normal(s.y, 7),
    of_dx: E = |s| normal(s.x, 8),
    second_x: E = |s| normal(s.x, 9),
    second_dy: E = |s| normal(s.y, 10),
    gamma: E::Param = |s| scales(s.c, 11),
    beta: E::Param = |s| normal(s.c, 12),
    dgamma: E::Param = |s| normal(s.c, 13),
    dbeta: E::Param = |s| normal(s.c, 14),
    mean: E::Param = |s| normal(s.c, 15),
    var: E::Param = |s| variances(s.c),
    scale: E::Param = |s| normal(s.c, 16),
    shift: E::Param = |s| normal(s.c, 17),
    second_gamma: E::Param = |s| normal(s.c, 18),
    weight: E::Param = |s| normal(2 * s.c * TAPS, 19),
    bias: E::Param = |s| normal(s.c, 20),
    bias_of_two: E::Param = |_| normal(2, 21),
    moments: Moments = |s| vec![Moments::default(); s.c],
    sums: GradientSums = |s| vec![GradientSums::default(); s.c],
    lengths: usize = |s| (0..s.n).map(|i| s.spatial - i % 2 * (s.spatial / 2)).collect(),
    mask: bool = |s| (0..s.positions).map(|i| i % 5 != 3).collect(),
    integers: i8 = |s| bytes(s.dense),
    integers_out: i8 = |s| bytes(s.dense),
    gates: u8 = |s| vec![0xa5; s.gates],
}

/// An operation on arguments in memory. The arguments of one are what those before it left.
struct Call<E: Element> {
    name: &'static str,
    run: fn(&BatchNorm<E>, &mut Memory<E>) -> Result<()>,
}

fn call<E: Element>(name: &'static str, run: fn(&BatchNorm<E>, &mut Memory<E>) -> Result<()>) -> Call<E> {
    Call { name, run }
}

const LEAKY: Activation = Activation::LeakyRelu(0.25);

/// The population in a memory.
macro_rules! population {
    ($m:ident) => {
        Population { mean: &$m.mean, var: &$m.var }
    };
}

/// The operations of all element types, in the order in which they run. To cover another one, add a line; for another
/// argument, one above.
fn calls<E: Tested>() -> Vec<Call<E>> {
    let mut calls = vec![
        call("forward_train", |bn, m| bn.forward_train(&m.x, Affine::new(&m.gamma, &m.beta), &mut m.y, &mut m.saved)),
        call("backward", |bn, m| {
            let gradients = Gradients {
                dx: Some(&mut m.dx),
                dgamma: Some(&mut m.dgamma),
                dbeta: Some(&mut m.dbeta),
                dresidual: Some(&mut m.dresidual),
            };
            bn.backward(&m.x, &m.dy, &m.saved, Affine::new(&m.gamma, &m.beta), gradients)
        }),
        call("backward, dx alone", |bn, m| {
            let gradients = Gradients { dx: Some(&mut m.dx), ..Default::default() };
            bn.backward(&m.x, &m.dy, &m.saved, Affine::scale(&m.gamma), gradients)
        }),
        call("backward, dgamma alone", |bn, m| {
            let gradients = Gradients { dgamma: Some(&mut m.dgamma), ..Default::default() };
            bn.backward(&m.x, &m.dy, &m.saved, Affine::none(), gradients)
        }),
        call("backward of a leaky ReLU", |bn, m| {
            let gradients = Gradients {
                dx: Some(&mut m.dx),
                dgamma: Some(&mut m.dgamma),
                dbeta: Some(&mut m.dbeta),
                dresidual: Some(&mut m.dresidual),
            };
            let affine = Affine::new(&m.gamma, &m.beta).with_activation(LEAKY);
            bn.backward(&m.x, &m.dy, &m.saved, affine, gradients)
        }),
        call("backward of a residual and ReLU", |bn, m| {
            let gradients = Gradients {
                dx: Some(&mut m.dx),
                dgamma: Some(&mut m.dgamma),
                dbeta: Some(&mut m.dbeta),
                dresidual: Some(&mut m.dresidual),
            };
            let affine = Affine::new(&m.gamma, &m.beta).with_residual(&m.residual).with_activation(Activation::Relu);
            bn.backward(&m.x, &m.dy, &m.saved, affine, gradients)
        }),
        call("backward of ReLU with the output", |bn, m| {
            let gradients = Gradients { dx: Some(&mut m.dx), dresidual: Some(&mut m.dresidual), ..Default::default() };
            let affine = Affine::new(&m.gamma, &m.beta).with_activation(Activation::Relu).with_output(&m.output);
            bn.backward(&m.x, &m.dy, &m.saved, affine, gradients)
        }),
        call("forward_train with bits", |bn, m| {
            let affine = Affine::new(&m.gamma, &m.beta).with_activation(LEAKY).with_gates_to(&mut m.gates);
            bn.forward_train(&m.x, affine, &mut m.y, &mut m.saved)
        }),
        call("backward of a leaky ReLU with bits", |bn, m| {
            let gradients = Gradients { dx: Some(&mut m.dx), dresidual: Some(&mut m.dresidual), ..Default::default() };
            let affine = Affine::new(&m.gamma, &m.beta).with_activation(LEAKY).with_gates(&m.gates);
            bn.backward(&m.x, &m.dy, &m.saved, affine, gradients)
        }),
        call("gradient_sums", |bn, m| {
            bn.gradient_sums(&m.x, &m.dy, &m.saved, Affine::new(&m.gamma, &m.beta), &mut m.sums)
        }),
        call("input_gradient", |bn, m| {
            bn.input_gradient(&m.x, &m.dy, &m.saved, Affine::new(&m.gamma, &m.beta), &m.sums, &mut m.dx)
        }),
        call("gradient_sums of ReLU", |bn, m| {
            let affine = Affine::new(&m.gamma, &m.beta).with_residual(&m.residual).with_activation(Activation::Relu);
            bn.gradient_sums(&m.x, &m.dy, &m.saved, affine, &mut m.sums)
        }),
        call("input_gradient of ReLU with the output", |bn, m| {
            let affine = Affine::new(&m.gamma, &m.beta).with_activation(Activation::Relu).with_output(&m.output);
            bn.input_gradient(&m.x, &m.dy, &m.saved, affine, &m.sums, &mut m.dx)
        }),
        call("parameter_gradients", |bn, m| {
            bn.parameter_gradients(&m.saved, &m.sums, Some(&mut m.dgamma), Some(&mut m.dbeta))
        }),
        call("residual_gradient", |bn, m| {
            let affine = Affine::new(&m.gamma, &m.beta).with_residual(&m.residual).with_activation(Activation::Relu);
            bn.residual_gradient(&m.x, &m.dy, &m.saved, affine, &mut m.dresidual)
        }),
        call("double_backward", |bn, m| {
            let cotangents = Cotangents { dx: &m.of_dx, dgamma: Some(&m.dgamma), dbeta: Some(&m.dbeta) };
            let gradients = SecondGradients {
                x: Some(&mut m.second_x),
                dy: Some(&mut m.second_dy),
                gamma: Some(&mut m.second_gamma),
            };
            bn.double_backward(&m.x, &m.dy, &m.saved, Affine::scale(&m.gamma), cotangents, gradients)
        }),
        call("moments", |bn, m| bn.moments(&m.x, &mut m.moments)),
        call("finish", |bn, m| bn.finish(&m.moments, &mut m.saved)),
        call("recompute", |bn, m| {
            let mut running = bn.running(Momentum::Cumulative, Variance::Biased)?;
            running.recompute(&m.moments)
        }),
        call("normalize", |bn, m| bn.normalize(&m.x, Affine::new(&m.gamma, &m.beta), &m.saved, &mut m.y)),
        call("normalize with a residual and ReLU", |bn, m| {
            let affine = Affine::new(&m.gamma, &m.beta).with_residual(&m.residual).with_activation(Activation::Relu);
            bn.normalize(&m.x, affine, &m.saved, &mut m.y)
        }),
        call("forward_train with a residual and ReLU", |bn, m| {
            let affine = Affine::new(&m.gamma, &m.beta).with_residual(&m.residual).with_activation(Activation::Relu);
            bn.forward_train(&m.x, affine, &mut m.y, &mut m.saved)
        }),
        call("forward_infer", |bn, m| bn.forward_infer(&m.x, Affine::new(&m.gamma, &m.beta), population!(m), &mut m.y)),
        call("forward_infer with a residual and a leaky ReLU", |bn, m| {
            let affine = Affine::new(&m.gamma, &m.beta).with_residual(&m.residual).with_activation(LEAKY);
            bn.forward_infer(&m.x, affine, population!(m), &mut m.y)
        }),
        call("scale_and_shift", |bn, m| {
            bn.scale_and_shift(Affine::new(&m.gamma, &m.beta), population!(m), &mut m.scale, &mut m.shift)
        }),
        call("fold_into_preceding", |bn, m| {
            let layer = Layer::convolution(bn.shape().channels(), 2, TAPS);
            let affine = Affine::new(&m.gamma, &m.beta);
            bn.fold_into_preceding(layer, &mut m.weight, &mut m.bias, affine, population!(m))
        }),
        call("fold_into_following", |bn, m| {
            let layer = Layer::convolution(2, bn.shape().channels(), TAPS);
            let affine = Affine::new(&m.gamma, &m.beta);
            bn.fold_into_following(layer, &mut m.weight, &mut m.bias_of_two, affine, population!(m))
        }),
        call("ghost", |bn, m| {
            let ghost = bn.clone().ghost(2)?;
            let affine = Affine::new(&m.gamma, &m.beta).with_residual(&m.residual).with_activation(LEAKY);
            let mut saved = ghost.saved();
            ghost.forward_train(&m.x, affine, &mut m.y, &mut saved)?;
            let gradients = Gradients {
                dx: Some(&mut m.dx),
                dgamma: Some(&mut m.dgamma),
                dbeta: Some(&mut m.dbeta),
                dresidual: Some(&mut m.dresidual),
            };
            ghost.backward(&m.x, &m.dy, &saved, affine, gradients)
        }),
        call("with_lengths", |bn, m| {
            let bn = bn.with_lengths(&m.lengths)?;
            bn.forward_infer(&m.x, Affine::new(&m.gamma, &m.beta), population!(m), &mut m.y)
        }),
        call("with_mask", |bn, m| {
            let bn = bn.with_mask(&m.mask)?;
            bn.forward_infer(&m.x, Affine::new(&m.gamma, &m.beta), population!(m), &mut m.y)
        }),
        call("renormalize", |bn, m| {
            m.saved.renormalize(population!(m), RenormLimits { r_max: 1.5, d_max: 0.4 })?;
            bn.forward_train(&m.x, Affine::new(&m.gamma, &m.beta), &mut m.y, &mut m.saved)
        }),
        call("freeze", |bn, m| {
            bn.freeze(population!(m), &mut m.saved)?;
            let gradients = Gradients { dx: Some(&mut m.dx), dresidual: Some(&mut m.dresidual), ..Default::default() };
            bn.backward(&m.x, &m.dy, &m.saved, Affine::new(&m.gamma, &m.beta).with_activation(LEAKY), gradients)
        }),
        // What writes over the tensors comes last.
        call("forward_train_in_place", |bn, m| {
            bn.forward_train_in_place(&mut m.x, Affine::new(&m.gamma, &m.beta), &mut m.saved)
        }),
        call("backward_in_place", |bn, m| {
            let affine = Affine::new(&m.gamma, &m.beta).with_activation(LEAKY);
            bn.backward_in_place(
                &m.x,
                &mut m.dy,
                &m.saved,
                affine,
                Gradients { dgamma: Some(&mut m.dgamma), dbeta: Some(&mut m.dbeta), ..Default::default() },
            )
        }),
        call("input_gradient_in_place", |bn, m| {
            bn.input_gradient_in_place(&m.x, &mut m.dy, &m.saved, Affine::scale(&m.gamma), &m.sums)
        }),
        call("normalize_in_place", |bn, m| {
            bn.normalize_in_place(&mut m.x, Affine::new(&m.gamma, &m.beta).with_activation(LEAKY), &m.saved)
        }),
        call("forward_infer_in_place", |bn, m| {
            bn.forward_infer_in_place(&mut m.x, Affine::new(&m.gamma, &m.beta), population!(m))
        }),
        call("ghost in place", |bn, m| {
            let ghost = bn.clone().ghost(2)?;
            let (affine, mut saved) = (Affine::new(&m.gamma, &m.beta).with_activation(LEAKY), ghost.saved());
            ghost.forward_train_in_place(&mut m.x, affine, &mut saved)?;
            ghost.backward_in_place(
                &m.x,
                &mut m.dy,
                &saved,
                affine,
                Gradients { dgamma: Some(&mut m.dgamma), dbeta: Some(&mut m.dbeta), ..Default::default() },
            )
        }),
    ];
    calls.extend(E::more());
    calls
}

/// An element type, with the operations that it alone has.
trait Tested: Bits {
    fn more() -> Vec<Call<Self>> {
        Vec::new()
    }
}

impl Tested for f32 {
    fn more() -> Vec<Call<f32>> {
        const OF: Quantization = Quantization { scale: 0.05, zero_point: 3 };
        vec![
            call("forward_infer_quantized", |bn, m| {
                let affine = Affine::new(&m.gamma, &m.beta).with_activation(LEAKY);
                bn.forward_infer_quantized(&m.integers, OF, affine, population!(m), &mut m.integers_out, OF)
            }),
            call("forward_infer_quantized_in_place", |bn, m| {
                let affine = Affine::new(&m.gamma, &m.beta);
                bn.forward_infer_quantized_in_place(&mut m.integers, OF, affine, population!(m), OF)
            }),
        ]
    }
}

impl Tested for f64 {}
#[cfg(feature = "half")]
impl Tested for half::bf16 {}
#[cfg(feature = "half")]
impl Tested for half::f16 {}

/// The plans for a shape, by name, and elements of the slices for both sides.
fn plans<E: Element>(shape: Shape, tier: Tier) -> Vec<(&'static str, BatchNorm<E>, [usize; 2])> {
    let dense = plan::<E>(shape, tier, Parallelism::Sequential);
    let (n, c, s, len) = (shape.batch(), shape.channels(), shape.spatial(), shape.len());
    // Waking threads takes longer than all else here.
    let threads = if len.is_multiple_of(5) { Parallelism::Threads(2) } else { Parallelism::Sequential };
    let streaming = dense.clone().with_stores(Stores::Streaming).with_parallelism(threads);
    let from_output = dense.clone().with_backward_from_output(true).with_accumulation(true);
    let mask: Vec<bool> = (0..shape.count()).map(|i| i * i % 7 != 2).collect();
    let sizes = if shape.layout() == Layout::ChannelsFirst { [n, c, s] } else { [n, s, c] };
    let strides = [(sizes[1] + 2) * (sizes[2] + 3), sizes[2] + 3, 1];
    let view = View::strided(&shape, &sizes, &strides).unwrap();
    let viewed = |x: &View, y: &View| dense.clone().with_views(x.clone(), y.clone()).unwrap();
    let (strided, one_side) = (viewed(&view, &view), viewed(&View::dense(&shape), &view));
    let mut plans = vec![
        ("strided", strided, [view.len(); 2]),
        ("strided on one side", one_side, [len, view.len()]),
        ("masked", dense.with_mask(&mask).unwrap(), [len; 2]),
        ("from the output", from_output, [len; 2]),
        ("streaming", streaming, [len; 2]),
        ("dense", dense.clone(), [len; 2]),
    ];
    if shape.layout() == Layout::ChannelsFirst {
        let view = View::blocked(&shape, 8).unwrap();
        plans.push(("blocked", viewed(&view, &view), [view.len(); 2]));
    }
    plans
}

/// Every operation of every plan for a shape, on ordinary memory and against guard pages. Counts the calls that were served.
fn check<E: Tested>(shape: Shape) -> usize {
    let (tiers, calls, mut served) = (tiers(), calls::<E>(), 0);
    let trace = std::env::var_os("BATCHNORM_TEST_TRACE").is_some();
    let of_tiers: Vec<_> = tiers.iter().map(|&tier| plans::<E>(shape, tier)).collect();
    for (k, (name, first, [x, y])) in of_tiers[0].iter().enumerate() {
        let (n, spatial) = (shape.batch(), shape.spatial());
        let (c, gates) = (shape.channels(), first.gates_len());
        let sizes = Sizes { x: *x, y: *y, dense: shape.len(), c, n, positions: n * spatial, spatial, gates };
        let fresh = Memory::<E>::new(&sizes);
        // In step, so that what differs is named at once.
        let mut ordinary = fresh.placed(Place::Ordinary);
        let mut guarded = Vec::new();
        for plans in &of_tiers {
            guarded.extend([Place::Start, Place::End].map(|place| (&plans[k].1, place, fresh.placed(place))));
        }
        for Call { name: called, run } in &calls {
            ordinary.result = run(first, &mut ordinary);
            // Views do not take all of them.
            assert!(*name != "dense" || ordinary.result.is_ok(), "{called} of {shape:?}: {:?}", ordinary.result);
            served += usize::from(ordinary.result.is_ok());
            for (bn, place, memory) in &mut guarded {
                let case = || format!("{called}, {name}, {shape:?}, {}, {place:?}", bn.tier());
                if trace {
                    eprintln!("{}: {}", std::any::type_name::<E>(), case());
                }
                memory.result = run(bn, memory);
                memory.check(&case, &ordinary);
            }
        }
    }
    served
}

/// Elements of a plane or a row: all that fill few vectors, and both sides of the ends of joins and blocks.
fn sizes() -> impl Iterator<Item = usize> {
    (1..=70).chain([95, 127, 128, 129, 255, 257, 1023, 1025])
}

fn all<E: Tested>() {
    let mut served = 0;
    for size in sizes() {
        let shapes = [
            Shape::ncl(3, 2, size),
            Shape::nc(5, size),
            Shape::nlc(2, size, 3),
            Shape::ncl(1 + size % 6, 1 + size % 19, 1 + size / 9),
        ];
        served += shapes.map(Result::unwrap).into_iter().map(check::<E>).sum::<usize>();
    }
    let large = [Shape::ncl(1, 1, 8193), Shape::ncl(2, 17, 600), Shape::nchw(9, 3, 31, 33), Shape::nhwc(3, 30, 31, 5)];
    served += large.map(Result::unwrap).into_iter().map(check::<E>).sum::<usize>();
    assert!(served > 70 * 3 * 100, "{served} calls");
}

mod every_operation_stays_within_its_slices {
    #[test]
    fn f32() {
        super::all::<f32>();
    }

    #[test]
    fn f64() {
        super::all::<f64>();
    }

    #[cfg(feature = "half")]
    #[test]
    fn bf16() {
        super::all::<half::bf16>();
    }

    #[cfg(feature = "half")]
    #[test]
    fn f16() {
        super::all::<half::f16>();
    }
}
