//! Models of random weights, for measuring and for trying things out where no real one is at hand.
//!
//! The files are like published ones in everything but their values: architecture, keys, names, types and
//! sizes. All values come from [`SplitMix64`], seeded by the file's seed and the tensor's name, so that the
//! same options make the same bytes everywhere.
//!
//! | tensor | values |
//! | --- | --- |
//! | projections | -1, 0, 1, equally often (to within 2^-16); scales so that outputs have variance 1: one (I2_S), or random ones of rows (TQ2_0) or groups (Q2_0, PQ2_0) |
//! | routers, parts of gated DeltaNets (F32) | uniform; memories decay by a few percent a row |
//! | norms (F32) | uniform in 0.75 .. 1.25 |
//! | embedding, output head | mean 0, standard deviation 1 / sqrt(hidden), so that logits have variance 1 |
//!
//! An embedding of F32, F16 or BF16 is close to normal (sums of four uniform values). One of Q8_0, Q6_K or
//! Q4_0 is made of random valid blocks (uniform codes with random signs of their scales) instead of being
//! quantised from floats: every row is random, and reading it costs what reading a real one costs.

mod shapes;

use std::cell::Cell;
use std::io::{self, Write};
use std::path::Path;

use bitnet_burn_formats::WriteError;
use bitnet_burn_formats::dense::DenseFormat;
use bitnet_burn_formats::gguf::{Array, GgufWriter, TensorType};
use bitnet_burn_formats::random::SplitMix64;

use crate::checkpoint::gguf::names::{INT8_ACTIVATIONS, float_part_name, int8_rows, norm_name_of};
use crate::gguf::{
    Architecture, GgufWriteError, TernaryType, norm_name, projection_name, tensors_of_layer, write_config,
};
use bitnet_burn::{ConfigError, FloatPart, ModelConfig, Norm, Projection};

pub use shapes::{SHAPES, last_tokens, set_layers, shape};

/// Which weights of a projection share a scale, and the type that holds them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum SynthScales {
    /// All: I2_S.
    #[default]
    Tensor,
    /// Those of a row: TQ2_0 with the same scale in all blocks of a row.
    Row,
    /// Groups of 64: Q2_0.
    Group64,
    /// Groups of 128: PQ2_0.
    Group128,
}

impl SynthScales {
    /// The type of the projections.
    pub fn tensor_type(self) -> TensorType {
        match self {
            Self::Tensor => TensorType::I2_S,
            Self::Row => TensorType::TQ2_0,
            Self::Group64 => TensorType::Dense(DenseFormat::Q2_0),
            Self::Group128 => TensorType::Dense(DenseFormat::PQ2_0),
        }
    }

    /// The type of the embedding in published files of such projections.
    pub fn embedding(self) -> DenseFormat {
        match self {
            Self::Tensor | Self::Row => DenseFormat::Q6_K,
            Self::Group64 => DenseFormat::Q2_0,
            Self::Group128 => DenseFormat::PQ2_0,
        }
    }
}

/// Tokens that the tokenizer needs: one a byte, and the three with a role.
pub const MIN_VOCABULARY: usize = 256 + 3;

/// What to write.
#[derive(Clone, Debug)]
pub struct SynthOptions {
    /// The model's shape. The architecture in the file follows from its activation and sub-norms.
    pub config: ModelConfig,
    /// Which weights of a projection share a scale.
    pub scales: SynthScales,
    /// Type of the embedding, and of the output head where that is not tied.
    pub embedding: DenseFormat,
    /// Other seeds make other weights.
    pub seed: u64,
}

/// Why nothing was written.
#[derive(Debug, thiserror::Error)]
pub enum SynthError {
    /// The shape is impossible.
    #[error("the shape is impossible: {0}")]
    Config(#[from] ConfigError),
    /// The vocabulary is too small for its tokenizer.
    #[error(
        "a vocabulary of {0} tokens is too small: the tokenizer takes {MIN_VOCABULARY}, one for each byte, and \
         the beginning of text and the ends of text and turn"
    )]
    Vocabulary(usize),
    /// The matrices of all experts are one tensor.
    #[error(
        "I2_S has one scale for all experts of a layer; choose scales of rows or groups (`--scales row`)"
    )]
    Experts,
    /// The file.
    #[error(transparent)]
    Write(#[from] WriteError),
    /// The configuration.
    #[error(transparent)]
    Gguf(#[from] GgufWriteError),
}

/// Writes a model; `progress` gets the bytes of the tensors written so far, and of all. Returns the size of
/// the file.
///
/// # Errors
/// If the shape is impossible, GGUF can't hold it (I2_S and PQ2_0 take K in multiples of 128, Q6_K and TQ2_0 of 256, Q2_0
/// of 64, Q8_0 and Q4_0 of 32), or the file can't be written; an existing file is then as it was.
pub fn write(path: &Path, options: &SynthOptions, progress: &dyn Fn(u64, u64)) -> Result<u64, SynthError> {
    let config = &options.config;
    config.validate()?;
    if config.vocab_size < MIN_VOCABULARY {
        return Err(SynthError::Vocabulary(config.vocab_size));
    }
    if config.options.experts.is_some() && options.scales == SynthScales::Tensor {
        return Err(SynthError::Experts);
    }
    let (written, total) = (Cell::new(0u64), Cell::new(0u64));
    let advance = |bytes: usize| {
        written.set(written.get() + bytes as u64);
        progress(written.get(), total.get());
    };
    let mut writer = GgufWriter::new();
    write_config(&mut writer, config)?;
    tokenizer(&mut writer, config)?;
    let architecture = Architecture::of(config, TernaryType::I2_S).map_or("", Architecture::name);
    if options.scales != SynthScales::Tensor && int8_rows(architecture, TensorType::TQ2_0) {
        // BitNet's files have one scale for a tensor, if this does not say otherwise.
        writer.set(format!("{architecture}.{INT8_ACTIVATIONS}"), false)?;
    }
    dense(&mut writer, "token_embd.weight", options, &advance)?;
    for layer in 0..config.n_layers {
        for which in Norm::of_layer(layer, config) {
            norm(&mut writer, norm_name_of(architecture, which), which.len(config), options)?;
        }
        for which in FloatPart::of_layer(layer, config) {
            float_part(&mut writer, layer, which, options)?;
        }
        for all in tensors_of_layer(layer, config) {
            projection(&mut writer, layer, &all, options, &advance)?;
        }
    }
    norm(&mut writer, norm_name(Norm::Output), config.hidden_size, options)?;
    if !config.tied_embeddings {
        dense(&mut writer, "output.weight", options, &advance)?;
    }
    let size = writer.file_size();
    total.set(size);
    writer.write(path)?;
    Ok(size)
}

impl SynthOptions {
    fn random(&self, tensor: &str) -> SplitMix64 {
        SplitMix64::new(self.seed ^ fnv1a(tensor))
    }
}

/// Adds the embedding or the head.
fn dense<'a>(
    writer: &mut GgufWriter<'a>,
    name: &str,
    options: &'a SynthOptions,
    advance: &'a dyn Fn(usize),
) -> Result<(), WriteError> {
    let (format, config) = (options.embedding, &options.config);
    let dims = [config.hidden_size as u64, config.vocab_size as u64];
    let deviation = 1.0 / (config.hidden_size as f32).sqrt();
    // The writer refuses a row that is no whole number of blocks.
    let row = format.row_bytes(config.hidden_size).unwrap_or(0);
    let mut random = options.random(name);
    writer.tensor(name, &dims, format, move |out| {
        let mut bytes = Vec::with_capacity(row);
        for _ in 0..config.vocab_size {
            bytes.clear();
            format.random_row(row / format.block_bytes(), deviation, &mut random, &mut bytes);
            out.write_all(&bytes)?;
            advance(row);
        }
        Ok(())
    })?;
    Ok(())
}

/// Adds the matrix of a projection, or those of all experts.
fn projection<'a>(
    writer: &mut GgufWriter<'a>,
    layer: usize,
    all: &[Projection],
    options: &'a SynthOptions,
    advance: &'a dyn Fn(usize),
) -> Result<(), WriteError> {
    let (which, count, scales) = (all[0], all.len(), options.scales);
    let (n, k) = which.shape(&options.config);
    let name = projection_name(layer, which);
    let mut random = options.random(&name);
    let mut dims = vec![k as u64, n as u64];
    dims.extend(which.expert().map(|_| count as u64));
    writer.tensor(name, &dims, scales.tensor_type(), move |out| {
        let format = match scales {
            SynthScales::Tensor => {
                return random_i2_s(n * k / 4, (1.5 / k as f32).sqrt(), &mut random, out, advance);
            }
            SynthScales::Row => DenseFormat::TQ2_0,
            SynthScales::Group64 => DenseFormat::Q2_0,
            SynthScales::Group128 => DenseFormat::PQ2_0,
        };
        let mut bytes = Vec::with_capacity(format.row_bytes(k).unwrap_or(0));
        for _ in 0..n * count {
            bytes.clear();
            format.random_row(k / format.block_len(), 1.0 / (k as f32).sqrt(), &mut random, &mut bytes);
            if scales == SynthScales::Row {
                // A block ends with its scale.
                let block = format.block_bytes();
                let scale = [bytes[block - 2], bytes[block - 1]];
                bytes.chunks_exact_mut(block).for_each(|bytes| bytes[block - 2..].copy_from_slice(&scale));
            }
            out.write_all(&bytes)?;
            advance(bytes.len());
        }
        Ok(())
    })?;
    Ok(())
}

/// Adds a router, or a part of a gated DeltaNet, as F32.
fn float_part(
    writer: &mut GgufWriter<'_>,
    layer: usize,
    which: FloatPart,
    options: &SynthOptions,
) -> Result<(), WriteError> {
    let name = float_part_name(layer, which);
    let (mut random, [rows, columns]) = (options.random(&name), which.shape(&options.config));
    let centred = |random: &mut SplitMix64| 2.0 * unit(random) - 1.0;
    // Outputs of variance 1, decays of a few percent a row, taps that keep the variance.
    let matrix = (3.0 / columns as f32).sqrt();
    let value = |random: &mut SplitMix64| match which {
        FloatPart::Router | FloatPart::SharedRouter | FloatPart::DeltaDecay | FloatPart::DeltaStrength => {
            centred(random) * matrix
        }
        FloatPart::DeltaConvolution => centred(random) * (3.0 / rows as f32).sqrt(),
        FloatPart::DeltaRate => -0.1 * unit(random),
        FloatPart::DeltaBias => centred(random),
    };
    let values: Vec<f32> = (0..rows * columns).map(|_| value(&mut random)).collect();
    let dims = match which {
        FloatPart::DeltaConvolution => vec![rows as u64, columns as u64],
        FloatPart::DeltaRate | FloatPart::DeltaBias => vec![columns as u64],
        _ => vec![columns as u64, rows as u64],
    };
    writer.tensor(name, &dims, DenseFormat::F32, move |out| {
        values.iter().try_for_each(|value| out.write_all(&value.to_le_bytes()))
    })?;
    Ok(())
}

fn norm(
    writer: &mut GgufWriter<'_>,
    name: String,
    len: usize,
    options: &SynthOptions,
) -> Result<(), WriteError> {
    let mut random = options.random(&name);
    let weights = (0..len).map(|_| 0.75 + 0.5 * unit(&mut random)).collect();
    writer.vector(name, weights)?;
    Ok(())
}

/// A byte-level vocabulary without merges: a token for each byte, the three with a role, and for the rest
/// words that can be told apart in the output.
fn tokenizer(writer: &mut GgufWriter<'_>, config: &ModelConfig) -> Result<(), WriteError> {
    const NORMAL: i32 = 1;
    const CONTROL: i32 = 3;
    let special = |id: usize| {
        let is = |token: Option<&u32>| token.is_some_and(|&t| t as usize == id);
        match () {
            () if is(config.bos_token.as_ref()) => Some("<|begin_of_text|>"),
            () if is(config.eos_tokens.first()) => Some("<|end_of_text|>"),
            () if is(config.eos_tokens.get(1)) => Some("<|eot_id|>"),
            () => None,
        }
    };
    let (mut tokens, mut types) =
        (Vec::with_capacity(config.vocab_size), Vec::with_capacity(config.vocab_size));
    let mut bytes = (0..=255u8).map(byte_character);
    for id in 0..config.vocab_size {
        let (token, kind) = match special(id) {
            Some(name) => (name.to_owned(), CONTROL),
            None => match bytes.next() {
                Some(byte) => (byte.to_string(), NORMAL),
                None => (format!("\u{120}w{id}"), NORMAL),
            },
        };
        tokens.push(token);
        types.push(kind);
    }
    writer.set("tokenizer.ggml.model", "gpt2")?;
    writer.set("tokenizer.ggml.pre", "llama-bpe")?;
    writer.set("tokenizer.ggml.tokens", Array::from_strings(tokens))?;
    writer.set("tokenizer.ggml.token_type", Array::from_i32(types))?;
    writer.set("tokenizer.ggml.merges", Array::from_strings(std::iter::empty::<&str>()))?;
    writer.set("tokenizer.ggml.add_bos_token", true)?;
    writer.set(
        "tokenizer.chat_template",
        "{{ bos_token }}{% for tool in tools or [] %}Tool: {{ tool.function.name }}<|eot_id|>{% endfor %}\
         {% for message in messages %}{{ message.role | capitalize }}: \
         {{ message.content }}<|eot_id|>{% endfor %}{% if add_generation_prompt %}Assistant: {% endif %}",
    )?;
    Ok(())
}

/// The character that stands for a byte in a byte-level vocabulary (GPT-2's `bytes_to_unicode`): itself
/// where it is printable, else one from U+0100 on.
fn byte_character(byte: u8) -> char {
    let printable = |b: u8| matches!(b, 0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff);
    if printable(byte) {
        return char::from(byte);
    }
    let before = (0..byte).filter(|&b| !printable(b)).count() as u32;
    char::from_u32(0x100 + before).expect("below U+0144")
}

/// A whole I2_S tensor: `bytes` of codes, the scale, zeros.
fn random_i2_s(
    bytes: usize,
    scale: f32,
    random: &mut SplitMix64,
    out: &mut dyn Write,
    advance: &dyn Fn(usize),
) -> io::Result<()> {
    // The 81 bytes of four codes 0, 1, 2. Codes are independent, so their order within a block is no matter.
    let table: [u8; 81] = std::array::from_fn(|i| {
        let code = |place: usize| (i / 3usize.pow(place as u32) % 3) as u8;
        code(0) | code(1) << 2 | code(2) << 4 | code(3) << 6
    });
    let mut buffer = [0u8; 1 << 16];
    let mut left = bytes;
    while left > 0 {
        let part = left.min(buffer.len());
        for four in buffer[..part].chunks_mut(4) {
            let word = random.next_u64();
            for (i, byte) in four.iter_mut().enumerate() {
                let sixteen = (word >> (16 * i)) as u16;
                *byte = table[(usize::from(sixteen) * 81) >> 16];
            }
        }
        out.write_all(&buffer[..part])?;
        advance(part);
        left -= part;
    }
    let mut tail = [0u8; 32];
    tail[..4].copy_from_slice(&scale.to_le_bytes());
    out.write_all(&tail)
}

/// Uniform in 0 .. 1.
fn unit(random: &mut SplitMix64) -> f32 {
    (random.next_u64() >> 40) as f32 / (1u64 << 24) as f32
}

/// FNV-1a of a tensor's name.
fn fnv1a(name: &str) -> u64 {
    name.bytes().fold(0xcbf2_9ce4_8422_2325, |h, b| (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::{Checkpoint, OpenOptions};
    use crate::tokenizer::Tokenizer;

    #[test]
    fn named_shapes_are_possible() {
        for name in SHAPES {
            let config = shape(name).unwrap();
            config.validate().unwrap();
            assert_eq!(config.name.unwrap(), format!("synthetic {name}"));
        }
        assert_eq!(shape("7t"), None);
    }

    #[test]
    fn rows_have_the_promised_deviation() {
        let mut random = SplitMix64::new(7);
        for format in DenseFormat::ALL {
            let (k, deviation) = (1 << 16, 0.02f32);
            let bytes = format.row_bytes(k).unwrap();
            let mut row = Vec::new();
            format.random_row(bytes / format.block_bytes(), deviation, &mut random, &mut row);
            assert_eq!(row.len(), bytes);
            let mut values = vec![0.0; k];
            format.decode_row(&row, &mut values).unwrap();
            let mean = values.iter().map(|&v| f64::from(v)).sum::<f64>() / k as f64;
            let square = values.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>() / k as f64;
            let name = format.name();
            assert!(mean.abs() < 1e-3, "{name}: mean {mean}");
            assert!((square.sqrt() / 0.02 - 1.0).abs() < 0.03, "{name}: deviation {}", square.sqrt());
        }
    }

    #[test]
    fn a_written_model_opens_checks_and_is_the_same_again() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("tiny.gguf");
        use SynthScales::{Group64, Group128, Row, Tensor};
        for (embedding, tied, scales) in [
            (DenseFormat::Q6_K, true, Tensor),
            (DenseFormat::F16, false, Tensor),
            (DenseFormat::Q2_0, true, Group64),
            (DenseFormat::PQ2_0, false, Group128),
            (DenseFormat::Q6_K, false, Row),
        ] {
            let mut config = ModelConfig { tied_embeddings: tied, ..shape("tiny").unwrap() };
            if scales != Tensor {
                config = shapes::qwen3(ModelConfig { intermediate_size: 768, ..config });
            }
            let mut options = SynthOptions { config, scales, embedding, seed: 3 };
            let seen = Cell::new((0, 0));
            let size = write(&path, &options, &|done, all| seen.set((done, all))).unwrap();
            assert_eq!(std::fs::metadata(&path).unwrap().len(), size);
            assert!(seen.get().0 > 0 && seen.get().0 <= seen.get().1);
            let checkpoint = Checkpoint::open(&path, &OpenOptions::default()).unwrap();
            assert_eq!(checkpoint.warnings(), [""; 0]);
            assert_eq!(*checkpoint.config(), options.config);
            let report = checkpoint.check().unwrap();
            assert_eq!(report.ternary_weights, options.config.ternary_parameters());
            let shared = match scales {
                Tensor => "tensor",
                Row => "row",
                Group64 => "group:64",
                Group128 => "group:128",
            };
            assert_eq!(report.scales, [(shared.to_owned(), 14)].into());
            let zeros = report.zero_weights as f64 / report.ternary_weights as f64;
            assert!((zeros - 1.0 / 3.0).abs() < 0.01, "{zeros}");
            let tokenizer = Tokenizer::from_source(&checkpoint.tokenizer_source(), 512).unwrap();
            assert_eq!(tokenizer.warnings(), [""; 0]);
            for text in ["Grüße, 世界!\n", " w400 and w401", "<|eot_id|>"] {
                let ids = tokenizer.encode(text, true).unwrap();
                assert_eq!(ids[0], 509);
                assert_eq!(tokenizer.decode(&ids[1..], false).unwrap(), text);
            }
            assert_eq!(tokenizer.end_of_generation(), [510, 511]);

            drop(checkpoint);
            let first = std::fs::read(&path).unwrap();
            write(&path, &options, &|_, _| ()).unwrap();
            assert_eq!(first, std::fs::read(&path).unwrap());
            options.seed = 4;
            write(&path, &options, &|_, _| ()).unwrap();
            assert_ne!(first, std::fs::read(&path).unwrap());
        }
    }

    #[test]
    fn experts_and_gated_delta_nets_are_written() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("model.gguf");
        for (name, scales) in [
            ("tiny-hybrid", SynthScales::Tensor),
            ("tiny-hybrid", SynthScales::Group128),
            ("tiny-experts", SynthScales::Row),
        ] {
            let config = shape(name).unwrap();
            let options = SynthOptions { config, scales, embedding: DenseFormat::Q6_K, seed: 3 };
            let size = write(&path, &options, &|_, _| ()).unwrap();
            assert_eq!(std::fs::metadata(&path).unwrap().len(), size);
            let checkpoint = Checkpoint::open(&path, &OpenOptions::default()).unwrap();
            assert_eq!(checkpoint.config(), &options.config);
            assert_eq!(checkpoint.warnings(), [""; 0]);
            checkpoint.check().unwrap();
        }
        let config = shape("tiny-experts").unwrap();
        let options =
            SynthOptions { config, scales: SynthScales::Tensor, embedding: DenseFormat::F16, seed: 0 };
        assert!(matches!(write(&path, &options, &|_, _| ()), Err(SynthError::Experts)));
    }

    #[test]
    fn what_the_file_cannot_hold_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.gguf");
        let error = |change: fn(&mut ModelConfig)| {
            let mut config = shape("tiny").unwrap();
            change(&mut config);
            let scales = SynthScales::Tensor;
            let options = SynthOptions { config, scales, embedding: DenseFormat::Q6_K, seed: 0 };
            write(&path, &options, &|_, _| ()).unwrap_err().to_string()
        };
        assert!(error(|c| c.n_layers = 0).contains("n_layers"));
        assert!(error(|c| c.intermediate_size = 600).contains("multiple of 128"));
        assert!(error(|c| c.hidden_size = 128).contains("multiple of 256"));
        assert!(
            error(|c| {
                c.vocab_size = 100;
                c.bos_token = None;
                c.eos_tokens.clear();
            })
            .contains("too small")
        );
        assert!(!path.exists());
    }
}
