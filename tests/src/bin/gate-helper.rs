//! The process in which these tests have plugins tried, as an embedder would write it.

use bitnet_burn_manager::gate;

fn main() {
    let mut arguments = std::env::args_os().skip(1);
    assert!(arguments.next().is_some_and(|command| command == gate::CHILD_COMMAND), "for the gate alone");
    std::process::exit(bitnet_burn_backends::manager::gate_child(arguments));
}
