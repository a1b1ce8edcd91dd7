//! What the documents say about the program, compared with it.

use std::collections::BTreeSet;
use std::path::Path;

use super::Place;

fn repository() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../.."))
}

/// What the names of the environment variables begin with that are compared: ours, and those of Hugging Face's programs.
const PREFIXES: [&str; 2] = ["BITNET_", "HF_"];

/// Names of environment variables that begin so.
fn variables(text: &str) -> BTreeSet<String> {
    let words = text.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
    words.filter(|word| PREFIXES.iter().any(|prefix| word.starts_with(prefix))).map(str::to_owned).collect()
}

fn environment_page() -> String {
    std::fs::read_to_string(repository().join("docs/environment.md")).unwrap()
}

#[test]
fn help_and_documents_list_the_same_variables() {
    let help = Place::empty().ok(&["--help"]);
    let listed = help.split_once("Environment (").unwrap().1.split_once("Exit status").unwrap().0;
    let page = environment_page();
    let for_users = page.split_once("## For users").unwrap().1.split_once("\n## ").unwrap().0;
    assert_eq!(variables(listed), variables(for_users));
}

/// All Rust sources of the workspace outside of its tests.
fn sources(directory: &Path, found: &mut Vec<String>) {
    for entry in std::fs::read_dir(directory).unwrap() {
        let entry = entry.unwrap();
        let (path, name) = (entry.path(), entry.file_name().into_string().unwrap());
        if entry.file_type().unwrap().is_dir() {
            if !name.starts_with("target") && !name.starts_with('.') && name != "tests" {
                sources(&path, found);
            }
        } else if name.ends_with(".rs") && name != "tests.rs" {
            let text = std::fs::read_to_string(&path).unwrap();
            found.push(text.split("#[cfg(test)]").next().unwrap_or_default().to_owned());
        }
    }
}

#[test]
fn every_variable_of_the_sources_is_documented() {
    let mut texts = Vec::new();
    sources(repository(), &mut texts);
    // As a string, so that constants of the plugins' ABI don't count.
    let literals = texts.iter().flat_map(|text| text.split('"')).filter(|literal| {
        PREFIXES.iter().any(|prefix| literal.starts_with(prefix))
            && literal.bytes().all(|b| b.is_ascii_uppercase() || b == b'_')
            // Not a prefix of names.
            && !literal.ends_with('_')
    });
    let used: BTreeSet<String> = literals.map(str::to_owned).collect();
    assert!(used.len() > 10 && used.contains("BITNET_THREADS"), "{used:?}");
    let documented = variables(&environment_page());
    let missing: Vec<&String> = used.difference(&documented).collect();
    assert!(missing.is_empty(), "docs/environment.md lacks {missing:?}");
}
