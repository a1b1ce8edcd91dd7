//! Writes the kernels of this package as text, in WGSL and in CUDA C++: what they would be in a plugin that is loaded from a
//! file, and what a compiler for the device can be tried on without one.
//!
//! ```sh
//! cargo run -p bitnet-burn-cube --features lower --example lower -- FOLDER
//! ```

use std::path::PathBuf;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let folder = std::env::args_os().nth(1).map(PathBuf::from).ok_or("the folder to write to is missing")?;
    std::fs::create_dir_all(&folder)?;
    for (name, texts) in bitnet_burn_cube::texts() {
        for (extension, text) in [("wgsl", texts.0?), ("cu", texts.1?)] {
            let path = folder.join(name).with_extension(extension);
            std::fs::write(&path, text.source)?;
            println!("{}: {}", path.display(), text.entry);
        }
    }
    Ok(())
}
