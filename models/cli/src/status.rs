//! The exit statuses of the program. `docs/running.md` has the table for users.

use std::process::ExitCode;

use anyhow::Context as _;
use bitnet_burn_formats::files;

/// How the program ends. The command line parser adds status 2 for wrong usage.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// Done.
    Done = 0,
    /// An error, whose message is on stderr; or a check that could not be made.
    Error = 1,
    /// `bench`: something became worse, or a required figure is missed. `compare`: a limit is broken. `plan`: the model does not fit. `receipt check`: something differs from the receipt.
    Mismatch = 3,
    /// Done, but results of a plugin are in doubt.
    Doubt = 4,
    /// A signal stopped training, or what would have written a large file.
    Interrupted = 130,
}

impl Status {
    /// Ends the process now.
    pub fn exit(self) -> ! {
        // Other threads may compute meanwhile.
        bitnet_burn_manager::expect_exit();
        std::process::exit(self as i32)
    }
}

/// Catches Ctrl-C and SIGTERM: what is written and not finished is removed, and the process ends. For commands that write large
/// files; others end by the signal itself.
///
/// # Errors
/// If the system refuses.
pub fn discard_when_interrupted() -> anyhow::Result<()> {
    let handler = || {
        files::discard_unfinished();
        Status::Interrupted.exit();
    };
    ctrlc::set_handler(handler).context("cannot catch Ctrl-C")
}

impl From<Status> for ExitCode {
    fn from(status: Status) -> Self {
        Self::from(status as u8)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::path::Path;

    use clap::Parser as _;

    use super::Status;

    #[test]
    fn the_documents_list_the_statuses_that_there_are() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/running.md");
        let text = std::fs::read_to_string(path).unwrap();
        let table = text.split_once("| status | command | meaning |\n| --- | --- | --- |\n").unwrap().1;
        let rows = table.lines().take_while(|line| line.starts_with('|'));
        let cells = rows.flat_map(|row| row.split('|').nth(1).unwrap().split(','));
        let listed: BTreeSet<i32> = cells.map(|status| status.trim().parse().unwrap()).collect();
        let usage = crate::Cli::try_parse_from(["bitnet", "--no-such-flag"]).unwrap_err().exit_code();
        let own = [Status::Done, Status::Error, Status::Mismatch, Status::Doubt, Status::Interrupted];
        let own = own.map(|status| status as i32);
        assert_eq!(listed, own.into_iter().chain([usage]).collect());
    }
}
