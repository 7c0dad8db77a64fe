//! Arguments of every kind, good and bad: no call panics, a call is served exactly if its arguments are right, and one
//! that is refused leaves its outputs as they were.
#![no_main]

use arbitrary::Arbitrary;
use batchnorm::{
    Affine, BatchNorm, Error, GradientSums, Gradients, Layout, Moments, Momentum, Parallelism, Population, Real,
    Running, Saved, Shape, Tier, Variance,
};
use batchnorm_fuzz::{
    Bits, Kind, Tested, Values, as_inv_std, moments_parts, same_bits, saved_parts, sums_parts, with_element,
};
use libfuzzer_sys::fuzz_target;

#[derive(Arbitrary, Debug)]
struct Input<'a> {
    kind: Kind,
    large: Constructor,
    last: bool,
    /// Batch, channels and spatial size of the shape that the calls are for.
    small: [u8; 3],
    eps: f64,
    threads: Option<usize>,
    lengths: Lengths,
    affine: [bool; 2],
    gradients: [bool; 3],
    given: Given,
    moments: Counts,
    running: Keeping,
    values: Values,
    params: Values,
    bytes: &'a [u8],
}

/// A dimension of any size.
#[derive(Arbitrary, Debug, Clone, Copy)]
enum Dim {
    Small(u8),
    NearPower(u8, i8),
    Any(usize),
}

impl Dim {
    fn size(self) -> usize {
        match self {
            Self::Small(size) => size.into(),
            Self::NearPower(power, plus) => {
                (1usize << (u32::from(power) % usize::BITS)).wrapping_add_signed(plus.into())
            }
            Self::Any(size) => size,
        }
    }
}

/// A call of a constructor of [`Shape`], the dimensions in the order of its arguments.
#[derive(Arbitrary, Debug)]
enum Constructor {
    New { last: bool, batch: Dim, channels: Dim, spatial: Vec<Dim> },
    Nc([Dim; 2]),
    Ncl([Dim; 3]),
    Nchw([Dim; 4]),
    Ncdhw([Dim; 5]),
    Nlc([Dim; 3]),
    Nhwc([Dim; 4]),
    Ndhwc([Dim; 5]),
}

impl Constructor {
    /// What the call gives, and the batch, channels and spatial dimensions that it is asked for.
    fn call(&self) -> (Result<Shape, Error>, [usize; 2], Vec<usize>) {
        match self {
            Self::New { last, batch, channels, spatial } => {
                let (batch, channels) = (batch.size(), channels.size());
                let spatial: Vec<_> = spatial.iter().map(|dim| dim.size()).collect();
                (Shape::new(layout(*last), batch, channels, &spatial), [batch, channels], spatial)
            }
            Self::Nc(dims) => {
                let [n, c] = dims.map(Dim::size);
                (Shape::nc(n, c), [n, c], vec![])
            }
            Self::Ncl(dims) => {
                let [n, c, l] = dims.map(Dim::size);
                (Shape::ncl(n, c, l), [n, c], vec![l])
            }
            Self::Nchw(dims) => {
                let [n, c, h, w] = dims.map(Dim::size);
                (Shape::nchw(n, c, h, w), [n, c], vec![h, w])
            }
            Self::Ncdhw(dims) => {
                let [n, c, d, h, w] = dims.map(Dim::size);
                (Shape::ncdhw(n, c, d, h, w), [n, c], vec![d, h, w])
            }
            Self::Nlc(dims) => {
                let [n, l, c] = dims.map(Dim::size);
                (Shape::nlc(n, l, c), [n, c], vec![l])
            }
            Self::Nhwc(dims) => {
                let [n, h, w, c] = dims.map(Dim::size);
                (Shape::nhwc(n, h, w, c), [n, c], vec![h, w])
            }
            Self::Ndhwc(dims) => {
                let [n, d, h, w, c] = dims.map(Dim::size);
                (Shape::ndhwc(n, d, h, w, c), [n, c], vec![d, h, w])
            }
        }
    }
}

fn layout(last: bool) -> Layout {
    if last { Layout::ChannelsLast } else { Layout::ChannelsFirst }
}

/// The length of an argument: the right one, most of the time.
#[derive(Arbitrary, Debug, Clone, Copy)]
struct Length(u8);

impl Length {
    fn of(self, right: usize) -> usize {
        if self.0 < 0xe0 { right } else { usize::from(self.0 - 0xe0) }
    }
}

#[derive(Arbitrary, Debug, Clone, Copy)]
struct Lengths {
    x: Length,
    y: Length,
    dy: Length,
    gamma: Length,
    beta: Length,
    mean: Length,
    var: Length,
    dgamma: Length,
    dbeta: Length,
    saved: Length,
    moments: Length,
    sums: Length,
    running: Length,
}

/// Statistics to start from.
#[derive(Arbitrary, Debug, Clone, Copy)]
enum Given {
    Unfilled,
    Parts { count: u64, inv_std: Length },
    OfTheShape,
}

/// Counts of moments: the same, or one that differs.
#[derive(Arbitrary, Debug, Clone, Copy)]
struct Counts {
    count: u64,
    odd: Option<(u8, u64)>,
}

/// The parts of running statistics.
#[derive(Arbitrary, Debug, Clone, Copy)]
struct Keeping {
    batches: u64,
    weight: f64,
    convention: u8,
    unbiased: bool,
}

fuzz_target!(|input: Input<'_>| with_element!(input.kind, check(&input)));

/// Holds a call to what it should do, and a refused one to its outputs being the `same` as before.
#[track_caller]
fn judge(what: &str, result: Result<(), Error>, allowed: bool, same: bool) {
    assert_eq!(result.is_ok(), allowed, "{what}: {result:?}");
    if let Err(error) = result {
        assert!(same, "{what} wrote although it failed with {error:?}");
        assert!(!error.to_string().is_empty());
        if let Error::Length { expected, got, .. } = error {
            assert_ne!(expected, got, "{what}");
        }
    }
}

fn check_constructor<E: Tested>(constructor: &Constructor) {
    let (result, [batch, channels], spatial) = constructor.call();
    let dims = [&[batch, channels], &spatial[..]].concat();
    // Saturation keeps what is too large too large: no factor is zero.
    let room = dims.iter().filter(|&&dim| dim > 0).fold(8u128, |room, &dim| room.saturating_mul(dim as u128));
    match result {
        Err(error) if channels == 0 => assert_eq!(error, Error::ZeroChannels),
        Err(error) => {
            assert!(room > isize::MAX as u128, "{dims:?}: {error}");
            assert_eq!(error, Error::ShapeOverflow { dims });
        }
        Ok(shape) => {
            assert!(channels > 0 && room <= isize::MAX as u128, "{dims:?} is too large");
            let spatial = spatial.iter().product();
            assert_eq!((shape.batch(), shape.channels(), shape.spatial()), (batch, channels, spatial));
            assert_eq!((shape.count(), shape.len()), (batch * spatial, batch * channels * spatial));
            assert_eq!(shape.is_empty(), batch * spatial == 0);
            for parallelism in [Parallelism::Sequential, Parallelism::Auto, Parallelism::Threads(usize::MAX)] {
                let bn = BatchNorm::<E>::new(shape).unwrap().with_parallelism(parallelism);
                // No memory is asked for yet, so any shape has an answer.
                let _ = bn.scratch_len();
            }
        }
    }
}

/// All arguments of the calls; slices of the lengths that the input says.
struct Case<E: Tested> {
    bn: BatchNorm<E>,
    x: Vec<E>,
    y: Vec<E>,
    dy: Vec<E>,
    gamma: Option<Vec<E::Param>>,
    beta: Option<Vec<E::Param>>,
    mean: Vec<E::Param>,
    var: Vec<E::Param>,
    saved: Saved<E::Param>,
    moments: Vec<Moments>,
    sums: Vec<GradientSums>,
}

fn check<E: Tested>(input: &Input<'_>) {
    check_constructor::<E>(&input.large);

    let [batch, channels, spatial] = input.small.map(usize::from);
    let (batch, channels, spatial) = (batch % 5, 1 + channels % 9, spatial % 5);
    let shape = Shape::new(layout(input.last), batch, channels, &[spatial]).unwrap();
    let bn = plan::<E>(input, shape);
    let fill = |salt: usize, length: Length, right| input.values.fill(input.bytes, salt, length.of(right));
    let params = |salt: usize, length: Length| input.params.fill(input.bytes, salt, length.of(channels));
    let Lengths { x, y, dy, gamma, beta, mean, var, .. } = input.lengths;
    let saved = given(input, &bn);
    let numbers: Vec<f64> = input.params.fill(input.bytes, 9, 3 * 40);
    let moment = |i: usize| Moments {
        count: input.moments.odd.filter(|odd| usize::from(odd.0) == i).map_or(input.moments.count, |odd| odd.1),
        mean: numbers[3 * i],
        residue: numbers[3 * i + 1],
        m2: numbers[3 * i + 2],
    };
    let sum = |i: usize| GradientSums { dy: numbers[2 * i], dy_xhat: numbers[2 * i + 1] };
    let case = Case {
        x: fill(0, x, shape.len()),
        y: fill(1, y, shape.len()),
        dy: fill(2, dy, shape.len()),
        gamma: input.affine[0].then(|| params(3, gamma)),
        beta: input.affine[1].then(|| params(4, beta)),
        mean: params(5, mean),
        var: params(6, var),
        saved,
        moments: (0..input.lengths.moments.of(channels)).map(moment).collect(),
        sums: (0..input.lengths.sums.of(channels)).map(sum).collect(),
        bn,
    };
    for pair in case.moments.windows(2) {
        let _ = pair[0].merge(pair[1]);
    }
    check_forward(&case);
    check_backward(&case, input);
    check_running(&case, input);
}

/// The plan of the input's options, where they are valid.
fn plan<E: Tested>(input: &Input<'_>, shape: Shape) -> BatchNorm<E> {
    let bn = BatchNorm::<E>::new(shape).unwrap();
    for tier in Tier::ALL {
        assert_eq!(bn.clone().with_tier(tier).is_ok(), tier.is_available());
    }
    let allowed = input.eps.is_finite() && input.eps >= 0.0;
    let parallelism = input.threads.map_or(Parallelism::Auto, Parallelism::Threads);
    let with_eps = bn.clone().with_eps(input.eps);
    assert_eq!(with_eps.is_ok(), allowed, "eps {}", input.eps);
    let bn = with_eps.unwrap_or(bn).with_parallelism(parallelism);
    bn.reserve(1);
    let _ = bn.scratch_len();
    bn.with_shape(shape).unwrap()
}

/// The statistics of the input.
fn given<E: Tested>(input: &Input<'_>, bn: &BatchNorm<E>) -> Saved<E::Param> {
    let channels = input.lengths.saved.of(bn.shape().channels());
    let unfilled = Saved::new(channels);
    let (count, len) = match input.given {
        Given::Unfilled => return unfilled,
        Given::Parts { count, inv_std } => (count, inv_std.of(channels)),
        Given::OfTheShape => (bn.shape().count() as u64, channels),
    };
    let values = |salt: usize, len: usize| input.params.fill(input.bytes, salt, len);
    let mut inv_std: Vec<E::Param> = values(8, len);
    if let Given::OfTheShape = input.given {
        inv_std = as_inv_std(inv_std);
    }
    let possible = |value: &E::Param| value.to_f64().is_nan() || (0.0..f64::INFINITY).contains(&value.to_f64());
    let all_possible = inv_std.iter().all(possible);
    let saved = Saved::from_parts(count, values(7, channels), inv_std, input.eps);
    let eps_allowed = input.eps.is_finite() && input.eps >= 0.0;
    let allowed = channels > 0 && len == channels && count > 0 && eps_allowed && all_possible;
    judge("Saved::from_parts", saved.as_ref().map(|_| ()).map_err(Error::clone), allowed, true);
    saved.unwrap_or(unfilled)
}

fn same_saved<P: Real + Bits>(a: &Saved<P>, b: &Saved<P>) -> bool {
    a.count() == b.count() && same_bits(&saved_parts(a), &saved_parts(b))
}

impl<E: Tested> Case<E> {
    fn is_tensor(&self, len: usize) -> bool {
        len == self.bn.shape().len()
    }

    fn is_channels(&self, len: usize) -> bool {
        len == self.bn.shape().channels()
    }

    fn affine(&self) -> Affine<'_, E> {
        Affine::of(self.gamma.as_deref(), self.beta.as_deref())
    }

    fn gamma_fits(&self) -> bool {
        self.gamma.as_ref().is_none_or(|gamma| self.is_channels(gamma.len()))
    }

    fn affine_fits(&self) -> bool {
        self.gamma_fits() && self.beta.as_ref().is_none_or(|beta| self.is_channels(beta.len()))
    }

    fn saved_fits(&self) -> bool {
        self.is_channels(self.saved.channels())
    }
}

fn check_forward<E: Tested>(case: &Case<E>) {
    let Case { bn, x, saved, moments, mean, var, .. } = case;
    let affine = case.affine();
    let (x_fits, y_fits) = (case.is_tensor(x.len()), case.is_tensor(case.y.len()));
    let count = bn.shape().count();

    let allowed = x_fits && case.affine_fits() && case.saved_fits() && count > 0;
    let (mut y, mut out) = (case.y.clone(), saved.clone());
    let result = bn.forward_train(x, affine, &mut y, &mut out);
    judge("forward_train", result, allowed && y_fits, same_bits(&y, &case.y) && same_saved(&out, saved));
    let (mut y, mut out) = (x.clone(), saved.clone());
    let result = bn.forward_train_in_place(&mut y, affine, &mut out);
    judge("forward_train_in_place", result, allowed, same_bits(&y, x) && same_saved(&out, saved));
    let mut out = saved.clone();
    let result = bn.forward_train_to_vec(x, affine, &mut out).map(drop);
    judge("forward_train_to_vec", result, allowed, same_saved(&out, saved));

    let mut out = moments.clone();
    let result = bn.moments(x, &mut out);
    let same = same_bits(&moments_parts(&out), &moments_parts(moments));
    judge("moments", result, x_fits && case.is_channels(moments.len()), same);
    let mut out = saved.clone();
    let counts = moments.windows(2).all(|pair| pair[0].count == pair[1].count);
    let counts = counts && moments.first().is_some_and(|moments| moments.count > 0);
    let result = bn.finish(moments, &mut out);
    let allowed = case.is_channels(moments.len()) && case.saved_fits() && counts;
    judge("finish", result, allowed, same_saved(&out, saved));

    let allowed = x_fits && case.affine_fits() && case.saved_fits() && saved.count() > 0;
    let mut y = case.y.clone();
    judge("normalize", bn.normalize(x, affine, saved, &mut y), allowed && y_fits, same_bits(&y, &case.y));
    let mut y = x.clone();
    judge("normalize_in_place", bn.normalize_in_place(&mut y, affine, saved), allowed, same_bits(&y, x));
    judge("normalize_to_vec", bn.normalize_to_vec(x, affine, saved).map(drop), allowed, true);

    let population = Population { mean, var };
    let variances = case.is_channels(var.len()) && var.iter().all(|var| var.to_f64() >= 0.0);
    let allowed = x_fits && case.affine_fits() && case.is_channels(mean.len()) && variances;
    let mut y = case.y.clone();
    let result = bn.forward_infer(x, affine, population, &mut y);
    judge("forward_infer", result, allowed && y_fits, same_bits(&y, &case.y));
    let mut y = x.clone();
    let result = bn.forward_infer_in_place(&mut y, affine, population);
    judge("forward_infer_in_place", result, allowed, same_bits(&y, x));
    judge("forward_infer_to_vec", bn.forward_infer_to_vec(x, affine, population).map(drop), allowed, true);
}

fn check_backward<E: Tested>(case: &Case<E>, input: &Input<'_>) {
    let Case { bn, x, dy, saved, sums, .. } = case;
    let gamma = case.gamma.as_deref();
    let count = bn.shape().count() as u64;
    let [asks_dx, asks_dgamma, asks_dbeta] = input.gradients;
    let param = |length: Length| vec![E::Param::sentinel(); length.of(bn.shape().channels())];
    let dgamma = asks_dgamma.then(|| param(input.lengths.dgamma));
    let dbeta = asks_dbeta.then(|| param(input.lengths.dbeta));
    let fits = |param: &Option<Vec<E::Param>>| param.as_ref().is_none_or(|param| case.is_channels(param.len()));
    let same = |a: &Option<Vec<E::Param>>, b: &Option<Vec<E::Param>>| {
        same_bits(a.as_deref().unwrap_or_default(), b.as_deref().unwrap_or_default())
    };
    let (dx_fits, inputs_fit) = (case.is_tensor(case.y.len()), case.is_tensor(x.len()) && case.is_tensor(dy.len()));

    let shared = inputs_fit && case.gamma_fits() && case.saved_fits() && saved.count() > 0;
    let allowed = shared && fits(&dgamma) && fits(&dbeta) && saved.count() == count;
    let (mut dx, mut out_gamma, mut out_beta) = (case.y.clone(), dgamma.clone(), dbeta.clone());
    let gradients = Gradients {
        dx: asks_dx.then_some(&mut dx[..]),
        dgamma: out_gamma.as_deref_mut(),
        dbeta: out_beta.as_deref_mut(),
        ..Default::default()
    };
    let result = bn.backward(x, dy, saved, Affine::of(gamma, None), gradients);
    let untouched = same_bits(&dx, &case.y) && same(&out_gamma, &dgamma) && same(&out_beta, &dbeta);
    judge("backward", result, allowed && (!asks_dx || dx_fits), untouched);

    let (mut dx, mut out_gamma, mut out_beta) = (dy.clone(), dgamma.clone(), dbeta.clone());
    let gradients =
        Gradients { dgamma: out_gamma.as_deref_mut(), dbeta: out_beta.as_deref_mut(), ..Default::default() };
    let result = bn.backward_in_place(x, &mut dx, saved, Affine::of(gamma, None), gradients);
    let untouched = same_bits(&dx, dy) && same(&out_gamma, &dgamma) && same(&out_beta, &dbeta);
    judge("backward_in_place", result, allowed, untouched);

    let (mut out_gamma, mut out_beta) = (dgamma.clone(), dbeta.clone());
    let gradients =
        Gradients { dgamma: out_gamma.as_deref_mut(), dbeta: out_beta.as_deref_mut(), ..Default::default() };
    let result = bn.backward_to_vec(x, dy, saved, Affine::of(gamma, None), gradients).map(drop);
    judge("backward_to_vec", result, allowed, same(&out_gamma, &dgamma) && same(&out_beta, &dbeta));

    let sums_fit = case.is_channels(sums.len());
    let mut out = sums.clone();
    let result = bn.gradient_sums(x, dy, saved, Affine::none(), &mut out);
    let allowed = inputs_fit && case.saved_fits() && saved.count() > 0 && sums_fit;
    judge("gradient_sums", result, allowed, same_bits(&sums_parts(&out), &sums_parts(sums)));

    let mut dx = case.y.clone();
    let result = bn.input_gradient(x, dy, saved, Affine::of(gamma, None), sums, &mut dx);
    judge("input_gradient", result, shared && sums_fit && dx_fits, same_bits(&dx, &case.y));
    let mut dx = dy.clone();
    let result = bn.input_gradient_in_place(x, &mut dx, saved, Affine::of(gamma, None), sums);
    judge("input_gradient_in_place", result, shared && sums_fit, same_bits(&dx, dy));
}

fn check_running<E: Tested>(case: &Case<E>, input: &Input<'_>) {
    let Case { bn, mean, var, saved, .. } = case;
    let Keeping { batches, weight, convention, unbiased } = input.running;
    let (momentum, weight_fits) = match convention % 3 {
        0 => (Momentum::WeightOfNew(weight), (0.0..=1.0).contains(&weight)),
        1 => (Momentum::WeightOfOld(weight), (0.0..=1.0).contains(&weight)),
        _ => (Momentum::Cumulative, true),
    };
    let variance = if unbiased { Variance::Unbiased } else { Variance::Biased };

    let channels = input.lengths.running.of(bn.shape().channels());
    let fresh = Running::<E::Param>::new(channels, momentum, variance);
    judge("Running::new", fresh.as_ref().map(|_| ()).map_err(Error::clone), channels > 0 && weight_fits, true);
    assert_eq!(bn.running(momentum, variance).is_ok(), weight_fits);

    let kept = Running::from_parts(mean.clone(), var.clone(), batches, momentum, variance);
    let variances = var.iter().all(|var| var.to_f64() >= 0.0);
    let allowed = !mean.is_empty() && mean.len() == var.len() && variances && weight_fits;
    judge("Running::from_parts", kept.as_ref().map(|_| ()).map_err(Error::clone), allowed, true);

    for mut running in [fresh, kept].into_iter().flatten() {
        let before = running.clone();
        let enough = saved.count() > u64::from(unbiased);
        let result = running.update(saved);
        let served = result.is_ok();
        let same = same_bits(running.mean(), before.mean())
            && same_bits(running.var(), before.var())
            && running.batches() == before.batches();
        judge("update", result, before.mean().len() == saved.channels() && enough, same);
        if served {
            assert_eq!(running.batches(), before.batches().saturating_add(1));
        }
        // The running variance may be refused now, but the call may not panic.
        let mut y = case.x.clone();
        let _ = bn.forward_infer_in_place(&mut y, case.affine(), running.population());
    }
}
