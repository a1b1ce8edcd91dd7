//! The same model with llama.cpp: one of random weights (`bitnet synth`'s) in a published shape, written as I2_S
//! for us and as TQ2_0 and TQ1_0 for llama.cpp, which the crate `llama-cpp-2` builds from source.
//!
//! Engines take turns, a prompt and then tokens one by one, so that all of them meet the machine in the same
//! moods; a read-only stream over memory runs between the rounds. The feed-forward activation is SiLU, the one that
//! every version of llama.cpp computes for the architecture `bitnet`; all else is the shape's. Logits are compared
//! first: they agree but for how activations are quantised (by rows, as the model was trained, or by 256 values).
//!
//! The shape and the number of rounds are arguments, `2b-4t` and 7 if there are none; `BITNET_THREADS` holds for
//! all engines. Building llama.cpp takes CMake, a C++ compiler and libclang (Debian: `apt-get install cmake clang
//! libclang-dev`); without `-march=native` it is built for AVX2 at most:
//!
//! ```sh
//! CFLAGS=-march=native CXXFLAGS=-march=native cargo bench --bench peers --features peers -- small 3
//! ```

use std::ffi::CStr;
use std::num::NonZeroU32;
use std::ops::ControlFlow;
use std::path::Path;
use std::thread::sleep;
use std::time::{Duration, Instant};

use bitnet_burn::CacheType;
use bitnet_burn::{BitNet, Row};
use bitnet_burn::{GatedActivation, ModelConfig};
use bitnet_burn_backends::manager::configure;
use bitnet_burn_benches::{Random, threads};
use bitnet_burn_engine::bench::{BytesPerToken, ReadStream, Spread};
use bitnet_burn_engine::checkpoint::{Checkpoint, OpenOptions};
use bitnet_burn_engine::generate::prefill;
use bitnet_burn_engine::gguf::{GgufTypes, TernaryType};
use bitnet_burn_engine::load::{HeadMode, LoadOptions};
use bitnet_burn_engine::synth;
use bitnet_burn_engine::synth::{SynthOptions, SynthScales};
use bitnet_burn_formats::DenseFormat;
use bitnet_burn_manager::ManagerConfig;
use bitnet_burn_train::export::{ExportOptions, Target, export};
use burn::tensor::{Device, Tensor};
use llama_cpp_2::context::LlamaContext;
use llama_cpp_2::context::params::LlamaContextParams;
use llama_cpp_2::llama_backend::LlamaBackend;
use llama_cpp_2::llama_batch::LlamaBatch;
use llama_cpp_2::model::LlamaModel;
use llama_cpp_2::model::params::LlamaModelParams;
use llama_cpp_2::token::LlamaToken;

/// Tokens of the prompt, and generated behind it.
const PROMPT: usize = 128;
const GENERATED: usize = 32;
/// Threads that an engine leaves spinning have gone to sleep after this.
const PAUSE: Duration = Duration::from_millis(50);

/// Seconds of a prompt and of the tokens behind it, and the logits of the prompt's last token.
struct Round {
    prefill: f64,
    decode: f64,
    logits: Vec<f32>,
}

trait Engine {
    /// Computes `tokens`, the first [`PROMPT`] of them at once, from an empty KV cache.
    fn run(&mut self, tokens: &[u32]) -> Round;
}

impl Engine for BitNet {
    fn run(&mut self, tokens: &[u32]) -> Round {
        let values = |logits: Tensor<2>| logits.into_data().iter::<f32>().collect::<Vec<f32>>();
        let mut cache = self.cache(tokens.len(), CacheType::F16).expect("a cache");
        let sequence = cache.add_sequence(tokens.len());
        let clock = Instant::now();
        let logits = prefill(self, &tokens[..PROMPT], sequence, &mut cache, PROMPT).expect("a prompt");
        let logits = values(logits);
        let prefill = clock.elapsed().as_secs_f64();
        let clock = Instant::now();
        for (position, &token) in tokens.iter().enumerate().skip(PROMPT) {
            let row = Row { token, sequence, position };
            values(self.forward(&[row], &[0], &mut cache).expect("a token"));
        }
        Round { prefill, decode: clock.elapsed().as_secs_f64(), logits }
    }
}

impl Engine for LlamaContext<'_> {
    fn run(&mut self, tokens: &[u32]) -> Round {
        self.clear_kv_cache();
        let mut batch = LlamaBatch::new(PROMPT, 1);
        let add = |batch: &mut LlamaBatch, position: usize, logits: bool| {
            let token = LlamaToken(tokens[position] as i32);
            batch.add(token, position as i32, &[0], logits).expect("the batch has room");
        };
        for position in 0..PROMPT {
            add(&mut batch, position, position == PROMPT - 1);
        }
        let clock = Instant::now();
        self.decode(&mut batch).expect("a prompt");
        let logits = self.get_logits_ith(PROMPT as i32 - 1).to_vec();
        let prefill = clock.elapsed().as_secs_f64();
        let clock = Instant::now();
        for position in PROMPT..tokens.len() {
            batch.clear();
            add(&mut batch, position, true);
            self.decode(&mut batch).expect("a token");
            let _ = self.get_logits_ith(0);
        }
        Round { prefill, decode: clock.elapsed().as_secs_f64(), logits }
    }
}

/// An engine, and what it took so far.
struct Contender<'a> {
    name: &'static str,
    engine: Box<dyn Engine + 'a>,
    /// Bytes of weights that a token reads.
    bytes: u64,
    prefill: Vec<f64>,
    decode: Vec<f64>,
}

impl<'a> Contender<'a> {
    fn new(name: &'static str, engine: impl Engine + 'a, bytes: u64) -> Self {
        Self { name, engine: Box::new(engine), bytes, prefill: Vec::new(), decode: Vec::new() }
    }
}

fn write(config: &ModelConfig, dir: &Path) -> Checkpoint {
    let path = dir.join("i2_s.gguf");
    let options = SynthOptions {
        config: config.clone(),
        scales: SynthScales::Tensor,
        embedding: DenseFormat::Q6_K,
        seed: 0,
    };
    synth::write(&path, &options, &|_, _| {}).expect("the temporary directory has room");
    let checkpoint = Checkpoint::open(&path, &OpenOptions::default()).expect("what synth writes");
    for (ternary, name) in [(TernaryType::TQ2_0, "tq2_0.gguf"), (TernaryType::TQ1_0, "tq1_0.gguf")] {
        let options =
            ExportOptions::new(Target::Gguf(GgufTypes { ternary, requantise: true, ..GgufTypes::default() }));
        export(&checkpoint, &dir.join(name), &options, &mut |_| ControlFlow::Continue(())).expect("exports");
    }
    checkpoint
}

/// The cosine of the angle between two vectors of logits.
fn cosine(a: &[f32], b: &[f32]) -> f32 {
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f32>();
    dot(a, b) / (dot(a, a) * dot(b, b)).sqrt()
}

fn main() {
    let mut arguments = std::env::args().skip(1).filter(|argument| !argument.starts_with("--"));
    let shape = arguments.next().unwrap_or_else(|| "2b-4t".into());
    let rounds: usize = arguments.next().map_or(7, |rounds| rounds.parse().expect("a number of rounds"));
    let config = synth::shape(&shape).unwrap_or_else(|| panic!("no shape {shape}: {:?}", synth::SHAPES));
    let config = ModelConfig { activation: GatedActivation::Silu, ..config };
    let dir = tempfile::tempdir().expect("a temporary directory");
    let checkpoint = write(&config, dir.path());

    let kernels = ManagerConfig { threads: threads(), ..ManagerConfig::default() };
    let (manager, _) = configure(kernels, &[]).expect("nobody has used the kernels yet");
    let ours = |head: HeadMode| {
        let options = LoadOptions { head, ..LoadOptions::default() };
        load(&checkpoint, &Device::flex(), &options, &mut |_| {}).expect("loads")
    };
    let mut backend = LlamaBackend::init().expect("the first one in the process");
    backend.void_logs();
    let theirs = ["tq2_0.gguf", "tq1_0.gguf"].map(|name| {
        let path = dir.path().join(name);
        let model = LlamaModel::load_from_file(&backend, &path, &LlamaModelParams::default());
        (model.expect("llama.cpp loads what was exported"), path.metadata().expect("a file").len())
    });
    let parameters = LlamaContextParams::default()
        .with_n_ctx(NonZeroU32::new((PROMPT + GENERATED) as u32))
        .with_n_threads(threads() as i32)
        .with_n_threads_batch(threads() as i32);
    let mut contenders = Vec::new();
    for (name, head) in [("ours, head f32", HeadMode::File), ("ours, head int8", HeadMode::Int8)] {
        let model = ours(head);
        let bytes = BytesPerToken::of(&model).expect("kernels").total();
        contenders.push(Contender::new(name, model, bytes));
    }
    for (name, (model, bytes)) in ["llama.cpp TQ2_0", "llama.cpp TQ1_0"].into_iter().zip(&theirs) {
        let context = model.new_context(&backend, parameters.clone()).expect("a context");
        contenders.push(Contender::new(name, context, *bytes));
    }
    // SAFETY: a text of the library's own, there as long as the process.
    let features = unsafe { CStr::from_ptr(llama_cpp_sys_2::llama_print_system_info()) };
    println!(
        "{shape} with SiLU, {} thread(s); llama.cpp was built for: {}",
        threads(),
        features.to_string_lossy()
    );

    // Everything once, without counting.
    let mut random = Random::new(1);
    let mut tokens = || -> Vec<u32> {
        (0..PROMPT + GENERATED).map(|_| (random.bits() >> 33) as u32 % config.vocab_size as u32).collect()
    };
    let first = tokens();
    let logits: Vec<Vec<f32>> = contenders.iter_mut().map(|c| c.engine.run(&first).logits).collect();
    for (contender, other) in contenders.iter().zip(&logits).skip(1) {
        let same = cosine(&logits[0], other);
        println!("logits of {} and of {}: cosine {same:.4}", contenders[0].name, contender.name);
        assert!(same > 0.9, "it computes something else");
    }

    let stream = ReadStream::new(ReadStream::default_bytes(), manager.pool()).expect("memory");
    let mut bandwidths = Vec::new();
    for round in 0..rounds {
        let tokens = tokens();
        sleep(PAUSE);
        bandwidths.push(stream.gb_per_s(manager.pool()));
        for i in 0..contenders.len() {
            let at = (round + i) % contenders.len();
            let contender = &mut contenders[at];
            sleep(PAUSE);
            let Round { prefill, decode, .. } = contender.engine.run(&tokens);
            contender.prefill.push(PROMPT as f64 / prefill);
            contender.decode.push(GENERATED as f64 / decode);
        }
    }
    print(&contenders, Spread::of(&bandwidths).expect("rounds"));
}

/// A table of medians (min-max), in tokens a second, each engine beside the first.
fn print(contenders: &[Contender], bandwidth: Spread) {
    let spread = |samples: &[f64]| Spread::of(samples).expect("rounds");
    let text = |s: Spread| format!("{:.1} ({:.1}-{:.1})", s.median, s.min, s.max);
    println!("memory read: {} GB/s", text(bandwidth));
    println!(
        "| engine | prefill {PROMPT}, tokens/s | ours : it | decode {GENERATED}, tokens/s | ours : it | share of the bandwidth |"
    );
    println!("| --- | --- | --- | --- | --- | --- |");
    let (first_prefill, first_decode) = (spread(&contenders[0].prefill), spread(&contenders[0].decode));
    for contender in contenders {
        let (prefill, decode) = (spread(&contender.prefill), spread(&contender.decode));
        println!(
            "| {} | {} | {:.2} | {} | {:.2} | {:.0} % |",
            contender.name,
            text(prefill),
            first_prefill.median / prefill.median,
            text(decode),
            first_decode.median / decode.median,
            decode.median * contender.bytes as f64 / (bandwidth.median * 1e7)
        );
    }
}
