//! Which tier runs: detection, choice and the one trampoline per tier that carries its CPU features.

use core::fmt;

#[cfg(target_arch = "x86_64")]
use super::x86_64::{Avx2, Avx512};
use super::{Isa, portable::Portable};
use crate::error::{Error, Result};

/// A SIMD tier. All of them give the same bits; they differ in speed alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Tier {
    /// What every target has, through the crate `wide`: SSE2, NEON, simd128 or plain code, as the build says.
    Portable,
    /// x86-64 with AVX2 and F16C.
    Avx2,
    /// x86-64 with AVX-512 F, BW, DQ and VL.
    Avx512,
}

impl Tier {
    /// All tiers of the crate, the widest last.
    pub const ALL: [Tier; 3] = [Tier::Portable, Tier::Avx2, Tier::Avx512];

    /// Whether this CPU and build have the tier.
    pub fn is_available(self) -> bool {
        Dispatched::new(self).is_ok()
    }

    /// The tiers that this CPU and build have, the widest last.
    pub fn available() -> impl Iterator<Item = Tier> {
        Self::ALL.into_iter().filter(|tier| tier.is_available())
    }

    /// The widest tier available: what a plan uses unless told otherwise.
    pub fn best() -> Tier {
        Self::available().last().unwrap_or(Tier::Portable)
    }

    /// Whether it stores past the caches: `wide` cannot.
    pub(crate) const fn streams(self) -> bool {
        !matches!(self, Tier::Portable)
    }

    /// The available tiers as text, for messages.
    pub(crate) fn list() -> String {
        Self::available().map(|tier| tier.to_string()).collect::<Vec<_>>().join(", ")
    }
}

impl fmt::Display for Tier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Tier::Portable => "portable",
            Tier::Avx2 => "avx2",
            Tier::Avx512 => "avx512",
        })
    }
}

impl core::str::FromStr for Tier {
    type Err = String;
    fn from_str(name: &str) -> core::result::Result<Self, String> {
        Self::ALL
            .into_iter()
            .find(|tier| tier.to_string() == name)
            .ok_or_else(|| format!("expected a tier (portable, avx2, avx512), got `{name}`"))
    }
}

/// A tier whose CPU features were detected.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Dispatched {
    Portable(Portable),
    #[cfg(target_arch = "x86_64")]
    Avx2(Avx2),
    #[cfg(target_arch = "x86_64")]
    Avx512(Avx512),
}

impl Dispatched {
    pub(crate) fn new(tier: Tier) -> Result<Self> {
        let found = match tier {
            Tier::Portable => Some(Self::Portable(Portable)),
            #[cfg(target_arch = "x86_64")]
            Tier::Avx2 => Avx2::detect().map(Self::Avx2),
            #[cfg(target_arch = "x86_64")]
            Tier::Avx512 => Avx512::detect().map(Self::Avx512),
            #[cfg(not(target_arch = "x86_64"))]
            Tier::Avx2 | Tier::Avx512 => None,
        };
        found.ok_or(Error::TierUnavailable { tier })
    }

    pub(crate) fn tier(self) -> Tier {
        match self {
            Self::Portable(_) => Portable::TIER,
            #[cfg(target_arch = "x86_64")]
            Self::Avx2(_) => <Avx2>::TIER,
            #[cfg(target_arch = "x86_64")]
            Self::Avx512(_) => Avx512::TIER,
        }
    }
}

/// A piece of work that is generic over the tier; `run` must be `#[inline(always)]`.
pub trait Kernel: Sized {
    type Output;
    fn run<I: Isa>(self, isa: I) -> Self::Output;
}

/// A piece of work on one tier, called by [`Isa::call`]; `run` must be `#[inline(always)]`. The functions that carry the tiers'
/// features are methods, so that each is compiled with the module of its kernel, and the modules side by side.
pub trait Part<I: Isa>: Sized {
    /// What it returns.
    type Output;
    /// Runs.
    fn run(self, isa: I) -> Self::Output;

    /// Runs without features.
    #[inline(never)]
    fn call_portable(self, isa: I) -> Self::Output {
        self.run(isa)
    }

    /// Runs with those of AVX2.
    ///
    /// # Safety
    /// They were detected, which an `isa` of that tier proves.
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2,f16c")]
    #[inline(never)]
    unsafe fn call_avx2(self, isa: I) -> Self::Output {
        align_frame();
        self.run(isa)
    }

    /// Runs with those of AVX-512.
    ///
    /// # Safety
    /// They were detected, which an `isa` of that tier proves.
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,f16c")]
    #[inline(never)]
    unsafe fn call_avx512(self, isa: I) -> Self::Output {
        align_frame();
        self.run(isa)
    }
}

impl<I: Isa, K: Kernel> Part<I> for K {
    type Output = K::Output;
    #[inline(always)]
    fn run(self, isa: I) -> K::Output {
        Kernel::run(self, isa)
    }
}

/// Makes the frame of the function that this is inlined into begin at a whole line, so that vectors that are kept there do not cross
/// lines or pages: compilers align frames for variables, but not for registers that they save.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
fn align_frame() {
    #[repr(align(64))]
    struct Line;
    let mut line = core::mem::MaybeUninit::<Line>::uninit();
    core::hint::black_box(&mut line);
}

/// Runs `kernel` on `tier`, compiled for the tier's features.
pub(crate) fn dispatch<K: Kernel>(tier: Dispatched, kernel: K) -> K::Output {
    match tier {
        Dispatched::Portable(isa) => isa.call(kernel),
        #[cfg(target_arch = "x86_64")]
        Dispatched::Avx2(isa) => isa.call(kernel),
        #[cfg(target_arch = "x86_64")]
        Dispatched::Avx512(isa) => isa.call(kernel),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct WhoRuns;

    impl Kernel for WhoRuns {
        type Output = Tier;
        fn run<I: Isa>(self, _: I) -> Tier {
            I::TIER
        }
    }

    #[test]
    fn each_tier_runs_as_itself() {
        for tier in Tier::available() {
            let dispatched = Dispatched::new(tier).unwrap();
            assert_eq!(dispatched.tier(), tier);
            assert_eq!(dispatch(dispatched, WhoRuns), tier);
        }
    }

    #[test]
    fn names_round_trip_and_strangers_are_refused() {
        for tier in Tier::ALL {
            assert_eq!(tier.to_string().parse(), Ok(tier));
        }
        assert!("sse9".parse::<Tier>().unwrap_err().contains("sse9"));
    }
}
