//! Models of the Hugging Face Hub: `hf:OWNER/NAME` or `hf:OWNER/NAME:FILE`.
//!
//! Their files lie in Hugging Face's own cache, so that all programs share them
//! (<https://huggingface.co/docs/huggingface_hub/guides/manage-cache>):
//!
//! | path in the cache | |
//! | --- | --- |
//! | `models--OWNER--NAME/blobs/HASH` | a file's bytes; `HASH.incomplete` as long as some are missing |
//! | `models--OWNER--NAME/snapshots/COMMIT/FILE` | a link to a blob |
//! | `models--OWNER--NAME/refs/main` | the last commit whose files were asked for and are all there |
//! | `.locks/models--OWNER--NAME/HASH.lock` | locked by the program that writes the blob |
//!
//! The crate `hf-hub` knows this layout. It does not transfer the files, because its version 0.5 puts a file into the cache
//! before its hash can be compared, does not notice a server that ignores where to resume, and sends the user's token to
//! the servers that it is redirected to. (Version 1.0 needs an asynchronous runtime and Hugging Face's storage protocol.)

mod client;
mod hash;
mod name;
mod redirect;
mod transfer;

use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, anyhow, bail};
use bitnet_burn_engine::checkpoint::{COMPANIONS, EMBED_COMPANIONS};
use bitnet_burn_engine::text::human_bytes;
use bitnet_burn_formats::gguf::{first_part, part_of};
use bitnet_burn_formats::{read_json, safetensors};
use hf_hub::{Cache, Repo};
use serde_json::Value;

use self::client::{Client, HubError, Listing};
pub use self::name::HubName;
use crate::output;

/// The branch whose newest commit is used.
const BRANCH: &str = "main";

/// A file of a model on the hub or in the cache.
#[derive(Clone, Debug)]
struct Entry {
    /// Its path in the repository, with `/`.
    name: String,
    bytes: u64,
}

/// The bytes at an `http` or `https` address, at most `limit`; `None` if there is nothing.
pub fn address(url: &str, limit: u64) -> anyhow::Result<Option<Vec<u8>>> {
    let server = url.split('/').take(3).collect::<Vec<_>>().join("/");
    finished(|| Client::of_server(server).download(url, limit))
}

/// The bytes of any file of a repository of the hub, at most `limit`; `None` if there is no such file.
pub fn file(id: &str, file: &str, limit: u64) -> anyhow::Result<Option<Vec<u8>>> {
    let client = Client::from_environment()?;
    finished(|| client.download(&client.address(id, file), limit))
}

fn finished(download: impl FnOnce() -> Result<Option<Vec<u8>>, HubError>) -> anyhow::Result<Option<Vec<u8>>> {
    if is_set("HF_HUB_OFFLINE") {
        bail!("HF_HUB_OFFLINE is set, so nothing is downloaded");
    }
    download().map_err(|error| match error {
        HubError::Refused(error) => error,
        HubError::Unreachable(why) => anyhow!(why),
    })
}

/// Downloads what is missing of a model's files, and gives the path to open.
pub fn get(name: &HubName) -> anyhow::Result<PathBuf> {
    let cached = Cached::new(name)?;
    if is_set("HF_HUB_OFFLINE") {
        return cached.find(name).context("HF_HUB_OFFLINE is set, so nothing is downloaded");
    }
    let client = Client::from_environment()?;
    match client.listing(name.id()) {
        Ok(listing) => download(name, &cached, &client, &listing),
        Err(HubError::Refused(error)) => Err(error),
        Err(HubError::Unreachable(why)) => match cached.find(name) {
            Ok(path) => {
                output::note(format_args!("{why}: {name} comes from the cache, {}", path.display()));
                Ok(path)
            }
            Err(error) => Err(error.context(format!(
                "{why}; check the network (HTTPS_PROXY names a proxy, HF_ENDPOINT another server)"
            ))),
        },
    }
}

fn download(name: &HubName, cached: &Cached, client: &Client, listing: &Listing) -> anyhow::Result<PathBuf> {
    let snapshot = cached.snapshot(&listing.commit);
    let get = |wanted: &[String]| transfer::get(client, cached, name.id(), listing, wanted);
    let chosen = choose(&listing.entries(), name)?;
    let path = match &chosen {
        Chosen::Gguf(parts) => {
            get(parts)?;
            snapshot.join(&parts[0])
        }
        // The weights come last: where they are there, all is.
        Chosen::Directory(files) => {
            get(files)?;
            get(&weights(&snapshot)?)?;
            snapshot
        }
    };
    cached.set_commit(&listing.commit)?;
    Ok(path)
}

/// The files of a model.
#[derive(Debug, PartialEq, Eq)]
enum Chosen {
    /// A GGUF file, or its parts in order.
    Gguf(Vec<String>),
    /// What lies beside the weights of a directory, and the weights' index, if there is one.
    Directory(Vec<String>),
}

/// The files that a name stands for, of those that there are.
fn choose(entries: &[Entry], name: &HubName) -> anyhow::Result<Chosen> {
    let has = |file: &str| entries.iter().any(|entry| entry.name == file);
    let models = gguf_models(entries);
    if let Some(file) = name.file() {
        return match models.iter().find(|model| model.parts.iter().any(|part| part == file)) {
            Some(model) => model.chosen(),
            None if models.is_empty() => {
                bail!("{}: the model has no GGUF file; leave :{file} out", name.id())
            }
            None => bail!("{}: there is no file {file}. There are:\n{}", name.id(), list(&models, name)),
        };
    }
    if has("config.json") && (has(safetensors::SINGLE) || has(safetensors::INDEX)) {
        let index = (!has(safetensors::SINGLE)).then_some(safetensors::INDEX);
        let files = COMPANIONS.into_iter().chain(EMBED_COMPANIONS).chain(index).filter(|file| has(file));
        return Ok(Chosen::Directory(files.map(str::to_owned).collect()));
    }
    match &models[..] {
        [model] => model.chosen(),
        [] => bail!(
            "{}: the model has neither config.json with safetensors nor a GGUF file, and nothing else is read",
            name.id()
        ),
        several => bail!(
            "{}: the model has several GGUF files; name one of them:\n{}",
            name.id(),
            list(several, name)
        ),
    }
}

/// A GGUF file, or the parts of one.
#[derive(Debug)]
struct GgufModel {
    /// In order, as far as they are there.
    parts: Vec<String>,
    /// How many there must be.
    count: usize,
    bytes: u64,
}

impl GgufModel {
    fn chosen(&self) -> anyhow::Result<Chosen> {
        let paths: Vec<PathBuf> = self.parts.iter().map(PathBuf::from).collect();
        if self.parts.len() != self.count || (self.count > 1 && first_part(&paths).is_none()) {
            bail!("{}: {} of its {} parts are there", self.parts[0], self.parts.len(), self.count);
        }
        Ok(Chosen::Gguf(self.parts.clone()))
    }
}

/// The GGUF files by name; the parts of a file count as one.
fn gguf_models(entries: &[Entry]) -> Vec<GgufModel> {
    let is_gguf = |entry: &&Entry| {
        Path::new(&entry.name).extension().is_some_and(|extension| extension.eq_ignore_ascii_case("gguf"))
    };
    let mut files: Vec<&Entry> = entries.iter().filter(is_gguf).collect();
    files.sort_by(|a, b| a.name.cmp(&b.name));
    let mut models: Vec<GgufModel> = Vec::new();
    // What the parts of a file have in common.
    let mut before: Option<(&str, u32)> = None;
    for Entry { name, bytes } in files {
        let of = part_of(Path::new(name))
            .map(|(_, count)| (&name[..name.len() - "-00001-of-00001.gguf".len()], count));
        match models.last_mut().filter(|_| of.is_some() && of == before) {
            Some(model) => {
                model.parts.push(name.clone());
                model.bytes += bytes;
            }
            None => models.push(GgufModel {
                parts: vec![name.clone()],
                count: of.map_or(1, |(_, count)| count as usize),
                bytes: *bytes,
            }),
        }
        before = of;
    }
    models
}

/// One line for each model, with the name to give and its size.
fn list(models: &[GgufModel], name: &HubName) -> String {
    let row = |model: &GgufModel| {
        let file = model.parts[0].escape_default();
        vec![format!("  hf:{}:{file}", name.id()), human_bytes(model.bytes)]
    };
    output::columns(&models.iter().map(row).collect::<Vec<_>>()).trim_end().to_owned()
}

/// The files with the weights of a directory whose companions are there.
fn weights(snapshot: &Path) -> anyhow::Result<Vec<String>> {
    let index = snapshot.join(safetensors::INDEX);
    if !index.exists() {
        return Ok(vec![safetensors::SINGLE.to_owned()]);
    }
    let json: Value = read_json(&index)?;
    let map = json["weight_map"].as_object();
    let map = map.with_context(|| format!("{}: the object `weight_map` is missing", index.display()))?;
    let mut files: Vec<String> = map.values().filter_map(Value::as_str).map(str::to_owned).collect();
    files.sort();
    files.dedup();
    Ok(files)
}

/// A model's place in the cache.
#[derive(Debug)]
struct Cached {
    cache: Cache,
    repo: Repo,
}

impl Cached {
    fn new(name: &HubName) -> anyhow::Result<Self> {
        Ok(Self { cache: Cache::new(cache_directory()?), repo: Repo::model(name.id().to_owned()) })
    }

    fn directory(&self) -> PathBuf {
        self.cache.path().join(self.repo.folder_name())
    }

    fn snapshot(&self, commit: &str) -> PathBuf {
        self.cache.repo(self.repo.clone()).pointer_path(commit)
    }

    fn blob(&self, hash: &str) -> PathBuf {
        self.directory().join("blobs").join(hash)
    }

    fn lock(&self, hash: &str) -> PathBuf {
        self.cache.path().join(".locks").join(self.repo.folder_name()).join(format!("{hash}.lock"))
    }

    /// The last commit whose files were asked for and are all there.
    fn commit(&self) -> Option<String> {
        let text = std::fs::read_to_string(self.directory().join("refs").join(BRANCH)).ok()?;
        client::is_hex(text.trim(), 40).then(|| text.trim().to_owned())
    }

    fn set_commit(&self, commit: &str) -> anyhow::Result<()> {
        if self.commit().as_deref() == Some(commit) {
            return Ok(());
        }
        let written = self.cache.repo(self.repo.clone()).create_ref(commit);
        written.with_context(|| format!("cannot write into {}", self.directory().display()))
    }

    /// The path to open, of files that are all there.
    fn find(&self, name: &HubName) -> anyhow::Result<PathBuf> {
        let place = || format!("{name} is not complete in the cache, {}", self.cache.path().display());
        let snapshot = self.commit().map(|commit| self.snapshot(&commit)).with_context(place)?;
        let mut entries = Vec::new();
        entries_of(&snapshot, "", &mut entries).with_context(place)?;
        Ok(match choose(&entries, name).with_context(place)? {
            Chosen::Gguf(parts) => snapshot.join(&parts[0]),
            Chosen::Directory(_) => {
                let missing = weights(&snapshot)?.into_iter().find(|file| !snapshot.join(file).exists());
                if let Some(file) = missing {
                    return Err(anyhow!("{file} is missing").context(place()));
                }
                snapshot
            }
        })
    }
}

/// All files below a directory, by their names from there. A link whose blob is gone is left out.
fn entries_of(directory: &Path, prefix: &str, entries: &mut Vec<Entry>) -> std::io::Result<()> {
    for entry in std::fs::read_dir(directory)? {
        let entry = entry?;
        let Ok(file) = entry.file_name().into_string() else { continue };
        let name = format!("{prefix}{file}");
        if entry.file_type()?.is_dir() {
            entries_of(&entry.path(), &format!("{name}/"), entries)?;
            continue;
        }
        match std::fs::metadata(entry.path()) {
            Ok(meta) => entries.push(Entry { name, bytes: meta.len() }),
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// A variable's value, if it has one.
fn variable(name: &str) -> Option<PathBuf> {
    std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from)
}

/// Whether a variable says yes, in the words that Hugging Face's programs know.
fn is_set(name: &str) -> bool {
    let value = std::env::var(name).unwrap_or_default().to_ascii_lowercase();
    ["1", "on", "yes", "true"].contains(&value.as_str())
}

/// Hugging Face's directory: the cache and the user's token are in it.
fn home() -> anyhow::Result<PathBuf> {
    if let Some(home) = variable("HF_HOME") {
        return Ok(home);
    }
    let cache = variable("XDG_CACHE_HOME").or_else(|| Some(std::env::home_dir()?.join(".cache")));
    Ok(cache
        .context("there is no home directory for downloads; set HF_HOME to a directory")?
        .join("huggingface"))
}

fn cache_directory() -> anyhow::Result<PathBuf> {
    match variable("HF_HUB_CACHE") {
        Some(directory) => Ok(directory),
        None => Ok(home()?.join("hub")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chosen(files: &[&str], name: &str) -> Result<Chosen, String> {
        let entries: Vec<Entry> =
            files.iter().map(|name| Entry { name: (*name).into(), bytes: 2_000_000 }).collect();
        choose(&entries, &name.parse().unwrap()).map_err(|error| error.to_string())
    }

    fn gguf(parts: &[&str]) -> Result<Chosen, String> {
        Ok(Chosen::Gguf(parts.iter().map(|&part| part.to_owned()).collect()))
    }

    #[test]
    fn a_name_stands_for_the_directory_or_the_only_gguf_file() {
        assert_eq!(chosen(&["README.md", "m.gguf"], "hf:o/n"), gguf(&["m.gguf"]));
        assert_eq!(chosen(&["a.gguf", "b/c.gguf"], "hf:o/n:b/c.gguf"), gguf(&["b/c.gguf"]));
        let parts = ["q/m-00001-of-00002.gguf", "q/m-00002-of-00002.gguf"];
        assert_eq!(chosen(&parts, "hf:o/n"), gguf(&parts));
        assert_eq!(chosen(&[parts[1], "x.gguf", parts[0]], &format!("hf:o/n:{}", parts[1])), gguf(&parts));
        let files = ["config.json", "m.gguf", "pytorch_model.bin", "model.safetensors", "tokenizer.json"];
        let directory = |files: &[&str]| {
            Ok(Chosen::Directory(files.iter().map(|&file| file.to_owned()).collect::<Vec<_>>()))
        };
        assert_eq!(chosen(&files, "hf:o/n"), directory(&["config.json", "tokenizer.json"]));
        assert_eq!(chosen(&files, "hf:o/n:m.gguf"), gguf(&["m.gguf"]));
        let files = ["config.json", safetensors::INDEX, "model-00001-of-00001.safetensors"];
        assert_eq!(chosen(&files, "hf:o/n"), directory(&["config.json", safetensors::INDEX]));
    }

    #[test]
    fn what_is_missing_or_unclear_is_said() {
        let error = |files: &[&str], name: &str| chosen(files, name).unwrap_err();
        let several =
            error(&["b-00001-of-00002.gguf", "a.gguf", "b-00002-of-00002.gguf", "c\u{1b}.gguf"], "hf:o/n");
        let rows = "  hf:o/n:a.gguf                 2.00 MB\n  hf:o/n:b-00001-of-00002.gguf  4.00 MB\n";
        assert!(
            several.contains(rows) && several.ends_with("hf:o/n:c\\u{1b}.gguf           2.00 MB"),
            "{several}"
        );
        assert!(error(&["a.gguf"], "hf:o/n:b.gguf").contains("no file b.gguf. There are:\n  hf:o/n:a.gguf"));
        assert!(error(&["config.json"], "hf:o/n:b.gguf").contains("leave :b.gguf out"));
        assert!(error(&["config.json", "pytorch_model.bin"], "hf:o/n").contains("neither config.json with"));
        for missing in [["m-00001-of-00003.gguf", "m-00002-of-00003.gguf"], ["m-00002-of-00002.gguf", "x"]] {
            assert!(error(&missing, "hf:o/n").contains("parts are there"));
        }
    }
}
