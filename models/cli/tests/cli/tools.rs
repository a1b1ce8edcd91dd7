//! Tools in the forms that chat templates ask for, as clients of `bitnet serve` see them.

use serde_json::{Value, json};

use crate::Place;
use crate::serve::Server;

/// What the templates have in common: the tools, and the messages with their calls.
fn template(call: &str) -> String {
    format!(
        "{{% for tool in tools or [] %}}{{{{ tool | tojson }}}}{{% endfor %}}{{% for m in messages %}}<{{{{ m.role }}}}>\
         {{{{ m.content }}}}{{% for c in m.tool_calls or [] %}}{call}{{% endfor %}}{{% endfor %}}<assistant>"
    )
}

/// The model with another chat template, and its last special token under another name.
fn model(place: &Place, name: &str, template: &str, special: Option<&str>) {
    place.ok(&["convert", "model.gguf", "--to", "hf", "--out", name]);
    let edit = |file: &str, edit: &dyn Fn(&mut Value)| {
        let path = format!("{name}/{file}");
        let mut value: Value = serde_json::from_slice(&std::fs::read(place.path(&path)).unwrap()).unwrap();
        edit(&mut value);
        place.write(&path, value.to_string());
    };
    edit("tokenizer_config.json", &|config| config["chat_template"] = template.into());
    if let Some(special) = special {
        // It ends no answer any more.
        for file in ["config.json", "generation_config.json"] {
            edit(file, &|config| config["eos_token_id"] = 510.into());
        }
        edit("tokenizer.json", &|tokenizer| {
            let last = &mut tokenizer["added_tokens"][2];
            assert_eq!((&last["id"], &last["special"]), (&json!(511), &json!(true)));
            last["content"] = special.into();
            let vocabulary = tokenizer["model"]["vocab"].as_object_mut().unwrap();
            vocabulary.retain(|_, id| *id != 511);
            vocabulary.insert(special.into(), 511.into());
        });
    }
}

fn chat(more: &Value) -> Value {
    let mut request = json!({
        "messages": [{ "role": "user", "content": "Hello" }], "max_tokens": 300, "seed": 3, "temperature": 0.7,
        "tools": [{ "type": "function", "function": { "name": "weather", "parameters": {
            "type": "object", "required": ["place"], "additionalProperties": false,
            "properties": { "place": { "type": "string", "enum": ["Bern", "Oslo"] } },
        } } }],
    });
    request.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    request
}

/// That this is a call of the tool, with valid arguments. Gives its id.
fn check(call: &Value) -> String {
    assert_eq!((&call["type"], &call["function"]["name"]), (&json!("function"), &json!("weather")));
    let arguments: Value = serde_json::from_str(call["function"]["arguments"].as_str().unwrap()).unwrap();
    assert!(["Bern", "Oslo"].contains(&arguments["place"].as_str().unwrap()), "{arguments}");
    call["id"].as_str().unwrap().to_owned()
}

#[test]
fn calls_have_the_form_of_the_template() {
    let place = Place::new();
    let hermes = template("<tool_call>{{ c.function | tojson }}</tool_call>");
    let xml = template(
        "<tool_call>\n<function={{ c.function.name }}>\n{% for k, v in c.function.arguments.items() %}<parameter={{ k }}>\n\
         {{ v }}\n</parameter>\n{% endfor %}</function>\n</tool_call>",
    );
    let llama = template(
        "{\"name\": \"{{ c.function.name }}\", \"parameters\": {{ c.function.arguments | tojson }}}",
    );
    let ids = "{% if c.id | length != 9 %}{{ raise_exception('ids have nine characters') }}{% endif %}";
    let mistral = template(&format!("{ids}[TOOL_CALLS] [{{{{ c.function | tojson }}}}]"));
    let args = template(&format!(
        "{ids}[TOOL_CALLS]{{{{ c.function.name }}}}[ARGS]{{{{ c.function.arguments | tojson }}}}"
    ));
    for (name, template, special, begins) in [
        ("hermes", &hermes, None, "<tool_call>"),
        ("xml", &xml, None, "<tool_call>"),
        ("llama", &llama, Some("<|python_tag|>"), "{\"name\": \"weather\", \"parameters\": "),
        ("mistral", &mistral, Some("[TOOL_CALLS]"), "["),
        ("args", &args, Some("[TOOL_CALLS]"), "weather[ARGS]{"),
    ] {
        model(&place, name, template, special);
        let server = Server::start(&place, &["-m", name]);
        for choice in [json!("required"), json!({ "type": "function", "function": { "name": "weather" } })] {
            let request = chat(&json!({ "tool_choice": choice, "logprobs": true }));
            let answer = server.ok("/v1/chat/completions", &request);
            let choice = &answer["choices"][0];
            assert_eq!(
                (&choice["finish_reason"], &choice["message"]["content"]),
                (&json!("tool_calls"), &Value::Null)
            );
            let id = check(&choice["message"]["tool_calls"][0]);
            // What the model wrote.
            let tokens = choice["logprobs"]["content"].as_array().unwrap();
            let written: String = tokens.iter().map(|token| token["token"].as_str().unwrap()).collect();
            assert!(written.starts_with(begins), "{name}: {written}");
            // The call goes back with its result.
            let messages = json!([
                { "role": "user", "content": "Hello" }, choice["message"],
                { "role": "tool", "tool_call_id": id, "content": "warm" },
            ]);
            server.ok("/v1/chat/completions", &chat(&json!({ "messages": messages, "max_tokens": 4 })));
            // Streamed, the same call in one piece, and no text.
            let chunks = server.stream("/v1/chat/completions", &request);
            let deltas: Vec<&Value> = chunks.iter().map(|chunk| &chunk["choices"][0]["delta"]).collect();
            let calls: Vec<&Value> = deltas.iter().filter_map(|delta| delta.get("tool_calls")).collect();
            assert_eq!(calls.len(), 1, "{name}: {chunks:?}");
            check(&calls[0][0]);
            assert!(
                deltas.iter().all(|delta| delta["content"].as_str().is_none_or(str::is_empty)),
                "{chunks:?}"
            );
        }
        // Where the model decides, a special token that begins a call is seen. (It is no call: these are nothing else.)
        if let Some(special) = special {
            let forced = json!({ "max_tokens": 3, "logit_bias": { "511": 100 } });
            let answer = server.ok("/v1/chat/completions", &chat(&forced));
            assert_eq!(answer["choices"][0]["message"]["content"], special.repeat(3));
            let chunks = server.stream("/v1/chat/completions", &chat(&forced));
            let text = chunks.iter().filter_map(|chunk| chunk["choices"][0]["delta"]["content"].as_str());
            assert_eq!(text.collect::<String>(), special.repeat(3));
            // Without tools it is what it was.
            let mut plain = chat(&forced);
            plain.as_object_mut().unwrap().remove("tools");
            assert_eq!(server.ok("/v1/chat/completions", &plain)["choices"][0]["message"]["content"], "");
        }
    }
}
