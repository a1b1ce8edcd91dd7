//! The operations as a client sends them.

use bitnet_burn_manager::ScaleKind;
use burn::backend::ir::{CustomOpIr, ScalarIr, TensorIr};
use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::backend::{Remote, RemoteDevice, TensorMetadata};
use burn::remote::CustomOpClient;
use burn::tensor::{DType, Shape, TensorData, try_read_sync};

use super::{TEXT, name};
use crate::extension::{
    AttentionArgs, BitLinearArgs, CacheTensor, CachedAttention, DeltaNetArgs, DeltaNetOutput, DeltaNetShape,
    DeltaNetTensors, DeltaNetWeights, DenseArgs, GatedActivation, InputNorm, TernaryBackend, WeightGroup,
};

fn size(value: usize) -> ScalarIr {
    ScalarIr::UInt(value as u64)
}

/// Sends an operation. Tensors that the client holds no other handle of are the worker's to write to.
fn send(
    device: &RemoteDevice,
    name: &'static str,
    inputs: &[TensorIr],
    outputs: impl IntoIterator<Item = (Shape, DType)>,
    scalars: Vec<ScalarIr>,
) -> Vec<FloatTensor<Remote>> {
    let client = CustomOpClient::new(device);
    let outputs: Vec<TensorIr> = outputs
        .into_iter()
        .map(|(shape, dtype)| TensorIr::uninit(client.create_empty_handle(), shape, dtype))
        .collect();
    client.register(CustomOpIr::with_scalars(name, inputs, &outputs, scalars))
}

/// An operation with one output of f32.
fn float(
    device: &RemoteDevice,
    name: &'static str,
    inputs: &[TensorIr],
    shape: [usize; 2],
    scalars: Vec<ScalarIr>,
) -> FloatTensor<Remote> {
    send(device, name, inputs, [(Shape::new(shape), DType::F32)], scalars).remove(0)
}

/// Asks for a text.
pub(super) fn text(device: &RemoteDevice, name: &'static str) -> Result<String, String> {
    use burn::backend::ops::FloatTensorOps;
    let text = send(device, name, &[], [(Shape::new([TEXT]), DType::F32)], Vec::new()).remove(0);
    let data = try_read_sync(Remote::float_into_data(text)).ok_or("a text that is not there")?;
    let data: TensorData = data.map_err(|error| error.to_string())?;
    let bytes: Vec<u8> = data.iter::<f32>().map(|byte| byte as u8).take_while(|&byte| byte != 0).collect();
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

fn dims(tensor: &FloatTensor<Remote>) -> [usize; 2] {
    let shape = tensor.shape();
    let [m, k] = shape[..] else { panic!("an operand of rank 2, not {shape:?}") };
    [m, k]
}

/// A cache's tensors, with the shapes and types that come back.
fn cache(cache: CacheTensor<Remote>) -> (Vec<TensorIr>, Vec<(Shape, DType)>) {
    let tensors = match cache {
        CacheTensor::Float(tensor) => vec![tensor],
        CacheTensor::Int8 { codes, scale } => vec![codes, scale],
    };
    let like = tensors.iter().map(|tensor| (tensor.shape(), tensor.dtype())).collect();
    (tensors.into_iter().map(FloatTensor::<Remote>::into_ir).collect(), like)
}

/// The cache of such tensors.
fn cache_of(tensors: Vec<FloatTensor<Remote>>) -> CacheTensor<Remote> {
    let mut tensors = tensors.into_iter();
    match (tensors.next(), tensors.next()) {
        (Some(codes), Some(scale)) => CacheTensor::Int8 { codes, scale },
        (Some(tensor), None) => CacheTensor::Float(tensor),
        _ => unreachable!("there are as many outputs as the cache has tensors"),
    }
}

fn dense(args: &DenseArgs) -> Vec<ScalarIr> {
    let DenseArgs { format, n, k, int8, tiled } = *args;
    vec![size(format as usize), size(n), size(k), ScalarIr::Bool(int8), ScalarIr::Bool(tiled)]
}

/// A window of 0 stands for none.
fn attention(args: &AttentionArgs) -> Vec<ScalarIr> {
    let AttentionArgs { n_heads, n_kv_heads, head_dim, position, window } = *args;
    [n_heads, n_kv_heads, head_dim, position, window.unwrap_or(0)].map(size).to_vec()
}

impl TernaryBackend for Remote {
    fn bit_linear(
        x: FloatTensor<Self>,
        norm: InputNorm<Self>,
        weights: WeightGroup<Self>,
        args: BitLinearArgs,
    ) -> FloatTensor<Self> {
        let (device, m) = (x.device(), dims(&x)[0]);
        let with_norm = matches!(norm, InputNorm::Rms(_));
        let mut scalars = vec![
            size(args.k),
            ScalarIr::Float(args.eps.into()),
            ScalarIr::Bool(args.quantise),
            ScalarIr::Bool(with_norm),
        ];
        scalars.extend(args.matrices.iter().flat_map(|matrix| {
            let (many, weights, activations) = match matrix.scales {
                ScaleKind::One => (false, 0, 0),
                ScaleKind::Groups { weights, activations, .. } => (true, weights, activations),
            };
            [size(matrix.n), ScalarIr::Bool(many), size(weights), size(activations)]
        }));
        let mut inputs = vec![x.into_ir()];
        if let InputNorm::Rms(weight) = norm {
            inputs.push(weight.into_ir());
        }
        for weight in weights.into_vec() {
            inputs.extend([weight.codes.into_ir(), weight.scale.into_ir()]);
        }
        float(&device, name::BIT_LINEAR, &inputs, [m, args.total_n()], scalars)
    }

    fn rms_norm(x: FloatTensor<Self>, weight: FloatTensor<Self>, eps: f32) -> FloatTensor<Self> {
        let (device, shape) = (x.device(), dims(&x));
        let inputs = [x.into_ir(), weight.into_ir()];
        float(&device, name::RMS_NORM, &inputs, shape, vec![ScalarIr::Float(eps.into())])
    }

    fn rope(
        x: FloatTensor<Self>,
        cos: FloatTensor<Self>,
        sin: FloatTensor<Self>,
        head_dim: usize,
    ) -> FloatTensor<Self> {
        let (device, shape) = (x.device(), dims(&x));
        let inputs = [x.into_ir(), cos.into_ir(), sin.into_ir()];
        float(&device, name::ROPE, &inputs, shape, vec![size(head_dim)])
    }

    fn cache_append(old: CacheTensor<Self>, rows: FloatTensor<Self>, position: usize) -> CacheTensor<Self> {
        let device = rows.device();
        let (mut inputs, like) = cache(old);
        inputs.push(rows.into_ir());
        cache_of(send(&device, name::CACHE_APPEND, &inputs, like, vec![size(position)]))
    }

    fn attention(
        q: FloatTensor<Self>,
        keys: CacheTensor<Self>,
        values: CacheTensor<Self>,
        args: AttentionArgs,
    ) -> FloatTensor<Self> {
        let (device, shape) = (q.device(), dims(&q));
        let scalars = attention(&args);
        let mut inputs = vec![q.into_ir()];
        inputs.extend(cache(keys).0);
        inputs.extend(cache(values).0);
        float(&device, name::ATTENTION, &inputs, shape, scalars)
    }

    fn cached_attention(
        qkv: FloatTensor<Self>,
        cos: FloatTensor<Self>,
        sin: FloatTensor<Self>,
        keys: CacheTensor<Self>,
        values: CacheTensor<Self>,
        args: AttentionArgs,
    ) -> CachedAttention<Self> {
        let (device, [m, _]) = (qkv.device(), dims(&qkv));
        let scalars = attention(&args);
        let ((keys, of_keys), (values, of_values)) = (cache(keys), cache(values));
        let inputs: Vec<TensorIr> =
            [qkv, cos, sin].map(FloatTensor::<Self>::into_ir).into_iter().chain(keys).chain(values).collect();
        let context = (Shape::new([m, args.n_heads * args.head_dim]), DType::F32);
        let of_caches = of_keys.len();
        let outputs = [context].into_iter().chain(of_keys).chain(of_values);
        let mut outputs = send(&device, name::CACHED_ATTENTION, &inputs, outputs, scalars);
        let values = cache_of(outputs.split_off(1 + of_caches));
        let keys = cache_of(outputs.split_off(1));
        CachedAttention { context: outputs.remove(0), keys, values }
    }

    fn delta_net(
        rows: FloatTensor<Self>,
        weights: DeltaNetWeights<Self>,
        state: DeltaNetTensors<Self>,
        args: DeltaNetArgs,
    ) -> DeltaNetOutput<Self> {
        let (device, [m, _]) = (rows.device(), dims(&rows));
        let DeltaNetArgs { shape, eps } = args;
        let DeltaNetShape { key_heads, value_heads, key_dim, value_dim, taps, tiled } = shape;
        let mut scalars = [key_heads, value_heads, key_dim, value_dim, taps].map(size).to_vec();
        scalars.extend([ScalarIr::Bool(tiled), ScalarIr::Float(eps.into())]);
        let DeltaNetWeights { convolution, decay, time_bias, norm } = weights;
        let tensors = [rows, convolution, decay, time_bias, norm, state.inputs, state.memory];
        let inputs = tensors.map(FloatTensor::<Self>::into_ir);
        let shapes = [
            Shape::new([m, shape.values()]),
            Shape::new([taps - 1, shape.channels()]),
            Shape::new([value_heads, key_dim, value_dim]),
        ];
        let outputs = shapes.map(|shape| (shape, DType::F32));
        let mut outputs = send(&device, name::DELTA_NET, &inputs, outputs, scalars).into_iter();
        let mut next = || outputs.next().expect("as many outputs as were asked for");
        let context = next();
        DeltaNetOutput { context, state: DeltaNetTensors { inputs: next(), memory: next() } }
    }

    fn gated(gate_up: FloatTensor<Self>, activation: GatedActivation) -> FloatTensor<Self> {
        let (device, [m, width]) = (gate_up.device(), dims(&gate_up));
        let scalars = vec![size(activation as usize)];
        float(&device, name::GATED, &[gate_up.into_ir()], [m, width / 2], scalars)
    }

    fn dense_linear(x: FloatTensor<Self>, words: IntTensor<Self>, args: DenseArgs) -> FloatTensor<Self> {
        let (device, m) = (x.device(), dims(&x)[0]);
        let inputs = [x.into_ir(), words.into_ir()];
        float(&device, name::DENSE_LINEAR, &inputs, [m, args.n], dense(&args))
    }

    fn dense_rows(words: IntTensor<Self>, ids: IntTensor<Self>, args: DenseArgs) -> FloatTensor<Self> {
        let (device, m) = (words.device(), ids.shape().num_elements());
        let inputs = [words.into_ir(), ids.into_ir()];
        float(&device, name::DENSE_ROWS, &inputs, [m, args.k], dense(&args))
    }
}
