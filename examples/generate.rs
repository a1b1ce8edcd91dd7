//! Loads a checkpoint and streams what it generates, from text or from token ids.
//!
//! ```text
//! cargo run --release --example generate -- MODEL "Once upon a time"
//! cargo run --release --example generate -- models/engine/testdata/golden/hf/A-packed-auto 97,16,11
//! ```

use bitnet_burn_engine::load::load;
use std::io::Write;
use std::ops::ControlFlow;

use bitnet_burn::CacheType;
use bitnet_burn_engine::checkpoint::{Checkpoint, OpenOptions};
use bitnet_burn_engine::generate::{GenerateOptions, generate, generate_text};
use bitnet_burn_engine::load::LoadOptions;
use bitnet_burn_engine::tokenizer::Tokenizer;
use burn::tensor::Device;

fn main() -> anyhow::Result<()> {
    let mut arguments = std::env::args().skip(1);
    let (Some(path), Some(prompt)) = (arguments.next(), arguments.next()) else {
        anyhow::bail!("usage: generate MODEL PROMPT (a GGUF file or a Hugging Face directory)");
    };
    let checkpoint = Checkpoint::open(path.as_ref(), &OpenOptions::default())?;
    let model = load(&checkpoint, &Device::flex(), &LoadOptions::default(), &mut |_| {})?;
    let mut cache = model.cache(2048, CacheType::F32)?;
    let sequence = cache.add_sequence(0);
    let mut options = GenerateOptions { max_new_tokens: 32, ..GenerateOptions::default() };

    let ids: Result<Vec<u32>, _> = prompt.split(',').map(|id| id.trim().parse()).collect();
    let generation = match ids {
        // Token ids need no tokenizer.
        Ok(ids) => generate(&model, &ids, sequence, &mut cache, &options, &mut |token, _logits| {
            show(&format!("{token} "))
        })?,
        Err(_) => {
            let tokenizer =
                Tokenizer::from_source(&checkpoint.tokenizer_source(), model.config().vocab_size)?;
            options.stop_tokens = tokenizer.end_of_generation().to_vec();
            let prompt = tokenizer.encode(&prompt, true)?;
            generate_text(&model, &tokenizer, &prompt, sequence, &mut cache, &options, &mut show)?
        }
    };
    println!("\n{} tokens after a prompt of {}", generation.tokens.len(), generation.prompt_tokens);
    Ok(())
}

/// Text as it comes.
fn show(text: &str) -> ControlFlow<()> {
    print!("{text}");
    match std::io::stdout().flush() {
        Ok(()) => ControlFlow::Continue(()),
        Err(_) => ControlFlow::Break(()),
    }
}
