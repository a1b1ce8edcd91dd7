//! Frozen ternary weights: in memory as the kernels of this machine read them, in records always canonical.
//!
//! A record holds three tensors: `format` (see [`VERSION`]), `words` (the canonical codes) and `scale`. So a record means
//! the same on every machine, whatever kernel packed the layer that was saved. A record of another kind is refused: its
//! reason is the last part of a "missing" tensor's path, the one place where Burn's stores let a module say something.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bitnet_burn_backends::ops::{self, TernaryMatrix};
use bitnet_burn_backends::{MatrixKernels, devices};
use bitnet_burn_formats::{WeightScale, canonical, check_canonical, scales};
use bitnet_burn_manager::ScaleKind;
use burn::module::{
    Content, Devices, Module, ModuleDisplay, ModuleDisplayDefault, ModuleMapper, ModuleVisitor, Param,
    ParamId,
};
use burn::tensor::{DType, Device, Int, Shape, Tensor, TensorData};

use crate::Quantisation;

/// The version of records: the first of the five I32 numbers in `format`. The others are output and input features, and how
/// many weights and activations share a scale (0: a row; -1: all weights, or activations that are floats).
pub const VERSION: i32 = 1;

/// Where the parts of a packed layer are in records.
const CONTAINER: &str = "Struct:PackedWeight";

/// Frozen ternary weights.
///
/// Records of them (of [`save_into`](https://docs.rs/burn-store), `into_record` and `save_file`) are canonical and have a
/// version, whatever packing the codes have in memory. Loading a record gives canonical codes;
/// [`BitLinear::repack`](crate::BitLinear::repack) packs them for this machine.
#[derive(Clone, Debug)]
pub struct PackedWeight {
    /// U32 words: canonical rows [d_output, ceil(d_input / 128) * 8], or [1, words] in the private
    /// packing of the kernel that was chosen for this machine.
    pub codes: Param<Tensor<2, Int>>,
    /// weight = code * scale: `[1]`, or many in blocks of 32 rows, as [`Scales`](crate::formats::Scales) has them.
    pub scale: Param<Tensor<1>>,
    format: ParamId,
    /// [d_output, d_input].
    shape: [usize; 2],
    quantisation: Quantisation,
    /// Whether the module is in training, so that unpacked weights have gradients.
    pub(super) training: bool,
    pub(super) scales: ScaleKind,
    pub(super) choice: Option<MatrixKernels>,
}

impl PackedWeight {
    /// A matrix, in a layer that quantises so, in training or not.
    pub(super) fn new(matrix: TernaryMatrix, quantisation: Quantisation, training: bool) -> Self {
        let TernaryMatrix { codes, scale, n, k, scales, choice } = matrix;
        Self {
            codes: Param::initialized(ParamId::new(), codes),
            scale: Param::initialized(ParamId::new(), scale.set_require_grad(false)),
            format: ParamId::new(),
            shape: [n, k],
            quantisation,
            training,
            scales,
            choice,
        }
    }

    /// Weights of zero that take no memory until they are used or loaded.
    pub(super) fn uninitialized([n, k]: [usize; 2], quantisation: Quantisation, device: &Device) -> Self {
        let kind = scale_kind(quantisation, k);
        let count = match kind {
            ScaleKind::One => 1,
            ScaleKind::Groups { weights, .. } => {
                scales::stored_bytes(false, n, k, weights)
                    .unwrap_or_else(|| panic!("weights [{n}, {k}] have more scales than memory has bytes"))
                    / 4
            }
        };
        let words = canonical::row_bytes(k) / 4;
        let zeros = move |device: &Device, _| {
            let word = u32::from_ne_bytes([canonical::ZERO_BYTE; 4]);
            Tensor::from_data(TensorData::new(vec![word; n * words], [n, words]), (device, DType::U32))
        };
        let ones = move |device: &Device, _| Tensor::ones([count], (device, DType::F32));
        let id = ParamId::new;
        let (codes, training) = (Shape::new([n, words]), device.is_autodiff());
        let device = device.clone().without_autodiff();
        Self {
            codes: Param::uninitialized(id(), zeros, device.clone(), false, codes),
            scale: Param::uninitialized(id(), ones, device, false, Shape::new([count])),
            format: id(),
            shape: [n, k],
            quantisation,
            training,
            scales: kind,
            choice: None,
        }
    }

    /// The same weights in another layout.
    pub(super) fn with_layout(self, matrix: TernaryMatrix) -> Self {
        let TernaryMatrix { codes, scale, scales, choice, .. } = matrix;
        Self {
            codes: Param::initialized(self.codes.id, codes),
            scale: Param::initialized(self.scale.id, scale.set_require_grad(false)),
            scales,
            choice,
            ..self
        }
    }

    /// The matrix, for operations over several layers.
    pub(super) fn matrix(&self) -> TernaryMatrix {
        let (scale, mut scales) = (self.scale.val(), self.scales);
        if let ScaleKind::Groups { half, .. } = &mut scales {
            *half = scale.dtype() == DType::F16;
        }
        let ([n, k], choice) = (self.shape, self.choice.clone());
        TernaryMatrix { codes: self.codes.val(), scale, n, k, scales, choice }
    }

    fn is_canonical(&self) -> bool {
        self.choice.as_ref().is_none_or(|choice| choice.layout().is_none())
    }

    fn format(&self) -> [i32; 5] {
        let number = |n: usize| i32::try_from(n).unwrap_or(i32::MAX);
        let [n, k] = self.shape;
        let weights = match self.quantisation.scale {
            WeightScale::Tensor => -1,
            scale => number(scale.group()),
        };
        [VERSION, number(n), number(k), weights, self.quantisation.activation_group(k).map_or(-1, number)]
    }

    fn format_param(&self) -> Param<Tensor<1, Int>> {
        let format = self.format().to_vec();
        let init = move |device: &Device, _| {
            let shape = [format.len()];
            Tensor::from_data(TensorData::new(format, shape), (device, DType::I32))
        };
        Param::uninitialized(self.format, init, self.codes.lazy_device(), false, Shape::new([5]))
    }

    /// The codes as records have them. Private ones are unpacked where the value is asked for.
    ///
    /// # Panics
    /// There, if the kernel that packed them can't unpack them any more.
    fn words_param(&self) -> Param<Tensor<2, Int>> {
        if self.is_canonical() {
            return self.codes.clone();
        }
        let [n, k] = self.shape;
        let matrix = self.matrix();
        let init = move |device: &Device, _| {
            let canonical = matrix.into_canonical().unwrap_or_else(|error| {
                panic!("packed weights [{n}, {k}] can't be saved: {error}; `BitLinear::into_canonical` returns this error")
            });
            canonical.codes.to_device(device)
        };
        let shape = Shape::new([n, canonical::row_bytes(k) / 4]);
        Param::uninitialized(self.codes.id, init, self.codes.lazy_device(), false, shape)
    }

    /// The scales as records have them: f32, which every device has.
    fn scale_param(&self) -> Param<Tensor<1>> {
        if !self.scale.is_initialized() || self.scale.val().dtype() == DType::F32 {
            return self.scale.clone();
        }
        Param::initialized(self.scale.id, self.scale.val().cast(DType::F32))
    }

    /// Why a record's `format` does not fit.
    fn refused(&self, found: &[i64]) -> Option<String> {
        let expected = self.format().map(i64::from);
        if found == expected {
            return None;
        }
        let &[version, n, k, weights, activations] = found else {
            return Some(format!("its format has {} numbers instead of 5", found.len()));
        };
        if version != i64::from(VERSION) {
            return Some(format!(
                "the record has version {version}, and this version of bitnet-burn reads version {VERSION}"
            ));
        }
        let of = |n, k, weights: i64, activations: i64| {
            let scale = match weights {
                -1 => "tensor".into(),
                0 => "row".into(),
                group => format!("group:{group}"),
            };
            let activations = match activations {
                -1 => "float".into(),
                0 => "row".into(),
                group => format!("group:{group}"),
            };
            format!("weights [{n}, {k}] with scale {scale} and activations {activations}")
        };
        let [_, n_here, k_here, weights_here, activations_here] = expected;
        let (there, here) =
            (of(n, k, weights, activations), of(n_here, k_here, weights_here, activations_here));
        Some(format!("the record has {there}, and this layer has {here}"))
    }

    /// What was loaded, if it can be computed with.
    fn loaded(&self, words: Param<Tensor<2, Int>>, scale: Param<Tensor<1>>) -> Result<Self, String> {
        let [n, k] = self.shape;
        let unread = |error: &dyn std::fmt::Debug| format!("what was loaded can't be read: {error:?}");
        let (codes, values) = (words.val(), scale.val());
        if codes.dtype() != DType::U32 {
            return Err(format!("its words are {:?} instead of U32", codes.dtype()));
        }
        let data = codes.clone().try_into_data().map_err(|error| unread(&error))?;
        check_canonical(data.as_bytes(), n, k).map_err(|error| error.to_string())?;
        if !values.dtype().is_float() {
            return Err(format!("its scales are {:?} instead of F32", values.dtype()));
        }
        let values = values.cast(DType::F32);
        let data = values.clone().try_into_data().map_err(|error| unread(&error))?;
        if let Some(at) = data.iter::<f32>().position(|scale| !scale.is_finite()) {
            return Err(format!("its scale {at} is not finite"));
        }
        let scales = match self.scales {
            ScaleKind::Groups { weights, activations, .. } => {
                ScaleKind::Groups { weights, activations, half: false }
            }
            ScaleKind::One => ScaleKind::One,
        };
        Ok(Self {
            codes: Param::initialized(words.id, codes),
            scale: Param::initialized(scale.id, values.set_require_grad(false)),
            scales,
            choice: None,
            ..self.clone()
        })
    }

    /// With its tensors on another device. A private packing that kernels there do not read becomes canonical; if it can't,
    /// the next forward pass says why.
    fn on(self, device: &Device, moved: impl Fn(Param<Tensor<1>>) -> Param<Tensor<1>>) -> Self {
        let from = self.codes.lazy_device();
        let remote = devices::is_remote(&from) || devices::is_remote(device);
        let read_there = ops::is_host(&from) == ops::is_host(device) && !remote;
        let canonical =
            (!read_there && !self.is_canonical()).then(|| self.matrix().into_canonical().ok()).flatten();
        let (codes, choice) = match canonical {
            Some(matrix) => (Param::initialized(self.codes.id, matrix.codes), None),
            None => (self.codes, self.choice),
        };
        Self { codes: codes.to_device(device), scale: moved(self.scale), choice, ..self }
    }
}

/// Which weights and activations share a scale, where a layer with `k` inputs that quantises so is packed.
pub(super) fn scale_kind(quantisation: Quantisation, k: usize) -> ScaleKind {
    let group = quantisation.activation_group(k);
    match (quantisation.scale, group) {
        (WeightScale::Tensor, None | Some(0)) => ScaleKind::One,
        (scale, group) => ScaleKind::Groups {
            weights: scale.group(),
            activations: group.unwrap_or(scale.group()),
            half: false,
        },
    }
}

/// A parameter that notes that a record was loaded into it.
macro_rules! noting {
    ($param:expr) => {{
        let loaded = Arc::new(AtomicBool::new(false));
        let note = loaded.clone();
        let param = $param.load_mapper(move |tensor| {
            note.store(true, Ordering::Relaxed);
            tensor
        });
        (param, move || loaded.load(Ordering::Relaxed))
    }};
}

impl Module for PackedWeight {
    /// The weights.
    fn num_params(&self) -> usize {
        self.shape[0] * self.shape[1]
    }

    fn visit<V: ModuleVisitor>(&self, visitor: &mut V) {
        visitor.enter_module("format", CONTAINER);
        visitor.visit_int(&self.format_param());
        visitor.exit_module("format", CONTAINER);
        visitor.enter_module("words", CONTAINER);
        visitor.visit_int(&self.words_param());
        visitor.exit_module("words", CONTAINER);
        visitor.enter_module("scale", CONTAINER);
        visitor.visit_float(&self.scale_param());
        visitor.exit_module("scale", CONTAINER);
    }

    fn map<M: ModuleMapper>(self, mapper: &mut M) -> Self {
        let (format, has_format) = noting!(self.format_param());
        mapper.enter_module("format", CONTAINER);
        let format = mapper.map_int(format);
        mapper.exit_module("format", CONTAINER);
        let refused = has_format().then(|| match format.val().try_into_data() {
            Ok(data) => self.refused(&data.iter::<i64>().collect::<Vec<_>>()),
            Err(error) => Some(format!("its format can't be read: {error:?}")),
        });
        if let Some(Some(reason)) = refused {
            refuse(mapper, &reason, &self.codes.lazy_device());
            return self;
        }
        let (words, has_words) = noting!(self.words_param());
        mapper.enter_module("words", CONTAINER);
        let words = mapper.map_int(words);
        mapper.exit_module("words", CONTAINER);
        let (scale, has_scale) = noting!(self.scale_param());
        mapper.enter_module("scale", CONTAINER);
        let scale = mapper.map_float(scale);
        mapper.exit_module("scale", CONTAINER);
        let reason = match (has_format(), has_words(), has_scale()) {
            (_, false, false) => return self.mapped(words, scale),
            (true, true, true) => match self.loaded(words, scale) {
                Ok(loaded) => return Self { format: format.id, ..loaded },
                Err(reason) => reason,
            },
            (false, ..) => {
                "the record has no `format`: it was saved by a bitnet-burn older than version 1 of records, \
                            which may have written the packing of one machine; save it again from its source"
                    .into()
            }
            (true, ..) => "`words` and `scale` are loaded together or not at all".into(),
        };
        refuse(mapper, &reason, &self.codes.lazy_device());
        self
    }

    fn collect_devices(&self, devices: Devices) -> Devices {
        self.scale.collect_devices(self.codes.collect_devices(devices))
    }

    fn to_device(self, device: &Device) -> Self {
        self.on(device, |scale| scale.to_device(device))
    }

    fn fork(self, device: &Device) -> Self {
        self.on(device, |scale| scale.fork(device))
    }

    fn valid(&self) -> Self {
        Self { training: false, ..self.clone() }
    }

    /// The tensors stay as they are: constants.
    fn train(self) -> Self {
        Self { training: true, ..self }
    }

    fn materialize(self) -> Self {
        self
    }
}

impl PackedWeight {
    /// What a mapper made of the tensors, which are constants: no gradients, and scales that are floats.
    fn mapped(self, words: Param<Tensor<2, Int>>, scale: Param<Tensor<1>>) -> Self {
        // Private codes were handed out unpacked, which counts where the mapper asked for them.
        let (codes, choice) = match (words.is_initialized(), self.is_canonical()) {
            (true, true) => (Param::initialized(words.id, words.val()), self.choice),
            (true, false) => (Param::initialized(words.id, words.val()), None),
            (false, _) => (self.codes, self.choice),
        };
        let scale = match scale.is_initialized().then(|| scale.val()) {
            Some(value) if matches!(value.dtype(), DType::F32 | DType::F16) => {
                Param::initialized(scale.id, value.set_require_grad(false))
            }
            _ => self.scale,
        };
        Self { codes, choice, scale, ..self }
    }
}

/// Makes a loader report that a record was refused: it finds no tensor of this name.
fn refuse<M: ModuleMapper>(mapper: &mut M, reason: &str, device: &Device) {
    let name = format!("refused: {reason}");
    let none = |device: &Device, _| Tensor::<1, Int>::zeros([0], (device, DType::I32));
    mapper.enter_module(&name, CONTAINER);
    mapper.map_int(Param::uninitialized(ParamId::new(), none, device.clone(), false, Shape::new([0])));
    mapper.exit_module(&name, CONTAINER);
}

impl ModuleDisplayDefault for PackedWeight {
    fn content(&self, content: Content) -> Option<Content> {
        let [n, k] = self.shape;
        let layout = if self.is_canonical() { "canonical" } else { "for this machine" };
        content.add_formatted(&format!("PackedWeight {{shape: [{n}, {k}], layout: {layout}}}")).optional()
    }

    fn num_params(&self) -> usize {
        Module::num_params(self)
    }
}

impl ModuleDisplay for PackedWeight {}
