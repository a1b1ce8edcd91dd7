//! `bitnet kernels`: the list, the explanations, the page; the configuration below them, what is remembered of measurements,
//! and strict mode.

use std::path::{Path, PathBuf};

use serde_json::Value;

use super::{Place, TEMPLATE, error, json, ok, plugin};

#[test]
fn kernels_are_listed_and_explained() {
    let place = Place::empty();
    let report =
        place.json(&["kernels", "--json", "--threads", "1", "--explain", "2x96x256", "--explain", "64x128"]);
    assert_eq!(report["threads"], 1);
    let explanations = report["explanations"].as_array().unwrap();
    assert_eq!(explanations.len(), 4);
    assert_eq!(
        (&explanations[0]["m"], &explanations[0]["n"], &explanations[0]["k"]),
        (&2.into(), &96.into(), &256.into())
    );
    for explanation in explanations {
        let candidates = explanation["candidates"].as_array().unwrap();
        assert!(candidates.iter().any(|c| c["kernel"] == explanation["chosen"]));
        assert!(candidates.iter().any(|c| !c["median_ns"].is_null()));
    }
    assert!(Path::new(report["cache_file"].as_str().unwrap()).exists());
    let text = place.ok(&["kernels", "--threads", "1", "--explain", "2x96x256"]);
    assert!(text.contains("[2, 256] x [96, 256]ᵀ") && text.contains("measured earlier"), "{text}");
    let kept = ok(place.command(&["kernels"]).env("BITNET_CACHE_DIR", ""));
    assert!(kept.contains("measurements are not kept"), "{kept}");
}

#[test]
fn all_shapes_of_a_model_are_explained_against_the_roof() {
    let place = Place::new();
    let report = place.json(&["kernels", "-m", "model.gguf", "--threads", "1", "--json", "--explain"]);
    assert!(report["roof"]["read_gb_per_s"].as_f64().unwrap() > 0.0);
    let explanations = report["explanations"].as_array().unwrap();
    let shapes: Vec<_> =
        explanations.iter().map(|e| (e["n"].as_u64().unwrap(), e["k"].as_u64().unwrap())).collect();
    // Hidden 256, two heads of 128 and one for keys and values, feed-forward 640; for three numbers of rows.
    assert_eq!(shapes, [[(256, 256); 3], [(128, 256); 3], [(640, 256); 3], [(256, 640); 3]].concat());
    assert_eq!(explanations[0]["projections"], serde_json::json!(["q", "o"]));
    let matrices: u64 = explanations.iter().step_by(3).map(|e| e["matrices"].as_u64().unwrap()).sum();
    assert_eq!(matrices, 14);
    for explanation in explanations {
        let chosen = explanation["chosen"].as_str().unwrap();
        let candidates = explanation["candidates"].as_array().unwrap();
        let row = candidates.iter().find(|c| c["kernel"] == chosen).unwrap();
        assert!(row["speed"]["g_per_s"].as_f64().unwrap() > 0.0, "{row}");
        assert!(explanation["reason"].as_str().unwrap().len() > 10);
    }
    let text = place.ok(&["kernels", "-m", "model.gguf", "--threads", "1", "--explain"]);
    for part in
        ["q, o: 4 matrices, [1, 256] x [256, 256]", "down: 2 matrices", "GB/s", "limits: memory reads"]
    {
        assert!(text.contains(part), "{part}: {text}");
    }
    if cfg!(feature = "default-model") {
        let text = place.ok(&["kernels", "--explain"]);
        assert!(text.contains("gate, up: "), "{text}");
    }
}

#[test]
fn the_page_needs_no_network_and_believes_no_name() {
    let place = Place::new();
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("../engine/testdata/golden/hf/A-packed-auto");
    std::fs::create_dir(place.path("hf")).unwrap();
    for entry in std::fs::read_dir(source).unwrap().map(Result::unwrap) {
        std::fs::copy(entry.path(), place.path("hf").join(entry.file_name())).unwrap();
    }
    let mut config: Value =
        serde_json::from_slice(&std::fs::read(place.path("hf/config.json")).unwrap()).unwrap();
    config["_name_or_path"] = "<script>alert('1')</script> & \"co\"".into();
    place.write("hf/config.json", config.to_string());

    let report = place.json(&["kernels", "-m", "hf", "--threads", "1", "--html", "page.html", "--json"]);
    let page = std::fs::read_to_string(place.path("page.html")).unwrap();
    assert!(page.starts_with("<!doctype html>") && page.ends_with("</html>\n"));
    assert!(page.contains("&lt;script&gt;alert(&#39;1&#39;)&lt;/script&gt; &amp; &quot;co&quot;"));
    for absent in ["<script", "http:", "https:", "url(", "@import", "src="] {
        assert!(!page.contains(absent), "{absent}");
    }
    assert!(page.contains("prefers-color-scheme: dark") && page.contains("memory reads"));
    let explanations = report["explanations"].as_array().unwrap();
    assert_eq!(page.matches("<figure>").count(), explanations.len());
    let rows: usize = explanations.iter().map(|e| e["candidates"].as_array().unwrap().len()).sum();
    let bars = page.matches("class=\"row\"").count() + page.matches("class=\"row chosen\"").count();
    assert_eq!(bars, rows);
    assert_eq!(page.matches("class=\"row chosen\"").count(), explanations.len());
    // What is opened is closed.
    for tag in
        ["main", "header", "section", "figure", "figcaption", "table", "tr", "td", "div", "span", "code", "i"]
    {
        let opened = page.matches(&format!("<{tag}>")).count() + page.matches(&format!("<{tag} ")).count();
        assert_eq!(opened, page.matches(&format!("</{tag}>")).count(), "{tag}");
    }
    // Shapes alone, and a place that is not there.
    place.ok(&["kernels", "--explain", "64x128", "--html", "shape.html", "--threads", "1"]);
    assert!(std::fs::read_to_string(place.path("shape.html")).unwrap().contains("64 &times; 128"));
    assert!(
        place.error(&["kernels", "--explain", "64x128", "--html", "no/shape.html"]).contains("no/shape.html")
    );
}

#[test]
fn the_configuration_file_is_below_the_environment_and_the_flags() {
    let place = Place::empty();
    let file = place.path("config").join("bitnet-burn/config.toml");
    std::fs::create_dir_all(file.parent().unwrap()).unwrap();
    let configure = |text: &str| std::fs::write(&file, text).unwrap();
    let list = ["kernels", "--json"];
    assert!(place.json(&list)["config_file"].is_null());
    if !cfg!(target_os = "linux") {
        return;
    }

    configure("threads = 1\nstrict_mode = 'no-fallback'\ncache_dir = ''\n");
    let mut without_cache = place.command(&list);
    let report = json(&ok(without_cache.env_remove("BITNET_CACHE_DIR")));
    assert_eq!(report["config_file"], file.to_str().unwrap());
    assert_eq!((&report["threads"], &report["strict"]["no_fallback"]), (&1.into(), &true.into()));
    assert!(report["cache_file"].is_null());
    assert!(place.ok(&["kernels"]).contains(&format!("configuration: {}", file.display())));
    // The environment, and the flags.
    let report = json(&ok(place.command(&list).env("BITNET_THREADS", "2").env("BITNET_STRICT_MODE", "0")));
    assert_eq!((&report["threads"], &report["strict"]["no_fallback"]), (&2.into(), &false.into()));
    assert!(!report["cache_file"].is_null());
    let report = place.json(&["kernels", "--json", "--threads", "3", "--strict=gated-plugins"]);
    assert_eq!((&report["threads"], &report["strict"]["no_fallback"]), (&3.into(), &false.into()));
    assert_eq!(report["strict"]["gated_plugins"], true);
    assert_eq!(place.json(&["kernels", "--json", "--strict"])["strict"]["plausible_figures"], true);
    // Another file, none, and one that is not there.
    place.write("other.toml", "threads = 4");
    let other = |path: &str| place.command(&list).env("BITNET_CONFIG", path).output().unwrap();
    let of = |output: std::process::Output| json(std::str::from_utf8(&output.stdout).unwrap());
    assert_eq!(of(other("other.toml"))["threads"], 4);
    assert!(of(other(""))["config_file"].is_null());
    assert!(error(place.command(&list).env("BITNET_CONFIG", "none.toml")).contains("none.toml"));

    // Whatever is wrong is named, with the file.
    for (text, expected) in [
        ("thread = 2", "there is no key `thread`"),
        ("threads = 'many'", "threads = \"many\": expected a number from 1 to 1024"),
        ("threads = = 2", "line 1"),
        ("fallback = 'sometimes'", "fallback = \"sometimes\""),
    ] {
        configure(text);
        let stderr = place.error(&list);
        assert!(stderr.contains(expected) && stderr.contains("config.toml"), "{stderr}");
    }
    std::fs::write(&file, [0xff]).unwrap();
    assert!(place.error(&list).contains("config.toml"));

    // The user's plugins, switched on in the configuration; and off.
    if plugin(&place, "good.so", TEMPLATE, &[]) {
        let user = place.path("data").join("bitnet-burn/plugins");
        std::fs::create_dir_all(&user).unwrap();
        std::fs::rename(place.path("good.so"), user.join("good.so")).unwrap();
        let has = |text: &str| {
            configure(text);
            place.ok(&list).contains("example-c/portable")
        };
        assert!(!has("") && has("plugins = 'user'") && !has("plugins = 'off'") && !has("plugins = 'on'"));
        assert!(has(&format!("plugin_path = ['{}']", user.display())));
        assert!(place.json(&["plugins", "list", "--json"])["config_file"].is_string());
    }

    // As for plugins: what everybody may write is not believed.
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        configure("threads = 1");
        let mode =
            |path: &Path, mode| std::fs::set_permissions(path, PermissionsExt::from_mode(mode)).unwrap();
        mode(&file, 0o666);
        let stderr = place.error(&list);
        assert!(stderr.contains("everybody may write it") && stderr.contains("config.toml"), "{stderr}");
        mode(&file, 0o600);
        mode(file.parent().unwrap(), 0o777);
        assert!(place.error(&list).contains("everybody may write the directory"));
        mode(file.parent().unwrap(), 0o755);
        assert_eq!(place.json(&list)["threads"], 1);
    }
}

#[test]
fn the_second_start_measures_nothing_and_a_damaged_cache_is_survived() {
    let place = Place::new();
    let call = ["bench", "-m", "model.gguf", "-p", "8", "-n", "2", "-r", "1", "--json"];
    let first = place.json(&call);
    assert!(first["tuning"]["measured"].as_u64().unwrap() > 0);
    let second = place.json(&call);
    assert_eq!(second["tuning"]["measured"], 0);
    assert_eq!(second["tuning"]["from_cache"], first["tuning"]["measured"]);
    let said = place.command(&call[..9]).output().unwrap();
    assert!(String::from_utf8_lossy(&said.stdout).contains("measured nothing"));
    // `run` measures while it answers, and may end before that does.
    let run = place.json(&["run", "-m", "model.gguf", "-p", "Hello", "-n", "2", "--json"]);
    assert_eq!(run["tuning"]["measured"], 0);

    let cache = PathBuf::from(second["tuning"]["cache_file"].as_str().unwrap());
    assert!(cache.starts_with(place.path("cache")));
    std::fs::write(&cache, "{ half a fi").unwrap();
    let third = place.json(&call);
    assert!(third["tuning"]["measured"].as_u64().unwrap() > 0);
    assert!(third["tuning"]["cache_problem"].as_str().unwrap().contains("damaged"));
    let fourth = place.json(&call);
    assert_eq!(
        (&fourth["tuning"]["measured"], &fourth["tuning"]["cache_problem"]),
        (&0.into(), &Value::Null)
    );
    std::fs::remove_file(&cache).unwrap();
    assert!(place.json(&call)["tuning"]["measured"].as_u64().unwrap() > 0);
}

/// The kernels' status says which CPU features there are; a mask takes them away.
#[test]
fn strict_mode_names_what_is_missing() {
    let place = Place::new();
    let call = ["run", "-m", "model.gguf", "-p", "Hello", "-n", "2", "--json", "--kernel", "t2-scalar"];
    let scalar = json(&ok(place.command(&call).env("BITNET_STRICT_MODE", "1")));
    assert_eq!((&scalar["strict"]["no_fallback"], &scalar["reference_calls"]), (&true.into(), &0.into()));

    let kernels = place.json(&["kernels", "--json"]);
    let fast = kernels["kernels"].as_array().unwrap().iter().find_map(|kernel| {
        let features = kernel["features"].as_array().unwrap();
        features.first().map(|f| (kernel["kernel"].as_str().unwrap(), f.as_str().unwrap()))
    });
    let Some((kernel, feature)) = fast else { return };
    let mut call = call;
    call[9] = kernel;
    let stderr = error(place.command(&call).env("BITNET_STRICT_MODE", "1").env("BITNET_CPU_MASK", feature));
    for part in ["strict mode", kernel, feature, "masked", "hint: "] {
        assert!(stderr.contains(part), "{part}: {stderr}");
    }
    let report = json(&ok(place.command(&call).env("BITNET_CPU_MASK", feature)));
    assert!(report["reference_calls"].as_u64().unwrap() > 0);
    assert_eq!(report["kernels"][0]["kernel"], "reference");
    assert_eq!(report["token_ids"], scalar["token_ids"]);
}

/// Figures that are true pass; what is strict is in every report.
#[test]
fn strictness_is_chosen_on_the_command_line_and_reported() {
    let place = Place::new();
    let run = ["run", "-m", "model.gguf", "-p", "Hello", "-n", "4", "--json"];
    let all = place.json(&[&run[..], &["--strict"]].concat());
    for name in ["no_fallback", "quantised_kernels", "gated_plugins", "plausible_figures"] {
        assert_eq!(all["strict"][name], true, "{name}");
    }
    let some = place.json(&[&run[..], &["--strict=plausible-figures", "--receipt", "r.json"]].concat());
    assert_eq!(
        (&some["strict"]["plausible_figures"], &some["strict"]["no_fallback"]),
        (&true.into(), &false.into())
    );
    let receipt: Value = serde_json::from_slice(&std::fs::read(place.path("r.json")).unwrap()).unwrap();
    assert_eq!(receipt["report"]["strict"], some["strict"]);
    let mut weaker = place.command(&[&run[..], &["--strict=0"]].concat());
    assert_eq!(json(&ok(weaker.env("BITNET_STRICT_MODE", "1")))["strict"]["no_fallback"], false);
    let bench = ["bench", "-m", "model.gguf", "-p", "8", "-n", "2", "--repetitions", "1", "--strict"];
    assert!(place.ok(&bench).contains("strict mode (no-fallback, "));
    let usage = place.command(&[&run[..], &["--strict=very"]].concat()).output().unwrap();
    assert_eq!(usage.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&usage.stderr).contains("plausible-figures"));
}
