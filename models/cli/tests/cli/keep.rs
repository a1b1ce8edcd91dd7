//! Plugins that are installed, from a server on the loopback interface: `plugins add`, `update`, `remove`, `list --outdated` and
//! trusted publishers.

use std::collections::BTreeMap;
use std::io::{BufRead as _, BufReader, Write as _};
use std::net::TcpListener;
use std::sync::{Arc, Mutex};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use ring::signature::{Ed25519KeyPair, KeyPair as _};

use super::{BROKEN, Place, plugin};

/// A server of files by their paths.
struct Server {
    files: Arc<Mutex<BTreeMap<String, Vec<u8>>>>,
    requests: Arc<Mutex<usize>>,
    port: u16,
}

impl Server {
    fn new() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let files = Arc::<Mutex<BTreeMap<String, Vec<u8>>>>::default();
        let requests = Arc::<Mutex<usize>>::default();
        let (shared, counted) = (files.clone(), requests.clone());
        std::thread::spawn(move || {
            for mut stream in listener.incoming().flatten() {
                let mut lines = BufReader::new(stream.try_clone().unwrap()).lines().map_while(Result::ok);
                let Some(first) = lines.next() else { continue };
                lines.by_ref().take_while(|line| !line.is_empty()).for_each(drop);
                *counted.lock().unwrap() += 1;
                let path = first.split(' ').nth(1).unwrap_or_default().trim_start_matches('/').to_owned();
                let (status, body) = match shared.lock().unwrap().get(&path) {
                    Some(body) => ("200 OK", body.clone()),
                    None => ("404 Not Found", Vec::new()),
                };
                let head = format!(
                    "HTTP/1.1 {status}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
                    body.len()
                );
                // A client that is gone needs no answer.
                let _ = stream.write_all(&[head.as_bytes(), &body[..]].concat());
            }
        });
        Self { files, requests, port }
    }

    fn set(&self, path: &str, content: impl Into<Vec<u8>>) {
        self.files.lock().unwrap().insert(path.into(), content.into());
    }

    fn remove(&self, path: &str) {
        self.files.lock().unwrap().remove(path);
    }

    fn address(&self, path: &str) -> String {
        format!("http://127.0.0.1:{}/{path}", self.port)
    }

    fn requests(&self) -> usize {
        *self.requests.lock().unwrap()
    }
}

/// A publisher, with a key as minisign makes them.
struct Publisher {
    key: Ed25519KeyPair,
    id: [u8; 8],
}

impl Publisher {
    fn new(seed: u8) -> Self {
        Self { key: Ed25519KeyPair::from_seed_unchecked(&[seed; 32]).unwrap(), id: [seed; 8] }
    }

    fn public_key(&self) -> String {
        STANDARD.encode([b"Ed", &self.id[..], self.key.public_key().as_ref()].concat())
    }

    fn sign(&self, content: &[u8]) -> String {
        let (signature, comment) = (self.key.sign(content), "timestamp:1");
        let global = self.key.sign(&[signature.as_ref(), comment.as_bytes()].concat());
        let line = STANDARD.encode([b"Ed", &self.id[..], signature.as_ref()].concat());
        format!(
            "untrusted comment: a signature\n{line}\ntrusted comment: {comment}\n{}\n",
            STANDARD.encode(global.as_ref())
        )
    }
}

/// A plugin's file of a name and a version, in a place.
fn build(place: &Place, name: &str, version: &str) -> Option<Vec<u8>> {
    let defines = [format!("-DNAME=\"{name}\""), format!("-DVERSION=\"{version}\"")];
    let built = plugin(place, "built.so", BROKEN, &defines.each_ref().map(String::as_str));
    built.then(|| std::fs::read(place.path("built.so")).unwrap())
}

#[test]
fn a_plugin_is_installed_from_an_address_used_updated_and_removed() {
    let (place, server) = (Place::empty(), Server::new());
    let Some(first) = build(&place, "mine", "1.9") else { return };
    server.set("mine.so", first.clone());
    let source = server.address("mine.so");
    let text = place.ok(&["plugins", "add", &source]);
    assert!(text.contains("mine 1.9 installed: ") && text.contains("plugins.lock"), "{text}");
    let installed = place.path("data").join("bitnet-burn/plugins/mine.so");
    assert_eq!(std::fs::read(&installed).unwrap(), first);
    // It is loaded from there.
    let kernels =
        super::json(&super::ok(place.command(&["kernels", "--json"]).env("BITNET_PLUGINS", "user")));
    let listed = kernels["kernels"].as_array().unwrap();
    assert!(
        listed.iter().any(|kernel| kernel["kernel"] == "mine/plain" && kernel["status"]["state"] == "ready")
    );
    assert!(place.ok(&["plugins", "list", "--outdated"]).contains("mine 1.9: up to date"));
    assert!(place.ok(&["plugins", "update"]).contains("mine 1.9 is up to date"));
    // A newer version.
    let second = build(&place, "mine", "1.10").unwrap();
    server.set("mine.so", second.clone());
    let listed = place.json(&["plugins", "list", "--outdated", "--json"]);
    assert_eq!(
        (&listed["plugins"][0]["outdated"], &listed["plugins"][0]["version"]),
        (&true.into(), &"1.9".into())
    );
    assert!(place.ok(&["plugins", "update", "mine"]).contains("mine 1.9 is now 1.10"));
    assert_eq!(std::fs::read(&installed).unwrap(), second);
    // An older one, another name, and the same version with other content are refused, and nothing changes.
    for (name, version, expected) in [
        ("mine", "1.9", "it has version 1.9 of mine, and 1.10 is installed, which is newer"),
        ("other", "1.11", "it had a plugin named mine, and has one named other now"),
    ] {
        server.set("mine.so", build(&place, name, version).unwrap());
        for command in [&["plugins", "update"][..], &["plugins", "add", &source]] {
            let refused = place.error(command);
            assert!(
                refused.contains(expected) && refused.contains("`bitnet plugins remove mine` first"),
                "{refused}"
            );
        }
    }
    let same = ["-DNAME=\"mine\"", "-DVERSION=\"1.10\"", "-DALIGNMENT=64"];
    assert!(plugin(&place, "built.so", BROKEN, &same));
    server.set("mine.so", std::fs::read(place.path("built.so")).unwrap());
    assert!(
        place.error(&["plugins", "update"]).contains("with other content; a new content needs a new version")
    );
    server.remove("mine.so");
    assert!(place.error(&["plugins", "update"]).contains("there is no such file"));
    let elsewhere = place.error(&["plugins", "add", "built.so"]);
    assert!(elsewhere.contains("mine is installed from http://127.0.0.1"), "{elsewhere}");
    assert_eq!(std::fs::read(&installed).unwrap(), second);
    assert!(place.ok(&["plugins", "remove", "mine"]).contains("mine 1.10 removed"));
    assert!(
        !installed.exists() && place.error(&["plugins", "remove", "mine"]).contains("no plugin of this name")
    );
    // From a directory; and what the gate refuses is not installed.
    std::fs::create_dir(place.path("folder")).unwrap();
    std::fs::copy(place.path("built.so"), place.path("folder/a.so")).unwrap();
    assert!(place.ok(&["plugins", "add", "folder"]).contains("mine 1.10 installed"));
    assert!(plugin(&place, "bad.so", BROKEN, &["-DNAME=\"bad\"", "-DWRONG=1"]));
    assert!(place.error(&["plugins", "add", "bad.so"]).contains("the gate refuses this plugin"));
    assert!(place.error(&["plugins", "add", "missing.so"]).contains("there is no such file"));
    let unencrypted = place.command(&["plugins", "add", "http://plugins.example/a.so"]).output().unwrap();
    assert!(String::from_utf8_lossy(&unencrypted.stderr).contains("use https"));
}

#[test]
fn a_team_with_a_lock_file_installs_the_same() {
    let (first, second, server) = (Place::empty(), Place::empty(), Server::new());
    let Some(library) = build(&first, "mine", "1.0") else { return };
    server.set("mine.so", library.clone());
    let source = server.address("mine.so");
    first.ok(&["plugins", "add", &source, "--lock", "team.lock"]);
    let lock = std::fs::read(first.path("team.lock")).unwrap();
    second.write("team.lock", &lock);
    let update = ["plugins", "update", "--locked", "--lock", "team.lock"];
    second.ok(&update);
    let installed = second.path("data").join("bitnet-burn/plugins/mine.so");
    assert_eq!(std::fs::read(&installed).unwrap(), library);
    // Offline after the first time.
    let requests = server.requests();
    assert!(second.ok(&update).contains("mine 1.0 is installed"));
    assert_eq!(server.requests(), requests);
    // Something else at the source is not installed, and neither is a plugin that the lock file has not.
    server.set("mine.so", build(&first, "mine", "1.1").unwrap());
    std::fs::remove_file(&installed).unwrap();
    for command in [&update[..], &["plugins", "add", &source, "--locked", "--lock", "team.lock"]] {
        let refused = second.error(command);
        assert!(refused.contains("and the lock file has ") && refused.contains("(--locked)"), "{refused}");
    }
    let unknown = second.error(&["plugins", "add", "team.lock", "--locked", "--lock", "team.lock"]);
    assert!(unknown.contains("has no plugin of this source (--locked)"), "{unknown}");
    assert_eq!(std::fs::read(second.path("team.lock")).unwrap(), lock);
    assert!(!installed.exists());
    second.write(
        "team.lock",
        "version = 1\n[[plugin]]\nname = \"../x\"\nversion = \"1\"\nsha256 = \"\"\nsource = \"a\"\n",
    );
    assert!(second.error(&update).contains("is no name of a plugin"));
    second.write("team.lock", "version = 9\n");
    assert!(second.error(&update).contains("version 9; this program knows 1"));
}

#[test]
fn with_a_trusted_publisher_only_what_it_signed_is_installed() {
    let (place, server) = (Place::empty(), Server::new());
    let Some(library) = build(&place, "mine", "1.0") else { return };
    let (publisher, stranger) = (Publisher::new(1), Publisher::new(2));
    let (source, key) = (server.address("mine.so"), publisher.public_key());
    let text = place.ok(&["plugins", "trust", &key, "--name", "Somebody"]);
    assert!(text.contains(&key) && text.contains("plugin-publishers"), "{text}");
    server.set("mine.so", library.clone());
    let refused = |expected: &str| {
        let refused = place.error(&["plugins", "add", &source]);
        assert!(refused.contains(expected), "{refused}");
    };
    refused("it is not signed");
    server.set("mine.so.minisig", stranger.sign(&library));
    refused("it is signed by a publisher who is not trusted");
    let mut tampered = library.clone();
    *tampered.last_mut().unwrap() ^= 1;
    server.set("mine.so.minisig", publisher.sign(&tampered));
    refused("its signature does not fit");
    server.set("mine.so.minisig", "nonsense");
    refused("its .minisig is no signature of minisign");
    server.set("mine.so.minisig", publisher.sign(&library).replace("timestamp:1", "timestamp:2"));
    refused("its signature does not fit");
    server.set("mine.so.minisig", publisher.sign(&library));
    place.ok(&["plugins", "add", &source]);
    let lock = std::fs::read_to_string(place.path("config").join("bitnet-burn/plugins.lock")).unwrap();
    assert!(lock.contains(&format!("publisher = \"{key}\"")), "{lock}");
    // The next version must come from the same publisher, also if another one is trusted.
    place.write("stranger.pub", format!("untrusted comment: key\n{}\n", stranger.public_key()));
    place.ok(&["plugins", "trust", "stranger.pub"]);
    let next = build(&place, "mine", "1.1").unwrap();
    server.set("mine.so", next.clone());
    server.set("mine.so.minisig", stranger.sign(&next));
    let refused = place.error(&["plugins", "update"]);
    assert!(refused.contains("mine was signed by another publisher"), "{refused}");
    server.set("mine.so.minisig", publisher.sign(&next));
    assert!(place.ok(&["plugins", "update"]).contains("mine 1.0 is now 1.1"));
}
