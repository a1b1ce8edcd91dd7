//! The cache of measurements between processes: real ones, which are this test's executable run again.
//!
//! Not under an emulator, which can't run itself again.
#![cfg(all(unix, not(target_feature = "crt-static")))]

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use bitnet_burn_manager::plugin::Plugin;
use bitnet_burn_manager::{KernelManager, LayoutPolicy, ManagerConfig, ManagerReport};

const ROLE: &str = "BITNET_TEST_ROLE";

fn manager(cache: &Path) -> KernelManager {
    let config = ManagerConfig {
        threads: 1,
        cache_dir: Some(cache.to_owned()),
        tune_budget: Duration::from_secs(3600),
        ..ManagerConfig::default()
    };
    let manager = KernelManager::new(config).unwrap();
    manager.register(Plugin::built_in(&bitnet_burn_cpu::PLUGIN).unwrap()).unwrap();
    manager
}

/// Measures what a model of one shape would need.
fn tune(manager: &KernelManager, n: usize) {
    let choice = manager.choose((n, 64), LayoutPolicy::Any).unwrap();
    manager.warm_up(&choice, 1);
}

/// Not a test by itself: what the processes that the tests start do.
#[test]
fn child() {
    let Ok(role) = std::env::var(ROLE) else { return };
    let (dir, role) = role.split_once('|').expect("a directory and what to do");
    let dir = Path::new(dir);
    match role.split_once(' ').expect("a role and its argument") {
        ("tune", shapes) => {
            let manager = manager(dir);
            shapes.split(' ').for_each(|n| tune(&manager, n.parse().unwrap()));
            let report = manager.report();
            // The last line, in one piece.
            println!("\ndone: tuned {}, problem {:?}", report.tuned, report.cache_problem);
        }
        ("write", first) => {
            let first: usize = first.parse().unwrap();
            let manager = manager(dir);
            (first..first + 100_000).for_each(|n| tune(&manager, n));
        }
        other => panic!("{other:?}"),
    }
}

fn command(dir: &Path, role: &str) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["child", "--exact", "--nocapture", "--test-threads=1"]);
    command.env(ROLE, format!("{}|{role}", dir.display()));
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

fn last_words(child: Child) -> String {
    let output = child.wait_with_output().unwrap();
    let (stdout, stderr) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{stdout}{stderr}");
    stdout.lines().find(|line| line.starts_with("done: ")).expect("it is done").to_owned()
}

fn known(dir: &Path, shapes: impl Iterator<Item = usize>) -> ManagerReport {
    let manager = manager(dir);
    shapes.for_each(|n| tune(&manager, n));
    manager.report()
}

fn files(dir: &Path) -> Vec<PathBuf> {
    std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()).filter(|path| path.is_file()).collect()
}

#[test]
fn processes_that_tune_at_once_lose_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let text = |shapes: std::ops::Range<usize>| {
        let shapes: Vec<_> = shapes.map(|n| n.to_string()).collect();
        format!("tune {}", shapes.join(" "))
    };
    // Each has shapes of its own, and some that the next has too.
    let ranges = [4..12, 9..17, 14..22];
    let children: Vec<Child> =
        ranges.iter().map(|range| command(dir.path(), &text(range.clone())).spawn().unwrap()).collect();
    for child in children {
        let words = last_words(child);
        assert!(words.ends_with("problem None"), "{words}");
    }
    let report = known(dir.path(), 4..22);
    assert_eq!((report.tuned, report.cache_problem), (0, None));
    assert!(report.cached >= 18, "{}", report.cached);
    assert_eq!(files(dir.path()), [report.cache_file.unwrap()], "nothing but the cache");
}

#[test]
fn a_process_that_is_killed_while_it_writes_leaves_a_whole_file() {
    let dir = tempfile::tempdir().unwrap();
    let mut seed = 0x9e37_79b9_u64;
    let mut interrupted = 0;
    let cache = manager(dir.path()).report().cache_file.unwrap();
    let size = |path: &Path| std::fs::metadata(path).map_or(0, |file| file.len());
    for round in 0..40 {
        let before = size(&cache);
        // Shapes of its own, so that it measures and writes at once, and goes on.
        let mut child = command(dir.path(), &format!("write {}", 4 + round * 1000)).spawn().unwrap();
        while size(&cache) == before {
            assert!(child.try_wait().unwrap().is_none(), "it writes until it is killed");
            std::thread::sleep(Duration::from_millis(1));
        }
        // At any moment, or as soon as a file is seen that is not finished.
        if round % 2 == 0 {
            seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            std::thread::sleep(Duration::from_micros((seed >> 33) % 20_000));
        } else {
            while files(dir.path()).len() < 2 {
                assert!(child.try_wait().unwrap().is_none(), "it writes until it is killed");
            }
        }
        // SIGKILL.
        child.kill().unwrap();
        assert!(!child.wait().unwrap().success());
        let report = manager(dir.path()).report();
        assert_eq!(report.cache_problem, None, "round {round}");
        interrupted += usize::from(files(dir.path()).len() > 1);
    }
    assert!(interrupted > 0, "nobody was killed within a write");
    // Whoever writes next cleans up, and knows what the killed ones had written.
    let report = known(dir.path(), std::iter::once(3));
    assert_eq!((report.cache_problem, report.tuned > 0), (None, true));
    assert!(std::fs::read_to_string(&cache).unwrap().matches("ternary m=1 ").count() > 40);
    assert_eq!(files(dir.path()), [cache]);
}

#[test]
fn a_full_disk_or_a_read_only_place_costs_only_the_memory() {
    let dir = tempfile::tempdir().unwrap();
    assert_eq!(known(dir.path(), 4..6).cache_problem, None);
    let before = std::fs::read(&files(dir.path())[0]).unwrap();
    // No file may grow: what a full disk does.
    let mut limited = Command::new("sh");
    limited.args(["-c", "trap '' XFSZ; ulimit -f 0; exec \"$@\"", "sh"]);
    let inner = command(dir.path(), "tune 5 6 7");
    limited.arg(inner.get_program()).args(inner.get_args());
    limited.env(ROLE, format!("{}|tune 5 6 7", dir.path().display()));
    limited.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let words = last_words(limited.spawn().unwrap());
    assert!(words.contains("can't be written") && !words.contains("tuned 0"), "{words}");
    assert_eq!(std::fs::read(&files(dir.path())[0]).unwrap(), before, "the old file stays");
    assert_eq!(files(dir.path()).len(), 1);
    // A place where nobody may make a file, the superuser neither.
    if cfg!(target_os = "linux") {
        let words = last_words(command(Path::new("/proc/self/fdinfo"), "tune 5 6").spawn().unwrap());
        assert!(words.contains("can't be written"), "{words}");
    }
}

#[test]
fn a_cache_that_is_damaged_or_of_another_machine_is_measured_anew_and_replaced() {
    let dir = tempfile::tempdir().unwrap();
    let first = known(dir.path(), 4..6);
    assert!(first.tuned > 0);
    let path = first.cache_file.unwrap();
    let text = std::fs::read_to_string(&path).unwrap();
    let (before, _) = text.split_once("\"measurements\"").unwrap();
    let other = text.replace(before, &before.replace("\"cpu\": \"", "\"cpu\": \"Abacus "));
    let half = text[..text.len() / 2].to_owned();
    for (damage, problem) in [
        (other, "was measured on another machine (Abacus "),
        (half, "is damaged"),
        ("\0".repeat(9999), "is damaged"),
    ] {
        std::fs::write(&path, damage).unwrap();
        let words = last_words(command(dir.path(), "tune 4 5").spawn().unwrap());
        assert!(words.contains(problem) && !words.contains("tuned 0"), "{words}");
        let repaired = known(dir.path(), 4..6);
        assert_eq!((repaired.tuned, repaired.cache_problem), (0, None));
    }
}
