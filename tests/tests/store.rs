//! Layers and models in files of Burn's own kinds: both states of `BitLinear`, and moving between devices.

use bitnet_burn::{BitLinear, BitLinearConfig, BitLinearWeight};
use bitnet_burn_tests::*;
use burn::module::{Module, Param};
use burn::store::{BurnpackStore, ModuleSnapshot, SafetensorsStore};
use burn::tensor::{DType, Device, Tensor, TensorData};

fn input(k: usize, device: &Device) -> Tensor<2> {
    Tensor::from_data(TensorData::new(Random(3).floats(5 * k), [5, k]), device)
}

/// A layer with everything that it can have, in the training state.
fn layer(k: usize, n: usize, device: &Device) -> BitLinear {
    let mut layer = BitLinearConfig::new(k, n).with_bias(true).with_norm(true).init(device);
    let floats = |count: usize| Tensor::from_data(TensorData::new(Random(4).floats(count), [count]), device);
    layer.bias = Some(Param::from_tensor(floats(n)));
    if let Some(norm) = &mut layer.norm {
        norm.gamma = Param::from_tensor(floats(k));
    }
    layer
}

#[test]
fn both_states_survive_both_kinds_of_file() {
    let dir = tempfile::tempdir().unwrap();
    for device in host_devices() {
        for (k, n) in [(256, 48), (70, 9)] {
            let latent = layer(k, n, &device);
            let packed = latent.clone().pack().unwrap();
            for (state, layer) in [("latent", latent), ("packed", packed)] {
                let want = values(layer.forward(input(k, &device)));
                // A layer of other weights, in the same state.
                let other = || {
                    let other = BitLinearConfig::new(k, n).with_bias(true).with_norm(true);
                    match state {
                        "latent" => other.init(&device),
                        _ => other.init_packed(&device),
                    }
                };
                assert_ne!(values(other().forward(input(k, &device))), want);

                let path = dir.path().join(format!("{state}.safetensors"));
                let store = || SafetensorsStore::from_file(&path).overwrite(true);
                layer.save_into(&mut store()).unwrap();
                let mut loaded = other();
                loaded.load_from(&mut store()).unwrap();
                assert_eq!(values(loaded.forward(input(k, &device))), want, "safetensors, {state}");

                let path = dir.path().join(format!("{state}.bpk"));
                let store = || BurnpackStore::from_file(&path).overwrite(true);
                layer.save_into(&mut store()).unwrap();
                let mut loaded = other();
                loaded.load_from(&mut store()).unwrap();
                assert_eq!(values(loaded.forward(input(k, &device))), want, "burnpack, {state}");
                if let BitLinearWeight::Packed(weight) = &loaded.weight {
                    assert_eq!(weight.codes.val().dtype(), DType::U32);
                    // And back to training, of the same codes.
                    let again = loaded.unpack().unwrap().pack().unwrap();
                    assert_eq!(values(again.forward(input(k, &device))), want);
                }
            }
        }
    }
}

#[test]
fn both_states_move_between_devices() {
    let devices = host_devices();
    for from in &devices {
        for to in &devices {
            let (k, n) = (300, 20);
            let latent = layer(k, n, from);
            let packed = latent.clone().pack().unwrap();
            let want = values(packed.forward(input(k, from)));
            let moved = packed.to_device(to);
            assert_eq!(values(moved.forward(input(k, to))), want, "packed, {from:?} to {to:?}");
            let got = values(latent.to_device(to).pack().unwrap().forward(input(k, to)));
            assert_eq!(got, want, "latent, {from:?} to {to:?}");
        }
    }
}

#[test]
fn packed_layers_are_frozen() {
    let device = Device::flex().autodiff();
    let layer = layer(128, 16, &device).pack().unwrap();
    let x = input(128, &device).require_grad();
    let grads = layer.forward(x.clone()).sum().backward();
    assert!(x.grad(&grads).is_some());
    let BitLinearWeight::Packed(weight) = &layer.weight else { panic!("it was packed") };
    assert!(!weight.scale.val().is_require_grad());
}
