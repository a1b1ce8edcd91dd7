//! BitNet b1.58 in float64, as plainly as it can be written: an oracle that shares no code with the
//! library, readers of its own included.
//!
//! int8 rounding is discontinuous: where an activation lies within float noise of a rounding boundary,
//! two correct implementations may round it differently, and everything behind it differs by 0.1 to 0.5.
//! The oracle knows how near each position comes to a boundary, and so how far a comparison holds.

use std::collections::HashMap;
use std::path::Path;

use half::f16;
use serde_json::Value;

use crate::{Golden, read_goldens};

/// Positions are compared up to the first whose activations come this close to a rounding boundary, in
/// steps of int8.
pub const BOUNDARY: f64 = 5e-5;

/// A deliberate mistake, to show that a comparison would notice it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Mutation {
    /// No mistake.
    None,
    /// Activations stay floats.
    NoActivationQuantisation,
    /// Truncates where it should round.
    Truncate,
    /// One activation scale for all tokens.
    ScalePerTensor,
    /// RoPE pairs neighbours.
    InterleavedRope,
    /// Another RoPE base.
    Theta(f64),
    /// Another epsilon in the norms.
    Eps(f64),
    /// The weight of the norm before o_proj is ignored.
    AttentionSubNormIgnored,
    /// The weight of the norm before down_proj is ignored.
    FeedForwardSubNormIgnored,
    /// Divides where it should multiply by the weights' scale.
    InverseScale,
    /// relu where it should be relu squared.
    Relu,
}

/// A ternary matrix [n, k].
#[derive(Clone, Debug)]
pub struct Linear {
    /// -1, 0 and 1.
    pub codes: Vec<f64>,
    /// weight = code * scale.
    pub scale: f64,
    /// Input features.
    pub k: usize,
    /// Output features with a float master so near the boundary between two codes that float32 may
    /// choose either.
    pub uncertain: Vec<usize>,
}

/// One block.
#[derive(Clone, Debug)]
pub struct Layer {
    /// Before q/k/v, o, gate/up, down.
    pub norms: [Vec<f64>; 4],
    /// q, k, v, o, gate, up, down.
    pub linears: [Linear; 7],
}

/// A model.
#[derive(Clone, Debug)]
pub struct Reference {
    /// Query heads.
    pub heads: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Epsilon of the norms.
    pub eps: f64,
    /// Base of RoPE.
    pub theta: f64,
    /// SiLU instead of squared ReLU.
    pub silu: bool,
    /// Embedding [vocabulary, hidden].
    pub embedding: Vec<f64>,
    /// lm_head, where it is not the embedding.
    pub head: Option<Vec<f64>>,
    /// The last norm.
    pub norm: Vec<f64>,
    /// The blocks.
    pub layers: Vec<Layer>,
}

/// What a forward pass gives.
#[derive(Debug)]
pub struct Forward {
    /// [T, vocabulary].
    pub logits: Golden,
    /// Per position, the distance of its activations to the nearest rounding boundary.
    pub boundary: Vec<f64>,
    /// Everything on the way, under the names of the golden traces.
    pub trace: HashMap<String, Golden>,
}

impl Forward {
    /// Leading positions that no rounding boundary makes uncertain.
    pub fn certain(&self) -> usize {
        self.boundary.iter().position(|&b| b < BOUNDARY).unwrap_or(self.boundary.len())
    }
}

fn f64s(values: &[f32]) -> Vec<f64> {
    values.iter().map(|&v| f64::from(v)).collect()
}

/// x [T, k] times w [n, k] transposed.
fn matmul(x: &[f64], w: &[f64], k: usize) -> Vec<f64> {
    let dot = |x: &[f64], w: &[f64]| x.iter().zip(w).map(|(a, b)| a * b).sum::<f64>();
    x.chunks_exact(k).flat_map(|x| w.chunks_exact(k).map(move |w| dot(x, w))).collect()
}

fn largest(values: &[f64]) -> f64 {
    values.iter().fold(0.0, |a, v| a.max(v.abs()))
}

/// Quantised activations.
struct Quantised {
    q: Vec<f64>,
    /// 127 / absmax of each row.
    scale: Vec<f64>,
    boundary: Vec<f64>,
}

fn quantise(x: &[f64], k: usize, mutation: Mutation) -> Quantised {
    let mut out = Quantised { q: Vec::new(), scale: Vec::new(), boundary: Vec::new() };
    for row in x.chunks_exact(k) {
        let absmax = largest(if mutation == Mutation::ScalePerTensor { x } else { row });
        let s = 127.0 / absmax.max(1e-5);
        let mut boundary = f64::INFINITY;
        for v in row.iter().map(|x| x * s) {
            boundary = boundary.min(0.5 - (v - v.round_ties_even()).abs());
            out.q.push(match mutation {
                Mutation::NoActivationQuantisation => v,
                Mutation::Truncate => v.trunc(),
                _ => v.round_ties_even().clamp(-128.0, 127.0),
            });
        }
        out.scale.push(s);
        out.boundary.push(boundary);
    }
    out
}

impl Linear {
    fn apply(&self, x: &Quantised, mutation: Mutation) -> Vec<f64> {
        let n = self.codes.len() / self.k;
        let scale = if mutation == Mutation::InverseScale { 1.0 / self.scale } else { self.scale };
        let mut y = matmul(&x.q, &self.codes, self.k);
        for (row, s) in y.chunks_exact_mut(n).zip(&x.scale) {
            row.iter_mut().for_each(|v| *v *= scale / s);
        }
        y
    }
}

impl Reference {
    /// Logits of all positions.
    pub fn forward(&self, ids: &[u32], mutation: Mutation) -> Forward {
        let t = ids.len();
        let hidden = self.norm.len();
        let d = self.layers[0].linears[0].codes.len() / hidden / self.heads;
        let eps = if let Mutation::Eps(eps) = mutation { eps } else { self.eps };
        let theta = if let Mutation::Theta(theta) = mutation { theta } else { self.theta };
        let mut trace = HashMap::new();
        let mut boundary = vec![f64::INFINITY; t];

        let rms = |x: &[f64], w: &[f64]| -> Vec<f64> {
            let rows = x.chunks_exact(w.len()).flat_map(|row| {
                let mean = row.iter().map(|v| v * v).sum::<f64>() / row.len() as f64;
                let root = (mean + eps).sqrt();
                row.iter().zip(w).map(move |(v, w)| w * (v / root))
            });
            rows.collect()
        };
        let angle = |p: usize, j: usize| p as f64 * theta.powf(-2.0 * j as f64 / d as f64);
        let rope = |x: &[f64]| -> Vec<f64> {
            let heads = x.len() / t / d;
            let mut y = x.to_vec();
            for (i, head) in y.chunks_exact_mut(d).enumerate() {
                for j in 0..d / 2 {
                    let (a, b) = if mutation == Mutation::InterleavedRope {
                        (2 * j, 2 * j + 1)
                    } else {
                        (j, j + d / 2)
                    };
                    let (sin, cos) = angle(i / heads, j).sin_cos();
                    (head[a], head[b]) = (head[a] * cos - head[b] * sin, head[b] * cos + head[a] * sin);
                }
            }
            y
        };
        let mut keep = |name: String, values: &[f64]| {
            let shape = vec![t, values.len() / t];
            trace.insert(name, Golden { shape, values: values.iter().map(|&v| v as f32).collect() });
        };

        let mut x: Vec<f64> =
            ids.iter().flat_map(|&i| &self.embedding[i as usize * hidden..][..hidden]).copied().collect();
        keep("embed".into(), &x);
        for (i, layer) in self.layers.iter().enumerate() {
            let [q, k, v, o, gate, up, down] = &layer.linears;
            let mut input = |name: &str, x: &[f64], keep: &mut dyn FnMut(String, &[f64])| {
                let quantised = quantise(x, x.len() / t, mutation);
                keep(format!("layer{i}.{name}_proj.in"), x);
                keep(format!("layer{i}.{name}_proj.in_int8"), &quantised.q);
                keep(format!("layer{i}.{name}_proj.in_scale"), &quantised.scale);
                boundary.iter_mut().zip(&quantised.boundary).for_each(|(b, &new)| *b = b.min(new));
                quantised
            };
            let ones = vec![1.0; layer.norms[1].len()];
            let sub = if mutation == Mutation::AttentionSubNormIgnored { &ones } else { &layer.norms[1] };
            let n = input("q", &rms(&x, &layer.norms[0]), &mut keep);
            let (q, k, v) = (q.apply(&n, mutation), k.apply(&n, mutation), v.apply(&n, mutation));
            keep(format!("layer{i}.q_proj.out"), &q);
            keep(format!("layer{i}.k_proj.out"), &k);
            keep(format!("layer{i}.v_proj.out"), &v);
            let (q, k) = (rope(&q), rope(&k));
            keep(format!("layer{i}.k_rope"), &k);
            let context = self.attend(&q, &k, &v, t, d);
            keep(format!("layer{i}.attn_ctx"), &context);
            let y = o.apply(&input("o", &rms(&context, sub), &mut keep), mutation);
            keep(format!("layer{i}.o_proj.out"), &y);
            x.iter_mut().zip(&y).for_each(|(x, y)| *x += y);
            keep(format!("layer{i}.after_attn"), &x);
            let n = input("gate", &rms(&x, &layer.norms[2]), &mut keep);
            let (gate, up) = (gate.apply(&n, mutation), up.apply(&n, mutation));
            keep(format!("layer{i}.gate_proj.out"), &gate);
            keep(format!("layer{i}.up_proj.out"), &up);
            let activation = |g: f64| match (self.silu, mutation) {
                (true, _) => g / (1.0 + (-g).exp()),
                (false, Mutation::Relu) => g.max(0.0),
                (false, _) => g.max(0.0) * g.max(0.0),
            };
            let a: Vec<f64> = gate.iter().zip(&up).map(|(&g, u)| activation(g) * u).collect();
            keep(format!("layer{i}.mlp_act"), &a);
            let ones = vec![1.0; layer.norms[3].len()];
            let sub = if mutation == Mutation::FeedForwardSubNormIgnored { &ones } else { &layer.norms[3] };
            let y = down.apply(&input("down", &rms(&a, sub), &mut keep), mutation);
            keep(format!("layer{i}.down_proj.out"), &y);
            x.iter_mut().zip(&y).for_each(|(x, y)| *x += y);
            keep(format!("layer{i}.after_mlp"), &x);
        }
        let x = rms(&x, &self.norm);
        keep("final_norm".into(), &x);
        let logits = matmul(&x, self.head.as_ref().unwrap_or(&self.embedding), hidden);
        keep("logits".into(), &logits);
        let logits = trace.remove("logits").expect("just kept");
        Forward { logits, boundary, trace }
    }

    fn attend(&self, q: &[f64], k: &[f64], v: &[f64], t: usize, d: usize) -> Vec<f64> {
        let group = self.heads / self.kv_heads;
        let at = |x: &[f64], heads: usize, p: usize, h: usize| (x[(p * heads + h) * d..][..d]).to_vec();
        let mut out = Vec::with_capacity(q.len());
        for p in 0..t {
            for h in 0..self.heads {
                let query = at(q, self.heads, p, h);
                let keys = (0..=p).flat_map(|s| at(k, self.kv_heads, s, h / group)).collect::<Vec<_>>();
                let scores = matmul(&query, &keys, d);
                let top = scores.iter().fold(f64::NEG_INFINITY, |a, &b| a.max(b));
                let e: Vec<f64> = scores.iter().map(|s| ((s - top) / (d as f64).sqrt()).exp()).collect();
                let sum: f64 = e.iter().sum();
                let mut context = vec![0.0; d];
                for (s, e) in e.iter().enumerate() {
                    let value = at(v, self.kv_heads, s, h / group);
                    context.iter_mut().zip(value).for_each(|(c, v)| *c += e / sum * v);
                }
                out.extend(context);
            }
        }
        out
    }

    /// A Hugging Face directory in any of the goldens' weight styles.
    ///
    /// # Panics
    /// If it is not that.
    pub fn from_hf(dir: &Path) -> Self {
        let text = std::fs::read_to_string(dir.join("config.json")).expect("config.json");
        let c: Value = serde_json::from_str(&text).expect("config.json");
        let mut tensors = HashMap::new();
        for entry in std::fs::read_dir(dir).expect("the directory") {
            let path = entry.expect("an entry").path();
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            if name.starts_with("model") && name.ends_with(".safetensors") {
                tensors.extend(read_goldens(&path));
            }
        }
        let quantization = &c["quantization_config"];
        let divide = quantization["linear_class"] == "bitlinear";
        let get = |name: &str| f64s(&tensors[name].values);
        let linear = |name: String| {
            let w = &tensors[&format!("{name}.weight")];
            let k = w.shape[1];
            let Some(scale) = tensors.get(&format!("{name}.weight_scale")) else {
                let w = f64s(&w.values);
                let scale = (w.iter().map(|w| w.abs()).sum::<f64>() / w.len() as f64).max(1e-5);
                let codes = w.iter().map(|w| (w / scale).round_ties_even().clamp(-1.0, 1.0)).collect();
                let near = |w: f64| ((w / scale).abs() - 0.5).abs() < 2e-7;
                let uncertain = (0..w.len()).filter(|&i| near(w[i])).map(|i| i / k).collect();
                return Linear { codes, scale, k, uncertain };
            };
            let scale = f64::from(scale.values[0]);
            // Four rows a byte, a quarter of the rows apart, the first quarter in the lowest bits.
            let codes =
                (0..4).flat_map(|i| w.values.iter().map(move |&b| f64::from((b as u8 >> (2 * i)) & 3) - 1.0));
            Linear {
                codes: codes.collect(),
                scale: if divide { 1.0 / scale } else { scale },
                k,
                uncertain: vec![],
            }
        };
        let number = |name: &str| c[name].as_u64().expect("a number") as usize;
        let layers = (0..number("num_hidden_layers")).map(|i| {
            let p = format!("model.layers.{i}.");
            let norms = [
                "input_layernorm",
                "self_attn.attn_sub_norm",
                "post_attention_layernorm",
                "mlp.ffn_sub_norm",
            ];
            let linears = [
                "self_attn.q",
                "self_attn.k",
                "self_attn.v",
                "self_attn.o",
                "mlp.gate",
                "mlp.up",
                "mlp.down",
            ];
            Layer {
                norms: norms.map(|name| get(&format!("{p}{name}.weight"))),
                linears: linears.map(|name| linear(format!("{p}{name}_proj"))),
            }
        });
        let theta = c["rope_theta"].as_f64().or(c["rope_parameters"]["rope_theta"].as_f64());
        Self {
            heads: number("num_attention_heads"),
            kv_heads: number("num_key_value_heads"),
            eps: c["rms_norm_eps"].as_f64().expect("a number"),
            theta: theta.expect("a number"),
            silu: c["hidden_act"] == "silu",
            embedding: get("model.embed_tokens.weight"),
            head: (!c["tie_word_embeddings"].as_bool().expect("stated")).then(|| get("lm_head.weight")),
            norm: get("model.norm.weight"),
            layers: layers.collect(),
        }
    }

    /// A GGUF file of F32, F16 and I2_S tensors with a tied embedding.
    ///
    /// # Panics
    /// If it is not that.
    pub fn from_gguf(path: &Path) -> Self {
        let bytes = std::fs::read(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        let gguf = Gguf::read(&bytes);
        let number = |name: &str| gguf.numbers[name];
        let get = |name: String| gguf.floats(&name).0;
        let linear = |name: String| {
            let (w, k) = gguf.floats(&name);
            let scale = largest(&w);
            Linear { codes: w.iter().map(|w| w / scale).collect(), scale, k, uncertain: vec![] }
        };
        let layers = (0..number("block_count") as usize).map(|i| {
            let norms = ["attn_norm", "attn_sub_norm", "ffn_norm", "ffn_sub_norm"];
            let linears = ["attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"];
            Layer {
                norms: norms.map(|name| get(format!("blk.{i}.{name}.weight"))),
                linears: linears.map(|name| linear(format!("blk.{i}.{name}.weight"))),
            }
        });
        Self {
            heads: number("attention.head_count") as usize,
            kv_heads: number("attention.head_count_kv") as usize,
            eps: number("attention.layer_norm_rms_epsilon"),
            theta: number("rope.freq_base"),
            silu: false,
            embedding: get("token_embd.weight".into()),
            head: None,
            norm: get("output_norm.weight".into()),
            layers: layers.collect(),
        }
    }
}

/// What a GGUF file holds.
struct Gguf<'a> {
    /// Numeric keys, without the architecture in front.
    numbers: HashMap<String, f64>,
    /// (type, dimensions, offset)
    tensors: HashMap<String, (u32, Vec<u64>, u64)>,
    data: &'a [u8],
}

impl<'a> Gguf<'a> {
    fn read(bytes: &'a [u8]) -> Self {
        let mut at = 4; // behind the magic
        let mut take = |n: usize| {
            at += n;
            &bytes[at - n..at]
        };
        fn number(bytes: &[u8]) -> u64 {
            bytes.iter().rev().fold(0, |n, &b| n << 8 | u64::from(b))
        }
        fn string<'b>(take: &mut dyn FnMut(usize) -> &'b [u8]) -> String {
            let length = number(take(8)) as usize;
            String::from_utf8(take(length).to_vec()).expect("UTF-8")
        }
        fn value<'b>(kind: u64, take: &mut dyn FnMut(usize) -> &'b [u8]) -> Option<f64> {
            match kind {
                0 | 1 | 7 => Some(f64::from(take(1)[0])),
                2 | 3 => Some(number(take(2)) as f64),
                4 | 5 => Some(number(take(4)) as f64),
                6 => Some(f64::from(f32::from_bits(number(take(4)) as u32))),
                8 => string(take).is_empty().then_some(0.0),
                9 => {
                    let (kind, count) = (number(take(4)), number(take(8)));
                    for _ in 0..count {
                        value(kind, take);
                    }
                    None
                }
                12 => Some(f64::from_bits(number(take(8)))),
                _ => Some(number(take(8)) as f64),
            }
        }
        let _version = take(4);
        let (tensor_count, key_count) = (number(take(8)), number(take(8)));
        let mut numbers = HashMap::new();
        for _ in 0..key_count {
            let key = string(&mut take);
            let kind = number(take(4));
            if let Some(number) = value(kind, &mut take) {
                numbers.insert(key.trim_start_matches("bitnet-b1.58.").to_owned(), number);
            }
        }
        let mut tensors = HashMap::new();
        for _ in 0..tensor_count {
            let name = string(&mut take);
            let rank = number(take(4));
            let dims = (0..rank).map(|_| number(take(8))).collect();
            tensors.insert(name, (number(take(4)) as u32, dims, number(take(8))));
        }
        let start = at.next_multiple_of(32);
        Self { numbers, tensors, data: &bytes[start..] }
    }

    /// A tensor's values, and the length of its rows.
    fn floats(&self, name: &str) -> (Vec<f64>, usize) {
        let (kind, dims, offset) = &self.tensors[name];
        let data = &self.data[*offset as usize..];
        let count = dims.iter().product::<u64>() as usize;
        let values = match kind {
            0 => data
                .chunks_exact(4)
                .take(count)
                .map(|b| f64::from(f32::from_le_bytes(b.try_into().unwrap())))
                .collect(),
            1 => data
                .chunks_exact(2)
                .take(count)
                .map(|b| f16::from_le_bytes(b.try_into().unwrap()).to_f64())
                .collect(),
            36 => {
                let scale = f32::from_le_bytes(data[count / 4..][..4].try_into().unwrap());
                let code = |i: usize| data[i / 128 * 32 + i % 32] >> (6 - 2 * (i % 128 / 32)) & 3;
                (0..count).map(|i| (f64::from(code(i)) - 1.0) * f64::from(scale)).collect()
            }
            other => panic!("{name}: type {other}"),
        };
        (values, dims[0] as usize)
    }
}
