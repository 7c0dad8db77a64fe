//! Pointers with lengths, as they come over the border, checked before they become slices.

use std::ffi::c_void;
use std::marker::PhantomData;

use batchnorm::Error;

use crate::status::{Failure, Result};

/// A pointer and a number of elements, and the name of the argument. Nothing is known of them yet.
#[derive(Clone, Copy)]
pub(crate) struct Raw {
    what: &'static str,
    at: *mut c_void,
    len: usize,
}

impl Raw {
    pub(crate) fn new<T>(what: &'static str, at: *const T, len: usize) -> Self {
        Self { what, at: at as *mut c_void, len }
    }

    /// `expected` elements, or none at all.
    pub(crate) fn optional<T>(self, expected: usize) -> Result<Region<T>> {
        if self.at.is_null() && self.len == 0 { Ok(self.region()) } else { self.required(expected) }
    }

    /// `expected` elements. Their number is checked first, so that no slice is made of another.
    pub(crate) fn required<T>(self, expected: usize) -> Result<Region<T>> {
        let Self { what, at, len } = self;
        if at.is_null() && len != 0 {
            return Err(Failure::Null { what });
        }
        if len != expected {
            return Err(Error::Length { what, expected, got: len }.into());
        }
        if !at.cast::<T>().is_aligned() {
            return Err(Failure::Alignment { what, expected: align_of::<T>(), got: at.addr() });
        }
        Ok(self.region())
    }

    fn region<T>(self) -> Region<T> {
        Region { raw: self, elements: PhantomData }
    }
}

/// Elements of a known type, as many as the plan asks for, at an aligned place; or none.
pub(crate) struct Region<T> {
    raw: Raw,
    elements: PhantomData<T>,
}

impl<T> Clone for Region<T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for Region<T> {}

impl<T> Region<T> {
    /// Where it lies, to compare with others.
    pub(crate) fn span(&self) -> Span {
        Span { what: self.raw.what, at: self.raw.at.addr(), bytes: self.raw.len * size_of::<T>() }
    }

    pub(crate) fn is_none(&self) -> bool {
        self.raw.at.is_null()
    }

    pub(crate) fn is_same(&self, other: &Self) -> bool {
        !self.is_none() && self.raw.at == other.raw.at && self.raw.len == other.raw.len
    }

    /// The elements, `None` without any.
    ///
    /// # Safety
    /// The caller gave a pointer to as many elements as it said, and nothing writes to them during `'a`.
    pub(crate) unsafe fn read<'a>(self) -> Option<&'a [T]> {
        // SAFETY: the caller's promise; the pointer is not null and aligned, the length that of a shape, which fits a slice.
        (!self.is_none()).then(|| unsafe { core::slice::from_raw_parts(self.raw.at.cast(), self.raw.len) })
    }

    /// The elements, to be written; `None` without any.
    ///
    /// # Safety
    /// As [`Region::read`], and nothing else accesses them during `'a`: [`apart`] looked at the other arguments.
    pub(crate) unsafe fn write<'a>(self) -> Option<&'a mut [T]> {
        // SAFETY: as above.
        (!self.is_none()).then(|| unsafe { core::slice::from_raw_parts_mut(self.raw.at.cast(), self.raw.len) })
    }
}

/// The bytes of an argument.
#[derive(Clone, Copy)]
pub(crate) struct Span {
    what: &'static str,
    at: usize,
    bytes: usize,
}

impl Span {
    fn meets(&self, other: &Self) -> bool {
        self.bytes.min(other.bytes) > 0
            && self.at < other.at.saturating_add(other.bytes)
            && other.at < self.at.saturating_add(self.bytes)
    }
}

/// Refuses arguments of which one is written and shares memory with another.
pub(crate) fn apart(written: &[Span], others: &[&[Span]]) -> Result<()> {
    for (i, span) in written.iter().enumerate() {
        let mut others = written[i + 1..].iter().chain(others.iter().copied().flatten());
        if let Some(other) = others.find(|other| span.meets(other)) {
            return Err(Failure::Overlap { written: span.what, other: other.what });
        }
    }
    Ok(())
}

/// Where a pass reads and writes.
pub(crate) enum Io<'a, T> {
    /// From one tensor to another.
    Apart(&'a [T], &'a mut [T]),
    /// One over the other.
    Over(&'a mut [T]),
}

/// The input and the output of a pass: the same, or apart. `written` and `read` are the other arguments.
///
/// # Safety
/// As [`Region::read`] and [`Region::write`].
pub(crate) unsafe fn io<'a, T>(from: Region<T>, to: Region<T>, written: &[Span], read: &[Span]) -> Result<Io<'a, T>> {
    let is_same = from.is_same(&to);
    let inputs = if is_same { &[][..] } else { &[from.span()] };
    apart(&[to.span()], &[inputs, written, read])?;
    apart(written, &[inputs, read])?;
    // SAFETY: the caller's promise; nothing that is written overlaps.
    Ok(unsafe {
        match is_same {
            true => Io::Over(to.write().unwrap_or_default()),
            false => Io::Apart(from.read().unwrap_or_default(), to.write().unwrap_or_default()),
        }
    })
}

/// The value that a number stands for.
pub(crate) fn choose<T: Copy>(what: &'static str, got: i32, choices: &[(i32, T)]) -> Result<T> {
    let found = choices.iter().find(|choice| choice.0 == got);
    found.map(|choice| choice.1).ok_or(Failure::Choice { what, got })
}
