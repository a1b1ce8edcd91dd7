//! What confines a process that holds a plugin, from before its library is opened: constructors run confined, too.
//!
//! On Linux these layers hold, as far as the kernel has them:
//!
//! * landlock: no file but the library itself and those of the system's directories of libraries, which may be read;
//! * seccomp: no sockets, no other programs or processes, no signals to others, and no opening of files for writing. Where
//!   landlock is missing, no file is opened any more once the library is loaded;
//! * limits of memory and descriptors, and no new privileges.
//!
//! What it is for, and what it does not keep out: docs/plugins-trust.md.
#![cfg_attr(not(target_os = "linux"), allow(dead_code, reason = "nothing is confined elsewhere"))]

#[cfg(all(target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64")))]
mod linux;

use std::path::Path;

use serde::{Deserialize, Serialize};

/// What a process that tried a plugin was confined by.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Confinement {
    /// The layers in force, in words.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub layers: Vec<String>,
    /// What is not in force, and why.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub missing: Vec<String>,
}

/// The process is confined. [`loaded`](Self::loaded) is still to come.
pub(crate) struct Confined {
    pub confinement: Confinement,
    /// Opening files is allowed until the library is loaded.
    opens: bool,
}

impl Confined {
    /// Confines this process for good. `library` stays readable.
    ///
    /// Call it on the only thread there is: landlock confines the thread that calls, and those that it starts later.
    ///
    /// # Errors
    /// If not even seccomp can be put in force. The process may be confined in part.
    pub fn new(library: &Path) -> Result<Self, String> {
        #[cfg(all(target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64")))]
        return linux::confine(library);
        #[cfg(not(all(target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64"))))]
        return Err(format!("{} can't be confined on {} here", library.display(), std::env::consts::OS));
    }

    /// After the library is loaded: where landlock is missing, no file is opened any more.
    ///
    /// # Errors
    /// If that can't be put in force.
    pub fn loaded(&mut self) -> Result<(), String> {
        #[cfg(all(target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64")))]
        if std::mem::take(&mut self.opens) {
            return linux::close_files();
        }
        self.opens = false;
        Ok(())
    }
}

// Not under an emulator, which can't run itself again: statically linked tests are emulated ones.
#[cfg(all(
    test,
    target_os = "linux",
    any(target_arch = "x86_64", target_arch = "aarch64"),
    not(target_feature = "crt-static")
))]
mod tests {
    use std::fs::File;
    use std::net::TcpListener;
    use std::process::Command;

    use super::*;

    const ROLE: &str = "BITNET_TEST_ROLE";

    #[test]
    fn without_landlock_no_file_is_opened_once_the_library_is_loaded() {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["sandbox::tests::child", "--exact", "--nocapture", "--test-threads=1"]).env(ROLE, "1");
        let output = command.output().unwrap();
        let words = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success() && words.contains("all of it was tried"), "{words}");
    }

    /// Not a test by itself: a process that confines itself. Another thread than the first keeps landlock out.
    #[test]
    fn child() {
        if std::env::var_os(ROLE).is_none() {
            return;
        }
        let (send, receive) = std::sync::mpsc::channel::<()>();
        let other = std::thread::spawn(move || receive.recv());
        let program = std::env::current_exe().unwrap();
        let mut confined = Confined::new(&program).unwrap();
        let Confinement { layers, missing } = &confined.confinement;
        assert!(missing.len() == 1 && missing[0].contains("landlock: it confines one thread"), "{missing:?}");
        assert!(layers[0].contains("once the library is loaded, no files"), "{layers:?}");
        // As the loader does; nothing is written, and the rest holds from the beginning.
        assert!(File::open(&program).is_ok());
        let new = std::env::temp_dir().join("bitnet-is-confined");
        let refused = |error: std::io::Error| assert_eq!(error.kind(), std::io::ErrorKind::PermissionDenied);
        refused(File::create(new).unwrap_err());
        refused(TcpListener::bind("127.0.0.1:0").unwrap_err());
        refused(Command::new(&program).spawn().unwrap_err());
        assert_eq!(std::thread::spawn(|| 7).join().unwrap(), 7);
        confined.loaded().unwrap();
        refused(File::open(&program).unwrap_err());
        assert_eq!(std::thread::spawn(|| 7).join().unwrap(), 7);
        drop(send);
        assert!(other.join().unwrap().is_err());
        eprintln!("all of it was tried");
    }
}
