//! A small Hugging Face directory, every part of which can be changed.

use bitnet_burn_engine::checkpoint::{Checkpoint, LoadError, OpenOptions};
use serde_json::{Map, Value, json};
use std::path::Path;

/// (name, dtype, shape, data) in the order of the file.
pub type Tensor = (String, &'static str, Vec<usize>, Vec<u8>);

pub fn f32s(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

pub fn safetensors(tensors: &[Tensor]) -> Vec<u8> {
    let mut header = Map::new();
    let mut data = Vec::new();
    for (name, dtype, shape, bytes) in tensors {
        let offsets = [data.len(), data.len() + bytes.len()];
        header.insert(name.clone(), json!({"dtype": dtype, "shape": shape, "data_offsets": offsets}));
        data.extend(bytes);
    }
    with_header(&Value::Object(header).to_string(), &data)
}

pub fn with_header(header: &str, data: &[u8]) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes(), header.as_bytes(), data].concat()
}

/// Hidden 8, FFN 12, one layer, two heads, one KV head, vocabulary 4.
pub struct Model {
    pub config: Value,
    pub tensors: Vec<Tensor>,
}

pub fn shapes() -> Vec<(String, usize, usize)> {
    [
        ("self_attn.q_proj", 8, 8),
        ("self_attn.k_proj", 4, 8),
        ("self_attn.v_proj", 4, 8),
        ("self_attn.o_proj", 8, 8),
        ("mlp.gate_proj", 12, 8),
        ("mlp.up_proj", 12, 8),
        ("mlp.down_proj", 8, 12),
    ]
    .map(|(part, n, k)| (format!("model.layers.0.{part}.weight"), n, k))
    .into()
}

impl Model {
    pub fn new(quantization: Value) -> Self {
        let config = json!({
            "model_type": "bitnet", "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1,
            "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 4, "max_position_embeddings": 32,
            "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "hidden_act": "relu2", "tie_word_embeddings": true,
            "bos_token_id": 1, "eos_token_id": 2, "quantization_config": quantization,
        });
        let mut tensors: Vec<Tensor> = vec![
            ("model.embed_tokens.weight".into(), "F32", vec![4, 8], f32s(&[0.5; 32])),
            ("model.norm.weight".into(), "F32", vec![8], f32s(&[1.0; 8])),
        ];
        for (part, n) in [
            ("input_layernorm", 8),
            ("post_attention_layernorm", 8),
            ("self_attn.attn_sub_norm", 8),
            ("mlp.ffn_sub_norm", 12),
        ] {
            tensors.push((format!("model.layers.0.{part}.weight"), "F32", vec![n], f32s(&vec![1.0; n])));
        }
        Self { config, tensors }
    }

    pub fn packed() -> Self {
        let mut model = Self::new(json!({"quant_method": "bitnet", "linear_class": "autobitlinear"}));
        for (name, n, k) in shapes() {
            model.tensors.push((format!("{name}_scale"), "F32", vec![1], f32s(&[0.5])));
            model.tensors.push((name, "U8", vec![n / 4, k], vec![0b10_01_00_01; n / 4 * k]));
        }
        model
    }

    pub fn online() -> Self {
        let quantization =
            json!({"quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "online"});
        let mut model = Self::new(quantization);
        for (name, n, k) in shapes() {
            let values: Vec<f32> = (0..n * k).map(|i| [0.3, -0.9, 0.0][i % 3]).collect();
            model.tensors.push((name, "F32", vec![n, k], f32s(&values)));
        }
        model
    }

    pub fn set(mut self, key: &str, value: Value) -> Self {
        match key.split_once('/') {
            Some((outer, inner)) => self.config[outer][inner] = value,
            None => self.config[key] = value,
        }
        self
    }

    pub fn without(mut self, key: &str) -> Self {
        self.config.as_object_mut().unwrap().remove(key);
        self
    }

    pub fn tensor(mut self, name: &str, dtype: &'static str, shape: &[usize], data: Vec<u8>) -> Self {
        self.tensors.retain(|t| t.0 != name);
        self.tensors.push((name.into(), dtype, shape.to_vec(), data));
        self
    }

    pub fn drop(mut self, name: &str) -> Self {
        self.tensors.retain(|t| t.0 != name);
        self
    }

    pub fn write(&self, dir: &Path) {
        std::fs::write(dir.join("config.json"), self.config.to_string()).unwrap();
        std::fs::write(dir.join("model.safetensors"), safetensors(&self.tensors)).unwrap();
    }

    pub fn open(&self) -> Result<Opened, LoadError> {
        self.open_with(&OpenOptions::default())
    }

    pub fn open_with(&self, options: &OpenOptions) -> Result<Opened, LoadError> {
        let dir = tempfile::tempdir().unwrap();
        self.write(dir.path());
        let checkpoint = Checkpoint::open(dir.path(), options)?;
        checkpoint.check()?;
        Ok(Opened { checkpoint, _dir: dir })
    }
}

/// A checkpoint, and its directory for as long.
pub struct Opened {
    pub checkpoint: Checkpoint,
    _dir: tempfile::TempDir,
}

#[track_caller]
pub fn assert_refused<T>(name: &str, result: Result<T, LoadError>, parts: &[&str]) {
    let Err(error) = result else { panic!("{name}: accepted") };
    let text = error.to_string();
    for part in parts {
        assert!(text.contains(part), "{name}: {text:?} does not say {part:?}");
    }
}
