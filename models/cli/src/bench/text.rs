//! The report of a measurement, for people.

use bitnet_burn_engine::bench::{
    BenchReport, BenchResult, DecodeAt, DecodeBatch, Phase, Profile, RequestLatency, Spread,
};
use bitnet_burn_engine::text::{count, human_bytes, human_seconds};
use bitnet_burn_manager::cpu;

use crate::output::columns;

/// The whole report.
pub fn report(report: &BenchReport) -> String {
    let BenchReport { model, load_seconds, result, execution, .. } = report;
    let mut rows = vec![vec!["".into(), "median".into(), "min".into(), "max".into(), "".into()]];
    let mut spread = |label: String, spread: Option<Spread>, unit: &str| {
        if let Some(Spread { median, min, max }) = spread {
            let digits = |value: f64| format!("{value:.2}");
            rows.push(vec![label, digits(median), digits(min), digits(max), unit.into()]);
        }
    };
    let BenchResult { prompt_tokens: p, generated_tokens: n, .. } = result;
    spread(format!("prefill {p}"), result.prefill_tokens_per_s, "tokens/s");
    spread(format!("decode {n}"), result.decode_tokens_per_s, "tokens/s");
    spread("memory read".into(), Some(result.read_bandwidth_gb_per_s), "GB/s");
    let mut text = columns(&rows);
    for DecodeAt { context, decode_tokens_per_s, .. } in &result.decode_by_context {
        text.push_str(&format!("decode {n} at a context of {context}: {decode_tokens_per_s:.2} tokens/s\n"));
    }
    for DecodeBatch { sequences, decode_tokens_per_s, .. } in &result.decode_by_batch {
        text.push_str(&format!(
            "decode {n} for {} at once: {decode_tokens_per_s:.2} tokens/s in all\n",
            count(*sequences as u64, "sequence")
        ));
    }
    text.push_str(&latency(result));
    text.push('\n');
    let row = |label: &str, value: String| vec![label.to_owned(), value];
    let parts = &result.bytes_per_token_parts;
    let name = model.name.as_ref().map(|name| format!(", {name}")).unwrap_or_default();
    let mut rows = vec![
        row("model", format!("{} ({}{name})", model.path.display(), model.architecture)),
        row("repetitions", result.repetitions.to_string()),
        row(
            "bytes/token",
            format!(
                "{} (projections {}, head {}, norms {})",
                human_bytes(result.bytes_per_token),
                human_bytes(parts.projections),
                human_bytes(parts.head),
                human_bytes(parts.norms)
            ),
        ),
    ];
    if let Some(fraction) = result.decode_fraction_of_bandwidth {
        let cached = cpu::last_level_cache().is_some_and(|cache| result.bytes_per_token < cache as u64);
        let cached = if cached { " (but the weights fit into the cache)" } else { "" };
        rows.push(row(
            "decode",
            format!("{:.0} % of the limit that the bandwidth sets{cached}", fraction * 100.0),
        ));
    }
    rows.push(row("load", human_seconds(*load_seconds)));
    if let Some(seconds) = result.start_to_first_token_seconds {
        rows.push(row("first token", format!("{} from the start of the program", human_seconds(seconds))));
    }
    rows.push(row("KV cache", human_bytes(result.kv_cache_bytes as u64)));
    if let Some(bytes) = result.peak_rss_bytes {
        rows.push(row("peak memory", human_bytes(bytes)));
    }
    text.push_str(&columns(&rows));
    text.push_str(&execution.to_string());
    if let Some(profile) = &result.profile {
        text.push_str(&profiled(profile));
    }
    text
}

/// The latency of requests, one prompt length a row.
fn latency(result: &BenchResult) -> String {
    let all: Vec<&RequestLatency> = result.latency.iter().chain(&result.latency_by_prompt).collect();
    if all.is_empty() {
        return String::new();
    }
    let head = ["prompt", "to tokens", "prefill", "first token", "a token", "95 %", "99 %", "most"];
    let head = head.into_iter().chain(["sampling", "to text", "end to end"]);
    let mut rows = vec![head.map(str::to_owned).collect::<Vec<_>>()];
    let median = |spread: Option<Spread>| spread.map_or("-".to_owned(), |s| human_seconds(s.median));
    for latency in all {
        let token = |part: fn(&bitnet_burn_engine::report::Latency) -> f64| {
            latency.token_seconds.as_ref().map_or("-".to_owned(), |token| human_seconds(part(token)))
        };
        rows.push(vec![
            latency.prompt_tokens.to_string(),
            median(latency.tokenisation_seconds),
            median(Some(latency.prefill_seconds)),
            median(Some(latency.first_token_seconds)),
            token(|token| token.p50),
            token(|token| token.p95),
            token(|token| token.p99),
            token(|token| token.max),
            human_seconds(latency.sampling_seconds.p50),
            latency.detokenisation_seconds.map_or("-".to_owned(), |text| human_seconds(text.p50)),
            median(Some(latency.end_to_end_seconds)),
        ]);
    }
    format!("\n{}", columns(&rows))
}

/// Where the time goes.
fn profiled(profile: &Profile) -> String {
    profile.phases.iter().map(phase).collect()
}

fn phase(phase: &Phase) -> String {
    let Phase { tokens, wall_seconds, spans_seconds, overhead, rows, .. } = phase;
    let token = |seconds: f64| human_seconds(seconds / (*tokens).max(1) as f64);
    let mut table = vec![
        [
            phase.phase.to_string(),
            "share".into(),
            "a token".into(),
            "calls".into(),
            "part".into(),
            "shapes".into(),
        ]
        .to_vec(),
    ];
    for row in rows {
        table.push(vec![
            row.operation.map_or("everything else".into(), |operation| operation.to_string()),
            format!("{:.1} %", row.share * 100.0),
            token(row.seconds),
            row.calls.to_string(),
            row.part.to_string(),
            row.shape.clone(),
        ]);
    }
    let overhead = overhead.map(|overhead| format!("; profiling cost {:.1} %", overhead * 100.0));
    let difference = (spans_seconds / wall_seconds - 1.0) * 100.0;
    format!(
        "\n{}The rows make {} a token, {difference:+.2} % beside the clock's {}{}.\n",
        columns(&table),
        token(*spans_seconds),
        token(*wall_seconds),
        overhead.unwrap_or_default()
    )
}
