//! Gated DeltaNet.

use burn::backend::Dispatch;
use burn::tensor::{Device, Tensor};

use crate::extension::{
    DeltaNetArgs, DeltaNetOutput, DeltaNetShape, DeltaNetTensors, DeltaNetWeights, TernaryBackend,
};

/// What a layer has learned, for [`delta_net`].
#[derive(Clone, Debug)]
pub struct DeltaNetParameters {
    /// [taps, channels], the oldest input first.
    pub convolution: Tensor<2>,
    /// By value head: the rate of decay, which is not positive.
    pub decay: Tensor<1>,
    /// By value head: added to the logit of the decay.
    pub time_bias: Tensor<1>,
    /// The norm of a value head's output: `value_dim` of them.
    pub norm: Tensor<1>,
}

/// What a layer remembers of a sequence.
#[derive(Clone, Debug)]
pub struct DeltaNetState {
    inputs: Tensor<2>,
    memory: Tensor<3>,
}

impl DeltaNetState {
    /// That of a sequence that begins.
    pub fn zeros(shape: &DeltaNetShape, device: &Device) -> Self {
        Self {
            inputs: Tensor::zeros([shape.taps - 1, shape.channels()], device),
            memory: Tensor::zeros([shape.value_heads, shape.key_dim, shape.value_dim], device),
        }
    }

    /// Bytes of its values.
    pub fn bytes(&self) -> usize {
        (self.inputs.shape().num_elements() + self.memory.shape().num_elements()) * 4
    }
}

/// [`TernaryBackend::delta_net`]: the context [M, value_heads * value_dim] of rows that follow those of `state`, and the state
/// behind them.
///
/// # Panics
/// If the shapes do not fit, or the convolution has fewer than two taps.
pub fn delta_net(
    rows: Tensor<2>,
    parameters: DeltaNetParameters,
    state: DeltaNetState,
    args: DeltaNetArgs,
) -> (Tensor<2>, DeltaNetState) {
    let (shape, channels) = (args.shape, args.shape.channels());
    let DeltaNetShape { key_heads, value_heads, key_dim, value_dim, taps, .. } = shape;
    let DeltaNetParameters { convolution, decay, time_bias, norm } = parameters;
    let DeltaNetState { inputs, memory } = state;
    assert!(key_heads > 0 && value_heads > 0 && value_heads.is_multiple_of(key_heads), "heads of {shape:?}");
    assert!(taps > 1, "a convolution of {taps} taps");
    assert_eq!(rows.dims()[1], shape.width(), "a row of {shape:?}");
    assert_eq!(convolution.dims(), [taps, channels], "the convolution of {shape:?}");
    assert_eq!((decay.dims(), time_bias.dims()), ([value_heads], [value_heads]), "decays of {shape:?}");
    assert_eq!(norm.dims(), [value_dim], "the norm of {shape:?}");
    assert_eq!(inputs.dims(), [taps - 1, channels], "the inputs of {shape:?}");
    assert_eq!(memory.dims(), [value_heads, key_dim, value_dim], "the memory of {shape:?}");
    let weights = DeltaNetWeights {
        convolution: convolution.into_dispatch(),
        decay: decay.into_dispatch(),
        time_bias: time_bias.into_dispatch(),
        norm: norm.into_dispatch(),
    };
    let state = DeltaNetTensors { inputs: inputs.into_dispatch(), memory: memory.into_dispatch() };
    let DeltaNetOutput { context, state } = Dispatch::delta_net(rows.into_dispatch(), weights, state, args);
    let DeltaNetTensors { inputs, memory } = state;
    let state =
        DeltaNetState { inputs: Tensor::from_dispatch(inputs), memory: Tensor::from_dispatch(memory) };
    (Tensor::from_dispatch(context), state)
}
