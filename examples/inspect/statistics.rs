//! The statistics of each channel, over stretches of a file, and what they say.

use crate::Result;
use crate::dump::{Dump, Extent, Number, Tensor};
use batchnorm::{BatchNorm, Layout, Moments, Real, Shape};
use half::{bf16, f16};
use std::io::Read;
use std::ops::Range;

/// Elements that are read at a time.
pub const STRETCH: usize = 4 << 20;

/// What is known of a channel.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Channel {
    pub moments: Moments,
    /// Of what is a number.
    pub min: f64,
    pub max: f64,
    pub zeros: u64,
    pub nans: u64,
    pub infinities: u64,
}

impl Default for Channel {
    fn default() -> Self {
        let (min, max) = (f64::INFINITY, f64::NEG_INFINITY);
        Self { moments: Moments::default(), min, max, zeros: 0, nans: 0, infinities: 0 }
    }
}

impl Channel {
    /// The smallest and the largest value; NaN if there is none.
    pub fn range(&self) -> [f64; 2] {
        if self.min <= self.max { [self.min, self.max] } else { [f64::NAN; 2] }
    }

    pub fn std(&self) -> f64 {
        self.moments.variance().sqrt()
    }

    /// The root of the mean of squares: large with the mean as with the standard deviation.
    pub fn rms(&self) -> f64 {
        self.moments.mean.hypot(self.std())
    }

    /// The share of zeros.
    pub fn zeros(&self) -> f64 {
        self.zeros as f64 / self.moments.count as f64
    }

    /// Of several values.
    fn is_constant(&self) -> bool {
        self.min == self.max && self.moments.count > 1
    }

    fn count<R: Real>(&mut self, run: &[R]) {
        for value in run {
            let value = value.to_f64();
            (self.min, self.max) = (self.min.min(value), self.max.max(value));
            self.zeros += u64::from(value == 0.0);
            self.nans += u64::from(value.is_nan());
            self.infinities += u64::from(value.is_infinite());
        }
    }
}

/// The channels of a tensor.
pub struct Channels(pub Vec<Channel>);

/// Reads a tensor, `most` elements at a time.
pub fn measure(dump: &Dump, tensor: &Tensor, extent: Extent, most: usize, progress: impl Fn(u64)) -> Result<Channels> {
    let number = tensor.number.clone()?;
    let from = dump.bytes_of(tensor)?;
    let channels = match number {
        Number::F16 => over(from, extent, most, progress, |bytes| f16::from_le_bytes(bytes).to_f32()),
        Number::Bf16 => over(from, extent, most, progress, |bytes| bf16::from_le_bytes(bytes).to_f32()),
        Number::F32 => over(from, extent, most, progress, f32::from_le_bytes),
        Number::F64 => over(from, extent, most, progress, f64::from_le_bytes),
    };
    channels.map(Channels)
}

/// A piece of a tensor that is contiguous.
#[derive(Debug, PartialEq)]
pub struct Piece {
    pub outer: usize,
    pub channels: Range<usize>,
    pub inner: usize,
}

/// A tensor in pieces of at most so many elements: whole samples, else whole channels, else parts of one.
pub fn pieces(extent: Extent, most: usize) -> impl Iterator<Item = Piece> {
    let Extent { outer, channels, inner, .. } = extent;
    let (of_inner, all) = (inner.min(most), channels * inner);
    let (of_channels, of_outer) = ((most / inner).clamp(1, channels), (most / all).clamp(1, outer));
    (0..outer).step_by(of_outer).flat_map(move |o| {
        (0..channels).step_by(of_channels).flat_map(move |c| {
            (0..inner).step_by(of_inner).map(move |i| Piece {
                outer: of_outer.min(outer - o),
                channels: c..(c + of_channels).min(channels),
                inner: of_inner.min(inner - i),
            })
        })
    })
}

fn over<R: Real, const BYTES: usize>(
    mut from: impl Read,
    extent: Extent,
    most: usize,
    progress: impl Fn(u64),
    number: impl Fn([u8; BYTES]) -> R,
) -> Result<Vec<Channel>> {
    let mut found = vec![Channel::default(); extent.channels];
    let (mut bytes, mut values, mut moments) = (Vec::new(), Vec::new(), Vec::new());
    let mut plan = BatchNorm::<R>::new(Shape::nc(1, 1)?)?;
    for Piece { outer, channels, inner } in pieces(extent, most) {
        let layout = if extent.inner == 1 { Layout::ChannelsLast } else { Layout::ChannelsFirst };
        let shape = Shape::new(layout, outer, channels.len(), &[inner])?;
        if *plan.shape() != shape {
            plan = plan.with_shape(shape)?;
        }
        bytes.resize(shape.len() * BYTES, 0);
        from.read_exact(&mut bytes)?;
        values.clear();
        values.extend(bytes.as_chunks().0.iter().map(|&bytes| number(bytes)));
        moments.resize(channels.len(), Moments::default());
        plan.moments(&values, &mut moments)?;
        let found = &mut found[channels.clone()];
        for (channel, moments) in found.iter_mut().zip(&moments) {
            channel.moments = channel.moments.merge(*moments);
        }
        for sample in values.chunks(channels.len() * inner) {
            found.iter_mut().zip(sample.chunks(inner)).for_each(|(channel, run)| channel.count(run));
        }
        progress(bytes.len() as u64);
    }
    Ok(found)
}

/// What is wrong with a channel, the worst first.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Fault {
    Nan,
    Infinite,
    Exploding,
    Dead,
}

impl Fault {
    pub const ALL: [Self; 4] = [Self::Nan, Self::Infinite, Self::Exploding, Self::Dead];

    pub fn name(self) -> &'static str {
        match self {
            Self::Nan => "NaN",
            Self::Infinite => "infinite",
            Self::Exploding => "exploding",
            Self::Dead => "dead",
        }
    }
}

/// A root mean square of so many times that of the median channel is called exploding.
pub const EXPLODING: f64 = 20.0;
/// A standard deviation of this part of that of the median channel is called dead.
pub const DEAD: f64 = 1e-4;

/// Channels with what is wrong with them.
pub struct Found {
    pub channels: Vec<(Channel, Option<Fault>)>,
    /// Of the channels that are alive and finite: standard deviation and root mean square.
    pub median_std: f64,
    pub median_rms: f64,
}

impl Channels {
    /// Compares each channel with the median one.
    pub fn judge(&self) -> Found {
        let finite = || self.0.iter().filter(|channel| channel.nans + channel.infinities == 0);
        let alive = || finite().filter(|channel| !channel.is_constant());
        let median_std = median(alive().map(Channel::std));
        let median_rms = median(alive().map(Channel::rms));
        let fault = |channel: &Channel| match channel {
            channel if channel.nans > 0 => Some(Fault::Nan),
            channel if channel.infinities > 0 => Some(Fault::Infinite),
            channel if channel.rms() > EXPLODING * median_rms => Some(Fault::Exploding),
            channel if channel.is_constant() || channel.std() < DEAD * median_std => Some(Fault::Dead),
            _ => None,
        };
        let channels = self.0.iter().map(|channel| (*channel, fault(channel))).collect();
        Found { channels, median_std, median_rms }
    }
}

impl Found {
    /// The channels from the worst on: by what is wrong, then by how far they are from the median channel.
    pub fn worst_first(&self) -> Vec<usize> {
        let distance = |channel: &Channel| (channel.rms() / self.median_rms).ln().abs();
        let rank = |fault: Option<Fault>| fault.map_or(Fault::ALL.len(), |fault| fault as usize);
        let mut order: Vec<_> = (0..self.channels.len()).collect();
        order.sort_by(|&a, &b| {
            let [a, b] = [a, b].map(|i| &self.channels[i]);
            rank(a.1).cmp(&rank(b.1)).then(distance(&b.0).total_cmp(&distance(&a.0)))
        });
        order
    }

    pub fn count(&self, fault: Fault) -> usize {
        self.channels.iter().filter(|channel| channel.1 == Some(fault)).count()
    }
}

/// The lower of the two in the middle; NaN of nothing, beside which nothing is large or small.
fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<_> = values.collect();
    values.sort_by(f64::total_cmp);
    values.get(values.len().saturating_sub(1) / 2).copied().unwrap_or(f64::NAN)
}
