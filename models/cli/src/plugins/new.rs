//! `bitnet plugins new`: a project with kernels that pass the gate, to start from.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use bitnet_burn_plugin::{HEADER, SOURCES};
use clap::{Args, ValueEnum};

use crate::output;

/// Write a project with kernels that pass the gate, as a start for your own
///
/// The project needs nothing from the network: it contains the header, or the sources of the Rust SDK.
#[derive(Debug, Args)]
pub struct NewArgs {
    /// The project's directory, which is new or empty. Its name becomes the plugin's
    directory: PathBuf,
    /// The language
    #[arg(long, value_enum)]
    lang: Lang,
}

/// The languages that there are templates in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Lang {
    /// A packing of its own, and kernels for AVX2 and any CPU. Built with cargo
    Rust,
    /// Kernels that read the weights where they are, for AVX2 and any CPU. Built with make
    C,
    /// Kernels on the public layout cpu/t2x32, for AVX2 and any CPU. Built with make
    Cpp,
    /// A kernel that reads the weights where they are, in vectors of any CPU. Built with `zig build-lib`
    Zig,
    /// Kernels for GPUs in WGSL and CUDA C++, packed by Rust. Built with cargo
    Wgsl,
}

/// A file of a template.
type File = (&'static str, &'static str);

const RUST: [File; 1] = [("src/lib.rs", include_str!("../../templates/rust/lib.rs"))];
const C: [File; 2] = [
    ("kernels.c", include_str!("../../templates/c/kernels.c")),
    ("Makefile", include_str!("../../templates/c/Makefile")),
];
const CPP: [File; 2] = [
    ("kernels.cpp", include_str!("../../templates/cpp/kernels.cpp")),
    ("Makefile", include_str!("../../templates/cpp/Makefile")),
];
const ZIG: [File; 1] = [("kernels.zig", include_str!("../../templates/zig/kernels.zig"))];
const WGSL: [File; 3] = [
    ("src/lib.rs", include_str!("../../templates/wgsl/lib.rs")),
    ("src/matmul.wgsl", include_str!("../../templates/wgsl/matmul.wgsl")),
    ("src/matmul.cu", include_str!("../../templates/wgsl/matmul.cu")),
];
/// Of both Rust templates.
const MANIFEST: &str = include_str!("../../templates/rust/manifest.toml");
/// Where the sources of the SDK go.
const SDK: &str = "bitnet-burn-plugin";

impl Lang {
    fn files(self) -> &'static [File] {
        match self {
            Self::Rust => &RUST,
            Self::C => &C,
            Self::Cpp => &CPP,
            Self::Zig => &ZIG,
            Self::Wgsl => &WGSL,
        }
    }

    /// The name that the template's plugin has.
    fn template_name(self) -> &'static str {
        match self {
            Self::Rust => "example-rust",
            Self::C => "example-c",
            Self::Cpp => "example-cpp",
            Self::Zig => "example-zig",
            Self::Wgsl => "example-gpu",
        }
    }

    /// The command that builds the project, and the library that it makes.
    fn build(self, library: &str) -> (String, String) {
        let (prefix, suffix) = (std::env::consts::DLL_PREFIX, std::env::consts::DLL_SUFFIX);
        match self {
            Self::Rust | Self::Wgsl => {
                ("cargo build --release".into(), format!("target/release/{prefix}{library}{suffix}"))
            }
            Self::C | Self::Cpp => ("make".into(), format!("lib{library}.so")),
            Self::Zig => (
                format!("zig build-lib kernels.zig -dynamic -O ReleaseFast -lc -I . --name {library}"),
                format!("{prefix}{library}{suffix}"),
            ),
        }
    }
}

pub fn run(args: &NewArgs) -> anyhow::Result<()> {
    let NewArgs { directory, lang } = args;
    let name = std::path::absolute(directory)?;
    let name = name.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    let starts_well = name.starts_with(|c: char| c.is_ascii_lowercase());
    if !starts_well
        || name.len() > 50
        || !name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
    {
        bail!(
            "{}: the directory's name becomes the plugin's, so it consists of up to 50 of a-z, 0-9 and '-', and begins with a \
             letter",
            directory.display()
        );
    }
    if std::fs::read_dir(directory).is_ok_and(|mut entries| entries.next().is_some()) {
        bail!("{}: the directory is not empty", directory.display());
    }
    let files = files(*lang, name);
    for (path, content) in &files {
        write(&directory.join(path), content)?;
    }
    let (build, library) = lang.build(&name.replace('-', "_"));
    let count = bitnet_burn_engine::text::count(files.len() as u64, "file");
    output::print(format_args!(
        "{count} written to {0}. Next:\n  cd {0}\n  {build}\n  bitnet plugins verify {library}\n  bitnet plugins bench {library}",
        directory.display()
    ))
}

/// The project's files.
fn files(lang: Lang, name: &str) -> Vec<(String, String)> {
    let library = name.replace('-', "_");
    let renamed = |text: &str| {
        let named = text.replace(&format!("\"{}\"", lang.template_name()), &format!("\"{name}\""));
        // The longest first.
        let libraries = ["example_kernels_cpp", "example_kernels_c", "example_kernels"];
        libraries.iter().fold(named, |text, name| text.replace(name, &library))
    };
    let mut files: Vec<(String, String)> =
        lang.files().iter().map(|(path, text)| ((*path).to_owned(), renamed(text))).collect();
    match lang {
        Lang::Rust | Lang::Wgsl => {
            let manifest = MANIFEST.replace("example-kernels", name);
            // The lines of the dependency's comment and of its path in this repository.
            let lines = manifest.lines().filter(|line| !line.starts_with("# Outside of this repository"));
            let lines = lines.map(|line| match line.strip_prefix("bitnet-burn-plugin = ") {
                Some(_) => format!("bitnet-burn-plugin = {{ path = \"{SDK}\" }}"),
                None => line.to_owned(),
            });
            files.push(("Cargo.toml".into(), lines.map(|line| line + "\n").collect()));
            files.push((format!("{SDK}/Cargo.toml"), sdk_manifest()));
            files.extend(SOURCES.map(|(path, text)| (format!("{SDK}/{path}"), text.to_owned())));
            // Which the sources include, too.
            files.push((format!("{SDK}/include/bitnet_plugin.h"), HEADER.to_owned()));
            files.push((".gitignore".into(), "/target\n".into()));
        }
        Lang::C | Lang::Cpp | Lang::Zig => {
            files.push(("bitnet_plugin.h".into(), HEADER.to_owned()));
            if let Some((_, makefile)) = files.iter_mut().find(|(path, _)| path == "Makefile") {
                *makefile = beside(makefile);
            }
            files.push((".gitignore".into(), "*.so\n*.dylib\n*.dll\n*.o\n".into()));
        }
    }
    files
}

/// A Makefile of a template, with the header beside it.
fn beside(makefile: &str) -> String {
    let lines =
        makefile.lines().map(|line| if line.starts_with("INCLUDE ?=") { "INCLUDE ?= ." } else { line });
    lines.map(|line| format!("{line}\n")).collect()
}

fn sdk_manifest() -> String {
    format!(
        "# The SDK of bitnet-burn {0}, as it was when this project was made.\n[package]\nname = \"{SDK}\"\nversion = \"{0}\"\n\
         edition = \"2024\"\nlicense = \"MIT OR Apache-2.0\"\npublish = false\n",
        env!("CARGO_PKG_VERSION")
    )
}

fn write(path: &Path, content: &str) -> anyhow::Result<()> {
    let failed = || format!("cannot write {}", path.display());
    let directory = path.parent().with_context(failed)?;
    std::fs::create_dir_all(directory).with_context(failed)?;
    std::fs::write(path, content).with_context(failed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_project_has_the_name_of_its_directory_and_nothing_of_the_template() {
        for lang in Lang::value_variants() {
            let files = files(*lang, "my-kernels");
            for (path, text) in &files {
                let of_sdk = path.starts_with(SDK);
                assert!(of_sdk || !text.contains("example_kernels"), "{path}");
                assert!(of_sdk || !text.contains(&format!("\"{}\"", lang.template_name())), "{path}");
                assert!(of_sdk || !text.contains("../../plugins"), "{path}: {text}");
            }
            assert!(
                files.iter().any(|(path, text)| !path.starts_with(SDK) && text.contains("\"my-kernels\""))
            );
        }
    }
}
