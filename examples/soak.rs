//! Random calls for as long as it is told, from several threads: shapes, layouts, element types, operations, tiers, numbers of
//! threads, on plans of their own and on plans that all threads share. Results are compared bit for bit with the reference, and
//! the process fails if its memory grows from the second quarter of the time to the last.
//!
//! `cargo run --release --all-features --example soak -- --seconds 120`

#[path = "../tests/common/mod.rs"]
mod common;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use batchnorm::{Activation, Affine, BatchNorm, GradientSums, Gradients, Layout, Moments, Parallelism, Population};
use batchnorm::{Saved, Shape, Stores, Tier, View, reference};
use clap::Parser;
use common::{Bits, Data, assert_bits, plan, tiers};
use rand::{Rng, RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Random calls, checked, with an eye on memory.
#[derive(Parser)]
struct Options {
    /// How long.
    #[arg(long, default_value_t = 60)]
    seconds: u64,
    /// Threads that call.
    #[arg(long, default_value_t = 4)]
    callers: u64,
    /// Of the random numbers; one for the time of day is printed if none is given.
    #[arg(long)]
    seed: Option<u64>,
    /// Of how many calls on plans of their own one is compared with the reference, which is slow.
    #[arg(long, default_value_t = 3)]
    check_every: u32,
    /// By how many MiB memory may grow from the second quarter to the last.
    #[arg(long, default_value_t = 24)]
    growth: usize,
}

/// Elements of the largest tensor: a few blocks of each geometry.
const MOST: usize = 40_000;

fn pick<T: Copy>(rng: &mut ChaCha8Rng, from: &[T]) -> T {
    from[rng.random_range(0..from.len())]
}

/// Small sizes, and both sides of the ends of vectors, joins and blocks.
fn size(rng: &mut ChaCha8Rng, most: usize) -> usize {
    let size = match rng.random_range(0..4) {
        0 => pick(rng, &[8, 16, 32, 64, 128, 256, 512, 2048, 8192, 16384]) + rng.random_range(0..3) - 1,
        1 => rng.random_range(1..=20_000),
        _ => rng.random_range(1..=70),
    };
    size.clamp(1, most.max(1))
}

fn shape(rng: &mut ChaCha8Rng) -> Shape {
    let most = MOST >> rng.random_range(0..6);
    let c = size(rng, most);
    let s = size(rng, most / c);
    let n = size(rng, most / c / s);
    Shape::new(pick(rng, &[Layout::ChannelsFirst, Layout::ChannelsLast]), n, c, &[s]).unwrap()
}

fn parallelism(rng: &mut ChaCha8Rng) -> Parallelism {
    pick(rng, &[Parallelism::Sequential, Parallelism::Auto, Parallelism::Threads(2), Parallelism::Threads(5)])
}

/// The data of a step, and what it gives.
struct Step<E: Bits>
where
    E::Param: Bits,
{
    shape: Shape,
    x: Vec<E>,
    dy: Vec<E>,
    residual: Option<Vec<E>>,
    activation: Activation,
    gamma: Vec<E::Param>,
    beta: Vec<E::Param>,
}

/// Outputs of a step: tensors, and values per channel.
type Results<E, P> = (Vec<Vec<E>>, Vec<Vec<P>>);

impl<E: Bits> Step<E>
where
    E::Param: Bits,
{
    fn new(rng: &mut ChaCha8Rng, shape: Shape) -> Self {
        let seed = rng.next_u64();
        let tensor = |data: Data, salt: u64| data.fill(shape.len(), seed ^ salt);
        let params = |salt: u64| Data::Normal.fill(shape.channels(), seed ^ salt);
        let activations = [Activation::None, Activation::Relu, Activation::LeakyRelu(0.125)];
        Self {
            shape,
            x: tensor(pick(rng, &Data::ALL), 1),
            dy: tensor(Data::Normal, 2),
            residual: rng.random_bool(0.3).then(|| tensor(Data::Normal, 3)),
            activation: pick(rng, &activations),
            gamma: params(4),
            beta: params(5),
        }
    }

    fn affine(&self) -> Affine<'_, E> {
        let affine = Affine::new(&self.gamma, &self.beta).with_activation(self.activation);
        self.residual.as_ref().map_or(affine, |residual| affine.with_residual(residual))
    }

    /// Every operation on `bn`.
    fn run(&self, bn: &BatchNorm<E>) -> Results<E, E::Param> {
        let (affine, c) = (self.affine(), self.shape.channels());
        let blank = || vec![E::default(); self.x.len()];
        let params = || vec![E::Param::default(); c];
        let (mut y, mut inferred, mut normalized) = (blank(), blank(), blank());
        let (mut dx, mut halves, mut dresidual) = (blank(), blank(), blank());
        let (mut dgamma, mut dbeta, mut saved) = (params(), params(), bn.saved());
        let (mut moments, mut sums) = (vec![Moments::default(); c], vec![GradientSums::default(); c]);
        bn.forward_train(&self.x, affine, &mut y, &mut saved).unwrap();
        let gradients = Gradients {
            dx: Some(&mut dx),
            dgamma: Some(&mut dgamma),
            dbeta: Some(&mut dbeta),
            dresidual: Some(&mut dresidual),
        };
        bn.backward(&self.x, &self.dy, &saved, affine, gradients).unwrap();
        let means = [saved.mean(), saved.var(), saved.inv_std()].map(<[_]>::to_vec);
        bn.moments(&self.x, &mut moments).unwrap();
        bn.finish(&moments, &mut saved).unwrap();
        bn.normalize(&self.x, affine, &saved, &mut normalized).unwrap();
        bn.gradient_sums(&self.x, &self.dy, &saved, affine, &mut sums).unwrap();
        bn.input_gradient(&self.x, &self.dy, &saved, affine, &sums, &mut halves).unwrap();
        inferred.copy_from_slice(&self.x);
        let var: Vec<_> = self.gamma.iter().map(|&g| g * g).collect();
        let population = Population { mean: &self.beta, var: &var };
        bn.forward_infer_in_place(&mut inferred, affine, population).unwrap();
        let [mean, var, inv_std] = means;
        (vec![y, normalized, dx, halves, dresidual, inferred], vec![dgamma, dbeta, mean, var, inv_std])
    }

    /// The same of the reference.
    fn expected(&self, eps: f64) -> Results<E, E::Param> {
        let (affine, shape) = (self.affine(), &self.shape);
        let saved: Saved<E::Param> = reference::finish(&reference::moments(shape, &self.x), eps);
        let y = reference::normalize(shape, &self.x, affine, &saved);
        let sums = reference::gradient_sums(shape, &self.x, &self.dy, &saved, affine);
        let dx = reference::input_gradient(shape, &self.x, &self.dy, &saved, affine, &sums);
        let dresidual = reference::residual_gradient(shape, &self.x, &self.dy, &saved, affine);
        let var: Vec<_> = self.gamma.iter().map(|&g| g * g).collect();
        let population = Population { mean: &self.beta, var: &var };
        let inferred = reference::forward_infer(shape, &self.x, affine, population, eps);
        let (dgamma, dbeta) = reference::affine_gradients(&sums, &saved);
        let [mean, var, inv_std] = [saved.mean(), saved.var(), saved.inv_std()].map(<[_]>::to_vec);
        (vec![y.clone(), y, dx.clone(), dx, dresidual, inferred], vec![dgamma, dbeta, mean, var, inv_std])
    }
}

fn assert_same<E: Bits>(what: &str, got: &Results<E, E::Param>, expected: &Results<E, E::Param>)
where
    E::Param: Bits,
{
    got.0.iter().zip(&expected.0).for_each(|(got, expected)| assert_bits(what, got, expected));
    got.1.iter().zip(&expected.1).for_each(|(got, expected)| assert_bits(what, got, expected));
}

/// A call on a plan that lives no longer. A dense view at times: it packs what it reads.
fn own<E: Bits>(rng: &mut ChaCha8Rng, tiers: &[Tier], checks: bool)
where
    E::Param: Bits,
{
    let shape = shape(rng);
    let bn = plan::<E>(shape, pick(rng, tiers), parallelism(rng));
    let bn = bn.with_stores(pick(rng, &[Stores::Auto, Stores::Cached, Stores::Streaming]));
    let bn = match rng.random_bool(0.2) {
        true => bn.with_views(View::dense(&shape), View::dense(&shape)).unwrap(),
        false => bn,
    };
    let step = Step::<E>::new(rng, shape);
    let got = step.run(&bn);
    if checks {
        assert_same(&format!("{shape:?} on {}", bn.tier()), &got, &step.expected(bn.eps()));
    }
}

/// A plan that all threads call, and what it gives.
struct Shared {
    bn: BatchNorm<f32>,
    step: Step<f32>,
    expected: Results<f32, f32>,
}

impl Shared {
    fn new(rng: &mut ChaCha8Rng, tiers: &[Tier]) -> Self {
        let shape = shape(rng);
        let (bn, step) = (plan(shape, pick(rng, tiers), parallelism(rng)), Step::new(rng, shape));
        let expected = step.expected(BatchNorm::<f32>::eps(&bn));
        Self { bn, step, expected }
    }
}

/// Resident memory in MiB, where the system tells.
fn resident() -> Option<usize> {
    let statm = std::fs::read_to_string("/proc/self/statm").ok()?;
    let pages: usize = statm.split(' ').nth(1)?.parse().ok()?;
    Some((pages * 4096) >> 20)
}

/// Says that time is up, also where a thread panics.
struct Stop<'a>(&'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

fn main() {
    let options = Options::parse();
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |now| now.as_secs());
    let seed = options.seed.unwrap_or(now);
    println!("seed {seed}, {} callers, {} s", options.callers, options.seconds);
    let (tiers, start, length) = (tiers(), Instant::now(), Duration::from_secs(options.seconds));
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let shared: Vec<Shared> = (0..8).map(|_| Shared::new(&mut rng, &tiers)).collect();
    let (stop, calls, checked) = (AtomicBool::new(false), AtomicU64::new(0), AtomicU64::new(0));
    let growth = std::thread::scope(|scope| {
        for caller in 0..options.callers {
            let (shared, tiers, stop, calls, checked) = (&shared, &tiers, &stop, &calls, &checked);
            let every = options.check_every.max(1);
            scope.spawn(move || {
                let _stop = Stop(stop);
                let mut rng = ChaCha8Rng::seed_from_u64(seed.wrapping_add(caller + 1));
                while !stop.load(Ordering::Relaxed) {
                    let checks = rng.random_ratio(1, every);
                    let is_checked = match rng.random_range(0..6) {
                        0 | 1 => {
                            let Shared { bn, step, expected } = &shared[rng.random_range(0..shared.len())];
                            assert_same(&format!("shared {:?}", bn.shape()), &step.run(bn), expected);
                            true
                        }
                        2 => {
                            own::<f64>(&mut rng, tiers, checks);
                            checks
                        }
                        #[cfg(feature = "half")]
                        3 => {
                            own::<half::bf16>(&mut rng, tiers, checks);
                            checks
                        }
                        #[cfg(feature = "half")]
                        4 => {
                            own::<half::f16>(&mut rng, tiers, checks);
                            checks
                        }
                        _ => {
                            own::<f32>(&mut rng, tiers, checks);
                            checks
                        }
                    };
                    calls.fetch_add(1, Ordering::Relaxed);
                    checked.fetch_add(is_checked.into(), Ordering::Relaxed);
                }
            });
        }
        let _stop = Stop(&stop);
        // What is resident in each quarter of the time. Peaks are chance, so medians are compared; the first quarter warms up.
        let mut quarters: [Vec<usize>; 4] = Default::default();
        while start.elapsed() < length && !stop.load(Ordering::Relaxed) {
            std::thread::sleep(Duration::from_millis(20));
            let quarter = (4 * start.elapsed().as_millis() / length.as_millis().max(1)).min(3);
            quarters[quarter as usize].extend(resident());
        }
        let medians = quarters.map(|mut samples| {
            samples.sort_unstable();
            samples.get(samples.len() / 2).copied().unwrap_or(0)
        });
        println!("resident MiB, median of each quarter: {medians:?}");
        medians[3].saturating_sub(medians[1])
    });
    println!("{} steps of 9 calls, {} of them checked", calls.into_inner(), checked.into_inner());
    assert!(growth <= options.growth, "memory grew by {growth} MiB");
}
