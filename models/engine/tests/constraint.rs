//! Answers of a given form: every answer that ends by itself has it.
#![cfg(feature = "default-model")]

use std::path::Path;
use std::time::{Duration, Instant};

use bitnet_burn::KvCache;
use bitnet_burn_engine::generate::{Finish, GenerateError, Generator, Step};
use bitnet_burn_engine::schedule::{
    BatchError, Completion, Request, Scheduler, SchedulerOptions, SubmitError,
};
use bitnet_burn_engine::synth::{self, SynthOptions, SynthScales};
use bitnet_burn_engine::tools::{CallForm, Tool};
use bitnet_burn_engine::{Constraint, ConstraintError, Engine, EngineError, GenerateOptions};
use bitnet_burn_formats::DenseFormat;
use serde_json::{Value, json};

/// A model of random weights, whose tokens are the bytes and a few more.
fn random_model(dir: &Path) -> Engine {
    let path = dir.join("tiny.gguf");
    let config = synth::shape("tiny").unwrap();
    let scales = SynthScales::Tensor;
    synth::write(&path, &SynthOptions { config, scales, embedding: DenseFormat::Q6_K, seed: 7 }, &|_, _| {})
        .unwrap();
    Engine::open(path).unwrap()
}

fn request(engine: &Engine, prompt: &str, constraint: Constraint, seed: u64) -> Request {
    let mut options = GenerateOptions { max_new_tokens: 200, ..engine.generate_options() };
    options.sampling.temperature = if seed % 4 == 3 { 0.0 } else { 1.0 };
    options.sampling.seed = seed;
    options.constraint = Some(constraint);
    Request::new(engine.encode(prompt, true).unwrap(), options)
}

fn answers(engine: &Engine, requests: Vec<Request>) -> Vec<Result<Completion, BatchError>> {
    Scheduler::start(engine, SchedulerOptions::of(engine)).unwrap().generate_batch(requests)
}

/// The answers to one constraint with several seeds, and why they ended.
fn texts(engine: &Engine, constraint: &Constraint, count: u64) -> Vec<(String, Finish)> {
    let requests = (0..count).map(|seed| request(engine, "There was", constraint.clone(), seed)).collect();
    let text = |answer: Result<Completion, BatchError>| {
        let answer = answer.unwrap();
        (answer.text, answer.generation.finish)
    };
    answers(engine, requests).into_iter().map(text).collect()
}

/// Numbers for random schemas (SplitMix64).
struct Random(u64);

impl Random {
    fn below(&mut self, n: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % n
    }

    fn schema(&mut self, depth: u64) -> Value {
        match self.below(if depth == 0 { 8 } else { 12 }) {
            0 => json!({ "type": "boolean" }),
            1 => json!({ "type": "null" }),
            2 => {
                let least = self.below(2000) as i64 - 1000;
                json!({ "type": "integer", "minimum": least, "maximum": least + self.below(5000) as i64 })
            }
            3 => json!({ "type": "number", "minimum": 0, "exclusiveMaximum": 1 + self.below(50) }),
            4 => {
                json!({ "enum": (0..1 + self.below(4)).map(|i| json!(format!("é{i}\n"))).collect::<Vec<_>>() })
            }
            5 => json!({ "const": [self.below(9), { "a": null }, "\"\\"] }),
            6 => {
                let least = self.below(4);
                json!({ "type": "string", "minLength": least, "maxLength": least + self.below(8) })
            }
            7 => {
                let pattern = ["^[a-f]{2,4}$", "^(no|yes)+$", r"^\d{4}-\d\d$"][self.below(3) as usize];
                json!({ "type": "string", "pattern": pattern })
            }
            8 => {
                let least = self.below(3);
                json!({ "type": "array", "items": self.schema(depth - 1), "minItems": least, "maxItems": least + self.below(3) })
            }
            9 => {
                json!({ "anyOf": (0..2 + self.below(2)).map(|_| self.schema(depth - 1)).collect::<Vec<_>>() })
            }
            _ => self.object(depth),
        }
    }

    fn object(&mut self, depth: u64) -> Value {
        let names = ["name", "a b", "ä\"", "size", "x"];
        let count = 1 + self.below(names.len() as u64) as usize;
        let properties: Vec<_> = names[..count].iter().map(|&name| (name, self.schema(depth - 1))).collect();
        let required: Vec<_> = names[..count].iter().filter(|_| self.below(3) > 0).collect();
        json!({
            "type": "object",
            "properties": properties.into_iter().map(|(name, schema)| (name.to_owned(), schema))
                .collect::<serde_json::Map<_, _>>(),
            "required": required,
            "additionalProperties": self.below(5) == 0,
        })
    }
}

fn random_schemas(engine: &Engine, seeds: std::ops::Range<u64>) {
    let count = seeds.end - seeds.start;
    let mut schemas = Vec::new();
    let mut requests = Vec::new();
    for seed in seeds {
        let mut random = Random(seed);
        let schema = if seed % 3 == 0 { random.schema(3) } else { random.object(3) };
        let prompt = format!("Object {}:", random.below(1000));
        requests.push(request(engine, &prompt, Constraint::JsonSchema(schema.to_string()), seed));
        schemas.push(schema);
    }
    let mut complete = 0;
    for (answer, schema) in answers(engine, requests).into_iter().zip(&schemas) {
        let answer = answer.unwrap_or_else(|error| panic!("{schema}: {error}"));
        let (text, generation) = (answer.text, answer.generation);
        match generation.finish {
            Finish::StopToken | Finish::Constraint => {
                complete += 1;
                let value: Value =
                    serde_json::from_str(&text).unwrap_or_else(|error| panic!("{schema}\n{text}\n{error}"));
                if let Err(error) = jsonschema::validate(schema, &value) {
                    panic!("{schema}\n{text}\n{error}");
                }
            }
            finish => {
                assert_eq!((finish, generation.tokens.len()), (Finish::Length, 200), "{schema}\n{text}");
            }
        }
    }
    assert!(complete * 2 > count, "{complete} of {count} answers ended by themselves");
}

#[test]
fn answers_to_random_schemas_are_valid() {
    let dir = tempfile::tempdir().unwrap();
    random_schemas(&random_model(dir.path()), 0..50);
}

/// `cargo test --release -p bitnet-burn-engine --features default-model --test constraint -- --ignored schemas`
#[test]
#[ignore = "takes minutes"]
fn answers_to_1000_random_schemas_are_valid() {
    let dir = tempfile::tempdir().unwrap();
    random_schemas(&random_model(dir.path()), 0..1000);
}

#[test]
fn every_kind_of_constraint_holds() {
    let dir = tempfile::tempdir().unwrap();
    let engine = random_model(dir.path());
    for (text, finish) in texts(&engine, &Constraint::Regex("[0-9]{3}(-[a-c]{2})?".into()), 6) {
        assert!(matches!(finish, Finish::StopToken | Finish::Constraint), "{text:?} {finish:?}");
        let (digits, rest) = text.split_at(3);
        assert!(digits.bytes().all(|byte| byte.is_ascii_digit()), "{text:?}");
        let letters = rest.strip_prefix('-').unwrap_or_default();
        assert!(letters.bytes().all(|byte| (b'a'..=b'c').contains(&byte)), "{text:?}");
        assert!(matches!((rest.len(), letters.len()), (0, 0) | (3, 2)), "{text:?}");
    }
    let choices = ["yes", "a \"no\"\n", "größer/kleiner\u{7f}"].map(String::from);
    let chosen = texts(&engine, &Constraint::Choice(choices.to_vec()), 12);
    assert!(chosen.iter().all(|(text, finish)| choices.contains(text) && *finish == Finish::Constraint));
    assert!(choices.iter().all(|choice| chosen.iter().any(|(text, _)| text == choice)), "{chosen:?}");
    let grammar = "start: \"(\" item (\",\" item)* \")\"\nitem: /[a-z]{1,3}/ | start\n";
    for (text, finish) in texts(&engine, &Constraint::Grammar(grammar.into()), 6) {
        assert!(text.starts_with('('), "{text}");
        let count = |c| text.chars().filter(|&found| found == c).count();
        match finish {
            Finish::Length => assert!(count('(') >= count(')')),
            _ => assert!(count('(') == count(')') && text.ends_with(')'), "{text}"),
        }
    }
    for (text, finish) in texts(&engine, &Constraint::Json, 4) {
        assert!(text.trim_start().starts_with('{'), "{text}");
        let whole = serde_json::from_str::<serde_json::Map<String, Value>>(&text).is_ok();
        assert_eq!(whole, finish != Finish::Length, "{text}");
    }
}

#[test]
fn calls_of_tools_have_the_model_s_form() {
    let dir = tempfile::tempdir().unwrap();
    let engine = random_model(dir.path());
    let place = json!({
        "properties": { "place": { "$ref": "#/$defs/place" }, "days": { "type": "integer", "minimum": 1, "maximum": 9 } },
        "required": ["place"],
        "additionalProperties": false,
        "$defs": { "place": { "enum": ["Bern", "Oslo"] } },
    });
    let tools = [
        Tool { name: "weather".into(), parameters: Some(place) },
        Tool {
            name: "t-ime".into(),
            parameters: Some(json!({ "type": "object", "additionalProperties": false })),
        },
    ];
    for form in [CallForm::Hermes, CallForm::Xml, CallForm::Llama, CallForm::Mistral, CallForm::MistralArgs] {
        // The first one alone, too: a random model may never choose it.
        let mut answers = texts(&engine, &form.constraint(&tools), 6);
        answers.extend(texts(&engine, &form.constraint(&tools[..1]), 6));
        // (It may also write much white space.)
        answers.retain(|(_, finish)| *finish != Finish::Length);
        assert!(answers.len() > 3, "{form:?}: {answers:?}");
        for (text, _) in &answers {
            let calls = form.parse(&format!("{}{text}", form.prompt()), &tools);
            let Some([call]) = calls.as_deref() else { panic!("{form:?}: {text}") };
            let arguments: Value = serde_json::from_str(&call.arguments).unwrap();
            match call.name.as_str() {
                "weather" => {
                    assert!(["Bern", "Oslo"].contains(&arguments["place"].as_str().unwrap()));
                    assert!(
                        arguments.get("days").is_none_or(|days| (1..=9).contains(&days.as_i64().unwrap()))
                    );
                }
                name => assert_eq!((name, &arguments), ("t-ime", &json!({}))),
            }
        }
    }
    // Texts that are written as they are.
    let note = json!({ "properties": { "text": { "type": "string" }, "kind": { "enum": ["a", "b"] } },
        "required": ["kind", "text"] });
    let tools = [Tool { name: "note".into(), parameters: Some(note) }];
    let mut request = request(&engine, "There was", CallForm::Xml.constraint(&tools), 3);
    request.options.max_new_tokens = 2000;
    request.options.sampling.temperature = 2.0;
    let answer = answers(&engine, vec![request]).remove(0).unwrap();
    if answer.generation.finish == Finish::Constraint {
        let calls = CallForm::Xml.parse(&answer.text, &tools).unwrap();
        let arguments: Value = serde_json::from_str(&calls[0].arguments).unwrap();
        assert!(arguments["text"].is_string() && ["a", "b"].contains(&arguments["kind"].as_str().unwrap()));
    } else {
        assert!(answer.text.starts_with("<tool_call>\n<function=note>\n<parameter="), "{}", answer.text);
    }
}

#[test]
fn sessions_and_schedulers_draw_the_same_tokens() {
    let engine = Engine::options().open_built_in().unwrap();
    let text = "Once there was a fox named Mo. Mo had a red ball.";
    let constraint = Constraint::Regex(r"( Mo (had|liked) (a|the) [a-z]+\.){2,9}".into());
    let requests: Vec<_> = (0..6).map(|seed| request(&engine, text, constraint.clone(), seed)).collect();
    let mut session = engine.session().unwrap();
    let alone: Vec<_> = requests
        .iter()
        .map(|request| {
            let mut text = session.generate_text(&request.prompt, &request.options).unwrap();
            let shown: String = text.by_ref().map(Result::unwrap).collect();
            let generation = text.finish().generation;
            (shown, generation.tokens, generation.finish)
        })
        .collect();
    assert!(alone.iter().any(|(_, _, finish)| *finish != Finish::Length));
    for draft in [0, 8] {
        let options = SchedulerOptions { draft, ..SchedulerOptions::of(&engine) };
        let scheduler = Scheduler::start(&engine, options).unwrap();
        for (answer, expected) in scheduler.generate_batch(requests.clone()).into_iter().zip(&alone) {
            let answer = answer.unwrap();
            assert_eq!((answer.text, answer.generation.tokens, answer.generation.finish), *expected);
        }
    }
    // By ids, too.
    let mut session = engine.session().unwrap();
    let mut tokens = session.generate_tokens(&requests[0].prompt, &requests[0].options).unwrap();
    while !matches!(tokens.step().unwrap(), Step::Finished(_)) {}
    assert_eq!(tokens.into_generation().tokens, alone[0].1);
}

#[test]
fn the_end_comes_when_the_answer_is_complete_and_not_before() {
    let dir = tempfile::tempdir().unwrap();
    let engine = random_model(dir.path());
    let mut long = request(&engine, "Hello", Constraint::Regex("(ab){20,30}".into()), 1);
    // Without tokens that end an answer: the longest text.
    long.options.stop_tokens.clear();
    // A token of the text ends the answer: it may not come before the end.
    let mut early = request(&engine, "Hello", Constraint::Regex("(ab){2}c?".into()), 1);
    let a = engine.encode("a", false).unwrap();
    early.options.stop_tokens = a;
    // A limit.
    let mut cut = long.clone();
    cut.options.max_new_tokens = 7;
    let mut found = answers(&engine, vec![long, cut, early]).into_iter();
    let long = found.next().unwrap().unwrap();
    assert_eq!((long.text, long.generation.finish), ("ab".repeat(30), Finish::Constraint));
    assert_eq!(found.next().unwrap().unwrap().generation.finish, Finish::Length);
    let error = found.next().unwrap().unwrap_err().to_string();
    assert!(error.contains("no token of the model can continue the regular expression"), "{error}");
}

/// The error of a constraint that is refused.
fn refused(engine: &Engine, constraint: Constraint) -> ConstraintError {
    let Err(error) = engine.check_constraint(&constraint) else { panic!("{constraint:?} is taken") };
    let EngineError::Generate(GenerateError::Constraint(error)) = error else { panic!("{error}") };
    // The same before a request is queued, and in a session.
    let scheduler = Scheduler::start(engine, SchedulerOptions::of(engine)).unwrap();
    let request = request(engine, "Hello", constraint, 0);
    let submitted = scheduler.submit(request.clone(), |_| ()).unwrap_err();
    assert!(matches!(submitted, SubmitError::Engine(_)), "{submitted}");
    assert_eq!(submitted.to_string(), error.to_string());
    let mut session = engine.session().unwrap();
    assert!(session.generate_text(&request.prompt, &request.options).is_err());
    error
}

#[test]
fn what_is_wrong_with_a_constraint_is_told() {
    let dir = tempfile::tempdir().unwrap();
    let engine = random_model(dir.path());
    let schema = |schema: Value| Constraint::JsonSchema(schema.to_string());
    for (constraint, says) in [
        (Constraint::JsonSchema("{".into()), "the JSON schema can't be used: it is no JSON"),
        (schema(json!(3)), "a schema is an object"),
        (schema(json!({ "type": "frog" })), "the JSON schema can't be used"),
        (schema(json!({ "uniqueItems": true, "type": "array" })), "uniqueItems"),
        (schema(json!({ "$ref": "http://127.0.0.1:9/schema.json" })), "Only absolute $ref"),
        (schema(json!({ "$ref": "#/$defs/none" })), "not found"),
        (schema(json!({ "allOf": vec![json!({ "enum": [1, 2, 3] }); 40] })), "schema too large"),
        (schema(json!({ "type": "integer", "minimum": 3, "maximum": 2 })), "the JSON schema can't be used"),
        (schema(json!(false)), "the JSON schema can't be used"),
        (Constraint::Regex("(".into()), "the regular expression can't be used"),
        (Constraint::Regex("\\".into()), "ends in a backslash"),
        (Constraint::Regex(String::new()), "it is empty"),
        (Constraint::Regex("(?=a)b".into()), "the regular expression can't be used"),
        (Constraint::Choice(Vec::new()), "one text at least"),
        (Constraint::Choice(vec!["a".into(), String::new()]), "none may be empty"),
        (Constraint::Grammar(" \n".into()), "it is empty"),
        (Constraint::Grammar("start: missing".into()), "missing"),
        (Constraint::Grammar("other: \"a\"".into()), "start"),
        (Constraint::Regex("x".repeat(300 << 10)), "at most 65.5 kB are allowed"),
    ] {
        let error = refused(&engine, constraint).to_string();
        assert!(error.contains(says), "{says}: {error}");
        assert!(!error.contains("backtrace") && !error.contains("verbose"), "{error}");
    }
    // Special tokens are no text.
    let bos = engine.tokenizer().unwrap().bos().unwrap();
    let end = engine.end_tokens()[0];
    for token in [bos, end] {
        refused(&engine, Constraint::Grammar(format!("start: <[{token}]>")));
    }
    // A generator of its own has no texts of tokens.
    let options = GenerateOptions { constraint: Some(Constraint::Json), ..engine.generate_options() };
    let mut cache: KvCache = engine.cache().unwrap();
    let sequence = cache.add_sequence(8);
    let error =
        Generator::new(engine.model(), &[1], sequence, &mut cache, &options).unwrap().step().unwrap_err();
    assert!(matches!(error, GenerateError::Constraint(ConstraintError::NoEngine)), "{error}");
}

/// Descriptions that are made to take long, or to recurse: each is refused, or computes a few tokens.
#[test]
fn hostile_constraints_end_and_harm_nobody() {
    let dir = tempfile::tempdir().unwrap();
    let engine = random_model(dir.path());
    let nested = |open: &str, inner: &str, close: &str, n: usize| {
        format!("{}{inner}{}", open.repeat(n), close.repeat(n))
    };
    let rules: String = (0..3000).map(|i| format!("r{i}: r{} \"x\"\n", i + 1)).collect();
    let terminals: String = (0..3000).map(|i| format!("T{i}: T{} \"x\"\n", i + 1)).collect();
    // As many levels as the limit of 64 KiB allows.
    let refs: serde_json::Map<_, _> = (0..1500)
        .map(|i| (format!("{i}"), json!({ "items": { "$ref": format!("#/$defs/{}", i + 1) } })))
        .chain([("1500".to_owned(), json!({}))])
        .collect();
    let wide: serde_json::Map<_, _> =
        (0..2000).map(|i| (format!("p{i}"), json!({ "type": "string" }))).collect();
    let all = [
        Constraint::JsonSchema(nested("{\"items\":", "{}", "}", 20_000)),
        Constraint::JsonSchema(nested("{\"items\":", "{}", "}", 120)),
        Constraint::JsonSchema(nested("{\"anyOf\":[", "{}", "]}", 60)),
        Constraint::JsonSchema(json!({ "$ref": "#" }).to_string()),
        Constraint::JsonSchema(json!({ "allOf": [{ "$ref": "#" }, { "$ref": "#" }] }).to_string()),
        Constraint::JsonSchema(json!({ "$ref": "#/$defs/0", "$defs": refs }).to_string()),
        Constraint::JsonSchema(json!({ "properties": wide }).to_string()),
        Constraint::JsonSchema(
            json!({ "allOf": vec![json!({ "anyOf": [{ "minLength": 1 }, { "minimum": 2 }] }); 17] })
                .to_string(),
        ),
        Constraint::JsonSchema(json!({ "type": "string", "maxLength": u64::MAX }).to_string()),
        Constraint::JsonSchema(json!({ "type": "array", "minItems": 1_000_000_000u64 }).to_string()),
        Constraint::JsonSchema(json!({ "type": "integer", "multipleOf": 1_000_000_007u64 }).to_string()),
        Constraint::JsonSchema(
            json!({ "type": "string", "pattern": "((a{1,100}){1,100}){1,100}b" }).to_string(),
        ),
        Constraint::Regex(nested("(", "a", ")", 20_000)),
        Constraint::Regex(nested("(", "a", ")*", 200)),
        Constraint::Regex("((a{1,500}){1,500}){1,500}".into()),
        Constraint::Regex("(.*a.{60}b.*){9}".into()),
        Constraint::Regex("(a?){3000}a{3000}".into()),
        Constraint::Grammar(nested("start: ", "", "", 1) + &nested("(", "\"a\"", ")", 20_000)),
        Constraint::Grammar(format!("start: r0\n{rules}r3000: \"x\"\n")),
        Constraint::Grammar(format!("start: T0\n{terminals}T3000: \"x\"\n")),
        Constraint::Grammar("start: start start | start \"a\" | \"a\" | \"\"".into()),
        Constraint::Grammar("start: /a/{1000000,2000000}".into()),
        Constraint::Grammar("start: %json {\"type\": \"frog\"}".into()),
        Constraint::Grammar("start: @other".into()),
        Constraint::Grammar("%import common.INT\n%ignore /(a*)*/\nstart: INT".into()),
    ];
    for (i, constraint) in all.into_iter().enumerate() {
        let shown: String = format!("{i} {constraint:?}").chars().take(100).collect();
        let began = Instant::now();
        let mut request = request(&engine, "Hello", constraint, 1);
        request.options.max_new_tokens = 8;
        request.deadline = Some(Instant::now() + Duration::from_secs(60));
        let answer = answers(&engine, vec![request]).pop().unwrap();
        let end = match answer {
            Ok(answer) => format!("{:?}", answer.text),
            Err(error) => error.to_string().chars().take(200).collect(),
        };
        println!("{shown}: {:.2} s: {end}", began.elapsed().as_secs_f64());
        assert!(!end.contains("please report"), "{shown}: {end}");
    }
    let after = request(&engine, "Hello", Constraint::Regex("ok".into()), 1);
    assert_eq!(answers(&engine, vec![after]).pop().unwrap().unwrap().text, "ok");
}
