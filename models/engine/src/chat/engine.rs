//! minijinja, brought to what Jinja2 does and bounded.

use std::time::SystemTime;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Rest};
use minijinja::{AutoEscape, Environment, Error, State, UndefinedBehavior, Value};

use super::strftime::strftime;
use super::text::to_text;
use super::values::{error, make};
use super::{filters, methods, operators, source};

/// How much work a template may do: an instruction takes 1 and 64 bytes take 1. Some 100 a message are usual.
pub const FUEL: u64 = 1_000_000;

/// What `raise_exception` was called with, on its way through minijinja.
#[derive(Debug)]
pub struct Refusal(pub String);

impl std::fmt::Display for Refusal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Refusal {}

pub fn environment(clock: impl Fn() -> SystemTime + Send + Sync + 'static) -> Environment<'static> {
    let mut environment = Environment::new();
    let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
    environment.set_syntax(syntax.expect("the usual delimiters are valid"));
    environment.set_fuel(Some(FUEL));
    environment.set_undefined_behavior(UndefinedBehavior::Lenient);
    environment.set_auto_escape_callback(|_| AutoEscape::None);
    environment.set_unknown_method_callback(methods::call);
    environment.set_formatter(|out, state, value| {
        let text = to_text(state, value)?;
        out.write_str(&text).map_err(|_| error("the text can't be written"))
    });
    filters::install(&mut environment);
    environment.remove_global("debug");
    environment.add_function(source::OPERATE, operators::operate);
    environment.add_function(source::MAKE, |state: &State<'_, '_>, value: Value| make(state, value));
    environment.add_function("range", methods::range);
    environment.add_function("dict", methods::dict);
    environment.add_function("namespace", |state: &State<'_, '_>, values: Rest<Value>, named: Kwargs| {
        let value = methods::dict(state, values.first().cloned(), named)?;
        minijinja::functions::namespace(Some(value.into()))
    });
    environment.add_function("raise_exception", |message: String| -> Result<Value, Error> {
        Err(error(message.clone()).with_source(Refusal(message)))
    });
    environment.add_function("strftime_now", move |format: &str| strftime(format, clock()));
    environment
}
