//! `bitnet-gate`: the process in which kernel plugins are tried. Programs that embed bitnet-burn without
//! the program `bitnet` name it as their helper
//! ([`PluginConfig::helper`](bitnet_burn_manager::store::PluginConfig::helper)).
#![forbid(unsafe_code)]

use bitnet_burn_manager::gate;

fn main() {
    let mut arguments = std::env::args_os().skip(1);
    if arguments.next().is_some_and(|command| command == gate::CHILD_COMMAND) {
        std::process::exit(gate::child(arguments));
    }
    eprintln!(
        "bitnet-gate tries kernel plugins for bitnet-burn, which calls it as\n  bitnet-gate {} LIBRARY NAME",
        gate::CHILD_COMMAND
    );
    std::process::exit(2);
}
