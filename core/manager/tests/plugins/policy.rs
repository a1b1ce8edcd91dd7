//! Plugins from files: the descriptor, the loading policy, the verdicts, and the built-in kernels through
//! their own library.

use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::time::SystemTime;

use crate::support::*;
use bitnet_burn_manager::KernelManager;
use bitnet_burn_manager::gate::GATE_VERSION;
use bitnet_burn_manager::plugin::PluginError;
use bitnet_burn_manager::store::{PluginConfig, read_pins, write_pins};
use bitnet_burn_manager::{ManagerConfig, Status, Strict};
use bitnet_burn_plugin::abi;

pub const SHAPES: [(usize, usize, usize); 6] =
    [(1, 1, 1), (1, 100, 784), (2, 33, 129), (7, 64, 256), (40, 19, 1000), (1, 640, 2560)];

#[test]
fn a_plugin_in_c_is_checked_and_used() {
    if !has_compiler() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    for (name, defines) in [("plain", &[][..]), ("private", &["PRIVATE", "GRANULE=8"])] {
        let path = build(dir.path(), name, defines);
        let config = ManagerConfig {
            force: Some("example/plain".into()),
            strict: Strict::ALL,
            ..config(&dir.path().join("cache"))
        };
        let manager = KernelManager::new(config).unwrap();
        add_built_in(&manager);
        let reports = manager.load_plugin(&path).unwrap();
        assert_eq!(reports.len(), 1);
        let report = &reports[0];
        assert_eq!(
            (report.kernel.as_str(), report.version.as_str(), &report.status),
            ("example/plain", "1.2.3", &Status::Ready)
        );
        assert_eq!(report.layout, if name == "private" { "example/bytes" } else { "canonical" });
        assert_eq!(report.sha256.as_ref().map(String::len), Some(64));
        assert_eq!(Path::new(&report.origin), path.canonicalize().unwrap());
        manager.validate().unwrap();
        for (m, n, k) in SHAPES {
            check(&manager, m, n, k, name);
        }
        let report = manager.report();
        let used: Vec<_> = report.kernels.iter().filter(|k| k.calls > 0).collect();
        assert_eq!((used.len(), used[0].calls, report.reference_calls), (1, SHAPES.len() as u64, 0));
        let sha256 = used[0].sha256.clone().unwrap();
        let verdict = manager.store().verdict(&sha256).unwrap();
        assert!(verdict.passed() && verdict.kernels[0].cases > 100, "{verdict:?}");
    }
}

#[test]
fn a_plugin_of_which_nothing_could_be_tried_has_not_passed() {
    if !has_compiler() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    for (name, define, reason) in [
        // A name that this host does not know: one that a later version may know, or a mistake.
        ("unknown", "FEATURES=\"avx2048\"", "needs avx2048 (unknown name; the host knows sse2, "),
        ("operation", "OPERATION=7", "it computes operation 7, which this host does not know"),
    ] {
        let path = build(dir.path(), name, &[define]);
        let manager = manager(&dir.path().join(name));
        let report = manager.verify_plugin(&path).unwrap();
        let unavailable = report.kernels[0].unavailable.as_ref().unwrap();
        assert!(unavailable.contains(reason), "{unavailable}");
        assert!(!report.passed() && report.refusal.is_none(), "{report:?}");
        // That is no fault: it is loaded, and not used.
        let reports = manager.load_plugin(&path).unwrap();
        assert_eq!(reports[0].status, Status::Unavailable(unavailable.clone()));
        check(&manager, 2, 33, 129, name);
        assert_eq!(manager.report().kernels[0].calls, 0);
    }
}

#[test]
fn the_documentation_lists_all_names_of_features_and_no_others() {
    let page = std::fs::read_to_string(package().join("../../docs/plugins-abi.md")).unwrap();
    let (_, section) = page.split_once("### Names of CPU features\n").expect("the section");
    let (table, _) = section.split_once("\n#").expect("the next section");
    let names: Vec<&str> = table.split('`').skip(1).step_by(2).collect();
    assert_eq!(names, bitnet_burn_plugin::features::NAMES);
}

#[test]
fn what_a_plugin_says_stays_on_its_line() {
    if !has_compiler() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let manager = manager(&dir.path().join("cache"));
    let forged = "VERSION=\"1.0\\033[31mRED\\033]0;title\\007\\nline2 passed: all\"";
    let plain = "1.0\u{fffd}[31mRED\u{fffd}]0;title\u{fffd} line2 passed: all";
    let path = build(dir.path(), "version", &[forged, "FEATURES=\"avx\\n2048\""]);
    let report = manager.verify_plugin(&path).unwrap();
    assert_eq!(report.plugin.as_ref().unwrap().version, plain);
    let loaded = manager.load_plugin(&path).unwrap();
    assert_eq!((loaded[0].version.as_str(), &loaded[0].features[..]), (plain, &["avx 2048".to_owned()][..]));
    // A message of a kernel; what it prints on stderr before it crashes; what the loader repeats.
    let says = "IN_RUN=say(message, \"bad\\nkernel x: passed\\033[2J\"); return BITNET_FAILED";
    let prints = "IN_RUN=fputs(\"words\\033[2J\\n\", stderr); abort()";
    for (name, define) in [("says", says), ("prints", prints)] {
        let text = manager.load_plugin(&build(dir.path(), name, &[define])).unwrap_err().to_string();
        assert!(text.contains("\u{fffd}[2J") && !text.contains(|c: char| c.is_control()), "{text:?}");
    }
}

#[test]
fn a_plugin_that_prints_passes_with_a_warning() {
    if !has_compiler() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let manager = manager(&dir.path().join("cache"));
    for (name, define, warnings) in [
        ("out", "ON_LOAD=puts(\"from stdout\")", &["from stdout"][..]),
        ("err", "ON_LOAD=fputs(\"from\\033 stderr\\n\", stderr)", &["from\u{fffd} stderr"]),
        ("silent", "ON_LOAD=(void)0", &[]),
    ] {
        let report = manager.verify_plugin(&build(dir.path(), name, &[define])).unwrap();
        assert!(report.passed(), "{name}: {report:?}");
        let warnings: Vec<_> =
            warnings.iter().map(|words| format!("it prints to stdout or stderr: {words}")).collect();
        assert_eq!(report.warnings, warnings, "{name}");
        // The verdict that is kept has it, too.
        assert_eq!(manager.store().verdict(&report.sha256).unwrap().warnings, warnings, "{name}");
    }
}

#[test]
fn statics_that_plugins_would_share_are_warned_of() {
    let cxx = std::env::var("CXX").unwrap_or_else(|_| "c++".into());
    if !cfg!(target_os = "linux") || !has_compiler() || Command::new(&cxx).arg("--version").output().is_err()
    {
        assert!(std::env::var_os("CI").is_none(), "no C++ compiler in CI");
        return eprintln!("SKIPPED: a plugin with an inline function's static (no C++ compiler `{cxx}`)");
    }
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("shared.cpp");
    let code = "inline int &counter() { static int count; return count; }\n\
                extern \"C\" void shared() { counter()++; }\n";
    std::fs::write(&source, code).unwrap();
    for (name, flag, warned) in [("unique", "-fgnu-unique", true), ("own", "-fno-gnu-unique", false)] {
        let object = dir.path().join(format!("{name}.o"));
        run(Command::new(&cxx).args(["-c", "-fPIC", flag, "-o"]).arg(&object).arg(&source));
        let flags = ["-DEXTERNAL=shared", "-DIN_RUN=shared()", object.to_str().unwrap()];
        let path = build_with(&package().join("../../plugins/abi/include"), dir.path(), name, &flags);
        let report = manager(&dir.path().join("cache")).verify_plugin(&path).unwrap();
        assert!(report.passed());
        let text = report.warnings.join("\n");
        assert_eq!(
            text.contains("_ZZ7countervE5count") && text.contains("-fno-gnu-unique"),
            warned,
            "{text}"
        );
    }
}

/// Macros of testdata/plugin.c, and what the refusal must say.
const BROKEN: [(&str, &[&str], &str); 21] = [
    ("major", &["MAJOR=9"], "built for ABI 9.3, and this host speaks ABI 1.3"),
    ("old", &["MAJOR=0"], "built for ABI 0.3, and this host speaks ABI 1.3"),
    ("symbol", &["NO_SYMBOL"], "it does not export `bitnet_plugin`"),
    ("descriptor", &["NULL_DESCRIPTOR"], "the entry point returned no descriptor"),
    ("name", &["NAME=NULL"], "the plugin's name is not 1 to 63 of"),
    ("slash", &["NAME=\"a/b\""], "the plugin's name is not 1 to 63 of"),
    ("version", &["NO_VERSION"], "the plugin has no version"),
    ("kernels", &["NO_KERNELS"], "it claims 1 kernels"),
    ("none", &["COUNT=0"], "it claims 0 kernels"),
    ("count", &["COUNT=0xffffffffffffffff"], "it claims 18446744073709551615 kernels"),
    ("null", &["NULL_KERNEL"], "kernel 0 is null"),
    ("twice", &["TWICE"], "two kernels are named"),
    ("run", &["NO_RUN"], "kernel `plain` lacks `supports` or `run`"),
    (
        "pack",
        &["LAYOUT_WITHOUT_PACK"],
        "kernel `plain` has a private layout but not packed_size, pack and unpack",
    ),
    ("granule", &["GRANULE=0"], "kernel `plain` has a row granule of 0"),
    ("alignment", &["ALIGNMENT=48"], "kernel `plain` asks for weights aligned to 48"),
    ("size", &["KERNEL_SIZE=8"], "struct_size of kernel 0 is 8"),
    ("plugin_size", &["PLUGIN_SIZE=16"], "struct_size of the plugin is 16"),
    ("huge", &["PLUGIN_SIZE=0xffffffffff"], "struct_size of the plugin is 1099511627775"),
    ("features", &["FEATURES=\"\\xff\""], "the features of kernel `plain` are no text of at most 255 bytes"),
    ("letters", &["KERNEL_NAME=\"\""], "the name of kernel 0 is not 1 to 63 of"),
];

#[test]
fn every_broken_descriptor_is_refused_with_the_reason() {
    if !has_compiler() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let manager = manager(&dir.path().join("cache"));
    for (name, defines, expected) in BROKEN {
        let path = build(dir.path(), name, defines);
        let error = manager.load_plugin(&path).unwrap_err();
        assert!(matches!(error, PluginError::Refused { .. }), "{error}");
        let error = error.to_string();
        assert!(error.contains(expected), "{error:?} should say {expected:?}");
        assert!(error.contains(path.to_str().unwrap()), "{error:?} should name the file");
    }
    assert!(manager.report().kernels.is_empty());
}

/// The library of `bitnet-burn-cpu-plugin`, built into the target directory that this test is in.
pub fn cpu_plugin() -> &'static Path {
    static PATH: OnceLock<PathBuf> = OnceLock::new();
    PATH.get_or_init(|| {
        // .../<target>/<profile>/deps/<this test>
        let exe = std::env::current_exe().unwrap();
        let profile_dir =
            exe.parent().and_then(Path::parent).expect("a test lies in <target>/<profile>/deps");
        let target = profile_dir.parent().expect("a target directory");
        let profile = match profile_dir.file_name().unwrap().to_str().unwrap() {
            "debug" => "dev",
            name => name,
        };
        let mut command = Command::new(env!("CARGO"));
        command.args(["build", "--package", "bitnet-burn-cpu-plugin", "--profile", profile]);
        run(command.current_dir(package()).env("CARGO_TARGET_DIR", target));
        let name =
            format!("{}bitnet_cpu_plugin{}", std::env::consts::DLL_PREFIX, std::env::consts::DLL_SUFFIX);
        // A copy: target directories may be writable for everybody.
        let copy = profile_dir.join(name);
        let dir = tempfile::tempdir().unwrap().keep();
        let path = dir.join(copy.file_name().unwrap());
        std::fs::copy(copy, &path).unwrap();
        path
    })
}

#[test]
fn the_built_in_kernels_pass_the_gate_and_work_the_same_from_their_library() {
    let dir = tempfile::tempdir().unwrap();
    let path = cpu_plugin();
    let statuses = |manager: &KernelManager| -> Vec<_> {
        manager.report().kernels.into_iter().map(|k| (k.kernel, k.status)).collect()
    };
    let all = manager(dir.path());
    let reports = all.load_plugin(path).unwrap();
    let built_in = manager(dir.path());
    add_built_in(&built_in);
    assert_eq!(statuses(&all), statuses(&built_in));
    // (Those for many scales are tried by the gate alone.)
    let ready = reports.into_iter().filter(|r| r.status == Status::Ready && !r.many_scales);
    let ready: Vec<_> = ready.map(|r| r.kernel).collect();
    assert!(ready.len() >= 2, "{ready:?}");
    for kernel in ready {
        let config = ManagerConfig { force: Some(kernel.clone()), strict: Strict::ALL, ..config(dir.path()) };
        let manager = KernelManager::new(config).unwrap();
        manager.load_plugin(path).unwrap();
        for (m, n, k) in SHAPES {
            check(&manager, m, n, k, &kernel);
        }
        let report = manager.report();
        let used: Vec<_> = report.kernels.iter().filter(|k| k.calls > 0).map(|k| &k.kernel).collect();
        assert_eq!(used, [&kernel]);
    }
    // Linked in and loaded, the two have one name: the second is refused, the first goes on.
    let error = built_in.load_plugin(path).unwrap_err().to_string();
    assert!(error.contains("`cpu` is in use already (built in)"), "{error}");
    check(&built_in, 2, 33, 129, "the linked-in kernels");
}

#[test]
fn the_same_file_twice_is_one_plugin_and_another_of_its_name_is_refused() {
    if !has_compiler() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let manager = manager(&dir.path().join("cache"));
    let (first, second) =
        (build(dir.path(), "first", &["VERSION=\"1.0\""]), build(dir.path(), "second", &["VERSION=\"2.0\""]));
    let (copy, link) = (dir.path().join("copy.so"), dir.path().join("link.so"));
    std::fs::copy(&first, &copy).unwrap();
    symlink(&first, &link).unwrap();
    let reports = manager.load_plugin(&link).unwrap();
    assert_eq!(Path::new(&reports[0].origin), first.canonicalize().unwrap(), "links are resolved");
    for same in [&first, &copy, &link] {
        assert_eq!(manager.load_plugin(same).unwrap()[0].origin, reports[0].origin);
    }
    let error = manager.load_plugin(&second).unwrap_err();
    let PluginError::Duplicate { version, other_version, .. } = &error else { panic!("{error}") };
    assert_eq!((version.as_str(), other_version.as_str()), ("2.0", "1.0"));
    for part in ["version 2.0 of a plugin named `example`", "version 1.0", "libfirst", "libsecond"] {
        assert!(error.to_string().contains(part), "{error}");
    }
    assert_eq!(manager.report().kernels.len(), 1);
    check(&manager, 2, 33, 129, "the first one");
}

#[test]
fn a_file_that_is_replaced_while_in_use_changes_nothing_until_it_is_loaded_again() {
    if !has_compiler() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let cache = dir.path().join("cache");
    let path = build(dir.path(), "plain", &[]);
    let first = manager(&cache);
    first.load_plugin(&path).unwrap();
    check(&first, 2, 33, 129, "before");
    // Overwritten in place: a mapped file would change under the feet of whoever runs it.
    let wrong = build(dir.path(), "wrong", &["WRONG=1"]);
    std::fs::write(&path, std::fs::read(&wrong).unwrap()).unwrap();
    check(&first, 2, 34, 129, "after");
    let error = manager(&cache).load_plugin(&path).unwrap_err();
    assert!(matches!(error, PluginError::Refused { .. }), "{error}");
    std::fs::remove_file(&path).unwrap();
    check(&first, 2, 35, 129, "after it is gone");
}

#[test]
fn a_verdict_is_found_again_and_a_damaged_one_is_not_believed() {
    if !has_compiler() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let cache = dir.path().join("cache");
    let path = build(dir.path(), "plain", &[]);
    manager(&cache).load_plugin(&path).unwrap();
    let store = manager(&cache);
    let stored = store.store().admit(&path).unwrap();
    let file = || {
        let entries = std::fs::read_dir(stored.library.parent().unwrap()).unwrap();
        let mut files: Vec<PathBuf> = entries.map(|e| e.unwrap().path()).collect();
        files.retain(|file| file.extension().is_some_and(|e| e == "json"));
        assert_eq!(files.len(), 1, "one verdict, and nothing is left of writing it: {files:?}");
        files.remove(0)
    };
    let written = |file: &Path| -> SystemTime { std::fs::metadata(file).unwrap().modified().unwrap() };
    let before = written(&file());
    manager(&cache).load_plugin(&path).unwrap();
    assert_eq!(written(&file()), before, "it was not tried again");
    let good = std::fs::read_to_string(file()).unwrap();
    for damage in [
        String::new(),
        "{".into(),
        good[..good.len() / 2].into(),
        good.replace(&format!("\"gate\": {GATE_VERSION}"), "\"gate\": 0"),
        good.replace(&stored.sha256, &"0".repeat(64)),
        good.replace("\"features\": [", "\"features\": [\"none\", "),
        good.replace("\"version\": 1,", "\"version\": 9,"),
    ] {
        assert_ne!(damage, good);
        std::fs::write(file(), &damage).unwrap();
        assert_eq!(store.store().verdict(&stored.sha256), None, "{damage}");
        assert_eq!(manager(&cache).load_plugin(&path).unwrap()[0].status, Status::Ready);
        assert!(store.store().verdict(&stored.sha256).unwrap().passed(), "it was tried again");
    }
    // A verdict that everybody could have written is none.
    std::fs::set_permissions(file(), PermissionsExt::from_mode(0o666)).unwrap();
    assert_eq!(store.store().verdict(&stored.sha256), None);
    // A copy that was changed is not run. (This process has the old one mapped: a new file in its place.)
    std::fs::remove_file(&stored.library).unwrap();
    std::fs::write(&stored.library, "something else").unwrap();
    let again = store.store().admit(&path).unwrap();
    assert_eq!(std::fs::read(again.library).unwrap(), std::fs::read(&path).unwrap());
    // Many at once.
    std::fs::remove_dir_all(&cache).unwrap();
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| assert_eq!(manager(&cache).load_plugin(&path).unwrap()[0].status, Status::Ready));
        }
    });
    assert!(store.store().verdict(&stored.sha256).unwrap().passed());
    let known = store.store().known().unwrap();
    assert_eq!((known.len(), &known[0].sha256, known[0].pinned), (1, &stored.sha256, None));
}

#[test]
fn without_a_place_to_keep_copies_a_plugin_is_tried_every_time() {
    if !has_compiler() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = build(dir.path(), "plain", &[]);
    let blocked = dir.path().join("blocked");
    std::fs::write(&blocked, "a file is no directory").unwrap();
    for cache_dir in [None, Some(blocked)] {
        let manager = KernelManager::new(ManagerConfig { cache_dir, ..config(dir.path()) }).unwrap();
        assert_eq!(manager.load_plugin(&path).unwrap()[0].status, Status::Ready);
        check(&manager, 2, 33, 129, "from a temporary copy");
    }
}

const ROLE: &str = "BITNET_TEST_PLUGIN";

/// Not a test by itself: loads a plugin as a program does, with a manager that lives as long as the process.
#[test]
fn child() {
    let Some(path) = std::env::var_os(ROLE) else { return };
    let config = ManagerConfig { cache_dir: None, ..config(Path::new("/nonexistent")) };
    let manager = Box::leak(Box::new(KernelManager::new(config).unwrap()));
    assert_eq!(manager.load_plugin(Path::new(&path)).unwrap()[0].status, Status::Ready);
    assert_eq!(std::fs::read_dir(std::env::temp_dir()).unwrap().count(), 1, "the temporary copy");
}

#[test]
fn a_temporary_place_goes_with_the_process() {
    if !has_compiler() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = build(dir.path(), "plain", &[]);
    let place = dir.path().join("place");
    std::fs::create_dir(&place).unwrap();
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["policy::child", "--exact", "--nocapture", "--test-threads=1"]);
    let output = command.env(ROLE, &path).env("TMPDIR", &place).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    assert!(String::from_utf8_lossy(&output.stdout).contains("1 passed"), "{output:?}");
    let left: Vec<_> = std::fs::read_dir(&place).unwrap().map(|entry| entry.unwrap().path()).collect();
    assert!(left.is_empty(), "{left:?}");
}

fn policy(cache: &Path, change: impl FnOnce(&mut PluginConfig)) -> KernelManager {
    let mut config = config(cache);
    change(&mut config.plugins);
    KernelManager::new(config).unwrap()
}

#[test]
fn what_everybody_may_write_is_refused() {
    if !has_compiler() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let cache = dir.path().join("cache");
    let plugin = build(dir.path(), "plain", &[]);
    let mode =
        |path: &Path, mode: u32| std::fs::set_permissions(path, PermissionsExt::from_mode(mode)).unwrap();
    let place = |name: &str, bits: u32| {
        let place = dir.path().join(name);
        std::fs::create_dir(&place).unwrap();
        std::fs::copy(&plugin, place.join("plugin.so")).unwrap();
        mode(&place, bits);
        place.join("plugin.so")
    };
    let file = place("file", 0o755);
    mode(&file, 0o666);
    let open = place("open", 0o777);
    let sticky = place("sticky", 0o1777);
    // The directory above, and links in and out of the open.
    let inner = dir.path().join("open/inner");
    std::fs::create_dir(&inner).unwrap();
    let below = inner.join("plugin.so");
    std::fs::copy(&plugin, &below).unwrap();
    let from = dir.path().join("open/link.so");
    symlink(&plugin, &from).unwrap();
    let to = dir.path().join("link.so");
    symlink(&open, &to).unwrap();
    for (path, what) in [
        (&file, "everybody may write it"),
        (&open, "everybody may write the directory"),
        (&sticky, "everybody may write the directory"),
        (&below, "everybody may write the directory"),
        (&from, "everybody may write the directory"),
        (&to, "everybody may write the directory"),
    ] {
        let error = manager(&cache).load_plugin(path).unwrap_err();
        assert!(matches!(error, PluginError::Policy { .. }), "{error}");
        let text = error.to_string();
        assert!(text.contains(what) && text.contains(path.to_str().unwrap()), "{text}");
    }
    let folder = dir.path().join("folder");
    std::fs::create_dir(&folder).unwrap();
    let error = manager(&cache).load_plugin(&folder).unwrap_err().to_string();
    assert!(error.contains("no regular file"), "{error}");
    mode(&file, 0o644);
    assert_eq!(manager(&cache).load_plugin(&file).unwrap()[0].status, Status::Ready);
    // Below a sticky directory, one's own directory is one's own.
    let own = dir.path().join("sticky/own");
    std::fs::create_dir(&own).unwrap();
    std::fs::copy(&plugin, own.join("plugin.so")).unwrap();
    assert_eq!(manager(&cache).load_plugin(&own.join("plugin.so")).unwrap()[0].status, Status::Ready);
    // Nor is anything run from a cache that everybody may write: a temporary copy is.
    mode(&cache.join("plugins"), 0o777);
    let manager = manager(&cache);
    assert_eq!(manager.load_plugin(&plugin).unwrap()[0].status, Status::Ready);
    assert!(!manager.store().admit(&plugin).unwrap().library.starts_with(&cache));
}

#[test]
fn pins_keep_everything_else_out() {
    if !has_compiler() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let cache = dir.path().join("cache");
    let (plugin, other) = (build(dir.path(), "plain", &[]), build(dir.path(), "other", &["NAME=\"other\""]));
    let sha256 = manager(&cache).store().admit(&plugin).unwrap().sha256;
    let pins = dir.path().join("pins");
    let pinned = || policy(&cache, |config| config.pins = Some(pins.clone()));
    let error = pinned().load_plugin(&plugin).unwrap_err();
    assert!(matches!(error, PluginError::Pins { .. }), "no file, nothing is loaded: {error}");
    write_pins(&pins, &[(sha256.clone(), "a name\nwith # more".into())]).unwrap();
    assert_eq!(read_pins(&pins).unwrap(), [(sha256.clone(), "a name_with _ more".into())]);
    let manager = pinned();
    assert_eq!(manager.load_plugin(&plugin).unwrap()[0].status, Status::Ready);
    let error = manager.load_plugin(&other).unwrap_err();
    assert!(matches!(error, PluginError::NotPinned { .. }), "{error}");
    assert!(error.to_string().contains(pins.to_str().unwrap()), "{error}");
    assert_eq!(manager.store().known().unwrap()[0].pinned, Some(true));
    // As sha256sum prints it, with a comment, in capitals.
    std::fs::write(&pins, format!("# mine\n\n{} *lib.so # it\n", sha256.to_uppercase())).unwrap();
    assert_eq!(pinned().load_plugin(&plugin).unwrap()[0].status, Status::Ready);
    for (damage, what) in
        [("zz lib.so\n", "line 1: \"zz lib.so\""), ("# x\nabc\n", "line 2: \"abc\""), ("\u{1}", "line 1")]
    {
        std::fs::write(&pins, damage).unwrap();
        let error = pinned().load_plugin(&plugin).unwrap_err().to_string();
        assert!(error.contains(what) && error.contains(pins.to_str().unwrap()), "{error}");
    }
    std::fs::set_permissions(&pins, PermissionsExt::from_mode(0o666)).unwrap();
    let error = pinned().load_plugin(&plugin).unwrap_err().to_string();
    assert!(error.contains("everybody may write it"), "{error}");
}

#[test]
fn plugins_come_from_named_places_in_order_and_from_nowhere_if_switched_off() {
    let dir = tempfile::tempdir().unwrap();
    let extension = std::env::consts::DLL_EXTENSION;
    let place = |name: &str, files: &[&str]| {
        let place = dir.path().join(name);
        std::fs::create_dir(&place).unwrap();
        for file in files {
            std::fs::write(place.join(file), "x").unwrap();
        }
        place
    };
    let b = format!("b.{extension}");
    let a = format!("a.{extension}");
    let (path, user) = (place("path", &[&b, &a, "readme.txt"]), place("user", &[&a]));
    let named = dir.path().join(&b);
    let mut config =
        PluginConfig { path: vec![path.clone()], user_dir: Some(user.clone()), ..PluginConfig::default() };
    let (files, problems) = config.find(std::slice::from_ref(&named));
    assert_eq!(files, [named.clone(), path.join(&a), path.join(&b), user.join(&a)]);
    assert!(problems.is_empty());
    config.user_dir = None;
    assert_eq!(config.find(&[]).0, [path.join(&a), path.join(&b)]);
    config.user_dir = Some(dir.path().join("nothing there"));
    assert_eq!(config.find(&[]).0.len(), 2);
    config.enabled = false;
    assert_eq!(config.find(std::slice::from_ref(&named)).0, std::slice::from_ref(&named));
    assert!(config.find(&[]).0.is_empty());
    std::fs::write(&named, "x").unwrap();
    let error = policy(dir.path(), |config| config.enabled = false).load_plugin(&named).unwrap_err();
    assert!(matches!(error, PluginError::Off { .. }), "{error}");
}

macro_rules! layout {
    ($($type:ident = $name:literal { $($field:ident),+ })+) => {
        /// Lines of `name size` and `name.field offset`, as the Rust types are laid out.
        fn rust_layout() -> Vec<String> {
            vec![$(
                format!("{} {}", $name, size_of::<abi::$type>()),
                $(format!("{}.{} {}", $name, stringify!($field), std::mem::offset_of!(abi::$type, $field)),)+
            )+]
        }

        /// A C program that prints the same from the header.
        fn c_program() -> String {
            let mut program = String::from("#include \"bitnet_plugin.h\"\n#include <stdio.h>\nint main(void) {\n");
            $(
                program += &format!("printf(\"{0} %zu\\n\", sizeof(bitnet_{0}_t));\n", $name);
                $(program += &format!(
                    "printf(\"{0}.{1} %zu\\n\", offsetof(bitnet_{0}_t, {1}));\n", $name, stringify!($field)
                );)+
            )+
            program + "return 0;\n}\n"
        }
    };
}

layout! {
    Signature = "signature" {
        struct_size, operation, threads, m, n, k, weight_group, activation_group, scale_format, reserved,
        context, message
    }
    Activations = "activations" { struct_size, m, k, stride, q, scale, sum, group, group_scale, group_sum }
    Weights = "weights" { struct_size, n, k, data, size, scale, scale_format, group, scales }
    Output = "output" { struct_size, y, stride }
    Tile = "tile" { struct_size, n0, n1, m0, m1, thread, reserved, scratch, scratch_size }
    Message = "message" { struct_size, text, capacity, context }
    Kernel = "kernel" {
        struct_size, name, layout, features, operation, target, weight_alignment, row_granule, supports,
        packed_size, pack, unpack, workspace_size, prepare, run, gpu, context, packed_size_of, scratch_size
    }
    Gpu = "gpu" { struct_size, source, entry, workgroup, tile_n, tile_m, reserved }
    Host = "host" { struct_size, abi_major, abi_minor, version, configuration, cpu_features, log }
    Plugin = "plugin" { struct_size, abi_major, abi_minor, name, version, kernels, kernel_count }
}

#[test]
fn the_c_header_lays_every_struct_out_as_rust_does() {
    if !has_compiler() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (source, program) = (dir.path().join("layout.c"), dir.path().join("layout"));
    std::fs::write(&source, c_program()).unwrap();
    let include = package().join("../../plugins/abi/include");
    let mut command = Command::new(std::env::var("CC").unwrap_or_else(|_| "cc".into()));
    run(command
        .args(["-std=c11", "-Wall", "-Wextra", "-Werror", "-I"])
        .arg(&include)
        .arg(&source)
        .arg("-o")
        .arg(&program));
    let output = Command::new(&program).output().unwrap();
    let lines: Vec<String> = String::from_utf8(output.stdout).unwrap().lines().map(str::to_owned).collect();
    assert_eq!(lines, rust_layout());
    // The numbers that both sides agree on.
    let header = std::fs::read_to_string(include.join("bitnet_plugin.h")).unwrap();
    for (name, value) in [
        ("BITNET_ABI_MAJOR", u64::from(abi::ABI_MAJOR)),
        ("BITNET_ABI_MINOR", u64::from(abi::ABI_MINOR)),
        ("BITNET_OPERATION_TERNARY_MATMUL", u64::from(abi::OPERATION_TERNARY_MATMUL)),
        ("BITNET_OPERATION_SCALED_TERNARY_MATMUL", u64::from(abi::OPERATION_SCALED_TERNARY_MATMUL)),
        ("BITNET_SCALE_ROWS", abi::SCALE_ROWS as u64),
        ("BITNET_SCALE_F32", u64::from(abi::SCALE_F32)),
        ("BITNET_SCALE_F16", u64::from(abi::SCALE_F16)),
        ("BITNET_TARGET_CPU", u64::from(abi::TARGET_CPU)),
        ("BITNET_TARGET_WGSL", u64::from(abi::TARGET_WGSL)),
        ("BITNET_TARGET_CUDA", u64::from(abi::TARGET_CUDA)),
        ("BITNET_GPU_ACTIVATION_BLOCK", abi::GPU_ACTIVATION_BLOCK as u64),
        ("BITNET_LOG_ERROR", u64::from(abi::LOG_ERROR)),
        ("BITNET_LOG_WARNING", u64::from(abi::LOG_WARNING)),
        ("BITNET_LOG_INFO", u64::from(abi::LOG_INFO)),
        ("BITNET_LOG_DEBUG", u64::from(abi::LOG_DEBUG)),
        ("BITNET_OK", abi::STATUS_OK as u64),
        ("BITNET_UNSUPPORTED", abi::STATUS_UNSUPPORTED as u64),
        ("BITNET_INVALID_ARGUMENT", abi::STATUS_INVALID_ARGUMENT as u64),
        ("BITNET_FAILED", abi::STATUS_FAILED as u64),
        ("BITNET_PANICKED", abi::STATUS_PANICKED as u64),
        ("BITNET_ACTIVATION_ALIGNMENT", abi::ACTIVATION_ALIGNMENT as u64),
        ("BITNET_ACTIVATION_SLACK", abi::ACTIVATION_SLACK as u64),
        ("BITNET_CANONICAL_ALIGNMENT", abi::CANONICAL_ALIGNMENT as u64),
        ("BITNET_WORKSPACE_ALIGNMENT", abi::WORKSPACE_ALIGNMENT as u64),
    ] {
        let line = header.lines().find_map(|line| line.strip_prefix(&format!("#define {name} ")));
        let number = line.and_then(|rest| rest.split_whitespace().next()).unwrap_or_default();
        assert_eq!(number.trim_end_matches('u').parse(), Ok(value), "{name}");
    }
}
