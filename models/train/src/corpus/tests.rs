use std::io::Write;
use std::path::Path;
use std::sync::Arc;

use parquet::basic::Compression;
use parquet::data_type::{ByteArray, ByteArrayType, Int32Type};
use parquet::file::properties::WriterProperties;
use parquet::file::writer::SerializedFileWriter;
use parquet::schema::parser::parse_message_type;

use super::*;
use crate::config::{Documents, Task};

#[test]
fn one_document_gives_its_end() {
    let text = "ä".repeat(500);
    let corpus = Corpus::new([text]);
    let (training, validation) = corpus.split(0.1, 0, false);
    assert_eq!((training[0][0].len(), validation[0].len()), (900, 100));
}

#[test]
fn files_are_read_as_documents() {
    let dir = tempfile::tempdir().unwrap();
    let file = |name: &str, bytes: &[u8]| {
        let path = dir.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        vec![path]
    };
    let text = file("a.txt", b"one\r\ntwo\n\n\nthree\n");
    let read = |path: &[PathBuf], documents| {
        let options = DataOptions { documents, ..DataOptions::default() };
        Corpus::read(path, &options).map(|c| c.documents)
    };
    assert_eq!(read(&text, Documents::File).unwrap(), ["one\ntwo\n\n\nthree\n"]);
    assert_eq!(read(&text, Documents::Line).unwrap(), ["one", "two", "three"]);
    assert_eq!(read(&text, Documents::Paragraph).unwrap(), ["one\ntwo", "three"]);
    let lines = file("b.jsonl", b"{\"text\": \"one\", \"id\": 3}\n\n{\"text\": \"two\\nthree\"}\n");
    assert_eq!(read(&lines, Documents::File).unwrap(), ["one", "two\nthree"]);
    for (name, bytes, expected) in [
        ("c.txt", &b""[..], "no text"),
        ("d.txt", b" \n\n ", "no text"),
        ("e.txt", b"one\ntw\xff", "byte 6, on line 2, is 0xff"),
        ("f.jsonl", b"{\"text\": \"one\"}\n{\"txt\": 1}", "line 2"),
        ("g.jsonl", b"", "no text"),
    ] {
        let error = read(&file(name, bytes), Documents::File).unwrap_err().to_string();
        assert!(error.contains(name) && error.contains(expected), "{error}");
    }
    let error = read(&[dir.path().join("none.txt")], Documents::File).unwrap_err().to_string();
    assert!(error.contains("none.txt"), "{error}");
}

fn read(sources: &[&Path], options: &DataOptions) -> Result<Corpus, String> {
    let sources: Vec<PathBuf> = sources.iter().map(|&path| path.to_owned()).collect();
    Corpus::read(&sources, options).map_err(|error| error.to_string())
}

/// A table with numbers and texts, of which the third is null, in row groups of two rows.
fn table(path: &Path, compression: Compression) {
    let schema = "message rows { REQUIRED INT32 id; OPTIONAL BYTE_ARRAY body (UTF8); }";
    let schema = Arc::new(parse_message_type(schema).unwrap());
    let properties = Arc::new(WriterProperties::builder().set_compression(compression).build());
    let file = std::fs::File::create(path).unwrap();
    let mut writer = SerializedFileWriter::new(file, schema, properties).unwrap();
    for (ids, texts) in [([1, 2], &["one", "two"][..]), ([3, 4], &["four"])] {
        let mut group = writer.next_row_group().unwrap();
        let mut column = group.next_column().unwrap().unwrap();
        column.typed::<Int32Type>().write_batch(&ids, None, None).unwrap();
        column.close().unwrap();
        let mut column = group.next_column().unwrap().unwrap();
        let values: Vec<ByteArray> = texts.iter().map(|&text| text.into()).collect();
        let defined: &[i16] = if texts.len() == 2 { &[1, 1] } else { &[0, 1] };
        column.typed::<ByteArrayType>().write_batch(&values, Some(defined), None).unwrap();
        column.close().unwrap();
        group.close().unwrap();
    }
    writer.close().unwrap();
}

#[test]
fn tables_are_read_by_column() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.parquet");
    let zstd = Compression::ZSTD(Default::default());
    for compression in
        [Compression::UNCOMPRESSED, Compression::SNAPPY, Compression::GZIP(Default::default()), zstd]
    {
        table(&path, compression);
        let mut options = DataOptions { column: "body".into(), bad_rows: 1, ..DataOptions::default() };
        let corpus = read(&[&path], &options).unwrap();
        assert_eq!(corpus.documents(), ["one", "two", "four"]);
        assert_eq!(
            (corpus.bad_row_count(), &*corpus.bad_rows()[0].problem),
            (1, "row 3: its `body` is null")
        );
        options.bad_rows = 0;
        let error = read(&[&path], &options).unwrap_err();
        assert!(error.contains("a.parquet: row 3") && error.contains("`data.bad_rows` allows 0"), "{error}");
    }
    let error = read(&[&path], &DataOptions::default()).unwrap_err();
    assert!(error.contains("no column `text`; its columns: id, body"), "{error}");
    let numbers = DataOptions { column: "id".into(), ..DataOptions::default() };
    assert!(read(&[&path], &numbers).unwrap_err().contains("row 1: its `id` is a number"));
    let options = DataOptions { column: "body".into(), bad_rows: 1, ..DataOptions::default() };
    let whole = std::fs::read(&path).unwrap();
    let mut damaged = 0;
    for at in (0..whole.len()).step_by(3) {
        let mut bytes = whole.clone();
        bytes[at] ^= 0x55;
        std::fs::write(&path, &bytes).unwrap();
        damaged += usize::from(read(&[&path], &options).is_err());
        std::fs::write(&path, &whole[..at]).unwrap();
        assert!(read(&[&path], &options).unwrap_err().contains("a.parquet: it can't be read as Parquet"));
    }
    assert!(damaged > 20, "{damaged}");
}

#[test]
fn directories_patterns_and_compressed_files_are_sources() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    std::fs::create_dir_all(at("data/below")).unwrap();
    std::fs::write(at("data/b.txt"), "second").unwrap();
    std::fs::write(at("data/notes.pdf"), b"\xff").unwrap();
    std::fs::write(at("data/.hidden.txt"), "hidden").unwrap();
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gzip.write_all(b"first").unwrap();
    std::fs::write(at("data/a.txt.gz"), gzip.finish().unwrap()).unwrap();
    let lines = b"{\"text\": \"third\"}\n{\"text\": \"fourth\"}";
    std::fs::write(at("data/below/c.jsonl.zst"), zstd::encode_all(&lines[..], 1).unwrap()).unwrap();
    let options = DataOptions::default();
    let corpus = read(&[&at("data")], &options).unwrap();
    assert_eq!(
        (corpus.documents(), corpus.sources()),
        (&["first", "second", "third", "fourth"].map(String::from)[..], 1)
    );
    let corpus = read(&[&at("data/*.txt"), &at("data/*/*.zst")], &options).unwrap();
    assert_eq!(
        (corpus.documents(), corpus.sources()),
        (&["second", "third", "fourth"].map(String::from)[..], 2)
    );
    std::fs::create_dir(at("empty")).unwrap();
    for (source, expected) in [
        ("data/*.csv", "no file has a path of this pattern"),
        ("empty", ".parquet"),
        ("data/[", "not a pattern"),
    ] {
        let error = read(&[&at(source)], &options).unwrap_err();
        assert!(error.contains(source) && error.contains(expected), "{source}: {error}");
    }
    // Cut off, and not what its name says.
    let whole = std::fs::read(at("data/below/c.jsonl.zst")).unwrap();
    std::fs::write(at("c.txt.zst"), &whole[..whole.len() - 3]).unwrap();
    std::fs::write(at("c.txt.gz"), &whole).unwrap();
    for name in ["c.txt.zst", "c.txt.gz"] {
        assert!(read(&[&at(name)], &options).unwrap_err().contains(name));
    }
}

#[test]
fn bad_rows_are_counted() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.jsonl");
    let lines =
        b"{\"body\": \"one\"}\nnothing\n{\"body\": \"\xff\"}\n[1]\n{\"body\": 2}\n{}\n{\"body\": \"two\"}\n";
    std::fs::write(&path, lines).unwrap();
    let mut options = DataOptions { column: "body".into(), bad_rows: 5, ..DataOptions::default() };
    let corpus = read(&[&path], &options).unwrap();
    assert_eq!((corpus.documents(), corpus.bad_row_count()), (&["one", "two"].map(String::from)[..], 5));
    let shown = corpus.bad_rows().iter().map(|row| row.problem.clone()).collect::<Vec<_>>();
    for (problem, expected) in shown.iter().zip(["line 2", "line 3", "line 4", "line 5", "line 6"]) {
        assert!(problem.contains(expected), "{problem}");
    }
    options.bad_rows = 4;
    let error = read(&[&path], &options).unwrap_err();
    assert!(error.contains("line 6") && error.contains("`data.bad_rows` allows 4"), "{error}");
}

#[test]
fn validation_may_have_sources_of_its_own() {
    let validation = Corpus::new(["three".to_owned()]);
    let plain = Corpus::new((0..40).map(|i| i.to_string()));
    let corpus = plain.clone().with_validation(validation);
    let (training, kept) = corpus.split(0.1, 1, false);
    assert_eq!((training[0].len(), kept), (40, vec!["three"]));
    assert_ne!(corpus.sha256(), plain.sha256());
}

/// Lists of objects, as data sets of conversations have them.
#[test]
fn conversations_are_read_from_tables_and_lines() {
    let dir = tempfile::tempdir().unwrap();
    let (table, lines) = (dir.path().join("a.parquet"), dir.path().join("a.jsonl"));
    let schema =
        "message rows { OPTIONAL group messages (LIST) { REPEATED group list { OPTIONAL group element {
        OPTIONAL BYTE_ARRAY role (UTF8); OPTIONAL BYTE_ARRAY content (UTF8); } } } }";
    let schema = Arc::new(parse_message_type(schema).unwrap());
    let file = std::fs::File::create(&table).unwrap();
    let mut writer = SerializedFileWriter::new(file, schema, Arc::default()).unwrap();
    let mut group = writer.next_row_group().unwrap();
    for texts in [["user", "assistant"], ["Hi", "Hello"]] {
        let mut column = group.next_column().unwrap().unwrap();
        let texts = texts.map(ByteArray::from);
        // One row with two messages, and one without a list.
        column.typed::<ByteArrayType>().write_batch(&texts, Some(&[4, 4, 0]), Some(&[0, 1, 0])).unwrap();
        column.close().unwrap();
    }
    group.close().unwrap();
    writer.close().unwrap();
    let expected = r#"[{"role":"user","content":"Hi"},{"role":"assistant","content":"Hello"}]"#;
    std::fs::write(&lines, format!("{{\"messages\": {expected}}}\n{{\"messages\": null}}\n")).unwrap();
    let value = |text: &str| serde_json::from_str::<serde_json::Value>(text).unwrap();
    for path in [table, lines] {
        let options = DataOptions { task: Task::Sft, bad_rows: 1, ..DataOptions::default() };
        let corpus = read(&[&path], &options).unwrap();
        assert_eq!((corpus.documents().len(), corpus.bad_row_count()), (1, 1));
        assert_eq!(value(&corpus.documents()[0]), value(expected));
        let text = DataOptions { column: "messages".into(), ..DataOptions::default() };
        assert!(read(&[&path], &text).unwrap_err().contains("is a list"));
    }
}
