//! Embeddings against the numpy reference of `golden/2026`. (An engine sets up the process's kernel manager: a process of its
//! own.)

use bitnet_burn_engine::Engine;
use bitnet_burn_engine::embed::{EmbedOptions, Pooling};
use bitnet_burn_engine::load::ActivationRule;
use bitnet_burn_tests::*;

/// Vectors of texts: (model, tokens, pooling, L2 norm before normalisation, first values of the vector).
///
/// ```sh
/// cd golden/2026 && python3 -c "
/// import numpy as np, reference as r
/// for path, goldens in (('hf/qwen3-g128-tied', 'hf/qwen3-g128-tied/goldens'), ('gguf/llama-attn-bias-q2_0.gguf',) * 2):
///     model, states = r.Model(path), {}
///     rms, ids = model.rms, r.read_safetensors(goldens.replace('.gguf', '.goldens') + '.safetensors')
///     model.rms = lambda x, name: states.setdefault(name, rms(x, name)) if name == 'output_norm' else rms(x, name)
///     for n in (16, 64):
///         states.clear(); model.forward(ids['seq%d.input_ids' % n], 'none'); s = states['output_norm']
///         for v in (s[-1], s.mean(0)): print(path, n, np.linalg.norm(v), (v / np.linalg.norm(v))[:6])"
/// ```
const EMBEDDINGS: [(&str, usize, Pooling, f64, [f32; 6]); 8] = [
    (
        "hf/qwen3-g128-tied",
        16,
        Pooling::Last,
        102.403846,
        [-0.0573068, 0.0024885, 0.0816569, 0.0522373, -0.0454326, -0.1269023],
    ),
    (
        "hf/qwen3-g128-tied",
        16,
        Pooling::Mean,
        65.090034,
        [-0.0337595, -0.0339307, 0.1118644, 0.0236502, -0.0066237, -0.1243221],
    ),
    (
        "hf/qwen3-g128-tied",
        64,
        Pooling::Last,
        102.408018,
        [0.0297385, -0.0555332, -0.0066131, 0.0603831, -0.0098216, -0.0763324],
    ),
    (
        "hf/qwen3-g128-tied",
        64,
        Pooling::Mean,
        47.032197,
        [0.0121026, -0.0776976, 0.0658761, 0.0020250, -0.0357544, -0.0623109],
    ),
    (
        "gguf/llama-attn-bias-q2_0.gguf",
        16,
        Pooling::Last,
        11.302339,
        [-0.0091601, -0.0031182, 0.0332229, 0.0555964, 0.0277218, -0.141167],
    ),
    (
        "gguf/llama-attn-bias-q2_0.gguf",
        16,
        Pooling::Mean,
        8.349381,
        [0.0242926, 0.0162524, -0.0485562, 0.0359966, 0.0974229, -0.0420335],
    ),
    (
        "gguf/llama-attn-bias-q2_0.gguf",
        64,
        Pooling::Last,
        11.310305,
        [0.0802426, -0.0275394, -0.0209182, 0.0239330, 0.0578394, -0.0759170],
    ),
    (
        "gguf/llama-attn-bias-q2_0.gguf",
        64,
        Pooling::Mean,
        7.752090,
        [0.0500003, 0.0065455, -0.0566113, 0.0553072, 0.0575254, -0.0614743],
    ),
];

#[test]
fn embeddings_are_pooled_from_the_states_behind_the_last_norm() {
    let Some(golden) = golden_dir("embeddings").map(|dir| dir.join("2026")) else { return };
    for (name, n, pooling, norm, values) in EMBEDDINGS {
        let path = golden.join(name);
        let goldens = match path.is_dir() {
            true => path.join("goldens.safetensors"),
            false => path.with_extension("goldens.safetensors"),
        };
        let ids = read_goldens(&goldens)[&format!("seq{n}.input_ids")].ids();
        let engine =
            Engine::options().without_tokenizer().activations(ActivationRule::Float).open(&path).unwrap();
        let options = EmbedOptions { pooling: Some(pooling), ..EmbedOptions::default() };
        let embed = |normalise| {
            let options = EmbedOptions { normalise: Some(normalise), ..options.clone() };
            engine.embedder(&options).unwrap().embed_tokens(std::slice::from_ref(&ids)).unwrap().remove(0)
        };
        let (vector, unscaled) = (embed(true), embed(false));
        assert_eq!((vector.tokens, vector.values.len()), (n, engine.checkpoint().config().hidden_size));
        let difference = max_difference(&vector.values[..6], &values);
        assert!(difference < 1e-5, "{name} {n} {pooling}: {difference:e}");
        let length = unscaled.values.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>().sqrt();
        assert!((length / norm - 1.0).abs() < 1e-5, "{name} {n} {pooling}: norm {length}");
    }
}
