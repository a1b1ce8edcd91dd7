//! Safetensors files of any bytes. What is read and written again reads the same.

use bitnet_burn_formats::safetensors::{SafetensorsWriter, open_file};

/// Whether the file was taken.
pub fn run(data: &[u8]) -> bool {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let (path, copy) = (dir.path().join("fuzzed.safetensors"), dir.path().join("again.safetensors"));
    std::fs::write(&path, data).expect("the file is written");
    let Ok(file) = open_file(&path) else { return false };
    // The writer has whole bytes only.
    if file.tensors.values().any(|tensor| tensor.dtype.bitsize() % 8 != 0) {
        return true;
    }
    let mut writer = SafetensorsWriter::new();
    for (name, tensor) in &file.tensors {
        writer
            .tensor(name.clone(), tensor.dtype, &tensor.shape, |out| out.write_all(&tensor.data))
            .expect("the file's tensors are possible");
    }
    writer.write(&copy, &mut |_| Ok(())).expect("the copy is written");
    let again = open_file(&copy).expect("what was written can be read");
    assert_eq!(file.tensors.len(), again.tensors.len());
    for (name, tensor) in &file.tensors {
        let other = &again.tensors[name];
        assert_eq!((tensor.dtype, &tensor.shape, &tensor.data), (other.dtype, &other.shape, &other.data));
    }
    true
}
