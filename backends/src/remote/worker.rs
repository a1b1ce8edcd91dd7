//! A worker: this machine's device, served to clients.
//!
//! Requests are hostile until they are checked: ranks, shapes, types and sizes of what an operation is asked to compute
//! are those that its body takes, or the client's session ends. Sessions share nothing but the kernels.

use std::net::{SocketAddr, TcpListener};
use std::slice::Iter;

use bitnet_burn_formats::{DenseFormat, canonical};
use bitnet_burn_manager::{ScaleKind, WeightShape};
use bitnet_burn_plugin::sdk::scale_count;
use burn::backend::ir::{BackendIr, CustomOpIr, HandleContainer, ScalarIr, TensorIr};
use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::backend::{DispatchDevice, TensorMetadata};
use burn::server::{AuthorizationRequest, ClientId, CustomOpRegistry, RemoteServer, WebSocketTransport};
use burn::tensor::{DType, Device, TensorData, try_read_sync};
use tokio::runtime::{Builder, Runtime};
use tokio::task::JoinHandle;

use super::gate::{self, Gate, Limits};
use super::{Secret, TEXT, name};
use crate::devices::{LARGEST_REMOTE, catching_panics};
use crate::extension::{
    AttentionArgs, BitLinearArgs, CacheTensor, DeltaNetArgs, DeltaNetOutput, DeltaNetShape, DeltaNetTensors,
    DeltaNetWeights, DenseArgs, GatedActivation, InputNorm, Matrix, TernaryBackend, TernaryWeight,
    WeightGroup,
};
use crate::manager::take_error;

/// Why a worker does not serve.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WorkerError {
    /// The system refuses threads or sockets.
    #[error("a worker can't start")]
    Start(#[source] std::io::Error),
    /// Burn refuses the device.
    #[error("a worker can't serve this device: {0}")]
    Device(String),
    /// Other machines can reach it, and it has no secret.
    #[error(
        "{0} can be reached from other machines, so the worker needs a secret that its clients know: --secret-file F, \
         or {name} (openssl rand -hex 32 makes one)",
        name = Secret::VARIABLE
    )]
    NoSecret(SocketAddr),
    /// Serving ended.
    #[error("the worker stopped serving: {0}")]
    Stopped(String),
    /// The process had more memory than [`Limits::memory`].
    #[error("the worker stopped serving: {0}")]
    Memory(String),
}

/// A device that is served; no longer when this is dropped, which ends all sessions.
///
/// ```
/// use bitnet_burn_backends::remote::{self, Worker};
/// use burn::tensor::{Device, Tensor};
///
/// let listener = std::net::TcpListener::bind("127.0.0.1:0")?;
/// let worker = Worker::start(listener, &Device::flex(), "flex")?;
/// let device = remote::open(&worker.address().to_string())?;
/// let x = Tensor::<1>::from_floats([1.0, 2.0], &device) * 2.0;
/// assert_eq!(x.into_data().iter::<f32>().collect::<Vec<_>>(), [2.0, 4.0]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct Worker {
    address: SocketAddr,
    /// The gate's, and Burn's; `None` when it is dropped.
    runtimes: Option<[Runtime; 2]>,
    serving: JoinHandle<WorkerError>,
}

fn runtime(threads: usize, name: &str) -> Result<Runtime, WorkerError> {
    let mut builder = Builder::new_multi_thread();
    builder.worker_threads(threads).thread_name(name).enable_all().build().map_err(WorkerError::Start)
}

impl Worker {
    /// Serves a device to this machine's programs, with a listener at a loopback address. `name` is what clients are told
    /// of the device.
    ///
    /// # Errors
    /// If the system or Burn refuses.
    pub fn start(listener: TcpListener, device: &Device, name: &str) -> Result<Self, WorkerError> {
        Self::start_with(listener, device, name, None, Limits::default())
    }

    /// Serves a device to whoever connects to the listener and proves that it knows the secret.
    ///
    /// # Errors
    /// If the system or Burn refuses, or the address is not a loopback address and there is no secret.
    pub fn start_with(
        listener: TcpListener,
        device: &Device,
        name: &str,
        secret: Option<&Secret>,
        limits: Limits,
    ) -> Result<Self, WorkerError> {
        let address = listener.local_addr().map_err(WorkerError::Start)?;
        if secret.is_none() && !address.ip().is_loopback() {
            return Err(WorkerError::NoSecret(address));
        }
        let [outer, inner] = [runtime(1, "bitnet-gate")?, runtime(2, "bitnet-worker")?];
        let burns = gate::loopback().map_err(WorkerError::Start)?;
        let gate = Gate::new(secret, limits, burns.local_addr().map_err(WorkerError::Start)?);
        let device = device.clone().without_autodiff();
        let sessions = gate.clone();
        // Whatever else reaches Burn's server came past the gate.
        let authorizer = move |request: AuthorizationRequest<'_>| {
            let known = match request.client {
                ClientId::WebSocket(address) => sessions.let_in(address, request.credential.as_bytes()),
                #[allow(unreachable_patterns, reason = "with Burn's other transport")]
                _ => false,
            };
            if known { Ok(()) } else { Err("it did not come through the gate".to_owned()) }
        };
        let server = RemoteServer::new([device.clone()]).with_authorizer(authorizer);
        let name = name.to_owned();
        let server: RemoteServer = match device.as_dispatch() {
            #[cfg(feature = "flex")]
            DispatchDevice::Flex(_) => server.with_custom_ops(operations::<burn::backend::Flex>(name)),
            #[cfg(feature = "ndarray")]
            DispatchDevice::NdArray(_) => server.with_custom_ops(operations::<burn::backend::NdArray>(name)),
            #[cfg(feature = "cube")]
            DispatchDevice::Cube(_) => server.with_custom_ops(operations::<burn::backend::Cube>(name)),
            #[allow(unreachable_patterns, reason = "with no other backend")]
            _ => return Err(WorkerError::Device("it is none of this machine's".into())),
        };
        let serving = {
            let _entered = inner.enter();
            inner.spawn(server.serve_async(WebSocketTransport::from_listener(burns)))
        };
        listener.set_nonblocking(true).map_err(WorkerError::Start)?;
        let listener = {
            let _entered = outer.enter();
            tokio::net::TcpListener::from_std(listener).map_err(WorkerError::Start)?
        };
        outer.spawn(gate.clone().serve(listener));
        let serving = outer.spawn(async move {
            tokio::select! {
                ended = serving => WorkerError::Stopped(match ended {
                    Ok(ended) => ended.err().map_or_else(String::new, |error| error.to_string()),
                    Err(error) => error.to_string(),
                }),
                problem = gate.watch_memory() => WorkerError::Memory(problem),
            }
        });
        Ok(Self { address, runtimes: Some([outer, inner]), serving })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Waits for the end of serving, which comes with an error only.
    pub fn wait(mut self) -> WorkerError {
        let serving = &mut self.serving;
        let ended = self.runtimes.as_ref().map(|[outer, _]| outer.block_on(serving));
        match ended {
            Some(Ok(error)) => error,
            Some(Err(error)) => WorkerError::Stopped(error.to_string()),
            None => unreachable!("it has runtimes until it is dropped"),
        }
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        for runtime in self.runtimes.take().into_iter().flatten() {
            runtime.shutdown_background();
        }
    }
}

/// What a client asks for, taken from the front to the back.
struct Request<'a, B: BackendIr> {
    handles: &'a mut HandleContainer<B::Handle>,
    inputs: Iter<'a, TensorIr>,
    scalars: Iter<'a, ScalarIr>,
}

enum Output<B: BackendIr> {
    Float(FloatTensor<B>),
    Int(IntTensor<B>),
}

type Outputs<B> = Result<Vec<Output<B>>, String>;

/// That a request has what an operation takes.
fn check(holds: bool, what: impl FnOnce() -> String) -> Result<(), String> {
    if holds { Ok(()) } else { Err(what()) }
}

/// Rows that can be sent back, and so are not too many to compute.
fn check_rows(m: usize, n: usize) -> Result<(), String> {
    let bytes = m.checked_mul(n).and_then(|count| count.checked_mul(4));
    check(bytes.is_some_and(|bytes| bytes <= LARGEST_REMOTE), || format!("an output of {m} rows of {n}"))
}

fn dims<const D: usize>(tensor: &impl TensorMetadata, what: &str) -> Result<[usize; D], String> {
    let shape = tensor.shape();
    shape[..].try_into().map_err(|_| format!("{what} of shape {shape:?}"))
}

impl<B: BackendIr> Request<'_, B> {
    fn input(&mut self) -> Result<&TensorIr, String> {
        self.inputs.next().ok_or_else(|| "a tensor is missing".to_owned())
    }

    /// A float tensor of one of some types.
    fn float_of<const D: usize>(
        &mut self,
        what: &str,
        types: &[DType],
    ) -> Result<(FloatTensor<B>, [usize; D]), String> {
        let ir = self.input()?.clone();
        let tensor = self.handles.get_float_tensor::<B>(&ir);
        check(types.contains(&tensor.dtype()), || format!("{what} of type {:?}", tensor.dtype()))?;
        let dims = dims(&tensor, what)?;
        Ok((tensor, dims))
    }

    fn float<const D: usize>(&mut self, what: &str) -> Result<(FloatTensor<B>, [usize; D]), String> {
        self.float_of(what, &[DType::F32])
    }

    fn float_as<const D: usize>(
        &mut self,
        what: &str,
        expected: [usize; D],
    ) -> Result<FloatTensor<B>, String> {
        let (tensor, dims) = self.float(what)?;
        check(dims == expected, || format!("{what} of {dims:?}, not {expected:?}"))?;
        Ok(tensor)
    }

    fn int<const D: usize>(
        &mut self,
        what: &str,
        dtype: DType,
    ) -> Result<(IntTensor<B>, [usize; D]), String> {
        let ir = self.input()?.clone();
        let tensor = self.handles.get_int_tensor::<B>(&ir);
        check(tensor.dtype() == dtype, || format!("{what} of type {:?}", tensor.dtype()))?;
        let dims = dims(&tensor, what)?;
        Ok((tensor, dims))
    }

    /// A size, so small that the product of two is one.
    fn size(&mut self) -> Result<usize, String> {
        match self.scalars.next() {
            Some(&ScalarIr::UInt(value)) if value < 1 << 31 => Ok(value as usize),
            other => Err(format!("{other:?} for a size")),
        }
    }

    fn number(&mut self) -> Result<f32, String> {
        match self.scalars.next() {
            Some(&ScalarIr::Float(value)) => Ok(value as f32),
            other => Err(format!("{other:?} for a number")),
        }
    }

    fn flag(&mut self) -> Result<bool, String> {
        match self.scalars.next() {
            Some(&ScalarIr::Bool(value)) => Ok(value),
            other => Err(format!("{other:?} for yes or no")),
        }
    }

    /// A cache [kv heads, capacity, d], of one tensor or of codes and scales.
    fn cache(&mut self, int8: bool) -> Result<(CacheTensor<B>, [usize; 3]), String> {
        if !int8 {
            let (tensor, dims) = self.float_of("a cache", &[DType::F32, DType::F16])?;
            return Ok((CacheTensor::Float(tensor), dims));
        }
        let (codes, dims) = self.int("a cache's codes", DType::I8)?;
        let (scale, of) = self.float::<2>("a cache's scales")?;
        check(of == dims[..2], || format!("scales of {of:?} for codes of {dims:?}"))?;
        Ok((CacheTensor::Int8 { codes, scale }, dims))
    }

    /// A dense matrix, and its words.
    fn dense(&mut self) -> Result<DenseArgs, String> {
        let format = self.size()?;
        let format = DenseFormat::ALL.into_iter().find(|&known| known as usize == format);
        let format = format.ok_or("an unknown format")?;
        let (n, k, int8, tiled) = (self.size()?, self.size()?, self.flag()?, self.flag()?);
        let args = DenseArgs { int8, tiled, ..DenseArgs::new(format, n, k) };
        check(n > 0 && k > 0 && (!int8 || args.with_int8().is_ok()), || format!("{args:?}"))?;
        Ok(args)
    }

    fn words(&mut self, args: &DenseArgs) -> Result<IntTensor<B>, String> {
        let (words, [rows, columns]) = self.int("words", DType::U32)?;
        let fits = args.bytes().is_some_and(|bytes| bytes <= rows * columns * 4);
        check(fits, || format!("{} words for {args:?}", rows * columns))?;
        Ok(words)
    }
}

fn bit_linear<B: TernaryBackend + BackendIr>(request: &mut Request<'_, B>) -> Outputs<B> {
    let (k, eps) = (request.size()?, request.number()?);
    let (quantise, with_norm) = (request.flag()?, request.flag()?);
    let (x, [m, width]) = request.float("x")?;
    check(k > 0 && width == k, || format!("an input of {width} features for {k}"))?;
    let norm = if with_norm {
        let (weight, dims) = request.float("the norm's weight")?;
        check(dims == [k], || format!("a norm's weight of {dims:?} for {k}"))?;
        InputNorm::Rms(weight)
    } else {
        InputNorm::None
    };
    let count = request.scalars.len() / 4;
    check((1..=3).contains(&count), || format!("{count} matrices"))?;
    let (mut matrices, mut weights) = (Vec::with_capacity(count), Vec::with_capacity(count));
    for _ in 0..count {
        let n = request.size()?;
        let (codes, dims) = request.int("codes", DType::U32)?;
        let expected = [n, canonical::row_bytes(k) / 4];
        check(n > 0 && dims == expected, || format!("codes of {dims:?} for [{n}, {k}]"))?;
        let (many, weights_of, activations) = (request.flag()?, request.size()?, request.size()?);
        let (scale, dims @ [count]) = request.float("a scale")?;
        let (scales, expected) = match many {
            false => (ScaleKind::One, Some(1)),
            // (Scales of a worker are f32.)
            true => (
                ScaleKind::Groups { weights: weights_of, activations, half: false },
                scale_count(n, k, weights_of),
            ),
        };
        check(Some(count) == expected, || format!("a scale of {dims:?}"))?;
        WeightShape { n, k, scales }.check().map_err(|error| error.to_string())?;
        let shared = |first: &Matrix| first.scales.activation_group() == scales.activation_group();
        check(matrices.first().is_none_or(shared), || format!("activations of {scales:?} beside others"))?;
        matrices.push(Matrix { n, scales, choice: None });
        weights.push(TernaryWeight { codes, scale });
    }
    let args = BitLinearArgs { k, matrices, eps, quantise };
    check_rows(m, args.total_n())?;
    Ok(vec![Output::Float(B::bit_linear(x, norm, WeightGroup::from_vec(weights), args))])
}

fn rms_norm<B: TernaryBackend + BackendIr>(request: &mut Request<'_, B>) -> Outputs<B> {
    let (x, [_, k]) = request.float("x")?;
    let (weight, dims) = request.float("the norm's weight")?;
    check(k > 0 && dims == [k], || format!("a norm's weight of {dims:?} for {k}"))?;
    Ok(vec![Output::Float(B::rms_norm(x, weight, request.number()?))])
}

fn rope<B: TernaryBackend + BackendIr>(request: &mut Request<'_, B>) -> Outputs<B> {
    let d = request.size()?;
    let (x, [m, width]) = request.float("x")?;
    let fits = d > 0 && d.is_multiple_of(2) && width.is_multiple_of(d);
    check(fits, || format!("heads of {d} in {width}"))?;
    let ((cos, of_cos), (sin, of_sin)) = (request.float("cosines")?, request.float("sines")?);
    check(of_cos == [m, d / 2] && of_sin == [m, d / 2], || format!("angles of {of_cos:?} and {of_sin:?}"))?;
    Ok(vec![Output::Float(B::rope(x, cos, sin, d))])
}

fn cache_append<B: TernaryBackend + BackendIr>(request: &mut Request<'_, B>) -> Outputs<B> {
    let int8 = request.inputs.len() == 3;
    let (cache, [heads, capacity, d]) = request.cache(int8)?;
    let (rows, [m, width]) = request.float("rows")?;
    let position = request.size()?;
    let fits = width == heads * d && d > 0 && position.checked_add(m).is_some_and(|end| end <= capacity);
    check(fits, || {
        format!(
            "{m} rows of {width} at {position} of a cache of {heads} heads, {capacity} positions, {d} values"
        )
    })?;
    Ok(of_cache(B::cache_append(cache, rows, position)))
}

/// A cache's tensors.
fn of_cache<B: BackendIr>(cache: CacheTensor<B>) -> Vec<Output<B>> {
    match cache {
        CacheTensor::Float(tensor) => vec![Output::Float(tensor)],
        CacheTensor::Int8 { codes, scale } => vec![Output::Int(codes), Output::Float(scale)],
    }
}

/// Heads, position and window, which the scalars begin with.
fn attention_args<B: BackendIr>(request: &mut Request<'_, B>) -> Result<AttentionArgs, String> {
    let [n_heads, n_kv_heads] = [request.size()?, request.size()?];
    let [head_dim, position] = [request.size()?, request.size()?];
    let window = Some(request.size()?).filter(|&window| window > 0);
    let fits = n_kv_heads > 0 && head_dim > 0 && n_heads.is_multiple_of(n_kv_heads);
    let args = AttentionArgs { n_heads, n_kv_heads, head_dim, position, window };
    check(fits, || format!("{args:?}"))?;
    Ok(args)
}

/// Keys and values that m rows at the position fit.
fn caches<B: BackendIr>(
    request: &mut Request<'_, B>,
    int8: bool,
    m: usize,
    args: &AttentionArgs,
) -> Result<(CacheTensor<B>, CacheTensor<B>), String> {
    let ((keys, of_keys), (values, of_values)) = (request.cache(int8)?, request.cache(int8)?);
    let [heads, capacity, d] = of_keys;
    let same_type = match (&keys, &values) {
        (CacheTensor::Float(keys), CacheTensor::Float(values)) => keys.dtype() == values.dtype(),
        _ => true,
    };
    let fits = of_keys == of_values
        && same_type
        && (heads, d) == (args.n_kv_heads, args.head_dim)
        && args.position.checked_add(m).is_some_and(|end| end <= capacity);
    check(fits, || format!("{args:?} of {m} rows over {of_keys:?} and {of_values:?}"))?;
    Ok((keys, values))
}

fn attention<B: TernaryBackend + BackendIr>(request: &mut Request<'_, B>) -> Outputs<B> {
    let int8 = request.inputs.len() == 5;
    let args = attention_args(request)?;
    let (q, [m, width]) = request.float("queries")?;
    check(Some(width) == args.n_heads.checked_mul(args.head_dim), || format!("{args:?} of {width}"))?;
    let (keys, values) = caches(request, int8, m, &args)?;
    Ok(vec![Output::Float(<B as TernaryBackend>::attention(q, keys, values, args))])
}

fn cached_attention<B: TernaryBackend + BackendIr>(request: &mut Request<'_, B>) -> Outputs<B> {
    let int8 = request.inputs.len() == 7;
    let args = attention_args(request)?;
    let AttentionArgs { n_heads, n_kv_heads, head_dim: d, .. } = args;
    let (qkv, [m, width]) = request.float("queries, keys and values")?;
    let expected = n_kv_heads.checked_mul(2).and_then(|kv| kv.checked_add(n_heads)?.checked_mul(d));
    check(Some(width) == expected && d.is_multiple_of(2), || format!("{args:?} of {width}"))?;
    let ((cos, of_cos), (sin, of_sin)) = (request.float("cosines")?, request.float("sines")?);
    check(of_cos == [m, d / 2] && of_sin == [m, d / 2], || format!("angles of {of_cos:?} and {of_sin:?}"))?;
    let (keys, values) = caches(request, int8, m, &args)?;
    let attended = B::cached_attention(qkv, cos, sin, keys, values, args);
    let mut outputs = vec![Output::Float(attended.context)];
    outputs.extend(of_cache(attended.keys));
    outputs.extend(of_cache(attended.values));
    Ok(outputs)
}

fn delta_net<B: TernaryBackend + BackendIr>(request: &mut Request<'_, B>) -> Outputs<B> {
    /// More than any model has, and few enough that no product of four of them overflows.
    const MOST: usize = 1 << 15;
    let [key_heads, value_heads] = [request.size()?, request.size()?];
    let [key_dim, value_dim, taps] = [request.size()?, request.size()?, request.size()?];
    let (tiled, eps) = (request.flag()?, request.number()?);
    let shape = DeltaNetShape { key_heads, value_heads, key_dim, value_dim, taps, tiled };
    let args = DeltaNetArgs { shape, eps };
    let sizes = [key_heads, value_heads, key_dim, value_dim, taps];
    let fits = sizes.iter().all(|size| (1..=MOST).contains(size)) && taps > 1;
    check(fits && value_heads.is_multiple_of(key_heads), || format!("{args:?}"))?;
    let channels = shape.channels();
    let (rows, [m, width]) = request.float("rows")?;
    check(width == shape.width(), || format!("rows of {width} for {args:?}"))?;
    let weights = DeltaNetWeights {
        convolution: request.float_as("the convolution", [taps, channels])?,
        decay: request.float_as("the decays", [value_heads])?,
        time_bias: request.float_as("the biases", [value_heads])?,
        norm: request.float_as("the norm's weight", [value_dim])?,
    };
    let state = DeltaNetTensors {
        inputs: request.float_as("the inputs", [taps - 1, channels])?,
        memory: request.float_as("the memory", [value_heads, key_dim, value_dim])?,
    };
    check_rows(m, shape.values())?;
    let DeltaNetOutput { context, state } = B::delta_net(rows, weights, state, args);
    Ok([context, state.inputs, state.memory].map(Output::Float).into())
}

fn gated<B: TernaryBackend + BackendIr>(request: &mut Request<'_, B>) -> Outputs<B> {
    let (gate_up, [_, width]) = request.float("gate and up")?;
    check(width > 0 && width.is_multiple_of(2), || format!("gate and up of {width}"))?;
    let asked = request.size()?;
    let activation = GatedActivation::ALL.into_iter().find(|&activation| activation as usize == asked);
    let activation = activation.ok_or_else(|| format!("activation {asked}"))?;
    Ok(vec![Output::Float(B::gated(gate_up, activation))])
}

fn dense_linear<B: TernaryBackend + BackendIr>(request: &mut Request<'_, B>) -> Outputs<B> {
    let args = request.dense()?;
    let (x, [m, width]) = request.float("x")?;
    check(width == args.k, || format!("an input of {width} features for {args:?}"))?;
    let words = request.words(&args)?;
    check_rows(m, args.n)?;
    Ok(vec![Output::Float(B::dense_linear(x, words, args))])
}

fn dense_rows<B: TernaryBackend + BackendIr>(request: &mut Request<'_, B>) -> Outputs<B> {
    let args = request.dense()?;
    check(!args.tiled, || format!("rows are looked up in tiles: {args:?}"))?;
    let words = request.words(&args)?;
    let (ids, [m]) = request.int("ids", DType::I32)?;
    check_rows(m, args.k)?;
    // GPUs read whatever lies there.
    let read = try_read_sync(B::int_into_data(ids.clone())).ok_or("ids that can't be read")?;
    let read: TensorData = read.map_err(|error| error.to_string())?;
    let known = |id: i64| usize::try_from(id).is_ok_and(|id| id < args.n);
    check(read.iter::<i64>().all(known), || format!("a row that the table of {} lacks", args.n))?;
    Ok(vec![Output::Float(B::dense_rows(words, ids, args))])
}

/// A text as an output.
fn text<B: BackendIr>(text: &str, device: &B::Device) -> Outputs<B> {
    let mut bytes = vec![0f32; TEXT];
    let mut end = text.len().min(TEXT - 1);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    for (value, &byte) in bytes.iter_mut().zip(&text.as_bytes()[..end]) {
        *value = f32::from(byte);
    }
    Ok(vec![Output::Float(B::float_from_data(TensorData::new(bytes, [TEXT]), device))])
}

/// What is told of the first error that this session's operations left behind. A session has a thread of its own, and
/// errors are kept by thread.
fn error() -> String {
    let Some(error) = take_error() else { return String::new() };
    let (mut text, mut cause) = (error.to_string(), std::error::Error::source(&error));
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}

/// The operations of a backend.
fn operations<B: TernaryBackend + BackendIr>(device_name: String) -> CustomOpRegistry<B> {
    let mut registry = CustomOpRegistry::new();
    let mut add = |name, body: Box<Body<B>>| {
        registry.register(name, move |handles: &mut HandleContainer<B::Handle>, op: &CustomOpIr, device| {
            if let Err(problem) =
                catching_panics(|| answer(&body, handles, op, device)).and_then(|result| result)
            {
                tracing::warn!(operation = name, %problem, "a request can't be computed; its session ends");
                // Burn ends the session. Not a panic that is printed: it has just been told.
                std::panic::resume_unwind(Box::new(format!("{name}: {problem}")));
            }
        });
    };
    add(name::BIT_LINEAR, Box::new(|request, _| bit_linear(request)));
    add(name::RMS_NORM, Box::new(|request, _| rms_norm(request)));
    add(name::ROPE, Box::new(|request, _| rope(request)));
    add(name::CACHE_APPEND, Box::new(|request, _| cache_append(request)));
    add(name::ATTENTION, Box::new(|request, _| attention(request)));
    add(name::CACHED_ATTENTION, Box::new(|request, _| cached_attention(request)));
    add(name::DELTA_NET, Box::new(|request, _| delta_net(request)));
    add(name::GATED, Box::new(|request, _| gated(request)));
    add(name::DENSE_LINEAR, Box::new(|request, _| dense_linear(request)));
    add(name::DENSE_ROWS, Box::new(|request, _| dense_rows(request)));
    add(name::DEVICE, Box::new(move |_, device| text(&device_name, device)));
    add(name::ERROR, Box::new(|_, device| text(&error(), device)));
    registry
}

type Body<B> =
    dyn Fn(&mut Request<'_, B>, &<B as burn::backend::BackendTypes>::Device) -> Outputs<B> + Send + Sync;

/// Computes what is asked for, and keeps it under the names that the client gave.
fn answer<B: BackendIr>(
    body: &Body<B>,
    handles: &mut HandleContainer<B::Handle>,
    op: &CustomOpIr,
    device: &B::Device,
) -> Result<(), String> {
    let mut request = Request { handles, inputs: op.inputs.iter(), scalars: op.scalars.iter() };
    let outputs = body(&mut request, device)?;
    let rest = request.inputs.len() + request.scalars.len();
    check(rest == 0 && outputs.len() == op.outputs.len(), || format!("{rest} arguments too many"))?;
    for (output, ir) in outputs.into_iter().zip(&op.outputs) {
        let shape = match &output {
            Output::Float(tensor) => tensor.shape(),
            Output::Int(tensor) => tensor.shape(),
        };
        check(shape == ir.shape, || format!("an output of {:?} is expected, and is {shape:?}", ir.shape))?;
        match output {
            Output::Float(tensor) => handles.register_float_tensor::<B>(&ir.id, tensor),
            Output::Int(tensor) => handles.register_int_tensor::<B>(&ir.id, tensor),
        }
    }
    Ok(())
}
