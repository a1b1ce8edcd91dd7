//! Receipts and machine profiles of any bytes.

use bitnet_burn_engine::plan::MachineProfile;
use bitnet_burn_engine::receipt::{CheckOutcome, Receipt};
use bitnet_burn_formats::files;

/// Whether the receipt was taken, and its seal is right.
pub fn receipt(data: &[u8]) -> bool {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let path = dir.path().join("receipt.json");
    std::fs::write(&path, data).expect("the file is written");
    let Ok(read) = Receipt::read(&path) else { return false };
    // Each compares with what is there, and reads nothing else.
    read.receipt.check_model(&read.receipt.model);
    read.receipt.check_kernels(&[]);
    // What was read is sealed anew.
    std::fs::write(&path, read.receipt.to_text().expect("JSON has no other numbers"))
        .expect("the file is written");
    let again = Receipt::read(&path).expect("what was written can be read");
    assert_eq!(again.check().outcome, CheckOutcome::Agrees);
    if read.check().outcome != CheckOutcome::Agrees {
        return false;
    }
    // As `head -n -2 | sha256sum` computes it.
    let lines: Vec<&[u8]> = data.split_inclusive(|&byte| byte == b'\n').collect();
    let head = lines[..lines.len() - 2].concat();
    assert_eq!(
        lines[lines.len() - 2..].concat(),
        format!("  \"sha256\": \"{}\"\n}}\n", files::sha256(&head)).as_bytes()
    );
    true
}

/// Whether the machine profile was taken.
pub fn machine(data: &[u8]) -> bool {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let path = dir.path().join("machine.json");
    std::fs::write(&path, data).expect("the file is written");
    let Ok(profile) = MachineProfile::read(&path) else { return false };
    std::fs::write(&path, serde_json::to_vec(&profile).expect("plain data")).expect("the file is written");
    MachineProfile::read(&path).expect("what was written can be read");
    true
}
