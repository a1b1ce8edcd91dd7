//! GGUF files of any bytes. What is read and written again reads the same.

use bitnet_burn_formats::gguf::{GgufFile, GgufWriter};

/// Whether the file was taken.
pub fn run(data: &[u8]) -> bool {
    let Ok(file) = GgufFile::parse("fuzzed.gguf".into(), data.to_vec().into()) else { return false };
    let mut writer = GgufWriter::new();
    // The writer always uses the default alignment.
    let keys = || file.metadata().iter().filter(|(key, _)| key != "general.alignment");
    for (key, value) in keys() {
        assert!(!value.to_string().is_empty());
        writer.set(key.clone(), value.clone()).expect("a key of a file comes once");
    }
    for tensor in file.tensors() {
        let bytes = file.tensor_bytes(&tensor.name).expect("the tensor lies within the file");
        writer
            .tensor(tensor.name.clone(), &tensor.dims, tensor.tensor_type, move |out| out.write_all(&bytes))
            .expect("the file's tensors are possible");
    }
    let dir = tempfile::tempdir().expect("a temporary directory");
    let path = dir.path().join("again.gguf");
    writer.write(&path).expect("the copy is written");
    let again = GgufFile::open(&path).expect("what was written can be read");
    // As text: a NaN is not equal to itself.
    assert_eq!(
        format!("{:?}", keys().collect::<Vec<_>>()),
        format!("{:?}", again.metadata().iter().collect::<Vec<_>>())
    );
    assert_eq!(file.tensors().len(), again.tensors().len());
    for (a, b) in file.tensors().iter().zip(again.tensors()) {
        assert_eq!((&a.name, &a.dims, a.tensor_type), (&b.name, &b.dims, b.tensor_type));
        assert_eq!(file.tensor_bytes(&a.name).ok(), again.tensor_bytes(&b.name).ok());
    }
    true
}
