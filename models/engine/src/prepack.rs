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

use std::cell::Cell;
use std::collections::{BTreeMap, HashMap};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::UNIX_EPOCH;

use bitnet_burn_backends::manager::manager;
use bitnet_burn_formats::dense_tiles::{TILE_ROWS, tile, tiled_bytes};
use bitnet_burn_formats::files;
use bitnet_burn_formats::{DenseFormat, FormatError, map_file};
use bitnet_burn_manager::{CpuKernels, LayoutPolicy, ManagerError, Packed};
use bytes::Bytes;
use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::xxh3_64;

use crate::checkpoint::{Checkpoint, Content, LoadError, Weights};
use crate::head::HeadMode;
use bitnet_burn::Projection;
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
    /// What the codes are times; 1 for the head, which has its own scales.
    scale: f32,
    offset: usize,
    bytes: usize,
    /// XXH3 of the bytes: against mistakes of a disk or a copy, not against malice.
    checksum: u64,
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
        let mut add = |entry: Entry, bytes: &[u8]| {
            let offset = end.next_multiple_of(ALIGNMENT);
            out.write_all(&[0; ALIGNMENT][..offset - end])?;
            out.write_all(bytes)?;
            end = offset + bytes.len();
            table.tensors.push(Entry { offset, bytes: bytes.len(), checksum: xxh3_64(bytes), ..entry });
            io::Result::Ok(())
        };
        for layer in 0..config.n_layers {
            for which in in_layer(layer) {
                progress(done, all);
                done += 1;
                let (n, k) = which.shape(config);
                if checkpoint.dense_bytes(layer, which).is_some() {
                    continue;
                }
                let choice = manager().choose(n, k, LayoutPolicy::Any)?;
                let Some(layout) = kept(&choice) else { continue };
                let Weights::Ternary(tensor) = checkpoint.weights(layer, which)? else { continue };
                let Packed::Private(packed) = manager().pack(&choice, &tensor.codes)? else { continue };
                let (name, layout) = (name(layer, which), layout.to_owned());
                let entry =
                    Entry { name, layout, n, k, scale: tensor.scale, offset: 0, bytes: 0, checksum: 0 };
                add(entry, packed.as_slice())?;
            }
            checkpoint.release();
        }
        progress(all - 1, all);
        let tensor = head_tensor(checkpoint)?;
        if let Some(format) = head.int8_format(&tensor) {
            let (n, k) = (tensor.n, tensor.k);
            let fail = |source| PrepackError::Head { tensor: tensor.name.clone(), format, source };
            // Without a size, the conversion says why.
            let mut tiles = vec![0; tiled_bytes(format, n, k).unwrap_or(0)];
            tile((tensor.format, &tensor.data), (n, k), (format, &mut tiles)).map_err(fail)?;
            let layout = format.name().to_owned();
            let entry =
                Entry { name: HEAD.into(), layout, n, k, scale: 1.0, offset: 0, bytes: 0, checksum: 0 };
            add(entry, &tiles)?;
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
    used: Cell<usize>,
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
        let this = Self { path: path.clone(), map, tensors, used: Cell::new(0) };
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
        let entries: Vec<&Entry> = self.tensors.values().collect();
        let map = &self.map;
        let damaged = Mutex::new(None);
        manager().pool().run(entries.len(), &|i| {
            let Entry { name, offset, bytes, checksum, .. } = entries[i];
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
            let (n, k) = which.shape(checkpoint.config());
            let choice = manager().choose(n, k, LayoutPolicy::Any)?;
            let Some((packed, scale)) =
                self.get(&name(0, which), kept(&choice), (n, k), choice.weight_bytes())
            else {
                continue;
            };
            let Weights::Ternary(tensor) = checkpoint.weights(0, which)? else {
                return Err(unusable(&name(0, which)));
            };
            if manager().unpack(&choice, &packed)? != *tensor.codes || scale != tensor.scale {
                return Err(unusable(&name(0, which)));
            }
        }
        if let Some(entry) = self.tensors.get(HEAD) {
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
        self.used.get()
    }

    /// The packed weights of a projection and their scale, if they are in the layout that was chosen.
    pub fn projection(&self, layer: usize, which: Projection, choice: &CpuKernels) -> Option<(Bytes, f32)> {
        if which.expert().is_some() {
            return None;
        }
        let found = self.get(&name(layer, which), kept(choice), choice.shape(), choice.weight_bytes());
        self.count(found)
    }

    /// The output projection [n, k] in tiles of a format.
    pub fn head(&self, format: DenseFormat, (n, k): (usize, usize)) -> Option<Bytes> {
        let found = self.get(HEAD, Some(format.name()), (n, k), tiled_bytes(format, n, k)?);
        self.count(found).map(|(tiles, _)| tiles)
    }

    fn count<T>(&self, found: Option<T>) -> Option<T> {
        self.used.set(self.used.get() + usize::from(found.is_some()));
        found
    }

    fn get(
        &self,
        name: &str,
        layout: Option<&str>,
        shape: (usize, usize),
        bytes: usize,
    ) -> Option<(Bytes, f32)> {
        let entry = self.tensors.get(name)?;
        let fits =
            Some(entry.layout.as_str()) == layout && (entry.n, entry.k) == shape && entry.bytes == bytes;
        fits.then(|| (self.bytes(entry), entry.scale))
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
    for Entry { name, scale, offset, bytes, .. } in &table.tensors {
        let end = offset.checked_add(*bytes).filter(|&end| end <= tensors.len());
        if end.is_none() || !offset.is_multiple_of(ALIGNMENT) {
            return Err(format!("{name} is to lie at byte {offset}, {bytes} long, of {}", tensors.len()));
        }
        if !(scale.is_finite() && *scale >= 0.0) {
            return Err(format!("the scale of {name} is {scale}"));
        }
    }
    Ok(table)
}
