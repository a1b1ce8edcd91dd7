//! The GPU that the gate tries kernels on.

use std::panic::{AssertUnwindSafe, catch_unwind};

use bitnet_burn_manager::gpu::{GpuDevice, GpuOperands};
use bitnet_burn_manager::plugin::{Kernel, Target};
use burn_cubecl::cubecl::client::Client;
use burn_cubecl::cubecl::server::Handle;

use super::body::error_text;
use super::launch::{self, Buffers};
use crate::devices;

/// This machine's default GPU, of a runtime that takes kernels as text: CUDA's, where that is compiled in and there is
/// one, else wgpu's.
///
/// # Errors
/// If there is none, or it takes no text.
pub fn open_gpu() -> Result<Box<dyn GpuDevice>, String> {
    let compiled = devices::runtimes();
    let mut problem = format!("the runtime {} takes no kernels as text", compiled.join(", "));
    for runtime in ["cuda", "wgpu"].into_iter().filter(|runtime| compiled.contains(runtime)) {
        match devices::open(runtime).map(|device| devices::client(&device)) {
            Ok(Some(client)) => match launch::target(&client) {
                Some(target) => return Ok(Box::new(Gpu { client, target })),
                None => problem = format!("the runtime {} takes no kernels as text", client.name()),
            },
            Ok(None) => {}
            Err(reason) => problem = format!("there is no GPU: {reason}"),
        }
    }
    Err(problem)
}

struct Gpu {
    client: Client,
    target: Target,
}

impl GpuDevice for Gpu {
    fn name(&self) -> String {
        format!("{} ({})", self.client.properties().identity.name, self.client.name())
    }

    fn target(&self) -> Target {
        self.target
    }

    fn lacking(&self, kernel: &Kernel) -> Option<String> {
        launch::lacking(&self.client, kernel.gpu()?, kernel.features())
    }

    fn run(&self, kernel: &Kernel, operands: &GpuOperands, y: &mut [f32]) -> Result<(), String> {
        let source = kernel.gpu().ok_or("it has no text")?;
        let (m, n, _) = operands.shape;
        if !launch::fits(&self.client, source, m, n) {
            let [x, y, _] = source.grid(m, n);
            return Err(format!("it takes {x} x {y} workgroups, more than the device can launch"));
        }
        let run = || {
            let create = |bytes: &[u8]| self.client.create_from_slice(bytes);
            let buffers = Buffers {
                weights: create(bytemuck::cast_slice(&operands.weights)),
                scale: create(bytemuck::bytes_of(&operands.scale)),
                x: create(bytemuck::cast_slice(&operands.x)),
                rows: create(bytemuck::cast_slice(&operands.rows)),
                params: create(bytemuck::cast_slice(&operands.params)),
                y: create(bytemuck::cast_slice(y)),
            };
            // SAFETY: the operands are filled, and `y` has room (the gate's).
            unsafe { launch::launch(&self.client, kernel, operands.shape, buffers.clone()) };
            let read =
                |handle: &Handle| self.client.read_one(handle.clone()).map_err(|error| error_text(&error));
            let output = read(&buffers.y)?;
            for (what, handle, bytes) in [
                ("the weights", &buffers.weights, bytemuck::cast_slice::<_, u8>(&operands.weights)),
                ("the weights' scale", &buffers.scale, bytemuck::bytes_of(&operands.scale)),
                ("the activations", &buffers.x, bytemuck::cast_slice(&operands.x)),
                ("the rows", &buffers.rows, bytemuck::cast_slice(&operands.rows)),
                ("the parameters", &buffers.params, bytemuck::cast_slice(&operands.params)),
            ] {
                if read(handle)?.get(..bytes.len()) != Some(bytes) {
                    return Err(format!("it wrote into {what}, an input"));
                }
            }
            Ok(output)
        };
        let output =
            catch_unwind(AssertUnwindSafe(run)).unwrap_or_else(|_| Err("the device panicked".into()))?;
        for (value, bytes) in y.iter_mut().zip(output.chunks_exact(4)) {
            *value = f32::from_ne_bytes(bytes.try_into().expect("4 bytes"));
        }
        Ok(())
    }
}
