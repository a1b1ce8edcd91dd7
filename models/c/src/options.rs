//! Options as C has them: structures that can grow, and their values.

use std::ffi::{c_char, c_int};
use std::mem::MaybeUninit;
use std::ptr;

use bitnet_burn::CacheType;
use bitnet_burn_backends::manager;
use bitnet_burn_engine::device::DeviceSpec;
use bitnet_burn_engine::load::HeadMode;
use bitnet_burn_engine::{Constraint, Engine, EngineError, EngineOptions, GenerateOptions};
use bitnet_burn_formats::DenseFormat;
use bitnet_burn_manager::ManagerConfig;

use crate::{Failure, text};

/// `bitnet_open_options`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct OpenOptionsC {
    size: usize,
    threads: u32,
    context: u32,
    kv_cache: c_int,
    lm_head: c_int,
    device: *const c_char,
}

/// `bitnet_generate_options`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct GenerateOptionsC {
    size: usize,
    max_new_tokens: u32,
    temperature: f32,
    top_k: u32,
    top_p: f32,
    min_p: f32,
    repetition_penalty: f32,
    seed: u64,
    stop: *const *const c_char,
    stop_count: usize,
    json_schema: *const c_char,
}

/// Structures of C that begin with their size, for which zeroes are valid.
trait ByC: Copy {}
impl ByC for OpenOptionsC {}
impl ByC for GenerateOptionsC {}

/// The size that a caller's structure says it has.
pub(crate) fn checked_size(size: usize, name: &str) -> Result<usize, Failure> {
    match size {
        // Larger ones are programs that forgot to set it.
        8..=4096 => Ok(size),
        _ => {
            Err(Failure::invalid(format!("the field `size` of `{name}` is {size}: set it to sizeof *{name}")))
        }
    }
}

/// A structure of the caller's version as one of ours: zero where it has no field.
///
/// # Safety
/// `pointer` is null, or a structure of as many bytes as its first field says.
unsafe fn read<T: ByC>(name: &str, pointer: *const T) -> Result<Option<T>, Failure> {
    if pointer.is_null() {
        return Ok(None);
    }
    // SAFETY: every structure begins with its size.
    let size = checked_size(unsafe { pointer.cast::<usize>().read() }, name)?;
    // SAFETY: as the caller promises.
    let bytes = unsafe { std::slice::from_raw_parts(pointer.cast::<u8>(), size) };
    if bytes.get(size_of::<T>()..).is_some_and(|newer| newer.iter().any(|&byte| byte != 0)) {
        let message = format!(
            "`{name}` has a field that this library, version {}, does not know: leave it at zero, or use a newer library",
            env!("CARGO_PKG_VERSION")
        );
        return Err(Failure::invalid(message));
    }
    let mut known = MaybeUninit::<T>::zeroed();
    // SAFETY: both have that many bytes; numbers and pointers may have any value, zeroes among them.
    unsafe {
        ptr::copy_nonoverlapping(bytes.as_ptr(), known.as_mut_ptr().cast(), size.min(size_of::<T>()));
        Ok(Some(known.assume_init()))
    }
}

/// How an engine is opened.
///
/// # Safety
/// As the header says.
pub(crate) unsafe fn open(options: *const OpenOptionsC) -> Result<EngineOptions, Failure> {
    let engine = Engine::options();
    // SAFETY: as the header asks.
    let Some(options) = (unsafe { read("options", options) })? else { return Ok(engine) };
    let mut engine = engine.kv_cache(match options.kv_cache {
        0 => CacheType::F32,
        1 => CacheType::F16,
        2 => CacheType::Int8,
        other => return Err(Failure::invalid(format!("`kv_cache` is {other}: it must be 0, 1 or 2"))),
    });
    engine = engine.head(match options.lm_head {
        0 => HeadMode::File,
        1 => HeadMode::Int8,
        2 => HeadMode::Requantised(DenseFormat::Q8_0),
        3 => HeadMode::Requantised(DenseFormat::Q6_K),
        4 => HeadMode::Requantised(DenseFormat::Q4_0),
        other => return Err(Failure::invalid(format!("`lm_head` is {other}: it must be between 0 and 4"))),
    });
    if options.context > 0 {
        engine = engine.context(options.context as usize);
    }
    if !options.device.is_null() {
        // SAFETY: as the header asks.
        let name = unsafe { text("device", options.device) }?;
        let device: DeviceSpec = name.parse().map_err(|error| Failure::from(EngineError::from(error)))?;
        engine = engine.device(device);
    }
    if options.threads > 0 {
        engine = threads(engine, options.threads as usize)?;
    }
    Ok(engine)
}

/// The threads belong to the process: the first engine decides, and others may ask for the same.
fn threads(engine: EngineOptions, threads: usize) -> Result<EngineOptions, Failure> {
    if !manager::is_set_up() {
        let config = ManagerConfig::from_env().map_err(|error| Failure::invalid(error.to_string()))?;
        return Ok(engine.kernels(ManagerConfig { threads, ..config }, &[]));
    }
    match manager::manager().pool().threads() {
        has if has == threads => Ok(engine),
        has => Err(Failure::invalid(format!(
            "`threads` is {threads}, and the kernels of this process have {has} since the first engine was opened: use 0"
        ))),
    }
}

/// How an answer is generated.
///
/// # Safety
/// As the header says.
pub(crate) unsafe fn generate(
    options: *const GenerateOptionsC,
    mut defaults: GenerateOptions,
) -> Result<GenerateOptions, Failure> {
    // SAFETY: as the header asks.
    let Some(options) = (unsafe { read("options", options) })? else { return Ok(defaults) };
    let or_off = |value: f32| if value == 0.0 { 1.0 } else { value };
    if options.max_new_tokens > 0 {
        defaults.max_new_tokens = options.max_new_tokens as usize;
    }
    let sampling = &mut defaults.sampling;
    sampling.temperature = options.temperature;
    sampling.top_k = options.top_k as usize;
    sampling.top_p = or_off(options.top_p);
    sampling.min_p = options.min_p;
    sampling.repetition_penalty = or_off(options.repetition_penalty);
    sampling.seed = options.seed;
    sampling.validate().map_err(|error| Failure::invalid(error.to_string()))?;
    if options.stop_count > 0 {
        if options.stop.is_null() {
            return Err(Failure::invalid(format!("`stop` is NULL, and `stop_count` {}", options.stop_count)));
        }
        // SAFETY: as the header asks.
        let stop = unsafe { std::slice::from_raw_parts(options.stop, options.stop_count) };
        for (i, &pointer) in stop.iter().enumerate() {
            let name = format!("stop[{i}]");
            // SAFETY: as the header asks.
            let stop = unsafe { text(&name, pointer) }?;
            if stop.is_empty() {
                return Err(Failure::invalid(format!(
                    "`{name}` is empty: it would end every answer at once"
                )));
            }
            defaults.stop_strings.push(stop.to_owned());
        }
    }
    if !options.json_schema.is_null() {
        // SAFETY: as the header asks.
        let schema = unsafe { text("json_schema", options.json_schema) }?;
        defaults.constraint = Some(Constraint::JsonSchema(schema.to_owned()));
    }
    Ok(defaults)
}
