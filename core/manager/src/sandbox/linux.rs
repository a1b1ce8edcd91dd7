//! landlock, seccomp and limits.

use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use landlock::{
    ABI, Access as _, AccessFs, AccessNet, LandlockStatus, RestrictionStatus, Ruleset, RulesetAttr as _,
    RulesetCreatedAttr as _, RulesetError, RulesetStatus, Scope, path_beneath_rules,
};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    TargetArch,
};

use super::{Confined, Confinement};

/// Bytes of memory of its own that the process may have: weights and activations that are shared with it do not count.
const MEMORY: u64 = 8 << 30;
/// Descriptors that it may have.
const DESCRIPTORS: u64 = 64;

/// Where systems keep their libraries.
const LIBRARIES: [&str; 7] =
    ["/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib", "/etc/ld.so.cache", "/nix/store"];

pub(super) fn confine(library: &Path) -> Result<Confined, String> {
    let mut confinement = Confinement::default();
    limits().map_err(|error| format!("its limits can't be set: {error}"))?;
    let missing = match threads() {
        Some(1) => restrict_files(library).err(),
        // The others would do what they are told to.
        Some(threads) => Some(format!("it confines one thread, and the process has {threads} already")),
        None => Some("it confines one thread, and /proc does not say how many the process has".into()),
    };
    let opens = missing.is_some();
    match missing {
        None => confinement
            .layers
            .push("landlock: no files but the library and the system's libraries, which can be read".into()),
        Some(reason) => confinement.missing.push(format!("landlock: {reason}")),
    }
    // The C library asks for a thread in the older way then, whose flags a filter can see. (This filter first: the other one
    // allows no more of them.)
    filter(BTreeMap::from([(libc::SYS_clone3, Vec::new())]), (libc::ENOSYS, Listed::Denied))?;
    filter(allowed(opens)?, (libc::EPERM, Listed::Allowed))?;
    confinement.layers.push(match opens {
        false => "seccomp: no sockets, programs, processes, signals to others".into(),
        true => "seccomp: no sockets, programs, processes, signals to others, and once the library is loaded, no files".into(),
    });
    confinement.layers.push(format!("limits: {} GiB of memory, {DESCRIPTORS} descriptors", MEMORY >> 30));
    Ok(Confined { confinement, opens })
}

/// No file is opened from now on.
pub(super) fn close_files() -> Result<(), String> {
    filter(opening().into_iter().map(|call| (call, Vec::new())).collect(), (libc::EACCES, Listed::Denied))
}

/// Threads of this process.
fn threads() -> Option<usize> {
    Some(std::fs::read_dir("/proc/self/task").ok()?.count())
}

fn limits() -> std::io::Result<()> {
    for (resource, most) in
        [(libc::RLIMIT_DATA, MEMORY), (libc::RLIMIT_NOFILE, DESCRIPTORS), (libc::RLIMIT_CORE, 0)]
    {
        // SAFETY: an all-zero rlimit is valid, and the system fills it.
        let mut limit: libc::rlimit = unsafe { std::mem::zeroed() };
        // SAFETY: as above.
        if unsafe { libc::getrlimit(resource, &raw mut limit) } != 0 {
            return Err(std::io::Error::last_os_error());
        }
        let most = most.min(limit.rlim_max);
        let limit = libc::rlimit { rlim_cur: most, rlim_max: most };
        // SAFETY: concerns this process alone.
        if unsafe { libc::setrlimit(resource, &raw const limit) } != 0 {
            return Err(std::io::Error::last_os_error());
        }
    }
    Ok(())
}

/// Lets this thread, and those that it starts, read the library and the system's, and open nothing else.
fn restrict_files(library: &Path) -> Result<(), String> {
    let abi = ABI::V6;
    let restrict = || -> Result<RestrictionStatus, RulesetError> {
        let read = AccessFs::Execute | AccessFs::ReadFile;
        Ruleset::default()
            .handle_access(AccessFs::from_all(abi))?
            .handle_access(AccessNet::from_all(abi))?
            .scope(Scope::from_all(abi))?
            .create()?
            .add_rules(path_beneath_rules(libraries(library), read))?
            .restrict_self()
    };
    let status = restrict().map_err(|error| error.to_string())?;
    match (status.ruleset, status.landlock) {
        (RulesetStatus::NotEnforced, LandlockStatus::NotEnabled) => {
            Err("it is switched off in the kernel".into())
        }
        (RulesetStatus::NotEnforced, _) => Err("this kernel does not have it (Linux 5.13 does)".into()),
        // An older kernel knows fewer ways to reach a file; what it does not know is left to seccomp.
        (RulesetStatus::FullyEnforced | RulesetStatus::PartiallyEnforced, _) => Ok(()),
    }
}

/// What the loader reads.
fn libraries(library: &Path) -> Vec<PathBuf> {
    let mut paths: Vec<PathBuf> = LIBRARIES.map(PathBuf::from).into();
    paths.retain(|path| trusted(path));
    // With what lies beside it, its verdicts: another process may put the same copy in its place meanwhile.
    paths.push(library.parent().unwrap_or(library).to_owned());
    paths
}

/// Whether it is not everybody's to write: what lies there would be no library of the system's.
fn trusted(path: &Path) -> bool {
    std::fs::metadata(path).is_ok_and(|metadata| metadata.permissions().mode() & 0o002 == 0)
}

/// What happens to the system calls of a filter.
enum Listed {
    Allowed,
    Denied,
}

type Rules = BTreeMap<i64, Vec<SeccompRule>>;

/// Puts a filter in force for all threads: the calls that it denies fail with an error.
fn filter(rules: Rules, (error, listed): (i32, Listed)) -> Result<(), String> {
    let deny = SeccompAction::Errno(error as u32);
    let (matched, other) = match listed {
        Listed::Allowed => (SeccompAction::Allow, deny),
        Listed::Denied => (deny, SeccompAction::Allow),
    };
    let architecture = if cfg!(target_arch = "x86_64") { TargetArch::x86_64 } else { TargetArch::aarch64 };
    let program: BpfProgram = SeccompFilter::new(rules, other, matched, architecture)
        .and_then(TryInto::try_into)
        .map_err(|error| format!("seccomp: {error}"))?;
    seccompiler::apply_filter_all_threads(&program).map_err(|error| {
        let cause = std::error::Error::source(&error).map_or(String::new(), |cause| format!(" ({cause})"));
        format!("seccomp can't be put in force here: {error}{cause}")
    })
}

/// The calls that open files.
fn opening() -> Vec<i64> {
    vec![
        #[cfg(target_arch = "x86_64")]
        libc::SYS_open,
        libc::SYS_openat,
    ]
}

/// What computing, loading a library, printing and ending take. `opens`: also what is needed to forbid opening later.
fn allowed(opens: bool) -> Result<Rules, String> {
    let mut rules: Rules = [
        // Memory.
        libc::SYS_mmap,
        libc::SYS_mprotect,
        libc::SYS_munmap,
        libc::SYS_mremap,
        libc::SYS_madvise,
        libc::SYS_brk,
        libc::SYS_membarrier,
        // Descriptors that are open.
        libc::SYS_read,
        libc::SYS_readv,
        libc::SYS_pread64,
        libc::SYS_write,
        libc::SYS_writev,
        libc::SYS_lseek,
        libc::SYS_close,
        libc::SYS_fstat,
        libc::SYS_ppoll,
        // Threads, waiting and time. (An earlier filter denies clone3, in other words.)
        libc::SYS_clone3,
        libc::SYS_futex,
        libc::SYS_set_robust_list,
        libc::SYS_get_robust_list,
        libc::SYS_set_tid_address,
        libc::SYS_rseq,
        libc::SYS_sched_yield,
        libc::SYS_sched_getaffinity,
        libc::SYS_getcpu,
        libc::SYS_nanosleep,
        libc::SYS_clock_nanosleep,
        libc::SYS_clock_gettime,
        libc::SYS_clock_getres,
        libc::SYS_gettimeofday,
        libc::SYS_getitimer,
        libc::SYS_times,
        libc::SYS_getrusage,
        libc::SYS_restart_syscall,
        // Signals of its own.
        libc::SYS_rt_sigaction,
        libc::SYS_rt_sigprocmask,
        libc::SYS_rt_sigreturn,
        libc::SYS_rt_sigpending,
        libc::SYS_rt_sigtimedwait,
        libc::SYS_sigaltstack,
        // What it is, and where.
        libc::SYS_getpid,
        libc::SYS_getppid,
        libc::SYS_gettid,
        libc::SYS_getuid,
        libc::SYS_geteuid,
        libc::SYS_getgid,
        libc::SYS_getegid,
        libc::SYS_uname,
        libc::SYS_sysinfo,
        libc::SYS_getrandom,
        // Its end.
        libc::SYS_exit,
        libc::SYS_exit_group,
    ]
    .into_iter()
    .map(|call| (call, Vec::new()))
    .collect();
    #[cfg(target_arch = "x86_64")]
    for call in [libc::SYS_poll, libc::SYS_time, libc::SYS_arch_prctl, libc::SYS_pause] {
        rules.insert(call, Vec::new());
    }
    let own = u64::from(std::process::id());
    let equal = |argument, value| condition(argument, SeccompCmpOp::Eq, value);
    let bits = |argument, mask: libc::c_int, value: libc::c_int| {
        condition(argument, SeccompCmpOp::MaskedEq(mask as u32 as u64), value as u32 as u64)
    };
    // Threads, and no processes.
    let mut insert = |call, alternatives: Vec<Result<SeccompCondition, String>>| -> Result<(), String> {
        let rule = |condition: Result<SeccompCondition, String>| {
            SeccompRule::new(vec![condition?]).map_err(|error| format!("seccomp: {error}"))
        };
        rules.insert(call, alternatives.into_iter().map(rule).collect::<Result<_, _>>()?);
        Ok(())
    };
    insert(libc::SYS_clone, vec![bits(0, libc::CLONE_THREAD, libc::CLONE_THREAD)])?;
    // Signals to itself.
    insert(libc::SYS_tgkill, vec![equal(0, own)])?;
    insert(libc::SYS_kill, vec![equal(0, own)])?;
    // Of this process, which is 0.
    insert(libc::SYS_prlimit64, vec![equal(0, 0), equal(0, own)])?;
    insert(libc::SYS_sched_setaffinity, vec![equal(0, 0)])?;
    // Names of threads and of memory.
    let mut names = vec![equal(0, libc::PR_SET_NAME as u64), equal(0, libc::PR_SET_VMA as u64)];
    if opens {
        names.push(equal(0, libc::PR_SET_NO_NEW_PRIVS as u64));
        insert(libc::SYS_seccomp, vec![equal(0, u64::from(libc::SECCOMP_SET_MODE_FILTER))])?;
    }
    insert(libc::SYS_prctl, names)?;
    // (Not F_SETOWN, by which the system sends signals to others.)
    insert(
        libc::SYS_fcntl,
        [libc::F_GETFD, libc::F_SETFD, libc::F_GETFL, libc::F_DUPFD_CLOEXEC]
            .map(|get| equal(1, get as u64))
            .into(),
    )?;
    // What a descriptor is, and nothing by its path.
    insert(libc::SYS_newfstatat, vec![bits(3, libc::AT_EMPTY_PATH, libc::AT_EMPTY_PATH)])?;
    insert(libc::SYS_statx, vec![bits(2, libc::AT_EMPTY_PATH, libc::AT_EMPTY_PATH)])?;
    // For reading. Which files is landlock's business, or that of the filter after loading.
    let writes = libc::O_ACCMODE | libc::O_CREAT | libc::O_TRUNC;
    for (call, flags) in opening().into_iter().rev().zip([2, 1]) {
        insert(call, vec![bits(flags, writes, libc::O_RDONLY)])?;
    }
    Ok(rules)
}

fn condition(argument: u8, operator: SeccompCmpOp, value: u64) -> Result<SeccompCondition, String> {
    // Flags and numbers of processes are 32 bits; what is above them, the kernel does not look at.
    SeccompCondition::new(argument, SeccompCmpArgLen::Dword, operator, value)
        .map_err(|error| format!("seccomp: {error}"))
}
