//! Weights in the layouts of this machine's kernels, kept in a file beside the model and mapped from then on.
//!
//! Packing takes part of a second for 2B-4T, at every start; [`write()`] does it once. The file belongs to one
//! model, as it was (size and time of modification of its files), and to the layouts that this program's
//! own kernels read: whatever differs at a later start, another choice of kernels among them, is packed again in
//! memory, and a report says so. Layouts of plugins are not kept: what a plugin packs is checked when it is
//! packed. The projections of experts are not kept either: most of them are not read for most tokens.
//!
//! ```text
//! tensors   each at a multiple of 4096 bytes
//! table     JSON: what the model was, and for each tensor its layout, shape, scale, place and checksum
//! 8 bytes   checksum of the table (XXH3, little-endian)
//! 8 bytes   length of the table, little-endian
//! 8 bytes   "BNPACK01"
//! ```

use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::UNIX_EPOCH;

use bitnet_burn_backends::manager::manager;
use bitnet_burn_backends::ops::{self, MatrixScale, TernaryMatrix};
use bitnet_burn_formats::dense_tiles::{TILE_ROWS, tile, tiled_bytes};
use bitnet_burn_formats::files;
use bitnet_burn_formats::scales::stored_bytes;
use bitnet_burn_formats::{DenseFormat, FormatError, Scales, map_file};
use bitnet_burn_manager::{CpuKernels, LayoutPolicy, ManagerError, Packed, ScaleKind, WeightShape};
use burn::tensor::Device;
use bytes::Bytes;
use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::xxh3_64;

use crate::checkpoint::{Checkpoint, Content, LoadError, Weights};
use crate::head::HeadMode;
use crate::projection::{self, Ternary};
use bitnet_burn::{ActivationRule, BitLinear, Projection};
use bitnet_burn_formats::DenseTensor;

const MAGIC: &[u8; 8] = b"BNPACK01";
/// Where tensors begin: a page, which every kernel's alignment divides.
const ALIGNMENT: usize = 4096;
/// The output projection's name.
const HEAD: &str = "output";

/// Why there is no such file, or none that is of use.
#[derive(Debug, thiserror::Error)]
pub enum PrepackError {
    /// The model.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// The kernels.
    #[error(transparent)]
    Kernel(#[from] ManagerError),
    /// The output projection can't be written in that format.
    #[error("the output projection {tensor} as {}: {source}", format.name())]
    Head {
        /// Its tensor.
        tensor: String,
        /// The format.
        format: DenseFormat,
        /// Why.
        source: FormatError,
    },
    /// The kernels that were chosen read every weight as the file has it.
    #[error("there is nothing to pack: the chosen kernels read all weights of {} as they are", .0.display())]
    Nothing(PathBuf),
    /// The model lies in no file.
    #[error("{} is in memory: there is no file to write packed weights beside", .0.display())]
    InMemory(PathBuf),
    /// The file was written for something else, or damaged.
    #[error("{}: {problem}; `bitnet prepack` writes it anew", path.display())]
    Unusable {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        problem: String,
    },
    /// The system.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The system, while writing.
    #[error(transparent)]
    System(#[from] io::Error),
}

/// A file of the model, as it was.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Origin {
    name: String,
    bytes: u64,
    /// Nanoseconds since 1970.
    modified: u64,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Table {
    model: Vec<Origin>,
    tensors: Vec<Entry>,
}

/// A tensor of the file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    /// `layer.projection`, or `output`.
    name: String,
    /// `plugin/layout`, or the format whose tiles these are.
    layout: String,
    n: usize,
    k: usize,
    /// What the codes are times; 1 where there are many scales, or the tiles have their own.
    scale: f32,
    /// Many scales, as kernels read them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    scales: Option<ScalesEntry>,
    offset: usize,
    bytes: usize,
    /// XXH3 of the bytes: against mistakes of a disk or a copy, not against malice.
    checksum: u64,
}

/// Scales of groups: a part of the file of their own.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct ScalesEntry {
    /// Weights of a row that share one; 0 for the whole row.
    group: usize,
    /// Whether they are f16, and not f32.
    half: bool,
    offset: usize,
    bytes: usize,
    checksum: u64,
}

/// A projection that was packed before.
#[derive(Debug)]
pub(crate) struct PackedProjection {
    pub choice: Arc<CpuKernels>,
    pub weights: Bytes,
    pub scale: MatrixScale,
}

impl PackedProjection {
    pub fn into_layer(self, device: &Device) -> BitLinear {
        BitLinear::from_matrix(TernaryMatrix::prepacked(self.choice, self.weights, self.scale, device))
    }
}

/// What was written.
#[derive(Clone, Debug, Serialize)]
pub struct Summary {
    /// The file.
    pub path: PathBuf,
    /// Its size.
    pub bytes: u64,
    /// The layouts in it, each with the number of matrices.
    pub layouts: BTreeMap<String, usize>,
}

/// Where the packed weights of a model are: `model.gguf.prepacked`, or `model.prepacked` in a directory.
pub fn path_of(model: &Path) -> PathBuf {
    if model.is_dir() {
        return model.join("model.prepacked");
    }
    let mut name = model.as_os_str().to_owned();
    name.push(".prepacked");
    name.into()
}

/// The files of a model, as they were opened.
fn origins(checkpoint: &Checkpoint) -> Result<Vec<Origin>, PrepackError> {
    let mut origins = Vec::new();
    for content in checkpoint.contents() {
        let (path, identity) = match content {
            Content::File(path, identity) => (path, identity),
            Content::Memory(path, _) => return Err(PrepackError::InMemory(path)),
        };
        let modified =
            identity.modified().and_then(|at| at.duration_since(UNIX_EPOCH).ok()).unwrap_or_default();
        origins.push(Origin {
            name: path.file_name().unwrap_or_default().to_string_lossy().into_owned(),
            bytes: identity.bytes(),
            modified: modified.as_nanos() as u64,
        });
    }
    Ok(origins)
}

/// The tensor that the output projection is.
fn head_tensor(checkpoint: &Checkpoint) -> Result<DenseTensor, LoadError> {
    match checkpoint.output()? {
        Some(output) => Ok(output),
        None => checkpoint.embedding(),
    }
}

/// What a choice keeps in such a file, if anything: the name of its layout.
fn kept(choice: &CpuKernels) -> Option<&str> {
    choice.layout().filter(|_| choice.is_built_in())
}

fn name(layer: usize, which: Projection) -> String {
    format!("{layer}.{}", which.name())
}

/// Packs a model's weights as the kernels that are chosen for it read them, and writes them to
/// [`path_of`] it. `progress` is told (matrices done, all).
///
/// # Errors
/// [`PrepackError`]; an older file is untouched then.
pub fn write(
    checkpoint: &Checkpoint,
    head: HeadMode,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<Summary, PrepackError> {
    let path = path_of(checkpoint.path());
    let config = checkpoint.config();
    let in_layer = |layer: usize| {
        let all = Projection::of_layer(layer, config).into_iter();
        all.filter(|which| which.expert().is_none())
    };
    let all = (0..config.n_layers).map(|layer| in_layer(layer).count()).sum::<usize>() + 1;
    let mut done = 0;
    let mut table = Table { model: origins(checkpoint)?, tensors: Vec::new() };
    let mut bytes = 0;
    let io_error = |source| PrepackError::Io { path: path.clone(), source };
    files::replace(&path, |out| {
        let mut end = 0usize;
        let mut put = |bytes: &[u8]| {
            let offset = end.next_multiple_of(ALIGNMENT);
            out.write_all(&[0; ALIGNMENT][..offset - end])?;
            out.write_all(bytes)?;
            end = offset + bytes.len();
            io::Result::Ok((offset, bytes.len(), xxh3_64(bytes)))
        };
        let entry = |name: &str, layout: &str, (n, k): (usize, usize), (offset, bytes, checksum)| Entry {
            name: name.to_owned(),
            layout: layout.to_owned(),
            n,
            k,
            scale: 1.0,
            scales: None,
            offset,
            bytes,
            checksum,
        };
        // What a choice keeps of weights.
        let mut ternary = |name: &str, weights: Ternary| -> Result<Option<Entry>, PrepackError> {
            let choice = manager().choose(weights.shape(), LayoutPolicy::Any)?;
            let Some(layout) = kept(&choice) else { return Ok(None) };
            let Packed::Private(packed) = manager().pack(&choice, &weights.codes)? else { return Ok(None) };
            let mut entry = entry(name, layout, choice.shape(), put(packed.as_slice())?);
            match &weights.scale {
                MatrixScale::One(scale) => entry.scale = *scale,
                MatrixScale::Groups { scales, .. } => {
                    let (offset, bytes, checksum) = put(scales.bytes())?;
                    let (group, half) = (scales.group(), scales.is_half());
                    entry.scales = Some(ScalesEntry { group, half, offset, bytes, checksum });
                }
            }
            Ok(Some(entry))
        };
        let rule = checkpoint.activations(ActivationRule::Model);
        for layer in 0..config.n_layers {
            for which in in_layer(layer) {
                progress(done, all);
                done += 1;
                if let Some(weights) = Ternary::of(checkpoint.weights(layer, which)?, rule) {
                    table.tensors.extend(ternary(&name(layer, which), weights)?);
                }
            }
            checkpoint.release();
        }
        progress(all - 1, all);
        let tensor = head_tensor(checkpoint)?;
        let head_of_layers = projection::computes_head(checkpoint, head)?;
        if let Some(weights) =
            head_of_layers.then(|| Ternary::of(Weights::Dense(tensor.clone()), rule)).flatten()
        {
            table.tensors.extend(ternary(HEAD, weights)?);
        } else if let Some(format) = head.int8_format(&tensor) {
            let (n, k) = (tensor.n, tensor.k);
            let fail = |source| PrepackError::Head { tensor: tensor.name.clone(), format, source };
            // Without a size, the conversion says why.
            let mut tiles = vec![0; tiled_bytes(format, n, k).unwrap_or(0)];
            tile((tensor.format, &tensor.data), (n, k), (format, &mut tiles)).map_err(fail)?;
            table.tensors.push(entry(HEAD, format.name(), (n, k), put(&tiles)?));
        }
        checkpoint.release();
        if table.tensors.is_empty() {
            return Err(PrepackError::Nothing(checkpoint.path().to_owned()));
        }
        checkpoint.intact().map_err(LoadError::from)?;
        let text = serde_json::to_vec(&table).map_err(io::Error::from)?;
        out.write_all(&text)?;
        out.write_all(&xxh3_64(&text).to_le_bytes())?;
        out.write_all(&(text.len() as u64).to_le_bytes())?;
        out.write_all(MAGIC)?;
        bytes = end + text.len() + 24;
        Ok(())
    })
    .map_err(|error| match error {
        PrepackError::System(source) => io_error(source),
        error => error,
    })?;
    progress(all, all);
    let mut layouts = BTreeMap::new();
    for entry in table.tensors {
        *layouts.entry(entry.layout).or_default() += 1;
    }
    Ok(Summary { path, bytes: bytes as u64, layouts })
}

/// The packed weights of a model, mapped.
#[derive(Debug)]
pub struct Prepacked {
    path: PathBuf,
    map: Bytes,
    tensors: HashMap<String, Entry>,
    /// The names of those that were taken.
    used: RefCell<HashSet<String>>,
}

impl Prepacked {
    /// Opens what lies beside a model, if anything does, and compares it with its checksums, and what it holds of
    /// the first layer and of the head with the model.
    ///
    /// # Errors
    /// If it was written for another model or by another program, or is damaged.
    pub fn beside(checkpoint: &Checkpoint) -> Result<Option<Self>, PrepackError> {
        let path = path_of(checkpoint.path());
        let Ok(origins) = origins(checkpoint) else { return Ok(None) };
        if !path.is_file() {
            return Ok(None);
        }
        let unusable = |problem: String| PrepackError::Unusable { path: path.clone(), problem };
        let (map, file_map) = map_file(&path).map_err(LoadError::from)?;
        let table = table(&map).map_err(unusable)?;
        if table.model != origins {
            return Err(unusable("the model has changed since it was packed".into()));
        }
        let tensors = table.tensors.into_iter().map(|entry| (entry.name.clone(), entry)).collect();
        let this = Self { path: path.clone(), map, tensors, used: RefCell::default() };
        this.check_sums().map_err(|name| unusable(format!("{name} is damaged")))?;
        this.check(checkpoint).map_err(|error| match error {
            PrepackError::Kernel(error) => unusable(error.to_string()),
            error => error,
        })?;
        if let Some(file_map) = file_map {
            checkpoint.keep_prepacked(file_map);
        }
        Ok(Some(this))
    }

    /// Compares every tensor with its checksum, on all threads; the name of one that differs.
    fn check_sums(&self) -> Result<(), String> {
        let parts = |entry: &Entry| {
            let scales = entry.scales.as_ref().map(|of| (of.offset, of.bytes, of.checksum));
            [Some((entry.offset, entry.bytes, entry.checksum)), scales].map(|part| (entry.name.clone(), part))
        };
        let parts: Vec<_> = self.tensors.values().flat_map(parts).collect();
        let map = &self.map;
        let damaged = Mutex::new(None);
        manager().pool().run(parts.len(), &|i| {
            let (name, Some((offset, bytes, checksum))) = &parts[i] else { return };
            if xxh3_64(&map[*offset..*offset + *bytes]) != *checksum {
                *damaged.lock().unwrap_or_else(PoisonError::into_inner) = Some(name.clone());
            }
        });
        damaged.into_inner().unwrap_or_else(PoisonError::into_inner).map_or(Ok(()), Err)
    }

    fn check(&self, checkpoint: &Checkpoint) -> Result<(), PrepackError> {
        let unusable = |what: &str| PrepackError::Unusable {
            path: self.path.clone(),
            problem: format!("{what} is not what the model has"),
        };
        let all = Projection::of_layer(0, checkpoint.config()).into_iter();
        for which in all.filter(|which| which.expert().is_none()) {
            let name = name(0, which);
            let Some(packed) = self.packed(&name, ActivationRule::Model, true)? else { continue };
            let weights =
                Ternary::of(checkpoint.weights(0, which)?, checkpoint.activations(ActivationRule::Model));
            let same = weights.is_some_and(|weights| {
                let shape = (weights.n, weights.k) == packed.choice.shape();
                shape
                    && weights.codes == manager().unpack(&packed.choice, &packed.weights).unwrap_or_default()
                    && self.has_scale(&name, &weights.scale)
            });
            if !same {
                return Err(unusable(&name));
            }
        }
        // (A head that is ternary was packed like the projections.)
        if let Some(entry) = self.tensors.get(HEAD).filter(|entry| entry.scales.is_none()) {
            let tensor = head_tensor(checkpoint)?;
            let format = DenseFormat::ALL.into_iter().find(|format| format.name() == entry.layout);
            let n = TILE_ROWS.min(tensor.n);
            let rows = tensor.format.row_bytes(tensor.k).map_or(0, |row| n * row);
            let mut want = vec![0; format.and_then(|format| tiled_bytes(format, n, tensor.k)).unwrap_or(0)];
            let tiled = format.is_some_and(|format| {
                let rows = (tensor.format, &tensor.data[..rows]);
                tile(rows, (n, tensor.k), (format, &mut want)).is_ok()
            });
            let shape = (entry.n, entry.k) == (tensor.n, tensor.k);
            if !tiled || !shape || !self.bytes(entry).starts_with(&want) {
                return Err(unusable("the output projection"));
            }
        }
        Ok(())
    }

    /// Matrices that were taken from the file.
    pub fn used(&self) -> usize {
        self.used.borrow().len()
    }

    /// The packed weights of a projection, if they are in the layout that is chosen for them.
    ///
    /// # Errors
    /// If no kernel may compute the shape.
    pub(crate) fn projection(
        &self,
        layer: usize,
        which: Projection,
        rule: ActivationRule,
        device: &Device,
    ) -> Result<Option<PackedProjection>, ManagerError> {
        if which.expert().is_some() {
            return Ok(None);
        }
        let name = name(layer, which);
        Ok(self.count(&name, self.packed(&name, rule, ops::holds_f16(device))?))
    }

    /// The output projection, if it is ternary and in the layout that is chosen for it.
    ///
    /// # Errors
    /// As [`projection`](Self::projection).
    pub(crate) fn ternary_head(
        &self,
        rule: ActivationRule,
        device: &Device,
    ) -> Result<Option<PackedProjection>, ManagerError> {
        Ok(self.count(HEAD, self.packed(HEAD, rule, ops::holds_f16(device))?))
    }

    fn packed(
        &self,
        name: &str,
        rule: ActivationRule,
        holds_f16: bool,
    ) -> Result<Option<PackedProjection>, ManagerError> {
        let Some(entry) = self.tensors.get(name) else { return Ok(None) };
        if !holds_f16 && entry.scales.as_ref().is_some_and(|scales| scales.half) {
            return Ok(None);
        }
        let (scales, scale) = match &entry.scales {
            None => (ScaleKind::One, MatrixScale::One(entry.scale)),
            Some(stored) => {
                let Some(activations) = rule.group(stored.group, entry.k) else { return Ok(None) };
                let scales = self.scales(entry, stored);
                let kind = ScaleKind::Groups { weights: stored.group, activations, half: stored.half };
                (kind, MatrixScale::Groups { scales, activations })
            }
        };
        let of = WeightShape { n: entry.n, k: entry.k, scales };
        let by_row = rule == ActivationRule::Model || rule.group(0, entry.k) == Some(0);
        if of.check().is_err() || scales == ScaleKind::One && !by_row {
            return Ok(None);
        }
        let choice = manager().choose(of, LayoutPolicy::Any)?;
        let fits = kept(&choice) == Some(&entry.layout) && choice.weight_bytes() == entry.bytes;
        let weights = self.bytes(entry);
        Ok(fits.then_some(PackedProjection { choice, weights, scale }))
    }

    /// Whether a tensor of the file has such a scale, or such scales.
    fn has_scale(&self, name: &str, scale: &MatrixScale) -> bool {
        let Some(entry) = self.tensors.get(name) else { return false };
        match (scale, &entry.scales) {
            (MatrixScale::One(scale), None) => *scale == entry.scale,
            (MatrixScale::Groups { scales, .. }, Some(stored)) => self.scales(entry, stored) == *scales,
            _ => false,
        }
    }

    /// The scales of an entry, in place. (Within the map, and as many as it needs: `table` checked that.)
    fn scales(&self, entry: &Entry, ScalesEntry { group, half, offset, bytes, .. }: &ScalesEntry) -> Scales {
        let bytes = self.map.slice(*offset..*offset + *bytes);
        Scales::stored(bytes, *half, entry.n, entry.k, *group).expect("their number was checked")
    }

    /// The output projection [n, k] in tiles of a format.
    pub fn head(&self, format: DenseFormat, (n, k): (usize, usize)) -> Option<Bytes> {
        let entry = self.tensors.get(HEAD)?;
        let fits = entry.layout == format.name() && (entry.n, entry.k) == (n, k);
        let fits = fits && Some(entry.bytes) == tiled_bytes(format, n, k);
        self.count(HEAD, fits.then(|| self.bytes(entry)))
    }

    fn count<T>(&self, name: &str, found: Option<T>) -> Option<T> {
        if found.is_some() {
            self.used.borrow_mut().insert(name.to_owned());
        }
        found
    }

    /// (Within the map: `table` checked that.)
    fn bytes(&self, entry: &Entry) -> Bytes {
        self.map.slice(entry.offset..entry.offset + entry.bytes)
    }
}

/// The table of a file, whose tensors lie within it.
fn table(map: &[u8]) -> Result<Table, String> {
    let cut = || "it is cut off, or no file of packed weights".to_owned();
    let (rest, magic) = map.split_last_chunk::<8>().ok_or_else(cut)?;
    let (rest, length) = rest.split_last_chunk::<8>().ok_or_else(cut)?;
    if magic != MAGIC {
        return Err(cut());
    }
    let (rest, checksum) = rest.split_last_chunk::<8>().ok_or_else(cut)?;
    let length = usize::try_from(u64::from_le_bytes(*length)).map_err(|_| cut())?;
    let at = rest.len().checked_sub(length).ok_or_else(cut)?;
    let (tensors, text) = rest.split_at(at);
    if xxh3_64(text) != u64::from_le_bytes(*checksum) {
        return Err("its table is damaged".into());
    }
    let table: Table = serde_json::from_slice(text).map_err(|error| format!("its table: {error}"))?;
    for Entry { name, n, k, scale, scales, offset, bytes, .. } in &table.tensors {
        let of_scales = scales.as_ref().map(|of| (&of.offset, &of.bytes));
        for (offset, bytes) in [(offset, bytes)].into_iter().chain(of_scales) {
            let end = offset.checked_add(*bytes).filter(|&end| end <= tensors.len());
            if end.is_none() || !offset.is_multiple_of(ALIGNMENT) {
                return Err(format!("{name} is to lie at byte {offset}, {bytes} long, of {}", tensors.len()));
            }
        }
        if let Some(ScalesEntry { group, half, bytes, .. }) = scales
            && stored_bytes(*half, *n, *k, *group) != Some(*bytes)
        {
            return Err(format!("the scales of {name} are {bytes} bytes"));
        }
        if !(scale.is_finite() && *scale >= 0.0) {
            return Err(format!("the scale of {name} is {scale}"));
        }
    }
    Ok(table)
}
