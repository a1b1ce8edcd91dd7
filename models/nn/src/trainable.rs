//! The model in its training state: latent float weights in, parameters out, and [`BitNet::pack`] to the packed state.

use std::cell::{Cell, RefCell};

use bitnet_burn_backends::ops;
use bitnet_burn_manager::ManagerError;
use burn::module::{Module, Param, ParamId};
use burn::nn::RmsNorm;
use burn::tensor::{Device, Tensor, TensorData};

use crate::model::rms_norm;
use crate::{
    Adapter, Attention, BitBlock, BitLinear, BitLinearWeight, BitNet, DenseMatrix, DenseWeight, FeedForward,
    FloatPart, ModelConfig, Norm, Projection, Quantisation, names,
};

/// Name, shape and values.
pub type Parameter = (String, Vec<usize>, Vec<f32>);

/// Gives the values of a parameter by its name and shape.
pub type ValuesOf<'a, E> = dyn FnMut(&str, &[usize]) -> Result<Vec<f32>, E> + 'a;

impl BitNet {
    /// A model in the training state, on a device with or without gradients: latent weights and float
    /// embeddings, by their names and shapes in a Hugging Face checkpoint ([N, K] and `[K]`), all asked for
    /// in the same order every time. Without `quantisation` it is BitNet's float twin: the same model with its
    /// weights and activations as they are.
    ///
    /// # Errors
    /// Those of `values`.
    ///
    /// # Panics
    /// If `values` gives other numbers of values than asked for, or a projection can't be quantised so
    /// ([`Quantisation::check_model`] says which).
    pub fn trainable<E>(
        config: &ModelConfig,
        quantisation: Option<Quantisation>,
        device: &Device,
        values: &mut ValuesOf<'_, E>,
    ) -> Result<Self, E> {
        // The parameters are numbered, so that an optimiser's state finds them again in another process.
        let next = Cell::new(1);
        let number = || ParamId::from(next.replace(next.get() + 1));
        let values = RefCell::new(values);
        let matrix = |name: &str, shape: (usize, usize)| -> Result<Param<Tensor<2>>, E> {
            let shape = [shape.0, shape.1];
            let data = TensorData::new((values.borrow_mut())(name, &shape)?, shape);
            Ok(Param::initialized(number(), Tensor::from_data(data, device)).set_require_grad(true))
        };
        let norm = |which: Norm| -> Result<RmsNorm, E> {
            let weight = (values.borrow_mut())(&names::norm_name(which), &[which.len(config)])?;
            let mut norm = rms_norm(weight, config.rms_norm_eps, device);
            norm.gamma = Param::initialized(number(), norm.gamma.into_value()).set_require_grad(true);
            Ok(norm)
        };
        let linear = |layer: usize, which: Projection| -> Result<BitLinear, E> {
            let layer =
                BitLinear::latent(matrix(&names::projection_name(layer, which), which.shape(config))?);
            let quantised = layer.with_quantisation(quantisation.unwrap_or_default());
            Ok(quantised.unwrap_or_else(|error| panic!("{which:?} projections: {error}")))
        };
        let float = |layer: usize, which: FloatPart| -> Result<DenseMatrix, E> {
            let name = names::float_part_name(layer, which);
            let stored = (values.borrow_mut())(&name, &which.checkpoint_shape(config))?;
            let data = TensorData::new(which.from_checkpoint(&stored, config), which.shape(config));
            let weight = Param::initialized(number(), Tensor::from_data(data, device));
            Ok(DenseMatrix::trainable(weight.set_require_grad(true)))
        };
        let table = (config.vocab_size, config.hidden_size);
        let embedding = DenseMatrix::trainable(matrix(names::EMBEDDING, table)?);
        let blocks = (0..config.n_layers)
            .map(|i| BitBlock::assemble(config, i, norm, linear, float))
            .collect::<Result<_, E>>()?;
        let last = norm(Norm::Output)?;
        let output = if config.tied_embeddings {
            None
        } else {
            Some(BitLinear::dense(DenseMatrix::trainable(matrix(names::HEAD, table)?)))
        };
        Ok(Self::assemble(config.clone(), quantisation.is_some(), embedding, blocks, last, output))
    }

    /// The parameters of a model in the training state, as [`trainable`](Self::trainable) asks for them:
    /// name, shape and values.
    ///
    /// # Panics
    /// If a layer is frozen, or the values can't be read back from their device.
    pub fn parameters(&self) -> Vec<Parameter> {
        self.parameters_with(|_, weight| weight)
    }

    /// [`parameters`](Self::parameters), with the projections' weights as the forward pass and [`pack`](Self::pack) make
    /// them ternary.
    ///
    /// # Panics
    /// As there.
    pub fn frozen_parameters(&self) -> Vec<Parameter> {
        self.parameters_with(|layer, weight| ops::ternarise(weight, layer.quantisation().scale))
    }

    fn parameters_with(&self, value: impl Fn(&BitLinear, Tensor<2>) -> Tensor<2>) -> Vec<Parameter> {
        let mut parameters = Vec::new();
        let mut add = |name: String, data: TensorData| {
            parameters.push((name, data.shape().to_vec(), data.iter::<f32>().collect()));
        };
        let float = |matrix: &DenseMatrix| match &matrix.weight {
            DenseWeight::Float(weight) => weight.val().into_data(),
            DenseWeight::Stored(_) => panic!("a frozen embedding has no parameters"),
        };
        add(names::EMBEDDING.to_owned(), float(&self.embedding));
        for (i, block) in self.blocks.iter().enumerate() {
            let (attention, feed_forward) = (&block.attention, &block.feed_forward);
            let matrices = block.float_matrices().into_iter().map(|(which, matrix)| (which, float(matrix)));
            let vectors = match attention {
                Attention::Softmax(_) => Vec::new(),
                Attention::DeltaNet(delta) => vec![
                    (FloatPart::DeltaConvolution, delta.convolution.val().into_data()),
                    (FloatPart::DeltaRate, delta.rate.val().into_data()),
                    (FloatPart::DeltaBias, delta.bias.val().into_data()),
                ],
            };
            for (which, values) in matrices.chain(vectors) {
                let values = which.to_checkpoint(&values.iter::<f32>().collect::<Vec<_>>(), self.config());
                let shape = which.checkpoint_shape(self.config());
                add(names::float_part_name(i, which), TensorData::new(values, shape));
            }
            let sub_norms = self.config().sub_norms;
            let sub_norm = match feed_forward {
                FeedForward::One(network) => network.down_proj.norm.as_ref().filter(|_| sub_norms),
                FeedForward::Experts(_) => None,
            };
            for (which, layer) in block.projections() {
                match &layer.weight {
                    BitLinearWeight::Latent(weight) => {
                        let weight = value(layer, weight.val().detach());
                        add(names::projection_name(i, which), weight.into_data());
                    }
                    BitLinearWeight::Packed(_) | BitLinearWeight::Dense(_) => {
                        panic!("a frozen layer has no parameters")
                    }
                }
                if let Some(norm) = layer.norm.as_ref().filter(|_| self.config().options.projection_norms) {
                    add(names::norm_name(Norm::Input(i, which)), norm.gamma.val().into_data());
                }
            }
            let (softmax, delta) = match attention {
                Attention::Softmax(attention) => (Some(attention), None),
                Attention::DeltaNet(delta) => (None, Some(delta)),
            };
            for (which, norm) in [
                (Norm::Attention(i), Some(attention.input_norm())),
                (Norm::Query(i), softmax.and_then(|attention| attention.q_norm.as_ref())),
                (Norm::Key(i), softmax.and_then(|attention| attention.k_norm.as_ref())),
                (Norm::Delta(i), delta.map(|delta| &delta.norm)),
                (
                    Norm::AttentionSub(i),
                    softmax.and_then(|attention| attention.o_proj.norm.as_ref().filter(|_| sub_norms)),
                ),
                (Norm::FeedForward(i), Some(feed_forward.input_norm())),
                (Norm::FeedForwardSub(i), sub_norm),
            ] {
                if let Some(norm) = norm {
                    add(names::norm_name(which), norm.gamma.val().into_data());
                }
            }
        }
        add(names::norm_name(Norm::Output), self.norm.gamma.val().into_data());
        if let Some(output) = self.output.as_ref().and_then(BitLinear::dense_matrix) {
            add(names::HEAD.to_owned(), float(output));
        }
        parameters
    }

    /// The model with its weights frozen, on the device without gradients: ternary layers packed for the
    /// fastest kernels of this machine, embeddings in F32.
    ///
    /// # Errors
    /// If no kernel may compute a layer, or memory is short.
    ///
    /// # Panics
    /// If the weights can't be read back from their device.
    pub fn pack(self) -> Result<Self, ManagerError> {
        let mut model = if self.device().is_autodiff() { self.valid() } else { self };
        for (i, block) in model.blocks.iter_mut().enumerate() {
            for (which, layer) in block.projections_mut() {
                *layer = layer.clone().pack().map_err(|error| match error {
                    ManagerError::Operands(problem) => {
                        ManagerError::Operands(format!("{}: {problem}", names::projection_module(i, which)))
                    }
                    error => error,
                })?;
                layer.adapter = layer.adapter.take().map(Adapter::into_stored);
            }
            if let Attention::DeltaNet(delta) = &mut block.attention {
                *delta = delta.clone().into_stored();
            }
            if let FeedForward::Experts(experts) = &mut block.feed_forward {
                experts.router = experts.router.clone().into_stored();
                if let Some(shared) = &mut experts.shared {
                    shared.gate = shared.gate.clone().into_stored();
                }
            }
        }
        model.embedding = model.embedding.into_stored();
        model.output = model.output.map(|output| match output.weight {
            BitLinearWeight::Dense(matrix) => BitLinear::dense(matrix.into_stored()),
            _ => output,
        });
        Ok(model)
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use bitnet_burn_backends::GatedActivation;

    use super::*;
    use crate::DecoderOptions;

    #[test]
    fn a_model_gives_the_parameters_that_it_was_made_of() {
        let config = ModelConfig {
            architecture: "bitnet".into(),
            name: None,
            hidden_size: 8,
            intermediate_size: 12,
            n_layers: 2,
            n_heads: 2,
            n_kv_heads: 1,
            head_dim: 4,
            vocab_size: 4,
            context_length: 8,
            rope_theta: 10_000.0,
            rms_norm_eps: 1e-5,
            activation: GatedActivation::Silu,
            sub_norms: false,
            tied_embeddings: false,
            bos_token: None,
            eos_tokens: Vec::new(),
            options: DecoderOptions::default(),
        };
        let with = |options: DecoderOptions| ModelConfig { options, ..config.clone() };
        for config in [
            config.clone(),
            ModelConfig { sub_norms: true, tied_embeddings: true, ..config.clone() },
            with(DecoderOptions { qk_norms: true, ..DecoderOptions::default() }),
            with(DecoderOptions { projection_norms: true, ..DecoderOptions::default() }),
        ] {
            config.validate().unwrap();
            let mut asked = Vec::new();
            let model = BitNet::trainable(
                &config,
                Some(Quantisation::default()),
                &Device::flex().autodiff(),
                &mut |name, shape| {
                    // Values of its own for each.
                    let values = vec![asked.len() as f32 + 1.0; shape.iter().product()];
                    asked.push((name.to_owned(), shape.to_vec(), values.clone()));
                    Ok::<_, Infallible>(values)
                },
            );
            let mut given = model.unwrap().parameters();
            given.sort_by(|a, b| a.0.cmp(&b.0));
            asked.sort_by(|a, b| a.0.cmp(&b.0));
            assert_eq!(given, asked, "{:?}", config.options);
        }
    }
}
