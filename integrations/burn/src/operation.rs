//! The operation: an extension of burn's backends, and its step in the graph of autodiff.

use core::marker::PhantomData;

use batchnorm::Saved;
use burn::backend::autodiff::NodeId;
use burn::backend::autodiff::checkpoint::{base::Checkpointer, strategy::CheckpointStrategy};
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::flex::FlexTensor;
use burn::backend::tensor::FloatTensor;
use burn::backend::{Autodiff, Backend, Dispatch, Flex, TensorMetadata, backend_extension};
use burn::tensor::module::BatchNormTrainOutput;
use burn::tensor::{Device, Tensor};

use crate::flex::{self, Element, by_element, per_channel};

/// Normalizes `input` of shape `[N, C, ...]` with the mean and the biased variance of the batch, which are returned beside it:
/// `output = gamma * (input - mean) / sqrt(variance + epsilon) + beta`. The arguments and results are those of
/// [`burn::tensor::module::batch_norm_train`].
///
/// Gradients flow to `input`, `gamma` and `beta`; mean and variance are detached.
///
/// # Panics
/// For an input of one dimension, other than C values in `gamma` or `beta`, and a batch without values.
pub fn batch_norm_train<const D: usize>(
    input: Tensor<D>,
    gamma: Tensor<1>,
    beta: Tensor<1>,
    epsilon: f64,
) -> BatchNormTrainOutput<D> {
    if !is_served(&input) {
        return burn::tensor::module::batch_norm_train(input, gamma, beta, epsilon);
    }
    let [x, gamma, beta] = [input.into_dispatch(), gamma.into_dispatch(), beta.into_dispatch()];
    let (output, mean, variance) = Dispatch::batch_norm_of_batch(x, gamma, beta, epsilon);
    BatchNormTrainOutput {
        output: Tensor::from_dispatch(output),
        mean: Tensor::from_dispatch(mean),
        variance: Tensor::from_dispatch(variance),
    }
}

/// Normalizes `input` of shape `[N, C, ...]` with a given mean and variance:
/// `output = gamma * (input - mean) / sqrt(variance + epsilon) + beta`. The arguments and results are those of
/// [`burn::tensor::module::batch_norm`].
///
/// Gradients flow to `input`, `gamma` and `beta`. On flex, mean and variance are constants: none flow to them.
///
/// # Panics
/// For an input of one dimension, other than C values in one of the others, and a variance that is negative or NaN.
pub fn batch_norm<const D: usize>(
    input: Tensor<D>,
    gamma: Tensor<1>,
    beta: Tensor<1>,
    mean: Tensor<1>,
    variance: Tensor<1>,
    epsilon: f64,
) -> Tensor<D> {
    if !is_served(&input) {
        return burn::tensor::module::batch_norm(input, gamma, beta, mean, variance, epsilon);
    }
    let [gamma, beta, mean, variance] = [gamma, beta, mean, variance].map(Tensor::into_dispatch);
    Tensor::from_dispatch(Dispatch::batch_norm_of(input.into_dispatch(), gamma, beta, mean, variance, epsilon))
}

/// Whether the kernels serve a tensor; burn's own operation has its own checks.
fn is_served<const D: usize>(input: &Tensor<D>) -> bool {
    assert!(D >= 2, "batch norm: expected an input of shape [N, C, ...], got {D} dimension");
    // Devices are equal whether they differentiate or not.
    input.device() == Device::flex()
}

/// Output, mean and variance.
type Trained<B> = (FloatTensor<B>, FloatTensor<B>, FloatTensor<B>);

/// The operations on backends.
#[backend_extension(Flex, Autodiff)]
trait BatchNormOps: Backend {
    /// With the statistics of the batch.
    fn batch_norm_of_batch(
        x: FloatTensor<Self>,
        gamma: FloatTensor<Self>,
        beta: FloatTensor<Self>,
        epsilon: f64,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>);

    /// With given statistics.
    fn batch_norm_of(
        x: FloatTensor<Self>,
        gamma: FloatTensor<Self>,
        beta: FloatTensor<Self>,
        mean: FloatTensor<Self>,
        variance: FloatTensor<Self>,
        epsilon: f64,
    ) -> FloatTensor<Self>;
}

impl BatchNormOps for Flex {
    fn batch_norm_of_batch(x: FlexTensor, gamma: FlexTensor, beta: FlexTensor, epsilon: f64) -> Trained<Self> {
        by_element!(x, E => {
            let (y, saved) = flex::train::<E>([x, gamma, beta], epsilon);
            (y, per_channel::<E>(saved.mean()), per_channel::<E>(saved.var()))
        })
    }

    fn batch_norm_of(
        x: FlexTensor,
        gamma: FlexTensor,
        beta: FlexTensor,
        mean: FlexTensor,
        variance: FlexTensor,
        epsilon: f64,
    ) -> FlexTensor {
        by_element!(x, E => flex::normalize::<E>([x, gamma, beta], [mean, variance], epsilon).0)
    }
}

/// A tensor of flex that autodiff may follow, with any strategy of checkpointing.
type Followed = FloatTensor<Autodiff<Flex>>;

impl<C: CheckpointStrategy> BatchNormOps for Autodiff<Flex, C> {
    fn batch_norm_of_batch(x: Followed, gamma: Followed, beta: Followed, epsilon: f64) -> Trained<Self> {
        by_element!(x, E => {
            let (y, saved) = step::<E, C>([x, gamma, beta], |tensors| flex::train::<E>(tensors, epsilon));
            let constant = |values| Followed::new(per_channel::<E>(values));
            (y, constant(saved.mean()), constant(saved.var()))
        })
    }

    fn batch_norm_of(
        x: Followed,
        gamma: Followed,
        beta: Followed,
        mean: Followed,
        variance: Followed,
        epsilon: f64,
    ) -> Followed {
        let statistics = [mean, variance].map(Followed::into_primitive);
        by_element!(x, E => {
            step::<E, C>([x, gamma, beta], |tensors| flex::normalize::<E>(tensors, statistics, epsilon)).0
        })
    }
}

/// The backward pass as a node of the graph.
#[derive(Debug)]
struct Differential<E>(PhantomData<E>);

impl<E: Element> Backward<Flex, 3> for Differential<E> {
    /// x and gamma, as the strategy of checkpointing keeps them, and the statistics.
    type State = (NodeId, NodeId, Saved<E::Param>);

    fn backward(self, ops: Ops<Self::State, 3>, grads: &mut Gradients, checkpointer: &mut Checkpointer) {
        let (x, gamma, saved) = ops.state;
        let [x, gamma] = [x, gamma].map(|node| checkpointer.retrieve_node_output::<FlexTensor>(node));
        let dy = grads.consume::<Flex>(&ops.node);
        let are_wanted = ops.parents.each_ref().map(Option::is_some);
        let gradients = flex::backward::<E>([x, gamma, dy], &saved, are_wanted);
        for (parent, gradient) in ops.parents.iter().zip(gradients) {
            if let (Some(parent), Some(gradient)) = (parent, gradient) {
                grads.register::<Flex>(parent.id, gradient);
            }
        }
    }
}

/// Runs a forward pass on x, gamma and beta, and leaves a step for the way back if one of them asks for it.
fn step<E: Element, C: CheckpointStrategy>(
    tensors: [Followed; 3],
    forward: impl FnOnce([FlexTensor; 3]) -> (FlexTensor, Saved<E::Param>),
) -> (Followed, Saved<E::Param>) {
    let nodes = tensors.each_ref().map(Followed::node);
    match Differential::<E>(PhantomData).prepare::<C>(nodes).compute_bound().stateful() {
        OpsKind::Tracked(mut prep) => {
            let (x, gamma) = (prep.checkpoint(&tensors[0]), prep.checkpoint(&tensors[1]));
            let (y, saved) = forward(tensors.map(Followed::into_primitive));
            (prep.finish((x, gamma, saved.clone()), y), saved)
        }
        OpsKind::UnTracked(prep) => {
            let (y, saved) = forward(tensors.map(Followed::into_primitive));
            (prep.finish(y), saved)
        }
    }
}
