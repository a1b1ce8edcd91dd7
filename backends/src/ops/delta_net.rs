//! Gated DeltaNet.

use burn::backend::Dispatch;
use burn::tensor::{Device, Tensor};

use crate::extension::{DeltaNetArgs, DeltaNetOutput, DeltaNetTensors, DeltaNetWeights, TernaryBackend};

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
    pub fn zeros(args: &DeltaNetArgs, device: &Device) -> Self {
        Self {
            inputs: Tensor::zeros([args.taps - 1, args.channels()], device),
            memory: Tensor::zeros([args.value_heads, args.key_dim, args.value_dim], device),
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
    let DeltaNetArgs { key_heads, value_heads, key_dim, value_dim, taps, .. } = args;
    let DeltaNetParameters { convolution, decay, time_bias, norm } = parameters;
    let DeltaNetState { inputs, memory } = state;
    assert!(key_heads > 0 && value_heads > 0 && value_heads.is_multiple_of(key_heads), "heads of {args:?}");
    assert!(taps > 1, "a convolution of {taps} taps");
    assert_eq!(rows.dims()[1], args.channels() + args.values() + 2 * value_heads, "a row of {args:?}");
    assert_eq!(convolution.dims(), [taps, args.channels()], "the convolution of {args:?}");
    assert_eq!((decay.dims(), time_bias.dims()), ([value_heads], [value_heads]), "decays of {args:?}");
    assert_eq!(norm.dims(), [value_dim], "the norm of {args:?}");
    assert_eq!(inputs.dims(), [taps - 1, args.channels()], "the inputs of {args:?}");
    assert_eq!(memory.dims(), [value_heads, key_dim, value_dim], "the memory of {args:?}");
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
