//! The passes on tensors of flex: their memory borrowed as slices, and results made into tensors.

use batchnorm::{Affine, BatchNorm, Gradients, Layout, Population, Result, Saved, Shape};
use burn::backend::TensorMetadata;
use burn::backend::flex::FlexTensor;
use burn::tensor::TensorData;
use bytemuck::Pod;

/// An element type that burn and the kernels have in common.
pub(crate) trait Element: batchnorm::Element + burn::tensor::Element + Pod {}

impl<T: batchnorm::Element + burn::tensor::Element + Pod> Element for T {}

/// Evaluates an expression with a name for the element type of a tensor.
macro_rules! by_element {
    ($tensor:expr, $E:ident => $body:expr) => {
        match $tensor.dtype() {
            burn::tensor::DType::F32 => {
                type $E = f32;
                $body
            }
            burn::tensor::DType::F64 => {
                type $E = f64;
                $body
            }
            burn::tensor::DType::F16 => {
                type $E = burn::tensor::f16;
                $body
            }
            burn::tensor::DType::BF16 => {
                type $E = burn::tensor::bf16;
                $body
            }
            other => panic!("batch norm: expected an input of f32, f64, f16 or bf16, got {other:?}"),
        }
    };
}
pub(crate) use by_element;

/// burn's convention: an operation that cannot be done panics.
fn checked<T>(result: Result<T>) -> T {
    result.unwrap_or_else(|error| panic!("batch norm: {error}"))
}

/// A tensor whose elements lie one after the other in memory, in the order of its layout.
struct Dense {
    /// In the order of memory: with the channels last, they are the last dimension.
    tensor: FlexTensor,
    layout: Layout,
}

impl Dense {
    /// Borrows the memory of a tensor that is dense in either order, and copies any other.
    fn new(tensor: FlexTensor) -> Self {
        let is_last = !tensor.is_contiguous() && channels_to_end(&tensor).is_contiguous();
        Self::with_layout(tensor, if is_last { Layout::ChannelsLast } else { Layout::ChannelsFirst })
    }

    /// The same in a given order.
    fn with_layout(tensor: FlexTensor, layout: Layout) -> Self {
        let tensor = match layout {
            Layout::ChannelsFirst => tensor,
            Layout::ChannelsLast => channels_to_end(&tensor),
        };
        // flex would copy a part of a larger tensor, such as some of its samples.
        let tensor = if tensor.is_contiguous() { tensor } else { tensor.to_contiguous() };
        Self { tensor, layout }
    }

    /// A tensor of values in the shape and order of this one.
    fn filled<E: Element>(&self, values: Vec<E>) -> FlexTensor {
        let tensor = FlexTensor::from_data(TensorData::new(values, self.tensor.shape()));
        Self { tensor, layout: self.layout }.into_tensor()
    }

    /// The dimensions in burn's order again.
    fn into_tensor(self) -> FlexTensor {
        match self.layout {
            Layout::ChannelsFirst => self.tensor,
            Layout::ChannelsLast => {
                let rank = self.tensor.layout().num_dims();
                self.tensor.permute(&[&[0, rank - 1], &(1..rank - 1).collect::<Vec<_>>()[..]].concat())
            }
        }
    }

    fn plan<E: Element>(&self) -> BatchNorm<E> {
        let sizes = self.tensor.layout().shape();
        let (batch, rest) = (sizes[0], &sizes[1..]);
        let shape = match self.layout {
            Layout::ChannelsFirst => Shape::new(self.layout, batch, rest[0], &rest[1..]),
            Layout::ChannelsLast => Shape::new(self.layout, batch, rest[rest.len() - 1], &rest[..rest.len() - 1]),
        };
        checked(shape.and_then(BatchNorm::new))
    }

    fn as_slice<E: Element>(&self) -> &[E] {
        slice(&self.tensor, "a tensor")
    }

    /// The memory, if no other tensor shares it.
    fn as_mut_slice<E: Element>(&mut self) -> Option<&mut [E]> {
        let (start, end) = self.tensor.layout().contiguous_offsets()?;
        self.tensor.try_storage_mut().map(|storage| &mut storage[start..end])
    }
}

/// A view of `[N, C, ...]` as `[N, ..., C]`.
fn channels_to_end(tensor: &FlexTensor) -> FlexTensor {
    let rank = tensor.layout().num_dims();
    tensor.permute(&[&[0], &(2..rank).collect::<Vec<_>>()[..], &[1]].concat())
}

/// The elements of a contiguous tensor.
fn slice<'a, E: Element>(tensor: &'a FlexTensor, what: &str) -> &'a [E] {
    tensor.as_slice().unwrap_or_else(|| {
        panic!(
            "batch norm: expected {what} of {:?} as the input is, got {:?}; cast either to the type of the other",
            E::dtype(),
            tensor.dtype()
        )
    })
}

/// One value per channel, as the kernels take them.
fn parameters<E: Element>(what: &str, tensor: &FlexTensor) -> Vec<E::Param> {
    slice::<E>(&tensor.to_contiguous(), what).iter().map(|&value| value.to_param()).collect()
}

/// One value per channel, as burn takes them.
pub(crate) fn per_channel<E: Element>(values: &[E::Param]) -> FlexTensor {
    let values: Vec<_> = values.iter().map(|&value| E::from_param(value)).collect();
    let channels = values.len();
    FlexTensor::from_data(TensorData::new(values, [channels]))
}

/// What a forward pass is given, checked as far as burn's types leave it open.
struct Input<E: Element> {
    x: Dense,
    plan: BatchNorm<E>,
    gamma: Vec<E::Param>,
    beta: Vec<E::Param>,
}

impl<E: Element> Input<E> {
    fn new([x, gamma, beta]: [FlexTensor; 3], epsilon: f64) -> Self {
        let x = Dense::new(x);
        let plan = checked(x.plan::<E>().with_eps(epsilon));
        Self { x, plan, gamma: parameters::<E>("gamma", &gamma), beta: parameters::<E>("beta", &beta) }
    }
}

/// Normalizes x with the statistics of the batch, which are returned. The tensors are x, gamma and beta.
pub(crate) fn train<E: Element>(tensors: [FlexTensor; 3], epsilon: f64) -> (FlexTensor, Saved<E::Param>) {
    let Input { x, plan, gamma, beta } = Input::<E>::new(tensors, epsilon);
    let mut saved = plan.saved();
    let y = checked(plan.forward_train_to_vec(x.as_slice(), Affine::new(&gamma, &beta), &mut saved));
    (x.filled(y), saved)
}

/// Normalizes x with a mean and a variance that are constants, over x if nobody else has it. The statistics are returned as
/// [`backward`] takes them.
pub(crate) fn normalize<E: Element>(
    tensors: [FlexTensor; 3],
    [mean, variance]: [FlexTensor; 2],
    epsilon: f64,
) -> (FlexTensor, Saved<E::Param>) {
    let Input { mut x, plan, gamma, beta } = Input::<E>::new(tensors, epsilon);
    let (mean, var) = (parameters::<E>("mean", &mean), parameters::<E>("variance", &variance));
    let (affine, mut saved) = (Affine::new(&gamma, &beta), plan.saved());
    checked(plan.freeze(Population { mean: &mean, var: &var }, &mut saved));
    let y = match x.as_mut_slice() {
        Some(x_and_y) => {
            checked(plan.normalize_in_place(x_and_y, affine, &saved));
            x.into_tensor()
        }
        None => x.filled(checked(plan.normalize_to_vec(x.as_slice(), affine, &saved))),
    };
    (y, saved)
}

/// The gradients of x, gamma and beta that are wanted; that of x is written over `dy` if nobody else has it.
pub(crate) fn backward<E: Element>(
    [x, gamma, dy]: [FlexTensor; 3],
    saved: &Saved<E::Param>,
    [wants_dx, wants_dgamma, wants_dbeta]: [bool; 3],
) -> [Option<FlexTensor>; 3] {
    let x = Dense::new(x);
    let mut dy = Dense::with_layout(dy, x.layout);
    let (plan, gamma) = (x.plan::<E>(), parameters::<E>("gamma", &gamma));
    let (x, affine) = (x.as_slice(), Affine::scale(&gamma));
    let room = |is_wanted: bool| is_wanted.then(|| vec![E::Param::default(); gamma.len()]);
    let (mut dgamma, mut dbeta) = (room(wants_dgamma), room(wants_dbeta));
    let gradients = Gradients { dgamma: dgamma.as_deref_mut(), dbeta: dbeta.as_deref_mut(), ..Default::default() };
    let dx = if !wants_dx {
        checked(plan.backward(x, dy.as_slice(), saved, affine, gradients));
        None
    } else if let Some(dy_and_dx) = dy.as_mut_slice() {
        checked(plan.backward_in_place(x, dy_and_dx, saved, affine, gradients));
        Some(dy.into_tensor())
    } else {
        Some(dy.filled(checked(plan.backward_to_vec(x, dy.as_slice(), saved, affine, gradients))))
    };
    [dx, dgamma.map(|values| per_channel::<E>(&values)), dbeta.map(|values| per_channel::<E>(&values))]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tensor(shape: [usize; 4]) -> FlexTensor {
        FlexTensor::from_data(TensorData::new((0..shape.iter().product()).map(|i| i as f32).collect(), shape))
    }

    /// Where the memory of a tensor begins.
    fn address(tensor: &FlexTensor) -> *const u8 {
        tensor.bytes().as_ptr()
    }

    #[test]
    fn dense_tensors_are_borrowed_in_either_order() {
        let first = tensor([4, 3, 2, 5]);
        let last = tensor([4, 2, 5, 3]).permute(&[0, 3, 1, 2]);
        let samples = first.narrow(0, 1, 2);
        for (tensor, layout, start) in [
            (&first, Layout::ChannelsFirst, 0.0),
            (&last, Layout::ChannelsLast, 0.0),
            (&samples, Layout::ChannelsFirst, 30.0),
        ] {
            let dense = Dense::new(tensor.clone());
            assert_eq!((dense.layout, address(&dense.tensor)), (layout, address(tensor)));
            assert_eq!(dense.as_slice::<f32>()[0], start);
            let back = dense.into_tensor();
            assert_eq!(back.layout(), tensor.layout());
        }
    }

    #[test]
    fn other_tensors_are_copied_in_their_order() {
        let narrow = tensor([4, 3, 2, 5]).narrow(1, 1, 2);
        let dense = Dense::new(narrow.clone());
        assert_ne!(address(&dense.tensor), address(&narrow));
        assert_eq!(dense.as_slice::<f32>()[..11], [10., 11., 12., 13., 14., 15., 16., 17., 18., 19., 20.]);
    }

    #[test]
    fn only_memory_that_nobody_shares_is_written_over() {
        let one = tensor([2, 2, 1, 1]);
        let other = one.clone();
        assert!(Dense::new(one).as_mut_slice::<f32>().is_none());
        let place = address(&other);
        let params = |value: f32| per_channel::<f32>(&[value; 2]);
        let (y, _) = normalize::<f32>([other, params(2.0), params(1.0)], [params(1.0), params(4.0)], 0.0);
        assert_eq!(address(&y), place);
        assert_eq!(y.as_slice::<f32>(), Some(&[0.0, 1.0, 2.0, 3.0][..]));
    }
}
