//! Kernel plugins from shared libraries: a third party's in C, every kind of broken one, and the built-in
//! kernels through their own library. The C plugins are built here, with the system's C compiler.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::time::Duration;

use bitnet_burn::backends::manager::{self, with_built_in_kernels};
use bitnet_burn::bitnet::LoadOptions;
use bitnet_burn::core::manager::{Job, KernelManager, LayoutPolicy, ManagerConfig, Packed, Status};
use bitnet_burn::core::memory::Activations;
use bitnet_burn::core::plugin::{Origin, Plugin, PluginError};
use bitnet_burn::core::reference;
use bitnet_burn::nn::CacheType;
use bitnet_burn_plugin::abi;
use bitnet_burn_tests::*;
use burn::tensor::Device;
use tempfile::TempDir;

fn include() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../plugins/abi/include")
}

fn compiler() -> String {
    std::env::var("CC").unwrap_or_else(|_| "cc".into())
}

/// Whether there is a C compiler. Without one says what is skipped; in CI (`CI` set) that is a failure.
fn has_compiler(what: &str) -> bool {
    let works =
        Command::new(compiler()).arg("--version").output().is_ok_and(|output| output.status.success());
    if !works {
        assert!(std::env::var_os("CI").is_none(), "no C compiler in CI");
        eprintln!("SKIPPED: {what} (no C compiler `{}`)", compiler());
    }
    works
}

fn compile(arguments: &[&str], source: &Path, out: &Path) {
    let mut command = Command::new(compiler());
    command.args(["-std=c11", "-O2", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror"]).args(arguments);
    let output = command.arg("-I").arg(include()).arg(source).arg("-o").arg(out).output().unwrap();
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// The plugin of testdata/plugin.c with these macros.
fn build(dir: &Path, name: &str, defines: &[&str]) -> PathBuf {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("testdata/plugin.c");
    let path = dir.join(format!("{}{name}{}", std::env::consts::DLL_PREFIX, std::env::consts::DLL_SUFFIX));
    let defines: Vec<String> = defines.iter().map(|d| format!("-D{d}")).collect();
    let arguments: Vec<&str> =
        ["-shared", "-fPIC"].into_iter().chain(defines.iter().map(String::as_str)).collect();
    compile(&arguments, &source, &path);
    path
}

fn quiet() -> ManagerConfig {
    ManagerConfig { threads: 2, tune_budget: Duration::ZERO, ..ManagerConfig::default() }
}

/// A matmul through a manager is the reference's, bit for bit.
fn check(manager: &KernelManager, m: usize, n: usize, k: usize, what: &str) {
    let mut random = Random((m * 7 + n * 3 + k) as u64);
    let x = Activations::from_rows(&random.floats(m * k), k);
    let canonical = canonical_rows(&random.ternary(n * k), k);
    let choice = manager.choose(n, k, LayoutPolicy::Any).unwrap_or_else(|error| panic!("{what}: {error}"));
    // Canonical weights no better aligned than the ABI promises.
    let mut buffer = vec![0u8; canonical.len() + 128];
    let from = buffer.as_ptr().align_offset(64) + abi::CANONICAL_ALIGNMENT;
    buffer[from..from + canonical.len()].copy_from_slice(&canonical);
    let packed = manager.pack(&choice, &canonical).unwrap();
    let weights = match &packed {
        Packed::Canonical => &buffer[from..from + canonical.len()],
        Packed::Private(packed) => {
            assert!(
                manager.unpack(&choice, packed.as_slice()).unwrap() == canonical,
                "{what}: unpack(pack(w))"
            );
            packed.as_slice()
        }
    };
    let (mut y, mut want) = (vec![f32::NAN; m * n], vec![0.0; m * n]);
    let job = Job { choice: &choice, weights, scale: 0.37, column: 0 };
    manager.matmul(&[job], &x, &mut y, n).unwrap_or_else(|error| panic!("{what}: {error}"));
    reference::matmul(&canonical, n, k, 0.37, x.q(), x.stride(), x.scale(), m, &mut want, n);
    assert_same_bits(&y, &want, &format!("{what}: [{m}, {k}] x [{n}, {k}]"));
}

const SHAPES: [(usize, usize, usize); 6] =
    [(1, 1, 1), (1, 100, 784), (2, 33, 129), (7, 64, 256), (40, 19, 1000), (1, 640, 2560)];

#[test]
fn a_plugin_in_c_is_checked_and_used() {
    if !has_compiler("plugins in C") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    for (name, defines) in [("plain", &[][..]), ("private", &["PRIVATE", "GRANULE=8"])] {
        let path = build(dir.path(), name, defines);
        let manager = with_built_in_kernels(ManagerConfig {
            force: Some("example/plain".into()),
            strict: true,
            ..quiet()
        });
        let manager = manager.unwrap();
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
        // The same again, under the same name, is refused, and nothing changes.
        let error = manager.load_plugin(&path).unwrap_err();
        assert!(matches!(&error, PluginError::Duplicate { name, .. } if name == "example"), "{error}");
        check(&manager, 3, 5, 77, name);
    }
}

/// Macros of testdata/plugin.c, and what the refusal must say.
const BROKEN: [(&str, &[&str], &str); 18] = [
    ("major", &["MAJOR=9"], "built for ABI 9.0, and this host speaks ABI 1.0"),
    ("old", &["MAJOR=0"], "built for ABI 0.0, and this host speaks ABI 1.0"),
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
    ("operation", &["OPERATION=7"], "kernel `plain` has operation 7"),
    ("size", &["KERNEL_SIZE=8"], "struct_size of kernel 0 is 8"),
];

#[test]
fn every_broken_library_is_refused_with_the_reason() {
    let dir = tempfile::tempdir().unwrap();
    let manager = with_built_in_kernels(quiet()).unwrap();
    let before = manager.report().kernels.len();
    let refuse = |path: &Path, expected: &str| {
        let error = manager.load_plugin(path).unwrap_err().to_string();
        assert!(error.contains(expected), "{error:?} should say {expected:?}");
        assert!(error.contains(&name_of(path)), "{error:?} should name the file");
        assert_eq!(manager.report().kernels.len(), before);
        check(&manager, 2, 33, 129, "the others, after a refusal");
    };
    let text = dir.path().join("text.so");
    std::fs::write(&text, "not a library at all").unwrap();
    refuse(&text, "not a loadable library");
    let empty = dir.path().join("empty.so");
    std::fs::write(&empty, "").unwrap();
    refuse(&empty, "not a loadable library");
    refuse(&dir.path().join("missing.so"), "os error 2");
    if !has_compiler("broken plugins in C") {
        return;
    }
    for (name, defines, expected) in BROKEN {
        refuse(&build(dir.path(), name, defines), expected);
    }
    refuse(&build(dir.path(), "plugin_size", &["PLUGIN_SIZE=16"]), "struct_size of the plugin is 16");
    let huge = build(dir.path(), "huge", &["PLUGIN_SIZE=0xffffffffff"]);
    refuse(&huge, "struct_size of the plugin is 1099511627775");
    refuse(&build(dir.path(), "features", &["FEATURES=\"\\xff\""]), "the CPU features of kernel `plain`");
    refuse(&build(dir.path(), "letters", &["KERNEL_NAME=\"\""]), "the name of kernel 0 is not 1 to 63 of");
}

#[test]
fn a_kernel_that_computes_wrongly_is_rejected_and_the_others_go_on() {
    if !has_compiler("wrong plugins in C") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    for (name, defines, expected) in [
        ("wrong", &["WRONG=1"][..], "the reference has"),
        ("behind", &["WRITE_BEHIND"], "of its output"),
        ("left_out", &["LEAVE_OUT"], "the reference has"),
        ("unpack", &["PRIVATE", "WRONG_UNPACK"], "unpack(pack(w)) differs from w at row 0, column 30"),
        ("nothing", &["SUPPORTS_NOTHING"], "supports none of the"),
        ("fails", &["FAIL_AT_N=100"], "status 3 (failed): out of luck"),
    ] {
        let path = build(dir.path(), name, defines);
        // First in the order of registration, so that it would be taken if it could be.
        let manager = KernelManager::new(quiet()).unwrap();
        let reports = manager.load_plugin(&path).unwrap();
        let Status::Rejected(reason) = &reports[0].status else { panic!("{name}: {reports:?}") };
        assert!(reason.contains(expected), "{name}: {reason:?} should say {expected:?}");
        manager.register(Plugin::built_in(&bitnet_burn_cpu::PLUGIN).unwrap()).unwrap();
        for (m, n, k) in SHAPES {
            check(&manager, m, n, k, name);
        }
        let report = manager.report();
        assert_eq!(
            (report.kernels[0].calls, report.reference_calls, report.fallbacks.len()),
            (0, 0, 0),
            "{name}"
        );
        // Alone and in strict mode there is nothing left, and the error says why.
        let strict = KernelManager::new(ManagerConfig { strict: true, ..quiet() }).unwrap();
        strict.load_plugin(&path).unwrap();
        let error = strict.choose(8, 128, LayoutPolicy::Any).unwrap_err().to_string();
        assert!(error.contains("example/plain: rejected: ") && error.contains(expected), "{error}");
    }
    // A feature that no machine has is no fault.
    let path = build(dir.path(), "feature", &["FEATURES=\"avx2048\""]);
    let reports = KernelManager::new(quiet()).unwrap().load_plugin(&path).unwrap();
    assert_eq!(reports[0].status, Status::Unavailable("needs avx2048".into()));
}

#[test]
fn a_kernel_that_fails_at_run_time_is_replaced_and_counted() {
    if !has_compiler("failing plugins in C") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = build(dir.path(), "fails", &["FAIL_AT_N=77"]);
    // Registered first and nothing measured: it is the first choice.
    let manager = KernelManager::new(quiet()).unwrap();
    assert_eq!(manager.load_plugin(&path).unwrap()[0].status, Status::Ready);
    manager.register(Plugin::built_in(&bitnet_burn_cpu::PLUGIN).unwrap()).unwrap();
    check(&manager, 2, 76, 256, "before the failure");
    for _ in 0..3 {
        check(&manager, 2, 77, 256, "the replacement");
    }
    check(&manager, 2, 78, 256, "after the failure");
    let report = manager.report();
    assert_eq!((report.kernels[0].calls, report.kernels[0].failures, report.reference_calls), (2, 1, 0));
    assert_eq!(report.fallbacks.len(), 1, "reported once: {:?}", report.fallbacks);
    let fallback = &report.fallbacks[0];
    assert_eq!(
        (fallback.kernel.as_str(), fallback.shape, fallback.count),
        ("example/plain", (2, 77, 256), 1)
    );
    assert!(fallback.replacement.starts_with("cpu/"), "{fallback:?}");
    assert!(fallback.reason.contains("out of luck"), "{fallback:?}");

    // Alone, the reference is what is left; strict mode refuses it.
    let alone = KernelManager::new(quiet()).unwrap();
    alone.load_plugin(&path).unwrap();
    check(&alone, 2, 77, 256, "the reference");
    assert_eq!(
        (alone.report().reference_calls, alone.report().fallbacks[0].replacement.as_str()),
        (1, "reference")
    );
    let strict = KernelManager::new(ManagerConfig { strict: true, ..quiet() }).unwrap();
    strict.load_plugin(&path).unwrap();
    let choice = strict.choose(77, 128, LayoutPolicy::Any).unwrap();
    let x = Activations::from_rows(&[1.0; 128], 128);
    let weights = canonical_rows(&[1; 77 * 128], 128);
    let job = Job { choice: &choice, weights: &weights, scale: 1.0, column: 0 };
    let error = strict.matmul(&[job], &x, &mut [0.0; 77], 77).unwrap_err().to_string();
    assert!(error.contains("strict mode") && error.contains("example/plain: failed in use"), "{error}");
}

/// The library of `bitnet-burn-cpu-plugin`, built into the target directory that this test is in.
fn cpu_plugin() -> &'static Path {
    static PATH: OnceLock<PathBuf> = OnceLock::new();
    PATH.get_or_init(|| {
        // .../<target>/<profile>/deps/<this test>
        let exe = std::env::current_exe().unwrap();
        let profile_dir =
            exe.parent().and_then(Path::parent).expect("a test lies in <target>/<profile>/deps");
        let target = profile_dir.parent().expect("a target directory");
        let profile = match name_of(profile_dir) {
            name if name == "debug" => "dev".into(),
            name => name,
        };
        let mut command = Command::new(env!("CARGO"));
        command.args(["build", "--package", "bitnet-burn-cpu-plugin", "--profile", &profile]);
        command.current_dir(env!("CARGO_MANIFEST_DIR")).env("CARGO_TARGET_DIR", target);
        let output = command.output().unwrap();
        assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
        let name =
            format!("{}bitnet_cpu_plugin{}", std::env::consts::DLL_PREFIX, std::env::consts::DLL_SUFFIX);
        profile_dir.join(name)
    })
}

#[test]
fn the_built_in_kernels_work_the_same_from_their_library() {
    let path = cpu_plugin();
    let plugin = Plugin::load(path).unwrap();
    assert!(matches!(plugin.origin(), Origin::File { .. }));
    assert_eq!((plugin.name(), plugin.version()), ("cpu", env!("CARGO_PKG_VERSION")));
    let statuses = |manager: &KernelManager| -> Vec<_> {
        manager.report().kernels.into_iter().map(|k| (k.kernel, k.status)).collect()
    };
    let all = KernelManager::new(quiet()).unwrap();
    let reports = all.load_plugin(path).unwrap();
    assert!(reports.iter().all(|r| r.sha256.is_some()));
    assert_eq!(statuses(&all), statuses(&with_built_in_kernels(quiet()).unwrap()));
    let ready: Vec<_> = reports.into_iter().filter(|r| r.status == Status::Ready).map(|r| r.kernel).collect();
    assert!(ready.len() >= 2, "{ready:?}");
    for kernel in ready {
        let manager =
            KernelManager::new(ManagerConfig { force: Some(kernel.clone()), strict: true, ..quiet() })
                .unwrap();
        manager.load_plugin(path).unwrap();
        for (m, n, k) in SHAPES {
            check(&manager, m, n, k, &kernel);
        }
        let report = manager.report();
        let used: Vec<_> = report.kernels.iter().filter(|k| k.calls > 0).map(|k| &k.kernel).collect();
        assert_eq!(used, [&kernel]);
    }
    // Linked in and loaded, the two have one name: the second is refused, the first goes on.
    let manager = with_built_in_kernels(quiet()).unwrap();
    let error = manager.load_plugin(path).unwrap_err().to_string();
    assert!(error.contains("a plugin named `cpu` is registered already (from built in)"), "{error}");
    check(&manager, 2, 33, 129, "the linked-in kernels");
}

/// The process's manager, as an embedder sets it up, with refused and rejected plugins among others.
#[test]
fn a_model_runs_on_with_the_kernels_that_are_left() {
    if !has_compiler("a model with broken plugins in C") {
        return;
    }
    let dir: TempDir = tempfile::tempdir().unwrap();
    let text = dir.path().join("text.so");
    std::fs::write(&text, "not a library at all").unwrap();
    let plugins = [
        text,
        build(dir.path(), "major", &["MAJOR=2"]),
        build(dir.path(), "symbol", &["NO_SYMBOL"]),
        build(dir.path(), "wrong", &["NAME=\"wrong\"", "WRONG=1"]),
        build(dir.path(), "good", &["NAME=\"good\""]),
    ];
    let (manager, refused) = manager::configure(quiet(), &plugins).unwrap();
    assert_eq!(refused.len(), 3);
    for (error, expected) in
        refused.iter().zip(["not a loadable library", "built for ABI 2.0", "does not export"])
    {
        assert!(error.to_string().contains(expected), "{error}");
    }
    let model_dir = repository_golden().join("hf/A-packed-auto");
    let checkpoint = bitnet_burn::checkpoint::Checkpoint::open(&model_dir, &Default::default()).unwrap();
    let device = Device::flex();
    let model = bitnet_burn::bitnet::BitNet::from_checkpoint(
        &checkpoint,
        &device,
        &LoadOptions::default(),
        &mut |_| {},
    );
    let goldens = read_goldens(&model_dir.join("goldens.safetensors"));
    let ids = goldens["seq16.input_ids"].ids();
    let logits = all_logits(&model.unwrap(), &ids, 5, CacheType::F32);
    assert!(max_difference(&logits, &goldens["seq16.logits"].values) < 1e-3);
    let report = manager.report();
    assert_eq!((report.reference_calls, report.fallbacks.len()), (0, 0));
    let status =
        |id: &str| report.kernels.iter().find(|k| k.kernel == id).map(|k| (k.status.clone(), k.calls));
    assert!(matches!(status("wrong/plain"), Some((Status::Rejected(_), 0))), "{:?}", status("wrong/plain"));
    assert!(matches!(status("good/plain"), Some((Status::Ready, _))));
    // Once in use it can't be configured again.
    assert!(manager::configure(quiet(), &[]).unwrap_err().to_string().contains("in use already"));
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
    Signature = "signature" { struct_size, operation, threads, m, n, k }
    Activations = "activations" { struct_size, m, k, stride, q, scale, sum }
    Weights = "weights" { struct_size, n, k, data, size, scale, reserved }
    Output = "output" { struct_size, y, stride }
    Tile = "tile" { struct_size, n0, n1, m0, m1 }
    Message = "message" { struct_size, text, capacity }
    Kernel = "kernel" {
        struct_size, name, layout, features, operation, target, weight_alignment, row_granule, supports,
        packed_size, pack, unpack, workspace_size, prepare, run
    }
    Plugin = "plugin" { struct_size, abi_major, abi_minor, name, version, kernels, kernel_count }
}

#[test]
fn the_c_header_lays_every_struct_out_as_rust_does() {
    if !has_compiler("the layout of the C header") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (source, program) = (dir.path().join("layout.c"), dir.path().join("layout"));
    std::fs::write(&source, c_program()).unwrap();
    compile(&[], &source, &program);
    let output = Command::new(&program).output().unwrap();
    let lines: Vec<String> = String::from_utf8(output.stdout).unwrap().lines().map(str::to_owned).collect();
    assert_eq!(lines, rust_layout());
    // The numbers that both sides agree on.
    let header = std::fs::read_to_string(include().join("bitnet_plugin.h")).unwrap();
    for (name, value) in [
        ("BITNET_ABI_MAJOR", u64::from(abi::ABI_MAJOR)),
        ("BITNET_ABI_MINOR", u64::from(abi::ABI_MINOR)),
        ("BITNET_OPERATION_TERNARY_MATMUL", u64::from(abi::OPERATION_TERNARY_MATMUL)),
        ("BITNET_TARGET_CPU", u64::from(abi::TARGET_CPU)),
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
