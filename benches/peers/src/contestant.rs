//! Whoever takes turns on the clock: this crate, and its peers.

use std::time::Instant;

use anyhow::{Context, Result};
use rayon::{ThreadPool, ThreadPoolBuilder};

use crate::problem::{Inputs, Outputs, Problem};

/// Who it is.
#[derive(Debug, Clone)]
pub struct About {
    pub peer: &'static str,
    pub version: String,
    pub layout: &'static str,
}

pub trait Contestant {
    fn about(&self) -> &About;
    fn serves(&self, problem: &Problem) -> bool;
    /// Makes ready for a problem, and says which implementation will run.
    fn setup(&mut self, problem: &Problem, inputs: &Inputs) -> Result<String>;
    /// Runs the problem once and gives what it computed.
    fn result(&mut self) -> Result<Outputs>;
    /// Runs the problem `calls` times to warm up, and as often again on the clock: microseconds per call.
    fn time(&mut self, calls: usize) -> Result<f64>;
    /// Gives back the memory of the problem.
    fn clear(&mut self);
    /// The process that it runs in.
    fn process(&self) -> u32;
}

/// A problem made ready in this process.
pub trait Call: Send {
    fn call(&mut self) -> Result<()>;
    /// Calls once and keeps the results.
    fn outputs(&mut self) -> Result<Outputs>;
}

/// A contestant in this process, in a rayon pool of the problem's threads.
pub struct InProcess {
    pub about: About,
    pub implementation: String,
    pub serves: fn(&Problem) -> bool,
    pub build: fn(&About, &Problem, &Inputs) -> Result<Box<dyn Call>>,
    pub current: Option<(ThreadPool, Box<dyn Call>)>,
}

impl InProcess {
    fn current(&mut self) -> Result<(&ThreadPool, &mut dyn Call)> {
        let (pool, call) = self.current.as_mut().context("nothing was set up")?;
        Ok((pool, call.as_mut()))
    }
}

impl Contestant for InProcess {
    fn about(&self) -> &About {
        &self.about
    }

    fn serves(&self, problem: &Problem) -> bool {
        (self.serves)(problem)
    }

    fn setup(&mut self, problem: &Problem, inputs: &Inputs) -> Result<String> {
        self.clear();
        let pool = pinned(problem.threads)?;
        let call = (self.build)(&self.about, problem, inputs)?;
        self.current = Some((pool, call));
        Ok(self.implementation.clone())
    }

    fn result(&mut self) -> Result<Outputs> {
        let (pool, call) = self.current()?;
        pool.install(|| call.outputs())
    }

    fn time(&mut self, calls: usize) -> Result<f64> {
        let (pool, call) = self.current()?;
        pool.install(|| {
            (0..calls).try_for_each(|_| call.call())?;
            let started = Instant::now();
            (0..calls).try_for_each(|_| call.call())?;
            Ok(started.elapsed().as_secs_f64() * 1e6 / calls as f64)
        })
    }

    fn clear(&mut self) {
        self.current = None;
    }

    fn process(&self) -> u32 {
        std::process::id()
    }
}

/// A pool of threads that stay on a core each, as those of the servers do: now and then the scheduler would leave two of
/// them on one core, and all times would double. The first CPUs that an operating system counts are whole cores.
fn pinned(threads: usize) -> Result<ThreadPool> {
    let cores = core_affinity::get_core_ids().unwrap_or_default();
    let pin = move |i: usize| {
        if let Some(&core) = cores.get(i) {
            core_affinity::set_for_current(core);
        }
    };
    Ok(ThreadPoolBuilder::new().num_threads(threads).start_handler(pin).build()?)
}

/// The version of a crate that was linked, from the lock file.
pub fn locked_version(package: &str) -> String {
    let lock = include_str!("../Cargo.lock");
    let entry = format!("name = \"{package}\"\nversion = \"");
    let version = lock.split(&entry).nth(1).and_then(|rest| rest.split('"').next());
    version.unwrap_or("unknown").into()
}
