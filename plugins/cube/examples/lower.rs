//! Writes all that this package launches as text, in WGSL and in CUDA C++: what its kernels would be in a plugin that is
//! loaded from a file, and what a compiler for the device can be tried on without one.
//!
//! ```sh
//! cargo run -p bitnet-burn-cube --features lower --example lower -- FOLDER
//! ```

use std::path::PathBuf;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let folder = std::env::args_os().nth(1).map(PathBuf::from).ok_or("the folder to write to is missing")?;
    std::fs::create_dir_all(&folder)?;
    let kernels = bitnet_burn_cube::texts().into_iter().map(|kernel| (kernel.entry.to_owned(), kernel.texts));
    for (name, texts) in kernels.chain(bitnet_burn_cube::lower::operations()) {
        for (extension, text) in [("wgsl", texts.0?), ("cu", texts.1?)] {
            // What it was made for is a part of the name.
            let name = name.replace(|c: char| !c.is_ascii_alphanumeric() && c != '_', "-");
            let path = folder.join(name).with_extension(extension);
            std::fs::write(&path, text.source)?;
            println!("{}: {}", path.display(), text.entry);
        }
    }
    for kernel in bitnet_burn_cube::matrix_unit_texts() {
        let (path, text) = (folder.join(kernel.entry).with_extension("cu"), kernel.texts.1?);
        std::fs::write(&path, text.source)?;
        println!("{}: {}", path.display(), text.entry);
    }
    Ok(())
}
