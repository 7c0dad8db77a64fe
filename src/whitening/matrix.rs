//! Inverse roots of covariance matrices, and their derivatives.

use core::ops::Range;

use faer::diag::DiagMut;
use faer::dyn_stack::{MemBuffer, MemStack};
use faer::linalg::evd::{ComputeEigenvectors, self_adjoint_evd, self_adjoint_evd_scratch};
use faer::linalg::matmul::{matmul, triangular};
use faer::{Accum, Mat, MatMut, MatRef, Par};

use crate::error::{Error, Result};

/// How the matrix `W` that whitens is made of the covariance.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Method {
    /// `W = S^(-1/2) = D diag(1/sqrt(l)) D^T` from the eigenvalues of `S`: of all matrices that whiten, the one that changes the
    /// values least (zero-phase component analysis). Huang, Yang, Lang & Deng, "Decorrelated Batch Normalization" (2018).
    Zca,
    /// Newton's iteration towards the same root, `W = P_T / sqrt(t)` with `t` the trace of `S`, `P_0 = I` and
    /// `P_k = 1.5 P_(k-1) - 0.5 P_(k-1)^3 S/t`: products of matrices alone. The fewer steps, the less the directions of small
    /// variance are enlarged; 5 is customary. Huang, Zhou, Zhu, Liu & Shao, "Iterative Normalization: Beyond Standardization
    /// towards Efficient Whitening" (2019).
    ///
    /// As written it enlarges rounding errors and diverges after some 20 steps, so `Z_k = P_k` is computed beside
    /// `Y_k = P_k S/t`, `Z_(k+1) = 1.5 Z - 0.5 Z Y Z` and `Y_(k+1) = 1.5 Y - 0.5 Y Z Y`, which does not (Higham, "Functions of
    /// Matrices", 2008, chapter 6).
    IterNorm {
        /// The number of steps, T, at most [`Method::MOST_STEPS`].
        steps: usize,
    },
}

impl Method {
    /// The most steps of [`Method::IterNorm`]. A direction with a share `r` of the variance takes about `-log(r) / log(2.25)` of
    /// them, so that after 50 none is left whose share is more than a rounding error.
    pub const MOST_STEPS: usize = 100;

    pub(super) fn check(self) -> Result<()> {
        match self {
            Self::IterNorm { steps } if steps > Self::MOST_STEPS => Err(Error::NewtonSteps { got: steps }),
            _ => Ok(()),
        }
    }
}

/// `to += alpha * a b`, on the calling thread.
pub(super) fn add_product(to: MatMut<'_, f64>, a: MatRef<'_, f64>, b: MatRef<'_, f64>, alpha: f64) {
    matmul(to, Accum::Add, a, b, alpha, Par::Seq);
}

/// `to = a b`, on the calling thread.
pub(super) fn set_product(to: MatMut<'_, f64>, a: MatRef<'_, f64>, b: MatRef<'_, f64>) {
    matmul(to, Accum::Replace, a, b, 1.0, Par::Seq);
}

/// Adds `a a^T` to the lower triangle of `to`.
pub(super) fn add_square(to: MatMut<'_, f64>, a: MatRef<'_, f64>) {
    use triangular::BlockStructure::{Rectangular, TriangularLower};
    triangular::matmul(to, TriangularLower, Accum::Add, a, Rectangular, a.transpose(), Rectangular, 1.0, Par::Seq);
}

/// The product of square matrices of one size.
fn times(a: MatRef<'_, f64>, b: MatRef<'_, f64>) -> Mat<f64> {
    let mut product = Mat::zeros(a.nrows(), b.ncols());
    set_product(product.as_mut(), a, b);
    product
}

/// One and a half times a matrix.
fn enlarged(matrix: &Mat<f64>) -> Mat<f64> {
    Mat::from_fn(matrix.nrows(), matrix.ncols(), |i, j| 1.5 * matrix[(i, j)])
}

/// The sum of the products of their elements.
fn inner(a: &Mat<f64>, b: &Mat<f64>) -> f64 {
    a.col_iter().zip(b.col_iter()).map(|(a, b)| a.iter().zip(b.iter()).map(|(a, b)| a * b).sum::<f64>()).sum()
}

/// `W`, and what its derivative needs.
#[derive(Debug, Clone)]
pub(super) struct Root {
    pub(super) matrix: Mat<f64>,
    kept: Kept,
}

#[derive(Debug, Clone)]
enum Kept {
    /// The eigenvectors, as columns, and the roots of the eigenvalues.
    Zca { vectors: Mat<f64>, roots: Vec<f64> },
    /// `t`, and where the iteration was before, between and after its steps.
    IterNorm { trace: f64, steps: Vec<Step> },
}

/// The two matrices of the iteration, or their gradients.
#[derive(Debug, Clone)]
struct Step {
    y: Mat<f64>,
    z: Mat<f64>,
}

impl Step {
    fn next(&self) -> Self {
        let Self { y, z } = self;
        let product = times(z.as_ref(), y.as_ref());
        let [mut next_y, mut next_z] = [y, z].map(enlarged);
        add_product(next_y.as_mut(), y.as_ref(), product.as_ref(), -0.5);
        add_product(next_z.as_mut(), product.as_ref(), z.as_ref(), -0.5);
        Self { y: next_y, z: next_z }
    }

    /// The gradient of this, from that of the next.
    fn gradient(&self, of_next: &Self) -> Self {
        let Self { y, z } = self;
        let product = times(z.as_ref(), y.as_ref());
        let mut of_product = Mat::zeros(y.nrows(), y.ncols());
        add_product(of_product.as_mut(), of_next.z.as_ref(), z.transpose(), -0.5);
        add_product(of_product.as_mut(), y.transpose(), of_next.y.as_ref(), -0.5);
        let [mut of_y, mut of_z] = [&of_next.y, &of_next.z].map(enlarged);
        add_product(of_y.as_mut(), of_next.y.as_ref(), product.transpose(), -0.5);
        add_product(of_y.as_mut(), z.transpose(), of_product.as_ref(), 1.0);
        add_product(of_z.as_mut(), product.transpose(), of_next.z.as_ref(), -0.5);
        add_product(of_z.as_mut(), of_product.as_ref(), y.transpose(), 1.0);
        Self { y: of_y, z: of_z }
    }
}

impl Root {
    /// The inverse root of a covariance to whose diagonal `eps` is added, of a group that `channels` names.
    pub(super) fn new(method: Method, covariance: &Mat<f64>, eps: f64, channels: &Range<usize>) -> Result<Self> {
        let n = covariance.nrows();
        let singular = || Error::Singular { first: channels.start, last: channels.end - 1 };
        let s = Mat::from_fn(n, n, |i, j| covariance[(i, j)] + if i == j { eps } else { 0.0 });
        let trace: f64 = (0..n).map(|i| s[(i, i)]).sum();
        // No element is larger than the trace, unless there are NaNs.
        let is_finite = trace.is_finite() && s.col_iter().all(|column| column.iter().all(|value| value.is_finite()));
        match method {
            Method::Zca => {
                let (mut vectors, mut values) = (Mat::full(n, n, f64::NAN), vec![f64::NAN; n]);
                // Eigenvalues of a matrix with NaN are not to be found.
                if is_finite && decompose(&s, &mut values, &mut vectors) {
                    // What rounding leaves of a variance of 0 beside the largest.
                    let noise = n as f64 * f64::EPSILON * values[n - 1];
                    if eps == 0.0 && values[0] <= noise {
                        return Err(singular());
                    }
                    values.iter_mut().for_each(|value| *value = value.max(eps).max(noise));
                }
                let roots: Vec<f64> = values.iter().map(|value| value.sqrt()).collect();
                let scaled = Mat::from_fn(n, n, |i, j| vectors[(i, j)] / roots[j]);
                let matrix = times(scaled.as_ref(), vectors.transpose());
                Ok(Self { matrix, kept: Kept::Zca { vectors, roots } })
            }
            Method::IterNorm { steps } => {
                if trace == 0.0 {
                    return Err(singular());
                }
                // Divided by infinity a matrix would look like one of zeros.
                let trace = if is_finite { trace } else { f64::NAN };
                let scaled = Mat::from_fn(n, n, |i, j| s[(i, j)] / trace);
                let mut all = vec![Step { y: scaled, z: Mat::identity(n, n) }];
                for k in 0..steps {
                    all.push(all[k].next());
                }
                let matrix = Mat::from_fn(n, n, |i, j| all[steps].z[(i, j)] / trace.sqrt());
                Ok(Self { matrix, kept: Kept::IterNorm { trace, steps: all } })
            }
        }
    }

    /// `dS + dS^T`, from the gradient of `W`.
    pub(super) fn gradient(&self, of_matrix: &Mat<f64>) -> Mat<f64> {
        let n = of_matrix.nrows();
        let d = match &self.kept {
            Kept::Zca { vectors, roots } => {
                let turned = times(times(vectors.transpose(), of_matrix.as_ref()).as_ref(), vectors.as_ref());
                // Divided in turn, since the product of small roots would be 0.
                let f = |i: usize, j: usize| -turned[(i, j)] / roots[i] / roots[j] / (roots[i] + roots[j]);
                let turned = Mat::from_fn(n, n, f);
                times(times(vectors.as_ref(), turned.as_ref()).as_ref(), vectors.transpose())
            }
            Kept::IterNorm { trace, steps } => {
                let root = trace.sqrt();
                let mut of = Step { y: Mat::zeros(n, n), z: Mat::from_fn(n, n, |i, j| of_matrix[(i, j)] / root) };
                for step in steps.iter().rev().skip(1) {
                    of = step.gradient(&of);
                }
                // The trace is in W = Z / sqrt(t) and in S/t.
                let of_trace = -0.5 * inner(of_matrix, &self.matrix) / trace - inner(&of.y, &steps[0].y) / trace;
                Mat::from_fn(n, n, |i, j| of.y[(i, j)] / trace + if i == j { of_trace } else { 0.0 })
            }
        };
        Mat::from_fn(n, n, |i, j| d[(i, j)] + d[(j, i)])
    }
}

/// Eigenvalues in ascending order, and their vectors as columns; whether they were found.
fn decompose(s: &Mat<f64>, values: &mut [f64], vectors: &mut Mat<f64>) -> bool {
    let n = s.nrows();
    let params = Default::default();
    let mut memory = MemBuffer::new(self_adjoint_evd_scratch::<f64>(n, ComputeEigenvectors::Yes, Par::Seq, params));
    let (values, stack) = (DiagMut::from_slice_mut(values), MemStack::new(&mut memory));
    self_adjoint_evd(s.as_ref(), values, Some(vectors.as_mut()), Par::Seq, stack, Default::default()).is_ok()
}
