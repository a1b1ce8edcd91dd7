//! Files of all kinds as text to train on and to validate on.

use std::io::Write as _;
use std::path::Path;
use std::sync::Arc;

use parquet::data_type::{ByteArray, ByteArrayType};
use parquet::file::properties::WriterProperties;
use parquet::file::writer::SerializedFileWriter;
use parquet::schema::parser::parse_message_type;

use super::*;

/// A table with a text in each row.
fn parquet(path: &Path, column: &str, texts: &[&str]) {
    let schema = format!("message rows {{ REQUIRED BYTE_ARRAY {column} (UTF8); }}");
    let schema = Arc::new(parse_message_type(&schema).unwrap());
    let file = std::fs::File::create(path).unwrap();
    let mut writer =
        SerializedFileWriter::new(file, schema, Arc::new(WriterProperties::builder().build())).unwrap();
    let mut group = writer.next_row_group().unwrap();
    let mut column = group.next_column().unwrap().unwrap();
    let values: Vec<ByteArray> = texts.iter().map(|&text| text.into()).collect();
    column.typed::<ByteArrayType>().write_batch(&values, None, None).unwrap();
    column.close().unwrap();
    group.close().unwrap();
    writer.close().unwrap();
}

#[test]
fn text_comes_from_directories_patterns_and_tables() {
    let dir = Dir::new();
    let text = text();
    let lines: Vec<&str> = text.lines().collect();
    std::fs::create_dir(dir.path("data")).unwrap();
    std::fs::rename(dir.path("text.txt"), dir.path("data/a.txt")).unwrap();
    parquet(&dir.path("data/b.parquet"), "text", &lines[..40]);
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    for line in &lines[40..80] {
        writeln!(gzip, "{}", serde_json::json!({ "text": line, "id": 1 })).unwrap();
    }
    writeln!(gzip, "not a row").unwrap();
    std::fs::write(dir.path("more.jsonl.gz"), gzip.finish().unwrap()).unwrap();
    parquet(&dir.path("v.parquet"), "text", &lines[80..90]);
    let train = |run: &str, changes: &[&str]| {
        let mut command =
            dir.bitnet(&["train", "--text", "data", "m*.jsonl.gz", "--weights", "3", "1", "--out", run]);
        command.args(["--validation", "v.parquet", "--json"]);
        TINY.iter().chain(&["model.n_layers=1", "run.steps=6"]).chain(changes).for_each(|assignment| {
            command.args(["--set", assignment]);
        });
        command
    };
    let output = succeed(&mut train("run", &["data.bad_rows=1"]));
    let (json, text) = (json(&output), stderr(&output));
    assert_eq!((&json["steps"], &json["bad_rows"]), (&6.into(), &1.into()));
    assert!(text.contains("1 bad row left out") && text.contains("more.jsonl.gz: line 41"), "{text}");
    let kept = std::fs::read_to_string(dir.path("run/validation.jsonl")).unwrap();
    assert!(kept.lines().count() == 10 && kept.contains(lines[80]), "{kept}");
    let config = std::fs::read_to_string(dir.path("run/config.toml")).unwrap();
    assert!(config.contains("weights = [3.0, 1.0]"), "{config}");
    assert!(dir.comes_back("run"));

    refuse(&mut train("bad", &[]), &["more.jsonl.gz: line 41", "`data.bad_rows` allows 0"]);
    parquet(&dir.path("data/b.parquet"), "content", &lines[..40]);
    refuse(
        &mut train("bad", &["data.bad_rows=1"]),
        &["b.parquet", "no column `text`", "its columns: content"],
    );
    assert!(!dir.path("bad").exists());
    refuse(&mut dir.bitnet(&["train", "--resume", "run"]), &["b.parquet", "its columns: content"]);
    // The same rows in another order are another text.
    parquet(&dir.path("data/b.parquet"), "text", &lines[1..41]);
    refuse(&mut dir.bitnet(&["train", "--resume", "run"]), &["the text is another"]);
}
