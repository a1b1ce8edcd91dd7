//! Fine-tuning on conversations.

use super::*;

const TEMPLATE: &str = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}\
                        {% if add_generation_prompt %}<assistant>{% endif %}";

#[test]
fn the_assistants_part_is_learned() {
    let dir = Dir::new();
    succeed(&mut dir.train("first", &["run.steps=20", "model.n_layers=1"]));
    let chat = |i: usize, answer: &str| {
        let question = ["fox", "hen", "cow", "owl"][i % 4];
        let messages = serde_json::json!([
            { "role": "user", "content": format!("The {question}?") },
            { "role": "assistant", "content": answer },
        ]);
        serde_json::json!({ "messages": messages }).to_string() + "\n"
    };
    std::fs::write(dir.path("chats.jsonl"), (0..40).map(|i| chat(i, "sings")).collect::<String>()).unwrap();
    std::fs::write(dir.path("template"), TEMPLATE).unwrap();
    let sft = |run: &str, text: &str, more: &[&str]| {
        let mut command = dir
            .bitnet(&["train", "--from", "first", "--task", "sft", "--text", text, "--out", run, "--json"]);
        command.args(["--steps", "60", "--batch", "4", "--set", "run.checkpoint_every=40"]).args(more);
        command.args(["--set", "optimizer.learning_rate=0.01", "--set", "optimizer.warmup_steps=2"]);
        command
    };
    let output = succeed(&mut sft("run", "chats.jsonl", &["--set", "data.chat_template=template"]));
    let found = json(&output);
    assert!(found["validation_loss"].as_f64().unwrap() < 0.2, "one answer to all: {found}");
    // Of each conversation the answer and the end of the line count, not the question.
    let tokens = found["training_tokens"].as_u64().unwrap();
    assert!((39 * 2..39 * 7).contains(&tokens) && tokens.is_multiple_of(39), "{found}");
    let kept = std::fs::read_to_string(dir.path("run/validation.jsonl")).unwrap();
    assert!(kept.contains("{\"role\":\"assistant\",\"content\":\"sings\"}"), "{kept}");
    let template =
        std::fs::read_to_string(dir.path("run/checkpoints/step-00000060/chat_template.jinja")).unwrap();
    assert_eq!(template, TEMPLATE);
    assert!(dir.comes_back("run"));
    let answer = succeed(&mut dir.bitnet(&[
        "run",
        "-m",
        "run/checkpoints/step-00000060",
        "-p",
        "<user>The cow?\n<assistant>",
        "-n",
        "12",
        "--seed",
        "1",
    ]));
    assert!(
        String::from_utf8_lossy(&answer.stdout).contains("sing"),
        "{}",
        String::from_utf8_lossy(&answer.stdout)
    );

    refuse(&mut sft("bad", "chats.jsonl", &[]), &["chat template", "data.chat_template"]);
    let with = |run: &str, text: &str| sft(run, text, &["--set", "data.chat_template=template"]);
    refuse(&mut with("bad", "text.txt"), &["text.txt", "not plain text"]);
    std::fs::write(
        dir.path("mute.jsonl"),
        "{\"messages\": [{\"role\": \"user\", \"content\": \"Hi\"}]}\n".repeat(3),
    )
    .unwrap();
    refuse(&mut with("bad", "mute.jsonl"), &["conversation", "the assistant says nothing"]);
    std::fs::write(dir.path("texts.jsonl"), "{\"messages\": \"Hi\"}\n").unwrap();
    refuse(&mut with("bad", "texts.jsonl"), &["line 1", "it is a text"]);
    refuse(dir.train("bad", &["run.steps=2"]).args(["--task", "sft"]), &["model.from"]);
    assert!(!dir.path("bad").exists());
}
