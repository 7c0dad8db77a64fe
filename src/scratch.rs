//! Memory for partial sums and coefficients, kept by a plan between calls.

use std::sync::{Mutex, MutexGuard, PoisonError};

use aligned_vec::{AVec, ConstAlign};

use crate::element::Real;

type Aligned<T> = AVec<T, ConstAlign<64>>;

/// How many values of each kind a call needs.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(crate) struct Need {
    pub(crate) wide: usize,
    pub(crate) narrow: usize,
}

impl Need {
    pub(crate) fn max(self, other: Self) -> Self {
        Self { wide: self.wide.max(other.wide), narrow: self.narrow.max(other.narrow) }
    }

    pub(crate) fn bytes<R>(self) -> usize {
        self.wide.saturating_mul(size_of::<f64>()).saturating_add(self.narrow.saturating_mul(size_of::<R>()))
    }
}

/// Memory of one call; its content means nothing between calls.
#[derive(Debug)]
pub(crate) struct Scratch<R> {
    wide: Aligned<f64>,
    narrow: Aligned<R>,
}

impl<R: Real> Scratch<R> {
    fn new() -> Self {
        Self { wide: Aligned::new(64), narrow: Aligned::new(64) }
    }

    fn grow(&mut self, need: Need) {
        if self.wide.len() < need.wide {
            self.wide.resize(need.wide, 0.0);
        }
        if self.narrow.len() < need.narrow {
            self.narrow.resize(need.narrow, R::default());
        }
    }

    /// Exactly what is needed; there is more only if [`Pool::with`] was asked for more.
    pub(crate) fn parts(&mut self, need: Need) -> (&mut [f64], &mut [R]) {
        (&mut self.wide[..need.wide], &mut self.narrow[..need.narrow])
    }
}

/// Scratch that waits for the next call; as many as calls ran at the same time.
#[derive(Debug, Default)]
pub(crate) struct Pool<R>(Mutex<Vec<Scratch<R>>>);

impl<R: Real> Pool<R> {
    pub(crate) fn new() -> Self {
        Self(Mutex::new(Vec::new()))
    }

    // Nothing that can panic runs under the lock, but a poisoned one would do no harm either.
    fn lock(&self) -> MutexGuard<'_, Vec<Scratch<R>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs `call` with scratch for `need`, which goes back to the pool afterwards.
    pub(crate) fn with<T>(&self, need: Need, call: impl FnOnce(&mut Scratch<R>) -> T) -> T {
        if need == Need::default() {
            return call(&mut Scratch::new());
        }
        let mut scratch = self.lock().pop().unwrap_or_else(Scratch::new);
        scratch.grow(need);
        let result = call(&mut scratch);
        self.lock().push(scratch);
        result
    }

    /// Has scratch ready for `calls` calls at the same time.
    pub(crate) fn reserve(&self, calls: usize, need: Need) {
        let mut waiting = self.lock();
        waiting.iter_mut().for_each(|scratch| scratch.grow(need));
        while waiting.len() < calls {
            let mut scratch = Scratch::new();
            scratch.grow(need);
            waiting.push(scratch);
        }
    }
}
