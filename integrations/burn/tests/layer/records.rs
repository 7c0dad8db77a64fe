//! Records, conversions and what a layer prints: those of burn's layer.

use batchnorm_burn::{BatchNorm, BatchNormConfig};
use burn::config::Config;
use burn::module::Module;
use burn::nn;
use burn::store::ModuleRecord;
use burn::tensor::{DType, Device};

use crate::support::{Types, list};

/// A model with either layer in it.
#[derive(Module, Debug)]
struct Ours {
    norm: BatchNorm,
}

#[derive(Module, Debug)]
struct Burns {
    norm: nn::BatchNorm,
}

fn device() -> Device {
    Device::flex()
}

/// A layer with values of its own.
fn trained() -> nn::BatchNorm {
    Types::both(DType::F32).layer(3, &device())
}

fn values(layer: &nn::BatchNorm) -> [Vec<f64>; 4] {
    [layer.gamma.val(), layer.beta.val(), layer.running_mean.value(), layer.running_var.value()].map(list)
}

/// A record as a file would give it back.
fn stored(model: impl Module) -> ModuleRecord {
    ModuleRecord::from_bytes(model.into_record().into_bytes().unwrap()).unwrap()
}

#[test]
fn burns_record_loads_into_ours() {
    let ours = Ours { norm: BatchNormConfig::new(3).init(&device()) };
    let loaded = ours.load_record(stored(Burns { norm: trained() }));
    assert_eq!(values(&loaded.norm.into()), values(&trained()));
}

#[test]
fn our_record_loads_into_burns() {
    let burns = Burns { norm: nn::BatchNormConfig::new(3).init(&device()) };
    let loaded = burns.load_record(stored(Ours { norm: trained().into() }));
    assert_eq!(values(&loaded.norm), values(&trained()));
}

#[test]
fn defaults_are_burns() {
    let (ours, burns) = (BatchNormConfig::new(3), nn::BatchNormConfig::new(3));
    assert_eq!((ours.epsilon, ours.momentum), (1e-5, 0.1));
    assert_eq!((ours.epsilon, ours.momentum), (burns.epsilon, burns.momentum));
    let (ours, burns) = (ours.with_momentum(0.3).with_epsilon(0.5), burns.with_momentum(0.3).with_epsilon(0.5));
    let layers = [nn::BatchNorm::from(ours.init(&device())), burns.init(&device())];
    let [ours_is, burns_is] = layers.each_ref().map(|layer| (values(layer), layer.momentum, layer.epsilon));
    assert_eq!(ours_is, burns_is);
    let read = nn::BatchNormConfig::load_binary(ours.to_string().as_bytes()).unwrap();
    assert_eq!((read.num_features, read.momentum, read.epsilon), (3, 0.3, 0.5));
}

#[test]
fn it_prints_as_burns() {
    for layer in [trained(), trained().freeze()] {
        assert_eq!(BatchNorm::from(layer.clone()).to_string(), layer.to_string());
    }
}
