//! What ABI 1.3 added, with the plugin of testdata/grown.c; and that plugins of every earlier version go on as they are.

use std::path::{Path, PathBuf};
use std::time::Duration;

use bitnet_burn_manager::plugin::Plugin;
use bitnet_burn_manager::{KernelManager, ManagerConfig, Source, Status, Strict};
use bitnet_burn_plugin::layouts;
use bitnet_burn_plugin::sdk::{
    ActivationsRef, HostRef, KernelResult, OutputTile, Signature, TernaryKernel, WeightsRef, build_plugin,
    kernel, plugin_for_host,
};

use crate::support::*;

fn include() -> PathBuf {
    package().join("../../plugins/abi/include")
}

fn grown(dir: &Path, name: &str, flags: &[&str]) -> PathBuf {
    build_source("grown.c", &include(), dir, name, &[&["-Wno-unused-function"], flags].concat())
}

#[test]
fn plugins_of_every_earlier_version_load_unchanged() {
    if !has_compiler() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    for version in ["1.0", "1.1", "1.2"] {
        for (name, flags) in [("plain", &[][..]), ("private", &["-DPRIVATE", "-DGRANULE=8"])] {
            let name = format!("{name}-{version}");
            let header = package().join(format!("testdata/abi-{version}"));
            let path = build_with(&header, dir.path(), &name, flags);
            let manager = manager(&dir.path().join("cache"));
            assert_eq!(manager.load_plugin(&path).unwrap()[0].status, Status::Ready, "{name}");
            check(&manager, 2, 33, 129, &name);
            let report = manager.report();
            assert_eq!(report.kernels[0].calls, 1, "{name}");
            let sha256 = report.kernels[0].sha256.clone().unwrap();
            let verdict = manager.store().verdict(&sha256).unwrap();
            assert_eq!(verdict.plugin.unwrap().abi, version);
        }
    }
}

#[test]
fn kernels_share_functions_by_their_contexts_and_what_is_unknown_is_listed_and_not_used() {
    if !has_compiler() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = grown(dir.path(), "grown", &[]);
    let manager = |force: Option<&str>| {
        let force = force.map(str::to_owned);
        let strict = if force.is_some() { Strict::ALL } else { Strict::NONE };
        KernelManager::new(ManagerConfig { force, strict, ..config(&dir.path().join("cache")) }).unwrap()
    };
    let reports = manager(None).load_plugin(&path).unwrap();
    let status = |name: &str| {
        let kernel = format!("grown/{name}");
        reports.iter().find(|report| report.kernel == kernel).map(|report| report.status.clone()).unwrap()
    };
    for (name, layout) in [
        ("three", "grown/three"),
        ("five", "grown/five"),
        ("t2-plain", "cpu/t2x32"),
        ("t5-plain", "cpu/t5x32"),
    ] {
        assert_eq!(status(name), Status::Ready);
        let kernel = format!("grown/{name}");
        let manager = manager(Some(&kernel));
        let reports = manager.load_plugin(&path).unwrap();
        assert_eq!(reports.iter().find(|report| report.kernel == kernel).unwrap().layout, layout);
        for (m, n, k) in [(1, 1, 1), (2, 33, 129), (7, 64, 256), (40, 19, 1000)] {
            check(&manager, m, n, k, name);
        }
        let used = manager.report().kernels.into_iter().filter(|kernel| kernel.calls > 0);
        assert_eq!(used.map(|kernel| kernel.kernel).collect::<Vec<_>>(), [kernel]);
    }
    for (name, reason) in [
        ("later", "it computes operation 99, which this host does not know"),
        (
            "later-layout",
            "it reads the public layout cpu/t9x64, which this host does not know (ABI 1.3 has cpu/t2x32 and cpu/t5x32)",
        ),
    ] {
        let Status::Unavailable(why) = status(name) else { panic!("{name}: {:?}", status(name)) };
        assert!(why.contains(reason), "{name}: {why}");
    }
    // A kernel says why not, where somebody wants to know.
    let manager = manager(Some("t2-prompts"));
    manager.load_plugin(&path).unwrap();
    let error = manager.choose((64, 128), bitnet_burn_manager::LayoutPolicy::Any).unwrap_err().to_string();
    assert!(error.contains("grown/t2-prompts: it is for prompts of 17 rows or more"), "{error}");
}

#[test]
fn a_plugin_gets_the_hosts_version_and_its_configuration_and_writes_to_the_log() {
    if !has_compiler() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = grown(dir.path(), "grown", &["-DONLY_FOR_HOST"]);
    let configured = |configuration: &str| {
        let mut config = config(&dir.path().join("cache"));
        config.plugins.configuration = configuration.into();
        KernelManager::new(config).unwrap()
    };
    let report = configured("").verify_plugin(&path).unwrap();
    assert!(report.passed() && report.kernels.len() == 7, "{report:?}");
    let version = env!("CARGO_PKG_VERSION");
    assert_eq!(report.log, [format!("info: bitnet-burn {version}, ABI 1.3, configured as '' with features")]);
    assert!(report.warnings.is_empty(), "{:?}", report.warnings);
    // A verdict holds for the configuration that it was made with.
    let other = configured("grown.only=prompts");
    assert_eq!(other.store().verdict(&report.sha256), None);
    let kernels = other.load_plugin(&path).unwrap();
    assert_eq!(kernels.iter().map(|kernel| kernel.kernel.as_str()).collect::<Vec<_>>(), ["grown/t2-prompts"]);
    let verdict = other.store().verdict(&report.sha256).unwrap();
    assert!(verdict.log[0].contains("configured as 'grown.only=prompts'"), "{:?}", verdict.log);
}

#[test]
fn scratch_and_public_layouts_are_checked() {
    if !has_compiler() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let manager = manager(&dir.path().join("cache"));
    for (name, flag, expected) in [
        ("behind", "-DBEHIND_SCRATCH", "behind a thread's scratch"),
        ("threads", "-DSCRATCH=4 * s->n * s->threads", "scratch_size depends on more than m, n and k"),
        ("huge", "-DSCRATCH=(uint64_t)1 << 50", "it asks for a workspace of 1125899906842624 bytes"),
        (
            "granule",
            "-DPUBLIC_GRANULE=16",
            "reads the public layout cpu/t2x32: that takes target 1 (the CPU), a row granule",
        ),
    ] {
        let error = manager.load_plugin(&grown(dir.path(), name, &[flag])).unwrap_err().to_string();
        assert!(error.contains(expected), "{name}: {error}");
    }
}

/// Counts up in its scratch, on a public layout.
struct Prefill;

impl TernaryKernel for Prefill {
    const NAME: &'static std::ffi::CStr = c"prefill";
    const LAYOUT: Option<&'static std::ffi::CStr> = Some(c"cpu/t2x32");
    const ROW_GRANULE: usize = layouts::BLOCK_ROWS;

    fn supports(signature: &Signature) -> bool {
        signature.m > 4
    }

    fn scratch_size(_: usize, n: usize, _: usize) -> usize {
        n
    }

    fn run(w: &WeightsRef, x: &ActivationsRef, _: &[u8], y: &mut OutputTile) -> KernelResult {
        let thread = y.thread() as u8;
        y.with_scratch(|scratch, y| {
            assert_eq!((scratch.len(), scratch.as_ptr() as usize % 64), (w.n(), 0));
            let rows = y.rows_n();
            // No other thread writes to it.
            scratch[rows.clone()].fill(thread);
            let mut weights = vec![0u8; rows.len() * bitnet_burn_plugin::canonical::row_bytes(w.k())];
            layouts::t2x32::unpack(w, rows.clone(), &mut weights)?;
            let canonical = WeightsRef::new(rows.len(), w.k(), w.scale(), &weights);
            for m in y.rows_m() {
                for n in rows.clone() {
                    let codes = canonical.canonical_row(n - rows.start);
                    let dot = (0..w.k()).map(|k| i32::from(codes.weight(k)) * i32::from(x.row(m)[k])).sum();
                    y.set(m, n, dot, w, x);
                }
            }
            assert!(scratch[rows].iter().all(|&byte| byte == thread));
            Ok(())
        })
    }
}

fn for_host(host: HostRef) -> &'static bitnet_burn_plugin::abi::Plugin {
    assert_eq!(host.setting("mine", "key"), Some("some value"));
    assert_eq!((host.setting("mine", "other"), host.abi(), host.version()), (None, (1, 3), "7.8"));
    build_plugin(c"mine", c"0.1.0", vec![kernel::<Prefill>()])
}

#[test]
fn the_sdk_builds_a_plugin_for_a_host_whose_kernel_joins_the_built_in_ones_on_their_layout() {
    let host = bitnet_burn_plugin::abi::Host {
        struct_size: size_of::<bitnet_burn_plugin::abi::Host>() as u64,
        abi_major: 1,
        abi_minor: 3,
        version: c"7.8".as_ptr(),
        configuration: c"other.key=1; mine.key = some value".as_ptr(),
        cpu_features: c"sse2".as_ptr(),
        log: None,
    };
    // SAFETY: a filled host.
    let built = unsafe { plugin_for_host(&raw const host, for_host).as_ref() }.unwrap();
    let dir = tempfile::tempdir().unwrap();
    let config = ManagerConfig { threads: 4, ..config(dir.path()) };
    let manager =
        KernelManager::new(ManagerConfig { force: Some("prefill".into()), ..config.clone() }).unwrap();
    assert_eq!(manager.register(Plugin::built_in(built).unwrap()).unwrap()[0].status, Status::Ready);
    let problem = Problem::new(9, 300, 129);
    // Weights that a built-in kernel packed.
    let packer = KernelManager::new(ManagerConfig { force: Some("t2-scalar".into()), ..config }).unwrap();
    add_built_in(&packer);
    packer.register(Plugin::built_in(built).unwrap()).unwrap();
    let policy = bitnet_burn_manager::LayoutPolicy::Any;
    let (built_in, packed) = packer.choose_and_pack((300, 129), policy, &problem.weights).unwrap();
    assert_eq!(built_in.layout(), Some("cpu/t2x32"));
    problem.check(&packer, &built_in, &packed, "the built-in kernel");
}

/// The features of this machine, all masked: the built-in kernels that are left are slow.
fn all_features() -> Vec<String> {
    bitnet_burn_manager::cpu::features().iter().map(|&name| name.to_owned()).collect()
}

#[test]
fn a_kernel_for_prompts_wins_beside_the_built_in_one_for_decode() {
    if !has_compiler() || !bitnet_burn_manager::cpu::features().contains(&"avx2") {
        return eprintln!("SKIPPED: a kernel in AVX2");
    }
    let dir = tempfile::tempdir().unwrap();
    let config = |configuration: &str, features: Vec<String>| {
        let mut config = ManagerConfig {
            threads: 1,
            tune_budget: Duration::from_secs(60),
            masked_features: features,
            ..config(&dir.path().join("cache"))
        };
        config.plugins.configuration = configuration.into();
        config
    };
    let manager = KernelManager::new(config("grown.only=prompts", all_features())).unwrap();
    add_built_in(&manager);
    manager.load_plugin(&grown(dir.path(), "prompts", &["-O3"])).unwrap();
    let problem = Problem::new(32, 512, 1024);
    let (choice, packed) = manager
        .choose_and_pack((512, 1024), bitnet_burn_manager::LayoutPolicy::Any, &problem.weights)
        .unwrap();
    assert_eq!(choice.layout(), Some("cpu/t2x32"));
    assert!(choice.is_built_in(), "the host packs a public layout");
    let ranking = manager.explain(32, (512, 1024));
    assert_eq!(
        (ranking.source.clone(), ranking.candidates[0].kernel()),
        (Source::Measured, "grown/t2-prompts")
    );
    problem.check(&manager, &choice, &packed, "a prompt");
    problem.check(&manager, &choice, &packed, "the same again");
    Problem { x: Problem::new(1, 512, 1024).x, shape: (1, 512, 1024), ..problem }
        .check(&manager, &choice, &packed, "a token");
    let used: Vec<_> = manager.report().kernels.into_iter().filter(|kernel| kernel.calls > 0).collect();
    let used: Vec<_> = used.iter().map(|kernel| (kernel.kernel.as_str(), kernel.layout.as_str())).collect();
    assert_eq!(used, [("cpu/t2-scalar", "cpu/t2x32"), ("grown/t2-prompts", "cpu/t2x32")]);
}
