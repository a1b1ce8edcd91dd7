//! `bitnet serve`, as its clients see it.

use std::io::{BufRead as _, BufReader, Read as _};
use std::process::{Child, Stdio};
use std::time::Duration;

use serde_json::{Value, json};
use ureq::Agent;

use crate::Place;

/// A server, and what it said of itself.
pub struct Server {
    child: Child,
    said: Value,
    agent: Agent,
}

impl Server {
    pub fn start(place: &Place, more: &[&str]) -> Self {
        let mut command = place.command(&[&["serve", "--listen", "127.0.0.1:0", "--json"], more].concat());
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let said = serde_json::from_str(&line).unwrap_or_else(|_| {
            let mut log = String::new();
            child.stderr.take().unwrap().read_to_string(&mut log).unwrap();
            panic!("{line:?}\n{log}");
        });
        // Statuses are answers here.
        let agent =
            Agent::config_builder().http_status_as_error(false).timeout_global(Some(Duration::from_secs(60)));
        Self { child, said, agent: agent.build().into() }
    }

    pub fn address(&self) -> &str {
        self.said["address"].as_str().unwrap()
    }

    fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.address())
    }

    pub fn get(&self, path: &str) -> (u16, String) {
        let mut response = self.agent.get(self.url(path)).call().unwrap();
        (response.status().as_u16(), response.body_mut().read_to_string().unwrap())
    }

    fn post_text(&self, path: &str, body: &str) -> (u16, String) {
        let request = self.agent.post(self.url(path)).header("Content-Type", "application/json");
        let mut response = request.send(body).unwrap();
        (response.status().as_u16(), response.body_mut().read_to_string().unwrap())
    }

    fn post(&self, path: &str, body: &Value) -> (u16, Value) {
        let (status, text) = self.post_text(path, &body.to_string());
        (status, serde_json::from_str(&text).unwrap_or_else(|_| panic!("{status}: {text}")))
    }

    /// The answer to a request that must succeed.
    pub fn ok(&self, path: &str, body: &Value) -> Value {
        let (status, answer) = self.post(path, body);
        assert_eq!(status, 200, "{answer}");
        answer
    }

    /// The message of a request that must be refused with this status.
    fn refused(&self, path: &str, body: &Value, status: u16) -> String {
        let (found, answer) = self.post(path, body);
        assert_eq!(found, status, "{answer}");
        answer["error"]["message"].as_str().unwrap().to_owned()
    }

    /// The chunks of a stream.
    pub fn stream(&self, path: &str, body: &Value) -> Vec<Value> {
        let mut body = body.clone();
        body["stream"] = json!(true);
        body["stream_options"] = json!({ "include_usage": true });
        let (status, text) = self.post_text(path, &body.to_string());
        assert_eq!(status, 200, "{text}");
        let events: Vec<&str> = text.lines().filter_map(|line| line.strip_prefix("data: ")).collect();
        let (last, chunks) = events.split_last().unwrap();
        assert_eq!(*last, "[DONE]");
        chunks.iter().map(|chunk| serde_json::from_str(chunk).unwrap()).collect()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A request whose tokens `run` gives, too.
pub fn sampled(prompt: &str) -> Value {
    json!({ "prompt": prompt, "max_tokens": 24, "temperature": 0.8, "top_p": 0.9, "seed": 5 })
}

#[test]
fn answers_are_those_of_run_and_have_receipts() {
    let place = Place::new();
    let server = Server::start(&place, &["-m", "model.gguf"]);
    assert_eq!(server.said["models"], json!(["model"]));
    let run = place.json(&[
        "run",
        "-m",
        "model.gguf",
        "-p",
        "Hello",
        "-n",
        "24",
        "--temperature",
        "0.8",
        "--top-p",
        "0.9",
        "--seed",
        "5",
        "--json",
    ]);
    let answer = server.ok("/v1/completions", &sampled("Hello"));
    assert_eq!(answer["choices"][0]["text"], run["text"]);
    assert_eq!(answer["usage"]["completion_tokens"], run["token_ids"].as_array().unwrap().len());
    assert_eq!(answer["usage"]["prompt_tokens"], run["prompt_tokens"]);
    // A stream says the same.
    let chunks = server.stream("/v1/completions", &sampled("Hello"));
    let text: String = chunks.iter().filter_map(|chunk| chunk["choices"][0]["text"].as_str()).collect();
    assert_eq!(text, run["text"].as_str().unwrap());
    let last = chunks.last().unwrap();
    assert_eq!(last["usage"]["completion_tokens"], answer["usage"]["completion_tokens"]);
    // The prompt was at hand.
    let prompt = run["prompt_tokens"].as_u64().unwrap();
    assert!(prompt < 9 || last["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap() > 0);
    // So does `n`, with the next seeds.
    let mut several = sampled("Hello");
    several["n"] = json!(3);
    several["seed"] = json!(4);
    let several = server.ok("/v1/completions", &several);
    assert_eq!(several["choices"][1]["text"], run["text"]);
    // The receipt says it, without the place of the model, and can be checked elsewhere.
    let id = answer["bitnet"]["receipt"].as_str().unwrap();
    let (status, receipt) = server.get(&format!("/v1/receipts/{id}"));
    assert_eq!(status, 200, "{receipt}");
    assert!(!receipt.contains(place.path("").to_str().unwrap()), "{receipt}");
    place.write("receipt.json", &receipt);
    let checked = place.ok(&["receipt", "check", "receipt.json", "--model", "model.gguf", "--rerun"]);
    assert!(checked.contains("agrees") && checked.contains("tokens"), "{checked}");
    assert_eq!(several["bitnet"]["receipts"].as_array().unwrap().len(), 3);
    assert_eq!(several["usage"]["prompt_tokens"], run["prompt_tokens"], "one prompt");
    let mut two = sampled("Hello");
    two["prompt"] = json!(["Hello", "Hello"]);
    let two = server.ok("/v1/completions", &two);
    assert_eq!(two["usage"]["prompt_tokens"].as_u64(), Some(2 * prompt));
    assert_eq!(server.get("/v1/receipts/none").0, 404);
}

#[test]
fn chats_are_rendered_by_the_models_template() {
    let place = Place::new();
    let server = Server::start(&place, &["-m", "small=model.gguf"]);
    let run = place.json(&[
        "run",
        "-m",
        "model.gguf",
        "--chat",
        "--system",
        "S",
        "-p",
        "Hi",
        "-n",
        "12",
        "--greedy",
        "--json",
    ]);
    let request = json!({
        "model": "small",
        "messages": [
            { "role": "system", "content": "S" },
            { "role": "user", "content": [{ "type": "text", "text": "H" }, { "type": "text", "text": "i" }] },
        ],
        "max_completion_tokens": 12,
        "temperature": 0,
    });
    let answer = server.ok("/v1/chat/completions", &request);
    assert_eq!(answer["object"], "chat.completion");
    assert_eq!(answer["choices"][0]["message"], json!({ "role": "assistant", "content": run["text"] }));
    assert_eq!(answer["usage"]["prompt_tokens"], run["prompt_tokens"]);
    let chunks = server.stream("/v1/chat/completions", &request);
    assert_eq!(chunks[0]["choices"][0]["delta"]["role"], "assistant");
    let text: String =
        chunks.iter().filter_map(|chunk| chunk["choices"][0]["delta"]["content"].as_str()).collect();
    assert_eq!(text, run["text"].as_str().unwrap());
    let finish = chunks.iter().find_map(|chunk| chunk["choices"][0]["finish_reason"].as_str());
    assert_eq!(finish, answer["choices"][0]["finish_reason"].as_str());
    // Log probabilities of each token.
    let mut with = request.clone();
    with["logprobs"] = json!(true);
    with["top_logprobs"] = json!(2);
    let with = server.ok("/v1/chat/completions", &with);
    let content = with["choices"][0]["logprobs"]["content"].as_array().unwrap();
    assert_eq!(content.len() as u64, with["usage"]["completion_tokens"].as_u64().unwrap());
    assert_eq!(content[0]["top_logprobs"][0]["logprob"], content[0]["logprob"], "greedy");
    for (change, says) in [
        (json!({ "messages": [] }), "nothing to answer"),
        (json!({ "messages": [{ "role": "user" }] }), "it has no content"),
        (json!({ "messages": [{ "role": "user", "content": [{ "type": "image_url" }] }] }), "\"text\" alone"),
        (json!({ "tool_choice": "required" }), "needs tools"),
        (json!({ "tool_choice": "sometimes" }), "tool_choice is \"auto\", \"none\""),
        (json!({ "response_format": { "type": "xml" } }), "response_format"),
        (json!({ "top_logprobs": 2 }), "needs \"logprobs\""),
    ] {
        let mut request = request.clone();
        request.as_object_mut().unwrap().extend(change.as_object().unwrap().clone());
        let message = server.refused("/v1/chat/completions", &request, 400);
        assert!(message.contains(says), "{message}");
    }
}

#[test]
fn answers_have_the_form_that_is_asked_for() {
    let place = Place::new();
    let server = Server::start(&place, &["-m", "model.gguf"]);
    let chat = |change: Value| {
        let mut request = json!({
            "messages": [{ "role": "user", "content": "Hi" }], "seed": 3, "max_tokens": 200,
        });
        request.as_object_mut().unwrap().extend(change.as_object().unwrap().clone());
        request
    };
    let schema = json!({
        "type": "object",
        "properties": {
            "name": { "type": "string", "pattern": "^[a-z]{1,8}$" },
            "age": { "type": "integer", "minimum": 0, "maximum": 120 },
        },
        "required": ["name", "age"],
        "additionalProperties": false,
    });
    let format = json!({ "type": "json_schema", "json_schema": { "name": "person", "strict": true, "schema": schema } });
    let request = chat(json!({ "response_format": format }));
    let answer = server.ok("/v1/chat/completions", &request);
    let text = answer["choices"][0]["message"]["content"].as_str().unwrap();
    let person: Value = serde_json::from_str(text).unwrap();
    assert!(person["age"].as_u64().unwrap() <= 120 && person["name"].as_str().unwrap().len() <= 8, "{text}");
    assert_eq!(answer["choices"][0]["finish_reason"], "stop");
    // A stream says the same, the receipt has the schema, and `receipt check` computes the answer again.
    let chunks = server.stream("/v1/chat/completions", &request);
    let streamed: String =
        chunks.iter().filter_map(|chunk| chunk["choices"][0]["delta"]["content"].as_str()).collect();
    assert_eq!(streamed, text);
    let (_, receipt) = server.get(&format!("/v1/receipts/{}", answer["bitnet"]["receipt"].as_str().unwrap()));
    assert!(receipt.contains("json_schema"), "{receipt}");
    place.write("receipt.json", &receipt);
    let checked = place.ok(&["receipt", "check", "receipt.json", "--model", "model.gguf", "--rerun"]);
    assert!(checked.contains("agrees") && checked.contains("tokens"), "{checked}");
    // Cut by the limit.
    let mut cut = request.clone();
    cut["max_tokens"] = json!(3);
    let cut = server.ok("/v1/chat/completions", &cut);
    assert_eq!(cut["choices"][0]["finish_reason"], "length");
    // Completions, in each other form, several at once.
    for (field, value, allowed) in [
        ("choice", json!(["yes", "no"]), &["yes", "no"][..]),
        ("regex", json!("(ab){1,2}"), &["ab", "abab"]),
        ("grammar", json!("start: \"a\" | \"b\" \"c\""), &["a", "bc"]),
    ] {
        let mut request = json!({ "prompt": "Hello", "n": 4, "seed": 1 });
        request[field] = value;
        let answer = server.ok("/v1/completions", &request);
        for choice in answer["choices"].as_array().unwrap() {
            assert!(allowed.contains(&choice["text"].as_str().unwrap()), "{choice}");
            assert_eq!(choice["finish_reason"], "stop");
        }
    }
    // A tool that must be called.
    let tools = json!([
        { "type": "function", "function": { "name": "weather", "parameters": {
            "type": "object", "properties": { "place": { "enum": ["Bern", "Oslo"] } },
            "required": ["place"], "additionalProperties": false,
        } } },
        { "type": "function", "function": { "name": "now", "parameters": {
            "type": "object", "additionalProperties": false,
        } } },
    ]);
    for choice in [json!("required"), json!({ "type": "function", "function": { "name": "weather" } })] {
        let named = choice.is_object();
        let answer =
            server.ok("/v1/chat/completions", &chat(json!({ "tools": tools, "tool_choice": choice })));
        assert_eq!(answer["choices"][0]["finish_reason"], "tool_calls");
        let call = &answer["choices"][0]["message"]["tool_calls"][0]["function"];
        let arguments: Value = serde_json::from_str(call["arguments"].as_str().unwrap()).unwrap();
        match call["name"].as_str().unwrap() {
            "weather" => assert!(["Bern", "Oslo"].contains(&arguments["place"].as_str().unwrap())),
            name => assert!(name == "now" && !named && arguments == json!({})),
        }
    }
    for (change, says) in [
        (json!({ "regex": "(" }), "regex: the regular expression can't be used"),
        (json!({ "regex": "a", "choice": ["b"] }), "exclude each other"),
        (json!({ "choice": "b" }), "choice: "),
        (json!({ "tools": tools, "tool_choice": "required", "regex": "a" }), "exclude each other"),
        (
            json!({ "tools": tools, "tool_choice": { "function": { "name": "none" } } }),
            "no function \"none\"",
        ),
        (json!({ "response_format": { "type": "json_schema" } }), "with json_schema: {\"schema\""),
        (
            json!({ "response_format": { "type": "json_schema", "json_schema": { "schema": { "type": "frog" } } } }),
            "response_format: the JSON schema can't be used",
        ),
    ] {
        let message = server.refused("/v1/chat/completions", &chat(change), 400);
        assert!(message.contains(says), "{message}");
    }
}

#[test]
fn tools_that_a_template_does_not_tell_of_are_refused() {
    let place = Place::new();
    let model = place.path("model.gguf");
    let mut bytes = std::fs::read(&model).unwrap();
    let (tells, silent) = (&b"in tools or []"[..], b"in [          ]");
    assert_eq!(tells.len() + 1, silent.len());
    let at = bytes.windows(tells.len()).position(|window| window == tells).unwrap();
    // The space behind it goes.
    bytes[at..=at + tells.len()].copy_from_slice(silent);
    std::fs::write(&model, bytes).unwrap();
    let server = Server::start(&place, &["-m", "model.gguf"]);
    let mut chat = json!({
        "messages": [{ "role": "user", "content": "Hi" }], "max_tokens": 4,
        "tools": [{ "type": "function", "function": { "name": "now", "parameters": { "type": "object" } } }],
    });
    let message = server.refused("/v1/chat/completions", &chat, 400);
    assert!(message.contains("does not tell the model of tools"), "{message}");
    // It need not know of the only one that it can call, nor of those that it can't.
    for choice in ["none", "required"] {
        chat["tool_choice"] = choice.into();
        server.ok("/v1/chat/completions", &chat);
    }
}

#[test]
fn a_model_without_a_template_completes_and_says_why_it_can_t_chat() {
    let place = Place::empty();
    // The built-in model.
    let server = Server::start(&place, &[]);
    assert_eq!(server.said["models"], json!(["stories"]));
    let (_, models) = server.get("/v1/models");
    let models: Value = serde_json::from_str(&models).unwrap();
    assert_eq!(models["data"][0]["bitnet"]["chat"], json!(false));
    let chat = json!({ "messages": [{ "role": "user", "content": "Hi" }] });
    let message = server.refused("/v1/chat/completions", &chat, 400);
    assert!(message.contains("no chat template") && message.contains("/v1/completions"), "{message}");
    let text =
        server.ok("/v1/completions", &json!({ "prompt": "There was", "max_tokens": 8, "temperature": 0 }));
    assert!(text["choices"][0]["text"].as_str().unwrap().len() > 8, "{text}");
}

#[test]
fn texts_are_tokens_and_vectors() {
    let place = Place::new();
    let server = Server::start(&place, &["-m", "model.gguf"]);
    let tokens = server.ok("/tokenize", &json!({ "content": "Hello", "add_special": true }));
    let back = server.ok("/detokenize", &json!({ "tokens": tokens["tokens"] }));
    assert!(back["content"].as_str().unwrap().ends_with("Hello"));
    // A bias of 100 leaves the sampler no choice.
    let token = &server.ok("/tokenize", &json!({ "content": "~", "add_special": false }))["tokens"][0];
    let biased = json!({ "prompt": "Hello", "max_tokens": 3, "logit_bias": { token.to_string(): 100 } });
    assert_eq!(server.ok("/v1/completions", &biased)["choices"][0]["text"], "~~~");
    // A part of a character has bytes that its text does not tell.
    let part = json!({ "messages": [{ "role": "user", "content": "Hi" }], "max_tokens": 1, "logprobs": true,
        "top_logprobs": 1, "logit_bias": { "195": 100 } });
    let part = &server.ok("/v1/chat/completions", &part)["choices"][0]["logprobs"]["content"][0];
    assert_eq!((&part["token"], &part["bytes"]), (&json!("\u{fffd}"), &json!([195])));
    let top = &part["top_logprobs"][0];
    assert!(top["bytes"].as_array().is_some_and(|bytes| !bytes.is_empty()), "{top}");
    let by_program = place.json(&["embed", "-m", "model.gguf", "Hello", "World", "--json"]);
    let vectors = server.ok("/v1/embeddings", &json!({ "input": ["Hello", "World"] }));
    assert_eq!(vectors["data"][1]["index"], 1);
    let of = |value: &Value| -> Vec<f32> {
        value.as_array().unwrap().iter().map(|value| value.as_f64().unwrap() as f32).collect()
    };
    let text = by_program.to_string();
    assert!(text.contains(&vectors["data"][0]["embedding"][0].to_string()), "{text}");
    assert_eq!(of(&vectors["data"][0]["embedding"]).len(), of(&vectors["data"][1]["embedding"]).len());
    let encoded = server.ok("/v1/embeddings", &json!({ "input": "Hello", "encoding_format": "base64" }));
    let encoded = encoded["data"][0]["embedding"].as_str().unwrap().len();
    assert_eq!(encoded, (of(&vectors["data"][0]["embedding"]).len() * 4).div_ceil(3) * 4);
    assert!(server.refused("/v1/embeddings", &json!({ "input": [] }), 400).contains("input"));
    assert!(
        server
            .refused("/v1/embeddings", &json!({ "input": "a", "dimensions": 3 }), 400)
            .contains("dimensions")
    );
}

#[test]
fn wrong_requests_are_told_what_to_change() {
    let place = Place::new();
    let server = Server::start(&place, &["-m", "model.gguf", "--context", "64"]);
    let refused = |change: Value, status| {
        let mut request = sampled("Hello");
        request.as_object_mut().unwrap().extend(change.as_object().unwrap().clone());
        server.refused("/v1/completions", &request, status)
    };
    for (change, says) in [
        (json!({ "temperature": -1 }), "temperature is -1"),
        (json!({ "temperature": "hot" }), "temperature: invalid type: string \"hot\""),
        (json!({ "prompt": { "a": 1 } }), "prompt: expected a text, token ids"),
        (json!({ "prompt": null }), "\"prompt\" is missing"),
        (json!({ "max_tokens": 0 }), "at least 1"),
        (json!({ "max_tokens": -5 }), "max_tokens"),
        (json!({ "n": 17 }), "1 to 16"),
        (json!({ "n": 0 }), "1 to 16"),
        (json!({ "stop": "" }), "stop"),
        (json!({ "logprobs": 21 }), "at most 20"),
        (json!({ "presence_penalty": 2.5 }), "-2 to 2"),
        (json!({ "frequency_penalty": -3 }), "-2 to 2"),
        (json!({ "logit_bias": { "1": 500 } }), "-100 to 100"),
        (json!({ "logit_bias": { "99999999": 5 } }), "logit_bias has token 99999999"),
        (json!({ "logit_bias": { "the": 5 } }), "logit_bias"),
        (json!({ "best_of": 3 }), "use n"),
        (json!({ "frobnicate": 1 }), "\"frobnicate\" is not known"),
        (json!({ "prompt": [[]] }), "no tokens"),
        (json!({ "prompt": [] }), "1 to 64"),
        (json!({ "prompt": vec!["a"; 64], "n": 16 }), "at most 256 may wait"),
        (json!({ "prompt": [4294967295u32] }), "4294967295"),
        (json!({ "prompt": "x".repeat(500) }), "context"),
    ] {
        let message = refused(change.clone(), 400);
        assert!(message.contains(says), "{change}: {message}");
    }
    assert!(refused(json!({ "model": "other" }), 404).contains("there are: model"));
    let (_, answer) = server.post("/v1/completions", &json!({ "prompt": "a", "temperature": -1 }));
    assert_eq!(answer["error"]["param"], "temperature");
    let answer = server.ok("/v1/completions", &json!({ "prompt": "a", "seed": -1, "max_tokens": 1 }));
    assert_eq!(answer["bitnet"]["seed"], -1);
    // Null is as if it were not there; what changes nothing is taken; 10^9 tokens are as many as fit.
    let taken = json!({ "stop": null, "user": "me", "max_tokens": 1_000_000_000, "presence_penalty": 0 });
    let mut request = sampled("Hello");
    request.as_object_mut().unwrap().extend(taken.as_object().unwrap().clone());
    let answer = server.ok("/v1/completions", &request);
    assert!(answer["usage"]["total_tokens"].as_u64().unwrap() <= 65, "{answer}");
    for body in ["", "{", "[]", "{\"prompt\": \"\u{1}\"", "null", "{\"prompt\": {\"a\": 1}}"] {
        let (status, text) = server.post_text("/v1/completions", body);
        assert!(status == 400 && text.contains("invalid_request_error"), "{body}: {status} {text}");
    }
    let deep = "[".repeat(100_000);
    assert_eq!(server.post_text("/v1/completions", &format!("{{\"prompt\": {deep}")).0, 400);
    let request = server.agent.post(server.url("/v1/completions")).header("Content-Type", "text/plain");
    assert_eq!(request.send("{}").unwrap().status().as_u16(), 415);
    assert_eq!(server.get("/v1/completions").0, 405);
    let (status, text) = server.get("/nothing");
    assert!(status == 404 && text.contains("docs/serving.md"), "{text}");
    assert_eq!(server.get("/health").0, 200);
}

/// A file that only its owner may read.
fn private(place: &Place, name: &str, text: &str) {
    place.write(name, text);
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt as _;
        let mode = std::fs::Permissions::from_mode(0o600);
        std::fs::set_permissions(place.path(name), mode).unwrap();
    }
}

#[test]
fn a_key_is_needed_where_there_is_one() {
    let place = Place::new();
    private(&place, "key", "a-key-of-this-test\n");
    let server = Server::start(&place, &["-m", "model.gguf", "--api-key", "key"]);
    let (status, text) = server.get("/v1/models");
    assert!(status == 401 && text.contains("Authorization: Bearer"), "{text}");
    let with = |key: &str| {
        let request = server.agent.get(server.url("/v1/models")).header("Authorization", key);
        request.call().unwrap().status().as_u16()
    };
    assert_eq!(with("Bearer a-key-of-this-test"), 200);
    assert_eq!(with("bearer a-key-of-this-test"), 200);
    for wrong in ["Bearer a-key-of-this-tes", "Bearer ", "Bearer", "a-key-of-this-test", "Basic YTpi"] {
        assert_eq!(with(wrong), 401, "{wrong}");
    }
    // The page and the health are for everybody.
    assert_eq!((server.get("/health").0, server.get("/").0), (200, 200));
    // Other machines need one.
    let error = place.error(&["serve", "-m", "model.gguf", "--listen", "0.0.0.0:0"]);
    assert!(error.contains("--api-key FILE") && error.contains("--no-api-key"), "{error}");
    private(&place, "short", "abc");
    let error = place.error(&["serve", "-m", "model.gguf", "--listen", "127.0.0.1:0", "--api-key", "short"]);
    assert!(error.contains("short: an API key has at least 8 characters"), "{error}");
}

#[test]
fn several_models_are_loaded_when_they_are_asked_for() {
    let place = Place::new();
    place.ok(&["synth", "--shape", "tiny", "--seed", "8", "--out", "other.gguf"]);
    let size = std::fs::metadata(place.path("model.gguf")).unwrap().len();
    let memory = (size + size / 2).to_string();
    let server =
        Server::start(&place, &["-m", "one=model.gguf", "-m", "two=other.gguf", "--model-memory", &memory]);
    let states = || -> Vec<String> {
        let models: Value = serde_json::from_str(&server.get("/v1/models").1).unwrap();
        let state = |model: &Value| model["bitnet"]["state"].as_str().unwrap().to_owned();
        models["data"].as_array().unwrap().iter().map(state).collect()
    };
    assert_eq!(states(), ["unloaded", "unloaded"]);
    let ask = |model: &str| {
        let mut request = sampled("Hello");
        request["model"] = json!(model);
        server.ok("/v1/completions", &request)["choices"][0]["text"].clone()
    };
    let (one, two) = (ask("one"), ask("two"));
    assert_ne!(one, two);
    // There is memory for one of them.
    assert_eq!(states(), ["unloaded", "ready"]);
    assert_eq!(ask("one"), one);
    assert_eq!(states(), ["ready", "unloaded"]);
    // Many at once for both: none starves.
    std::thread::scope(|scope| {
        for i in 0..8 {
            let (ask, one, two) = (&ask, &one, &two);
            scope.spawn(move || match i % 2 {
                0 => assert_eq!(ask("one"), *one),
                _ => assert_eq!(ask("two"), *two),
            });
        }
    });
    let error =
        place.error(&["serve", "-m", "a=model.gguf", "-m", "a=other.gguf", "--listen", "127.0.0.1:0"]);
    assert!(error.contains("two models are named \"a\""), "{error}");
    let error = place.error(&["serve", "-m", "model.gguf", "-m", "missing.gguf", "--listen", "127.0.0.1:0"]);
    assert!(error.contains("missing.gguf"), "{error}");
}

#[test]
fn the_queue_s_bound_is_felt_and_the_end_is_clean() {
    let place = Place::new();
    let mut server = Server::start(&place, &["-m", "model.gguf", "--parallel", "1", "--queue", "1"]);
    let url = server.url("/v1/completions");
    let ask = |agent: &Agent| {
        let request = agent.post(&url).header("Content-Type", "application/json");
        let body = json!({ "prompt": "Hello", "max_tokens": 400, "temperature": 0, "seed": 1 });
        let response = request.send(body.to_string()).unwrap();
        let retry = response.headers().get("Retry-After").map(|seconds| seconds.to_str().unwrap().to_owned());
        (response.status().as_u16(), retry)
    };
    let statuses: Vec<_> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..12).map(|_| scope.spawn(|| ask(&server.agent))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    assert!(statuses.iter().any(|(status, _)| *status == 200), "{statuses:?}");
    for (status, retry) in &statuses {
        assert!(*status == 200 || (*status == 429 && retry.as_deref() == Some("1")), "{statuses:?}");
    }
    if cfg!(unix) {
        let id = server.child.id().to_string();
        assert!(std::process::Command::new("kill").args(["-TERM", &id]).status().unwrap().success());
        assert!(server.child.wait().unwrap().success());
        let mut log = String::new();
        server.child.stderr.take().unwrap().read_to_string(&mut log).unwrap();
        assert!(!log.contains("panicked"), "{log}");
    }
}

#[test]
fn the_page_is_this_program_s_alone() {
    let place = Place::new();
    let server = Server::start(&place, &["-m", "model.gguf"]);
    let get = |path: &str, kind: &str| {
        let mut response = server.agent.get(server.url(path)).call().unwrap();
        let header = |name: &str| response.headers()[name].to_str().unwrap().to_owned();
        assert!(header("Content-Type").starts_with(kind), "{path}");
        assert!(header("Content-Security-Policy").contains("script-src 'self'"));
        // Modules of two versions never meet.
        assert_eq!(header("Cache-Control"), "no-cache");
        let text = response.body_mut().read_to_string().unwrap();
        assert!(text.len() > 100 && !text.contains("https://"), "{path}");
        text
    };
    let index = get("/", "text/html");
    assert!(index.contains("\"page/style.css\"") && index.contains("\"page/app.js\""));
    get("/page/style.css", "text/css");
    // All modules that the first one needs.
    let mut modules = vec!["app.js".to_owned()];
    let mut at = 0;
    while let Some(module) = modules.get(at) {
        let text = get(&format!("/page/{module}"), "text/javascript");
        let imported = text.lines().filter_map(|line| line.split_once("} from './")?.1.strip_suffix("';"));
        let new: Vec<String> =
            imported.filter(|name| !modules.iter().any(|m| m == name)).map(str::to_owned).collect();
        modules.extend(new);
        at += 1;
    }
    assert!(modules.len() > 5, "{modules:?}");
    let (status, message) = server.get("/page/none.js");
    assert!(status == 404 && message.contains("/page/none.js"), "{message}");
}
