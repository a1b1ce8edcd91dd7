//! Writing adapters, as PEFT's `save_pretrained` does.

use std::io::{self, Write as _};
use std::path::Path;

use bitnet_burn::names;
use bitnet_burn_formats::WriteError;
use bitnet_burn_formats::safetensors::{Dtype, SafetensorsWriter};
use serde_json::json;

use super::config::factor;
use super::{A, AdaptedProjection, AdapterError, B, CONFIG, PREFIX, WEIGHTS, module_name};

/// What an adapter's configuration says beside its matrices.
#[derive(Clone, Debug, PartialEq)]
pub struct AdapterOptions {
    /// Rank of all matrices.
    pub rank: usize,
    /// The product of the matrices is multiplied by alpha / rank.
    pub alpha: f64,
    /// By alpha / sqrt(rank) instead (rsLoRA, arXiv 2312.03732).
    pub rank_stabilised: bool,
    /// The model that it belongs to, as it was named.
    pub base: String,
}

impl AdapterOptions {
    /// What the product of the matrices is multiplied by.
    pub fn scale(&self) -> f32 {
        factor(self.alpha, self.rank, self.rank_stabilised)
    }
}

/// Writes an adapter into `dir`, which exists; files of its names are replaced. The matrices are F32.
///
/// # Errors
/// If a matrix has another rank than stated, or a value that is not finite, or a file can't be written.
pub fn write(
    dir: &Path,
    options: &AdapterOptions,
    projections: &[AdaptedProjection],
) -> Result<(), AdapterError> {
    let path = dir.join(WEIGHTS);
    let mut writer = SafetensorsWriter::new();
    for AdaptedProjection { layer, which, values } in projections {
        let stem = format!("{PREFIX}{}", names::projection_module(*layer, *which));
        let (k, n) = values.shape();
        for (name, shape, values) in [(A, [values.rank, k], &values.a), (B, [n, values.rank], &values.b)] {
            let name = format!("{stem}{name}");
            let wrong =
                |problem: String| AdapterError::Tensor { path: path.clone(), tensor: name.clone(), problem };
            if !shape.contains(&options.rank) || shape[0] * shape[1] != values.len() {
                return Err(wrong(format!("is {shape:?}, and the rank {}", options.rank)));
            }
            if let Some(value) = values.iter().find(|value| !value.is_finite()) {
                return Err(wrong(format!("holds {value}")));
            }
            writer.tensor(name, Dtype::F32, &shape, move |out| {
                values.iter().try_for_each(|value| out.write_all(&value.to_le_bytes()))
            })?;
        }
    }
    writer.write(&path, &mut |_| Ok(()))?;
    let mut targets: Vec<String> = projections.iter().map(|of| module_name(of.which)).collect();
    targets.sort();
    targets.dedup();
    let config = json!({
        "alpha_pattern": {},
        "base_model_name_or_path": options.base,
        "bias": "none",
        "fan_in_fan_out": false,
        "inference_mode": true,
        "init_lora_weights": true,
        "lora_alpha": number(options.alpha),
        "lora_dropout": 0.0,
        "modules_to_save": null,
        "peft_type": "LORA",
        "r": options.rank,
        "rank_pattern": {},
        "target_modules": targets,
        "task_type": "CAUSAL_LM",
        "use_dora": false,
        "use_rslora": options.rank_stabilised,
    });
    let path = dir.join(CONFIG);
    let failed = |error: io::Error| WriteError::Io { path: path.clone(), action: "write".into(), error };
    let mut file = std::fs::File::create(&path).map_err(failed)?;
    file.write_all(format!("{config:#}\n").as_bytes()).and_then(|()| file.sync_all()).map_err(failed)?;
    Ok(())
}

/// A whole number without a fraction, as PEFT writes it.
fn number(value: f64) -> serde_json::Value {
    if value.fract() == 0.0 && value.abs() < 1e15 { json!(value as i64) } else { json!(value) }
}
