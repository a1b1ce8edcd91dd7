//! Opens a model and streams what it generates, from text or from token ids.
//!
//! ```text
//! cargo run --release --example generate -- MODEL "Once upon a time"
//! cargo run --release --example generate -- models/engine/testdata/golden/hf/A-packed-auto 97,16,11
//! ```

use std::io::Write;

use bitnet_burn_engine::generate::Step;
use bitnet_burn_engine::{Engine, GenerateOptions};

fn main() -> anyhow::Result<()> {
    let mut arguments = std::env::args().skip(1);
    let (Some(path), Some(prompt)) = (arguments.next(), arguments.next()) else {
        anyhow::bail!("usage: generate MODEL PROMPT (a GGUF file or a Hugging Face directory)");
    };
    // Token ids need no tokenizer.
    let ids: Result<Vec<u32>, _> = prompt.split(',').map(|id| id.trim().parse()).collect();
    let engine = match ids {
        Ok(_) => Engine::options().without_tokenizer().open(path)?,
        Err(_) => Engine::open(path)?,
    };
    let options = GenerateOptions { max_new_tokens: 32, ..engine.generate_options() };
    let mut session = engine.session()?;
    let mut stdout = std::io::stdout();
    if let Ok(ids) = ids {
        let mut tokens = session.generate_tokens(&ids, &options)?;
        loop {
            match tokens.step()? {
                Step::Token(token) => write!(stdout, "{token} ")?,
                Step::Finished(_) => break,
                Step::Prompt { .. } => {}
            }
            stdout.flush()?;
        }
        println!();
        return Ok(());
    }
    let mut text = session.generate(&prompt, &options)?;
    for piece in &mut text {
        stdout.write_all(piece?.as_bytes())?;
        stdout.flush()?;
    }
    println!("\n\n{}", text.finish().report);
    Ok(())
}
