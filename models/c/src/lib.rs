//! The engine for programs in C. `include/bitnet.h` describes each function, and what callers must keep. Nothing here is for Rust.

mod options;

use std::cell::RefCell;
use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, TryLockError};

use bitnet_burn_engine::chat::Message;
use bitnet_burn_engine::generate::Finish;
use bitnet_burn_engine::{Answer, Engine, EngineError, GenerateOptions, Session, Text};

use options::{GenerateOptionsC, OpenOptionsC};

/// `bitnet_status`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Status {
    Ok = 0,
    Invalid = 1,
    Failed = 2,
    Busy = 3,
    TooShort = 4,
    Internal = 5,
}

/// A status other than `Ok`, and its message.
struct Failure(Status, String);

impl Failure {
    fn invalid(message: impl Into<String>) -> Self {
        Self(Status::Invalid, message.into())
    }
}

impl From<EngineError> for Failure {
    fn from(error: EngineError) -> Self {
        Self(Status::Failed, error.to_string())
    }
}

thread_local! {
    static ERROR: RefCell<CString> = RefCell::default();
}

/// Runs a call: keeps the message of a failure, and lets no panic out.
fn call(run: impl FnOnce() -> Result<(), Failure>) -> Status {
    let outcome = catch_unwind(AssertUnwindSafe(run)).unwrap_or_else(|_| {
        let message = "a fault of the library, which a message on standard error describes; please report it";
        Err(Failure(Status::Internal, message.into()))
    });
    let Err(Failure(status, message)) = outcome else { return Status::Ok };
    let message = CString::new(message.replace('\0', "\u{fffd}")).expect("its zero bytes were replaced");
    ERROR.with(|error| *error.borrow_mut() = message);
    status
}

/// What a pointer points to.
///
/// # Safety
/// It is null, or valid for reading as long as the result lives.
unsafe fn argument<'a, T>(name: &str, pointer: *const T) -> Result<&'a T, Failure> {
    // SAFETY: as the caller promises.
    unsafe { pointer.as_ref() }.ok_or_else(|| Failure::invalid(format!("`{name}` is NULL")))
}

/// Where a result goes.
///
/// # Safety
/// It is null, or valid for writing as long as the result lives.
unsafe fn place<'a, T>(name: &str, pointer: *mut T) -> Result<&'a mut T, Failure> {
    // SAFETY: as the caller promises.
    unsafe { pointer.as_mut() }.ok_or_else(|| Failure::invalid(format!("`{name}` is NULL")))
}

/// A text.
///
/// # Safety
/// It is null, or ends with a zero byte and stays as it is as long as the result lives.
unsafe fn text<'a>(name: &str, pointer: *const c_char) -> Result<&'a str, Failure> {
    if pointer.is_null() {
        return Err(Failure::invalid(format!("`{name}` is NULL")));
    }
    // SAFETY: as the caller promises.
    let bytes = unsafe { CStr::from_ptr(pointer) };
    bytes.to_str().map_err(|error| {
        Failure::invalid(format!("`{name}` is not UTF-8: its byte {} is wrong", error.valid_up_to()))
    })
}

/// Copies `values` to a buffer of the caller and their number to `count`, of which `end` are not counted.
///
/// # Safety
/// `buffer` is valid for writing `capacity` values.
unsafe fn copy<T: Copy>(
    values: &[T],
    end: usize,
    buffer: *mut T,
    capacity: usize,
    count: &mut usize,
) -> Result<(), Failure> {
    *count = values.len() - end;
    if capacity < values.len() {
        let message = format!("the buffer has room for {capacity}, and {} are needed", values.len());
        return Err(Failure(Status::TooShort, message));
    }
    if buffer.is_null() && !values.is_empty() {
        return Err(Failure::invalid("the buffer is NULL"));
    }
    if !values.is_empty() {
        // SAFETY: it has room for `capacity` values, which are enough, and the caller's buffer is not the library's.
        unsafe { ptr::copy_nonoverlapping(values.as_ptr(), buffer, values.len()) };
    }
    Ok(())
}

#[unsafe(no_mangle)]
extern "C" fn bitnet_version() -> *const c_char {
    concat!(env!("CARGO_PKG_VERSION"), "\0").as_ptr().cast()
}

#[unsafe(no_mangle)]
extern "C" fn bitnet_error() -> *const c_char {
    ERROR.with(|error| error.borrow().as_ptr())
}

#[unsafe(no_mangle)]
unsafe extern "C" fn bitnet_open(
    path: *const c_char,
    options: *const OpenOptionsC,
    engine: *mut *mut Engine,
) -> Status {
    call(|| {
        // SAFETY: as the header asks.
        let engine = unsafe { place("engine", engine) }?;
        *engine = ptr::null_mut();
        // SAFETY: as the header asks.
        let options = unsafe { options::open(options) }?;
        let opened = match path.is_null() {
            // SAFETY: as the header asks.
            false => options.open(unsafe { text("path", path) }?)?,
            #[cfg(feature = "default-model")]
            true => options.open_built_in()?,
            #[cfg(not(feature = "default-model"))]
            true => return Err(Failure::invalid("`path` is NULL, and this library carries no model")),
        };
        *engine = Box::into_raw(Box::new(opened));
        Ok(())
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn bitnet_engine_free(engine: *mut Engine) {
    // SAFETY: it came from `bitnet_open`, and this is its last use.
    let engine = (!engine.is_null()).then(|| unsafe { Box::from_raw(engine) });
    call(|| {
        drop(engine);
        Ok(())
    });
}

#[unsafe(no_mangle)]
unsafe extern "C" fn bitnet_tokenize(
    engine: *const Engine,
    text: *const c_char,
    special: bool,
    tokens: *mut u32,
    capacity: usize,
    count: *mut usize,
) -> Status {
    call(|| {
        // SAFETY: as the header asks.
        let (engine, text, count) =
            unsafe { (argument("engine", engine)?, self::text("text", text)?, place("count", count)?) };
        let ids = engine.encode(text, special)?;
        // SAFETY: as the header asks.
        unsafe { copy(&ids, 0, tokens, capacity, count) }
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn bitnet_detokenize(
    engine: *const Engine,
    tokens: *const u32,
    count: usize,
    text: *mut c_char,
    capacity: usize,
    length: *mut usize,
) -> Status {
    call(|| {
        // SAFETY: as the header asks.
        let (engine, length) = unsafe { (argument("engine", engine)?, place("length", length)?) };
        let tokens = match count {
            0 => &[][..],
            // SAFETY: as the header asks.
            _ => unsafe { std::slice::from_raw_parts(argument("tokens", tokens)?, count) },
        };
        let tokenizer = engine.tokenizer().ok_or(EngineError::NoTokenizer)?;
        let decoded = tokenizer.decode(tokens, true).map_err(EngineError::from)?;
        let bytes = [decoded.as_bytes(), b"\0"].concat();
        // SAFETY: as the header asks.
        unsafe { copy(&bytes, 1, text.cast(), capacity, length) }
    })
}

/// `bitnet_session`.
#[derive(Debug)]
struct SessionC {
    session: Mutex<Session>,
    engine: Engine,
    cancelled: Arc<AtomicBool>,
}

impl SessionC {
    /// Calls `run` with the session, unless another call has it.
    fn with(&self, run: impl FnOnce(&mut Session) -> Result<(), Failure>) -> Result<(), Failure> {
        match self.session.try_lock() {
            Ok(mut session) => run(&mut session),
            Err(TryLockError::WouldBlock) => Err(Failure(
                Status::Busy,
                "another call uses the session; wait for its end, or cancel it".into(),
            )),
            Err(TryLockError::Poisoned(_)) => {
                Err(Failure(Status::Internal, "a call before this one broke the session; free it".into()))
            }
        }
    }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn bitnet_session_new(engine: *const Engine, session: *mut *mut SessionC) -> Status {
    call(|| {
        // SAFETY: as the header asks.
        let session = unsafe { place("session", session) }?;
        *session = ptr::null_mut();
        // SAFETY: as the header asks.
        let engine = unsafe { argument("engine", engine) }?.clone();
        let made = SessionC { session: Mutex::new(engine.session()?), engine, cancelled: Arc::default() };
        *session = Box::into_raw(Box::new(made));
        Ok(())
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn bitnet_session_free(session: *mut SessionC) {
    // SAFETY: it came from `bitnet_session_new`, and this is its last use.
    let session = (!session.is_null()).then(|| unsafe { Box::from_raw(session) });
    call(|| {
        drop(session);
        Ok(())
    });
}

/// `bitnet_on_text`.
type OnText = Option<unsafe extern "C" fn(text: *const c_char, length: usize, user: *mut c_void) -> bool>;

/// `bitnet_result`, behind its size.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct ResultC {
    size: usize,
    finish: c_int,
    prompt_tokens: u32,
    cached_tokens: u32,
    generated_tokens: u32,
    prefill_seconds: f64,
    decode_seconds: f64,
}

impl ResultC {
    fn of(answer: &Answer, size: usize) -> Self {
        let generation = &answer.generation;
        // No context is longer than u32 counts.
        let count = |tokens: usize| u32::try_from(tokens).unwrap_or(u32::MAX);
        Self {
            size,
            finish: match generation.finish {
                Finish::Length => 0,
                Finish::StopToken => 1,
                Finish::StopString => 2,
                Finish::Constraint => 3,
                Finish::Context => 4,
                Finish::Cancelled => 5,
            },
            prompt_tokens: count(generation.prompt_tokens),
            cached_tokens: count(generation.cached_tokens),
            generated_tokens: count(generation.tokens.len()),
            prefill_seconds: generation.prefill.as_secs_f64(),
            decode_seconds: generation.steps.iter().map(std::time::Duration::as_secs_f64).sum(),
        }
    }
}

/// An answer, and where it goes.
struct Listener {
    on_text: OnText,
    user: *mut c_void,
    cancelled: Arc<AtomicBool>,
}

impl Listener {
    /// Passes the pieces of an answer on: the whole text, and what it became.
    fn hear(&self, text: Text<'_>) -> Result<(String, Answer), Failure> {
        let mut text = text.cancel_when(self.cancelled.clone());
        let mut whole = String::new();
        while let Some(piece) = text.next() {
            let piece = piece?;
            whole.push_str(&piece);
            let Some(on_text) = self.on_text else { continue };
            let bytes = [piece.as_bytes(), b"\0"].concat();
            // SAFETY: the caller gave the function and its argument for this call.
            if !unsafe { on_text(bytes.as_ptr().cast(), piece.len(), self.user) } {
                text.cancel();
            }
        }
        Ok((whole, text.finish()))
    }
}

/// What `bitnet_generate` and `bitnet_chat` have in common: their arguments, and the result.
///
/// # Safety
/// As the header says.
unsafe fn generate(
    session: *mut SessionC,
    options: *const GenerateOptionsC,
    (on_text, user): (OnText, *mut c_void),
    result: *mut ResultC,
    run: impl FnOnce(&mut Session, &GenerateOptions, &Listener) -> Result<Answer, Failure>,
) -> Result<(), Failure> {
    // SAFETY: as the header asks.
    let session = unsafe { argument("session", session) }?;
    // SAFETY: as the header asks.
    let options = unsafe { options::generate(options, session.engine.generate_options()) }?;
    // SAFETY: as the header asks.
    let size = match unsafe { result.as_ref() } {
        Some(result) => Some(options::checked_size(result.size, "result")?),
        None => None,
    };
    session.with(|inner| {
        session.cancelled.store(false, Ordering::Relaxed);
        let listener = Listener { on_text, user, cancelled: session.cancelled.clone() };
        let answer = run(inner, &options, &listener)?;
        if let Some(size) = size {
            let known = ResultC::of(&answer, size);
            let length = size.min(size_of::<ResultC>());
            // SAFETY: the caller's structure has `size` bytes.
            unsafe { ptr::copy_nonoverlapping((&raw const known).cast::<u8>(), result.cast::<u8>(), length) };
        }
        Ok(())
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn bitnet_generate(
    session: *mut SessionC,
    prompt: *const c_char,
    options: *const GenerateOptionsC,
    on_text: OnText,
    user: *mut c_void,
    result: *mut ResultC,
) -> Status {
    call(|| {
        // SAFETY: as the header asks.
        let prompt = unsafe { text("prompt", prompt) }?;
        let run = |session: &mut Session, options: &GenerateOptions, listener: &Listener| {
            Ok(listener.hear(session.generate(prompt, options)?)?.1)
        };
        // SAFETY: as the header asks.
        unsafe { generate(session, options, (on_text, user), result, run) }
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn bitnet_chat(
    session: *mut SessionC,
    message: *const c_char,
    options: *const GenerateOptionsC,
    on_text: OnText,
    user: *mut c_void,
    result: *mut ResultC,
) -> Status {
    call(|| {
        // SAFETY: as the header asks.
        let message = unsafe { text("message", message) }?;
        let run = |session: &mut Session, options: &GenerateOptions, listener: &Listener| {
            let before = session.messages().to_vec();
            let answer = match session.chat(message, options) {
                Ok(text) => listener.hear(text),
                Err(error) => Err(error.into()),
            };
            match answer {
                Ok((text, answer)) => {
                    session.push(Message::new("assistant", text));
                    Ok(answer)
                }
                Err(error) => {
                    session.replace(before);
                    Err(error)
                }
            }
        };
        // SAFETY: as the header asks.
        unsafe { generate(session, options, (on_text, user), result, run) }
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn bitnet_session_push(
    session: *mut SessionC,
    role: *const c_char,
    content: *const c_char,
) -> Status {
    call(|| {
        // SAFETY: as the header asks.
        let (session, role, content) =
            unsafe { (argument("session", session)?, text("role", role)?, text("content", content)?) };
        session.with(|session| {
            session.push(Message::new(role, content));
            Ok(())
        })
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn bitnet_session_reset(session: *mut SessionC) -> Status {
    call(|| {
        // SAFETY: as the header asks.
        let session = unsafe { argument("session", session) }?;
        session.with(|session| {
            session.reset();
            Ok(())
        })
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn bitnet_session_cancel(session: *mut SessionC) {
    // SAFETY: as the header asks.
    if let Some(session) = unsafe { session.as_ref() } {
        session.cancelled.store(true, Ordering::Relaxed);
    }
}
