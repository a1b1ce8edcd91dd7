//! `bitnet worker`: serves a device to other machines, which place layers on it.

use std::net::TcpListener;

use anyhow::{Context as _, bail};
use burn::tensor::Device;
use clap::Args;

use crate::args::{KernelArgs, SecretArgs};
use crate::engine::config;
#[cfg(feature = "remote")]
use crate::output;
#[cfg(feature = "remote")]
use crate::status::Status;
#[cfg(feature = "remote")]
use bitnet_burn::backends::remote::{Limits, Worker};
use bitnet_burn_engine::device::{DeviceKind, DeviceName};
#[cfg(feature = "remote")]
use bitnet_burn_engine::plan::MemoryProfile;

/// Serve a device of this machine to other machines (feature remote)
///
/// Other machines use the device with `--device remote:HOST:PORT`. They send weights when a model is loaded, and rows of
/// activations in every step. The KV cache of a layer is on the layer's device. The worker prints one line with its
/// address when it listens, and serves until Ctrl-C or SIGTERM.
///
/// The default address can be reached from this machine only, and needs no secret. Every other address needs one: a file
/// (--secret-file) or BITNET_WORKER_SECRET, here and on the other machines. Both sides prove that they know it. Nothing
/// is encrypted: in a network that others can listen to, use a tunnel (docs/devices.md#workers).
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct WorkerArgs {
    #[command(flatten)]
    kernels: KernelArgs,
    #[command(flatten)]
    secret: SecretArgs,
    /// The address to listen on; port 0 takes a free port
    #[arg(long, value_name = "HOST:PORT", default_value = "127.0.0.1:7158")]
    listen: String,
    /// The device: flex (the CPU), ndarray, wgpu, wgpu:1, cuda ... [default: the CPU]
    #[arg(long, value_name = "DEVICE")]
    device: Option<DeviceName>,
    /// Print the line as a JSON object
    #[arg(long)]
    json: bool,
}

const EXAMPLES: &str = "\
Examples:
  bitnet worker                                            # for this machine, on port 7158
  (umask 077; openssl rand -hex 32 > secret)               # once; copy it to the other machines
  bitnet worker --listen 192.168.1.2:7158 --secret-file secret --device wgpu:0
  bitnet run -m model.gguf --device remote:192.168.1.2:7158=20,flex --secret-file secret";

pub fn run(args: WorkerArgs) -> anyhow::Result<()> {
    DeviceKind::Remote.compiled_in()?;
    let name = args.device.unwrap_or_else(|| DeviceKind::compiled().into());
    if name.kind == DeviceKind::Remote {
        bail!("--device {name}: a worker serves a device of its own machine");
    }
    // First of all, so that a wrong address fails at once.
    let listener = TcpListener::bind(&args.listen)
        .with_context(|| format!("cannot listen on {}; an address is HOST:PORT", args.listen))?;
    args.kernels.configure_with(config()?.0)?;
    let device = name.open()?;
    serve(listener, &device, &name.to_string(), &args.secret, args.json)
}

#[cfg(not(feature = "remote"))]
fn serve(_: TcpListener, _: &Device, _: &str, _: &SecretArgs, _: bool) -> anyhow::Result<()> {
    unreachable!("`run` checks the feature first")
}

#[cfg(feature = "remote")]
fn serve(
    listener: TcpListener,
    device: &Device,
    name: &str,
    secret: &SecretArgs,
    json: bool,
) -> anyhow::Result<()> {
    #[derive(serde::Serialize)]
    struct Serves<'a> {
        address: String,
        device: &'a str,
        version: &'static str,
    }

    // The worker keeps no state, so it can end at any time.
    ctrlc::set_handler(|| Status::Done.exit()).context("cannot catch Ctrl-C")?;
    let mut limits = Limits::default();
    // The rest is for the time until sessions end, and for other programs.
    limits.memory = MemoryProfile::detect().map(|memory| memory.available_bytes / 4 * 3);
    let worker = Worker::start_with(listener, device, name, secret.read()?.as_ref(), limits)?;
    let address = worker.address();
    let version = env!("CARGO_PKG_VERSION");
    if json {
        output::print_json(&Serves { address: address.to_string(), device: name, version })?;
    } else {
        output::print(format_args!("listening at {address}, device {name}, bitnet {version}"))?;
    }
    output::print_error(&worker.wait().into());
    // Sessions may still compute.
    Status::Error.exit()
}
