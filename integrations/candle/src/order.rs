//! The order of a tensor's elements in memory: channels first, or channels last behind a permutation.

use batchnorm::Layout as Channels;
use candle_core::{Result, Tensor};

/// How the elements of a tensor of (N, C, ...) lie, without gaps.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Order(Channels);

impl Order {
    /// That of a tensor, if there is one.
    fn of(x: &Tensor) -> Result<Option<Self>> {
        let last = Self(Channels::ChannelsLast);
        Ok(if x.is_contiguous() {
            Some(Self(Channels::ChannelsFirst))
        } else {
            let strides = x.layout().permute(&last.axes(x.rank()))?;
            strides.is_contiguous().then_some(last)
        })
    }

    /// A tensor of at least two dimensions without gaps: itself, or else a copy.
    pub(crate) fn dense(x: &Tensor) -> Result<(Tensor, Self)> {
        match Self::of(x)? {
            Some(order) => Ok((x.clone(), order)),
            None => Ok((x.contiguous()?, Self(Channels::ChannelsFirst))),
        }
    }

    /// The dimensions from the slowest to the fastest.
    fn axes(self, rank: usize) -> Vec<usize> {
        match self.0 {
            Channels::ChannelsFirst => (0..rank).collect(),
            Channels::ChannelsLast => [0].into_iter().chain(2..rank).chain([1]).collect(),
        }
    }

    /// The sizes in that order.
    pub(crate) fn in_memory(self, dims: &[usize]) -> Vec<usize> {
        self.axes(dims.len()).into_iter().map(|axis| dims[axis]).collect()
    }

    /// A tensor whose dimensions are in the order of memory, as (N, C, ...).
    pub(crate) fn back(self, tensor: &Tensor) -> Result<Tensor> {
        match self.0 {
            Channels::ChannelsFirst => Ok(tensor.clone()),
            Channels::ChannelsLast => {
                let rank = tensor.rank();
                tensor.permute([0, rank - 1].into_iter().chain(1..rank - 1).collect::<Vec<_>>())
            }
        }
    }

    /// What the kernels call it.
    pub(crate) fn shape(self, dims: &[usize]) -> batchnorm::Result<batchnorm::Shape> {
        batchnorm::Shape::new(self.0, dims[0], dims[1], &dims[2..])
    }
}
