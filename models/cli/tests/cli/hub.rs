//! Models of the Hugging Face Hub, from a small hub on the loopback interface.

use std::collections::BTreeMap;
use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex};

use ring::digest;
use serde_json::{Value, json};

use super::{Place, error, ok};

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
const ID: &str = "owner/tiny-1.58";

/// How files of this size and above are named and served: by SHA-256, and from another server.
const LARGE: usize = 100_000;

/// What the hub has and does.
#[derive(Default)]
struct State {
    files: BTreeMap<String, Vec<u8>>,
    /// The status of every answer, with the hub's code for it.
    refuse: Option<(u16, &'static str)>,
    /// Where every request is sent on to.
    redirect: Option<&'static str>,
    /// Connections end after so many bytes of a large file, in the next so many answers.
    cut: (usize, usize),
    /// Large files always come from their beginning.
    no_ranges: bool,
    /// A bit of each large file is wrong, in the next so many answers.
    damage: usize,
    /// More bytes than stated come of large files.
    longer: bool,
    /// Requests: path, range, authorization, host.
    seen: Vec<[String; 4]>,
}

struct Hub {
    state: Arc<Mutex<State>>,
    port: u16,
}

impl Hub {
    fn new(files: &[(&str, Vec<u8>)]) -> Self {
        let files = files.iter().map(|(name, bytes)| ((*name).to_owned(), bytes.clone())).collect();
        let state = Arc::new(Mutex::new(State { files, ..State::default() }));
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let shared = state.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let state = shared.clone();
                // What a client that is gone does not take is nobody's problem.
                std::thread::spawn(move || drop(answer(stream, &state, port)));
            }
        });
        Self { state, port }
    }

    fn set(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.state.lock().unwrap());
    }

    /// The requests since the last call.
    fn seen(&self) -> Vec<[String; 4]> {
        std::mem::take(&mut self.state.lock().unwrap().seen)
    }

    fn endpoint(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    /// The program in a place, with this hub.
    fn command(&self, place: &Place, args: &[&str]) -> Command {
        let mut command = place.command(args);
        command.env("HF_ENDPOINT", self.endpoint());
        command
    }

    /// The ids of a text by the model of this name.
    fn tokenize(&self, place: &Place, name: &str) -> Command {
        self.command(place, &["tokenize", "-m", name, "Hello"])
    }
}

fn hex(digest: &digest::Digest) -> String {
    digest.as_ref().iter().map(|byte| format!("{byte:02x}")).collect()
}

fn hash(bytes: &[u8]) -> String {
    if bytes.len() >= LARGE {
        return hex(&digest::digest(&digest::SHA256, bytes));
    }
    let blob = [format!("blob {}\0", bytes.len()).as_bytes(), bytes].concat();
    hex(&digest::digest(&digest::SHA1_FOR_LEGACY_USE_ONLY, &blob))
}

fn listing(files: &BTreeMap<String, Vec<u8>>) -> Value {
    let sibling = |(name, bytes): (&String, &Vec<u8>)| {
        let id = hash(bytes);
        match bytes.len() >= LARGE {
            true => json!({
                "rfilename": name, "size": bytes.len(), "blobId": "f".repeat(40),
                "lfs": {"sha256": id, "size": bytes.len(), "pointerSize": 134},
            }),
            false => json!({"rfilename": name, "size": bytes.len(), "blobId": id}),
        }
    };
    json!({"id": ID, "sha": COMMIT, "siblings": files.iter().map(sibling).collect::<Vec<_>>()})
}

fn answer(mut stream: TcpStream, state: &Mutex<State>, port: u16) -> std::io::Result<()> {
    let mut lines = BufReader::new(stream.try_clone()?).lines();
    let request = lines.next().unwrap()?;
    let target = request.split(' ').nth(1).unwrap().to_owned();
    let mut fields = BTreeMap::new();
    for line in lines.map_while(Result::ok).take_while(|line| !line.is_empty()) {
        let (name, value) = line.split_once(": ").unwrap();
        fields.insert(name.to_ascii_lowercase(), value.to_owned());
    }
    let field = |name: &str| fields.get(name).cloned().unwrap_or_default();
    let mut state = state.lock().unwrap();
    state.seen.push([target.clone(), field("range"), field("authorization"), field("host")]);
    let mut head = |status: &str, fields: &str, length: usize| {
        write!(stream, "HTTP/1.1 {status}\r\n{fields}Content-Length: {length}\r\nConnection: close\r\n\r\n")
    };
    if let Some((status, code)) = state.refuse {
        return head(&format!("{status} No"), &format!("X-Error-Code: {code}\r\n"), 0);
    }
    if let Some(location) = state.redirect {
        return head("302 Found", &format!("Location: {location}\r\n"), 0);
    }
    if target == format!("/api/models/{ID}/revision/main?blobs=true") {
        let body = listing(&state.files).to_string();
        head("200 OK", "", body.len())?;
        return stream.write_all(body.as_bytes());
    }
    let cdn = target.strip_prefix("/cdn/");
    let name = cdn.or_else(|| target.strip_prefix(&format!("/{ID}/resolve/{COMMIT}/")));
    let Some((name, mut bytes)) = name.and_then(|name| Some((name, state.files.get(name)?.clone()))) else {
        return head("404 Not Found", "X-Error-Code: EntryNotFound\r\n", 0);
    };
    if bytes.len() >= LARGE && cdn.is_none() {
        // The same server by another name.
        return head("302 Found", &format!("Location: http://localhost:{port}/cdn/{name}\r\n"), 0);
    }
    let start: usize = match field("range").strip_prefix("bytes=").filter(|_| !state.no_ranges) {
        Some(range) => range.strip_suffix('-').unwrap().parse().unwrap(),
        None => 0,
    };
    let mut end = bytes.len();
    if cdn.is_some() {
        if state.damage > 0 {
            state.damage -= 1;
            bytes[end - 1] ^= 1;
        }
        if state.longer {
            bytes.push(0);
            end += 1;
        }
        if state.cut.1 > 0 {
            state.cut.1 -= 1;
            end = end.min(start + state.cut.0);
        }
    }
    match start {
        0 => head("200 OK", "", bytes.len())?,
        _ => {
            let range = format!("Content-Range: bytes {start}-{}/{}\r\n", bytes.len() - 1, bytes.len());
            head("206 Partial Content", &range, bytes.len() - start)?;
        }
    }
    drop(state);
    stream.write_all(&bytes[start..end])
}

/// A place whose `model.gguf` is on the hub, too, and the hub.
fn with_gguf() -> (Place, Hub) {
    let place = Place::new();
    let bytes = std::fs::read(place.path("model.gguf")).unwrap();
    assert!(bytes.len() > 3 * LARGE);
    let hub = Hub::new(&[("README.md", b"# A model\n".to_vec()), ("model.gguf", bytes)]);
    (place, hub)
}

fn in_cache(place: &Place) -> PathBuf {
    place.path("huggingface/hub/models--owner--tiny-1.58")
}

fn name() -> String {
    format!("hf:{ID}")
}

#[test]
fn a_model_is_downloaded_once_and_works_offline() {
    let (place, hub) = with_gguf();
    let local = place.ok(&["tokenize", "-m", "model.gguf", "Hello"]);
    for name in [name(), format!("{}:model.gguf", name())] {
        assert_eq!(ok(&mut hub.tokenize(&place, &name)), local);
    }
    let downloads = hub.seen().iter().filter(|[path, ..]| path.starts_with("/cdn/")).count();
    assert_eq!(downloads, 1);

    let cache = in_cache(&place);
    let bytes = std::fs::read(place.path("model.gguf")).unwrap();
    assert_eq!(std::fs::read(cache.join("blobs").join(hash(&bytes))).unwrap(), bytes);
    assert_eq!(std::fs::read(cache.join("snapshots").join(COMMIT).join("model.gguf")).unwrap(), bytes);
    assert_eq!(std::fs::read_to_string(cache.join("refs/main")).unwrap(), COMMIT);
    #[cfg(unix)]
    assert_eq!(
        std::fs::read_link(cache.join("snapshots").join(COMMIT).join("model.gguf")).unwrap(),
        Path::new("../../blobs").join(hash(&bytes))
    );

    // All subcommands take such names.
    let inspected = ok(&mut hub.command(&place, &["inspect", "-m", &name(), "--json"]));
    assert!(super::json(&inspected)["config"].is_object(), "{inspected}");
    // Nobody answers, or nobody is asked.
    drop(hub.seen());
    let output = place.command(&["tokenize", "-m", &name(), "Hello"]).output().unwrap();
    assert_eq!(String::from_utf8(output.stdout).unwrap(), local);
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert!(stderr.contains("can't be reached") && stderr.contains("comes from the cache"), "{stderr}");
    let output = hub.tokenize(&place, &name()).env("HF_HUB_OFFLINE", "1").output().unwrap();
    assert_eq!((String::from_utf8(output.stdout).unwrap(), &output.stderr[..]), (local, &b""[..]));
    let missing = format!("{}:other.gguf", name());
    let stderr = error(hub.tokenize(&place, &missing).env("HF_HUB_OFFLINE", "1"));
    assert!(
        stderr.contains("HF_HUB_OFFLINE") && stderr.contains("hf:owner/tiny-1.58:model.gguf"),
        "{stderr}"
    );
    assert_eq!(hub.seen().len(), 0);
    // Another server's answer for now is as good as none.
    hub.set(|state| state.refuse = Some((503, "")));
    assert!(hub.tokenize(&place, &name()).output().unwrap().status.success());
    // A place of its own for the cache.
    let stderr = error(hub.tokenize(&place, &name()).env("HF_HUB_CACHE", place.path("other")));
    assert!(stderr.contains("503") && stderr.contains("HTTPS_PROXY") && stderr.contains("other"), "{stderr}");
}

#[test]
fn a_directory_comes_with_its_tokenizer_and_all_shards() {
    let place = Place::new();
    place.ok(&["convert", "model.gguf", "--to", "hf", "--out", "model-hf"]);
    let read = |name: &str| std::fs::read(place.path("model-hf").join(name)).unwrap();
    let mut files: Vec<(&str, Vec<u8>)> =
        ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]
            .into_iter()
            .map(|name| (name, read(name)))
            .collect();
    let weights = read("model.safetensors");
    let header: Value = serde_json::from_slice(
        &weights[8..8 + u64::from_le_bytes(weights[..8].try_into().unwrap()) as usize],
    )
    .unwrap();
    const SHARD: &str = "model-00001-of-00001.safetensors";
    let tensors = header.as_object().unwrap().keys().filter(|name| *name != "__metadata__");
    let map: BTreeMap<&String, &str> = tensors.map(|name| (name, SHARD)).collect();
    let index = json!({"metadata": {}, "weight_map": map}).to_string().into_bytes();
    files.extend([("model.safetensors.index.json", index), (SHARD, weights)]);
    files.extend([("pytorch_model.bin", vec![1; LARGE]), ("extra/model.safetensors", vec![1; LARGE])]);
    let hub = Hub::new(&files);
    let local = place.ok(&["run", "-m", "model-hf", "-p", "Hello", "-n", "8", "--print-ids", "-q"]);
    let run = || hub.command(&place, &["run", "-m", &name(), "-p", "Hello", "-n", "8", "--print-ids", "-q"]);
    assert_eq!(ok(&mut run()), local);
    let seen = hub.seen();
    assert!(!seen.iter().any(|[path, ..]| path.contains("pytorch") || path.contains("extra")), "{seen:?}");
    assert_eq!(ok(run().env("HF_HUB_OFFLINE", "1")), local);
    std::fs::remove_file(in_cache(&place).join("snapshots").join(COMMIT).join(SHARD)).unwrap();
    let stderr = error(run().env("HF_HUB_OFFLINE", "1"));
    assert!(stderr.contains(&format!("{SHARD} is missing")), "{stderr}");

    // An index that names what the hub does not have, or a file outside of the directory.
    for (shard, says) in [("model-2.safetensors", "has no file"), ("../../x.safetensors", "is not a name")] {
        let index = json!({"weight_map": {"a": shard}}).to_string().into_bytes();
        hub.set(|state| drop(state.files.insert("model.safetensors.index.json".into(), index)));
        // (The same commit has other files now, which no real hub does.)
        std::fs::remove_dir_all(in_cache(&place)).unwrap();
        let stderr = error(&mut run());
        assert!(stderr.contains(says) && stderr.contains(shard), "{stderr}");
    }
}

#[test]
fn all_parts_of_a_gguf_file_come() {
    let (place, hub) = with_gguf();
    let part = |n: usize| format!("q/m-0000{n}-of-00002.gguf");
    hub.set(|state| {
        let bytes = state.files.remove("model.gguf").unwrap();
        state.files.extend([(part(1), bytes), (part(2), vec![7; 10])]);
    });
    // (The first one is a whole file, so the reader does not ask for the second.)
    ok(&mut hub.tokenize(&place, &format!("hf:{ID}:{}", part(2))));
    let snapshot = in_cache(&place).join("snapshots").join(COMMIT);
    assert!(snapshot.join(part(1)).exists());
    assert_eq!(std::fs::read(snapshot.join(part(2))).unwrap(), [7; 10]);
    #[cfg(unix)]
    assert!(std::fs::read_link(snapshot.join(part(2))).unwrap().starts_with("../../../blobs"));
}

#[test]
fn downloads_go_on_where_they_ended() {
    let (place, hub) = with_gguf();
    let size = std::fs::metadata(place.path("model.gguf")).unwrap().len() as usize;
    // In the same run, as long as each attempt brings something.
    hub.set(|state| state.cut = (size / 8 + 1, 7));
    ok(&mut hub.tokenize(&place, &name()));
    let ranges: Vec<String> =
        hub.seen().into_iter().filter(|r| r[0].starts_with("/cdn")).map(|r| r[1].clone()).collect();
    assert_eq!(ranges.len(), 8, "{ranges:?}");
    assert_eq!((&ranges[0][..], &ranges[1]), ("", &format!("bytes={}-", size / 8 + 1)));

    // In the next run, after one that was in vain.
    std::fs::remove_dir_all(in_cache(&place)).unwrap();
    hub.set(|state| state.cut = (LARGE, 1));
    hub.set(|state| state.files.get_mut("model.gguf").unwrap().truncate(size));
    let mut first = hub.tokenize(&place, &name());
    hub.set(|state| state.cut = (0, usize::MAX));
    let stderr = error(&mut first);
    assert!(stderr.contains("0 B of") && stderr.contains("start again to go on"), "{stderr}");
    let incomplete = || -> Vec<PathBuf> {
        let blobs = std::fs::read_dir(in_cache(&place).join("blobs")).unwrap();
        blobs.map(|entry| entry.unwrap().path()).collect()
    };
    let [part] = &incomplete()[..] else { panic!() };
    assert!(part.to_str().unwrap().ends_with(".incomplete"), "{part:?}");
    let bytes = std::fs::read(place.path("model.gguf")).unwrap();
    std::fs::write(part, &bytes[..LARGE]).unwrap();
    hub.set(|state| state.cut = (0, 0));
    drop(hub.seen());
    ok(&mut hub.tokenize(&place, &name()));
    let seen = hub.seen();
    assert_eq!(seen.last().unwrap()[..2], ["/cdn/model.gguf".to_owned(), format!("bytes={LARGE}-")]);
    assert!(!part.exists());

    // What is there is damaged, or the server can't go on from there: from the beginning.
    for (left, no_ranges, word) in [(vec![1; LARGE], false, "damaged"), (bytes[..LARGE].to_vec(), true, "")] {
        std::fs::remove_dir_all(in_cache(&place)).unwrap();
        std::fs::create_dir_all(in_cache(&place).join("blobs")).unwrap();
        std::fs::write(part, left).unwrap();
        hub.set(|state| state.no_ranges = no_ranges);
        let output = hub.tokenize(&place, &name()).output().unwrap();
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.success() && stderr.contains(word), "{stderr}");
    }
}

#[test]
fn only_what_has_the_stated_hash_and_length_gets_into_the_cache() {
    let (place, hub) = with_gguf();
    hub.set(|state| state.damage = 1);
    let stderr = error(&mut hub.tokenize(&place, &name()));
    assert!(
        stderr.contains("SHA-256") && stderr.contains("deleted") && stderr.contains("model.gguf"),
        "{stderr}"
    );
    let blobs = in_cache(&place).join("blobs");
    assert_eq!(std::fs::read_dir(&blobs).unwrap().count(), 0);
    assert!(!in_cache(&place).join("refs").exists());
    hub.set(|state| state.longer = true);
    let stderr = error(&mut hub.tokenize(&place, &name()));
    assert!(stderr.contains("more bytes came"), "{stderr}");
    hub.set(|state| state.longer = false);
    ok(&mut hub.tokenize(&place, &name()));
    // A file in the cache that has another length than stated is replaced.
    let bytes = std::fs::read(place.path("model.gguf")).unwrap();
    std::fs::write(blobs.join(hash(&bytes)), &bytes[..LARGE]).unwrap();
    ok(&mut hub.tokenize(&place, &name()));
    assert_eq!(std::fs::read(blobs.join(hash(&bytes))).unwrap(), bytes);
}

#[test]
fn of_several_gguf_files_one_must_be_named() {
    let (place, hub) = with_gguf();
    hub.set(|state| {
        state.files.insert("small-00001-of-00002.gguf".into(), vec![0; 1000]);
        state.files.insert("small-00002-of-00002.gguf".into(), vec![0; 500]);
    });
    let stderr = error(&mut hub.tokenize(&place, &name()));
    let small = "hf:owner/tiny-1.58:small-00001-of-00002.gguf  1.50 kB";
    assert!(stderr.contains("several GGUF files") && stderr.contains(small), "{stderr}");
    ok(&mut hub.tokenize(&place, &format!("{}:model.gguf", name())));
    let stderr = error(&mut hub.tokenize(&place, &format!("{}:modell.gguf", name())));
    assert!(stderr.contains("no file modell.gguf. There are:") && stderr.contains(small), "{stderr}");
}

#[test]
fn names_of_files_that_leave_the_directory_are_refused() {
    for evil in
        ["../../../evil.gguf", "/tmp/evil.gguf", "a/../../evil.gguf", "evil\\..\\x.gguf", "C:evil.gguf"]
    {
        let place = Place::empty();
        let hub = Hub::new(&[(evil, vec![7; 1000])]);
        let stderr = error(&mut hub.tokenize(&place, &name()));
        assert!(stderr.contains("is not a name that a file of a model can have"), "{evil}: {stderr}");
        assert!(!place.path("huggingface").exists(), "{evil}");
    }
    // In the name on the command line: wrong usage.
    let place = Place::empty();
    for evil in ["hf:../x", "hf:o/n:../x.gguf", "hf:o/n/../../x", "hf:o", "hf:o/n:config.json"] {
        let output = place.command(&["tokenize", "-m", evil, "Hello"]).output().unwrap();
        assert_eq!(output.status.code(), Some(2), "{evil}");
    }
}

#[test]
fn refusals_say_what_to_do() {
    let (place, hub) = with_gguf();
    for (refusal, says) in [
        ((404, ""), "no such model"),
        ((404, "RepoNotFound"), "check OWNER and NAME"),
        ((401, "RepoNotFound"), "set HF_TOKEN"),
        ((401, "GatedRepo"), "open the page and agree"),
        ((403, "GatedRepo"), "open the page and agree"),
        ((403, ""), "access was refused"),
        ((400, ""), "unexpected answer, status 400"),
        ((429, ""), "429"),
    ] {
        hub.set(|state| state.refuse = Some(refusal));
        let stderr = error(&mut hub.tokenize(&place, &name()));
        assert!(stderr.contains(says), "{refusal:?}: {stderr}");
        let with_token = error(hub.tokenize(&place, &name()).env("HF_TOKEN", "hf_secret"));
        assert!(!with_token.contains("hf_secret"), "{with_token}");
    }
    // A refusal is none of the network's: what is in the cache is not taken in its place.
    hub.set(|state| state.refuse = None);
    ok(&mut hub.tokenize(&place, &name()));
    hub.set(|state| state.refuse = Some((401, "GatedRepo")));
    error(&mut hub.tokenize(&place, &name()));
    // Nobody there, and nothing in the cache.
    let stderr = place.error(&["tokenize", "-m", "hf:owner/other", "Hello"]);
    for part in ["can't be reached", "check the network", "hf:owner/other is not complete in the cache"] {
        assert!(stderr.contains(part), "{stderr}");
    }
    let stderr = error(hub.tokenize(&place, &name()).env("HF_ENDPOINT", "ftp://x"));
    assert!(stderr.contains("HF_ENDPOINT") && stderr.contains("ftp://x"), "{stderr}");
}

#[test]
fn only_http_addresses_are_followed() {
    let (place, hub) = with_gguf();
    for (location, scheme) in
        [("file:///etc/passwd", "`file`"), ("FILE:/etc/passwd", "`FILE`"), ("ftp://localhost/x", "`ftp`")]
    {
        hub.set(|state| state.redirect = Some(location));
        let stderr = error(&mut hub.tokenize(&place, &name()));
        let origin = hub.endpoint();
        for part in [location, scheme, &origin, "only http and https are followed", "nothing was downloaded"]
        {
            assert!(stderr.contains(part), "{stderr} does not say {part}");
        }
        assert_eq!(hub.seen().len(), 1, "asked again after {location}");
    }
    hub.set(|state| state.redirect = Some("http://"));
    assert!(error(&mut hub.tokenize(&place, &name())).contains("is no address"));
    hub.seen();
    // Redirections in a circle come to an end.
    hub.set(|state| state.redirect = Some("/around"));
    let stderr = error(&mut hub.tokenize(&place, &name()));
    assert!(stderr.contains("redirects more than 10 times"), "{stderr}");
    assert_eq!(hub.seen().len(), 11);
}

#[test]
fn the_token_goes_to_the_hub_only() {
    let (place, hub) = with_gguf();
    place.write("token", "hf_of_the_file\n");
    let check = |token: &str| {
        let seen = hub.seen();
        assert!(seen.len() >= 3);
        for [path, _, authorization, host] in seen {
            let expected = if host.starts_with("127.0.0.1") { token } else { "" };
            assert_eq!(authorization, expected, "{path}");
        }
        std::fs::remove_dir_all(in_cache(&place)).unwrap();
    };
    ok(hub.tokenize(&place, &name()).env("HF_TOKEN", "hf_secret"));
    check("Bearer hf_secret");
    ok(hub.tokenize(&place, &name()).env("HF_TOKEN_PATH", place.path("token")));
    check("Bearer hf_of_the_file");
    place.write("huggingface/token", "hf_of_home");
    ok(&mut hub.tokenize(&place, &name()));
    check("Bearer hf_of_home");
    std::fs::remove_file(place.path("huggingface/token")).unwrap();
    ok(&mut hub.tokenize(&place, &name()));
    check("");
    let stderr = error(hub.tokenize(&place, &name()).env("HF_TOKEN", "hf_se\ncret"));
    assert!(stderr.contains("HF_TOKEN") && !stderr.contains("cret"), "{stderr}");
}

#[test]
fn two_programs_download_a_model_once() {
    let (place, hub) = with_gguf();
    let commands: Vec<_> = (0..3)
        .map(|_| hub.tokenize(&place, &name()).stdout(std::process::Stdio::null()).spawn().unwrap())
        .collect();
    for mut child in commands {
        assert!(child.wait().unwrap().success());
    }
    let downloads = hub.seen().iter().filter(|[path, ..]| path.starts_with("/cdn/")).count();
    assert_eq!(downloads, 1);
}
