//! `bitnet worker`: this machine's device for the layers of other machines' models.

use std::net::TcpListener;

use anyhow::{Context as _, bail};
use burn::tensor::Device;
use clap::Args;

use crate::args::KernelArgs;
use crate::engine::config;
#[cfg(feature = "remote")]
use crate::output;
use bitnet_burn_engine::device::{DeviceKind, DeviceName};

/// Serve a device of this machine to other machines (feature remote)
///
/// `--device remote:HOST:PORT` of the other subcommands computes here then: weights come over when a model is loaded,
/// rows of activations in every step; the KV cache of a layer is where the layer is. Prints one line with its address
/// when it listens, and serves until it is asked to end (Ctrl-C, SIGTERM).
///
/// The protocol has no authentication and no encryption: whoever reaches the address can compute here, and take all of
/// the memory. Listen at addresses of trusted networks only; the default can be reached from this machine alone.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct WorkerArgs {
    #[command(flatten)]
    kernels: KernelArgs,
    /// The address to listen at; port 0 takes a free one
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
  bitnet worker                                            # for this machine, at port 7158
  bitnet worker --listen 192.168.1.2:7158 --device wgpu:0  # for a network that is trusted
  bitnet run -m model.gguf --device remote:192.168.1.2:7158=20,flex";

pub fn run(args: WorkerArgs) -> anyhow::Result<()> {
    DeviceKind::Remote.compiled_in()?;
    let name = args.device.unwrap_or_else(|| DeviceKind::compiled().into());
    if name.kind == DeviceKind::Remote {
        bail!("--device {name}: a worker serves a device of its own machine");
    }
    // Before the work of setting up: a wrong address should not wait for it.
    let listener = TcpListener::bind(&args.listen)
        .with_context(|| format!("cannot listen at {}; an address is HOST:PORT", args.listen))?;
    args.kernels.configure_with(config()?.0)?;
    let device = name.open()?;
    serve(listener, &device, &name.to_string(), args.json)
}

#[cfg(not(feature = "remote"))]
fn serve(_: TcpListener, _: &Device, _: &str, _: bool) -> anyhow::Result<()> {
    unreachable!("the feature was asked for first")
}

#[cfg(feature = "remote")]
fn serve(listener: TcpListener, device: &Device, name: &str, json: bool) -> anyhow::Result<()> {
    #[derive(serde::Serialize)]
    struct Serves<'a> {
        address: String,
        device: &'a str,
        version: &'static str,
    }

    // Nothing is kept that an end could damage.
    ctrlc::set_handler(|| std::process::exit(0)).context("cannot catch Ctrl-C")?;
    let worker = bitnet_burn::backends::remote::Worker::start(listener, device, name)?;
    let address = worker.address();
    if !address.ip().is_loopback() {
        output::warning(format_args!(
            "{address} may be reached from other machines, without authentication or encryption: whoever reaches it \
             can compute here"
        ));
    }
    let version = env!("CARGO_PKG_VERSION");
    if json {
        output::print_json(&Serves { address: address.to_string(), device: name, version })?;
    } else {
        output::print(format_args!("listening at {address}, device {name}, bitnet {version}"))?;
    }
    Err(worker.wait().into())
}
