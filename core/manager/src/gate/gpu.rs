//! How kernels that are GPU source are tried: their packing on the host as that of any kernel, between walls; and
//! their text on a device, over the same shapes, compared with the reference.

use bitnet_burn_plugin::abi::{CANONICAL_ALIGNMENT, Signature};

use super::cases::{self, Case, POISON};
use crate::gpu::{GpuDevice, GpuOperands, close};
use crate::memory::Activations;
use crate::plugin::Kernel;
use bitnet_burn_formats::random::SplitMix64;
use bitnet_burn_formats::reference;

/// Columns of another matrix on the left of the outputs and, in all, beside them.
const COLUMN: usize = 2;
const OTHERS: usize = 5;

/// Packs and unpacks the weights of the cases that a kernel supports, between walls, announcing each.
///
/// # Errors
/// What is wrong with the case that was announced last.
pub(super) fn check_packing(
    kernel: &Kernel,
    announce: &mut dyn FnMut(&dyn std::fmt::Display),
) -> Result<(), String> {
    let mut random = SplitMix64::new(0x6b17);
    for case in cases::of_gpus() {
        let (m, n, k) = case.shape();
        let signature = Signature::ternary(m as u64, n as u64, k as u64, 1);
        if kernel.claims(&signature).map_err(|failure| failure.to_string())? {
            announce(&format_args!("[{m}, {k}] x [{n}, {k}]ᵀ, {}", case.values()));
            case.weights(kernel, &case.inputs(&mut random).0)?;
        }
    }
    Ok(())
}

/// Tries a kernel on the cases that it supports, announcing each; how many there were.
///
/// Each is run twice. With all scales 1 the outputs are the sums, which f32 holds exactly: they must be equal to
/// the bit. With the case's scales they must be [`close`].
///
/// # Errors
/// What is wrong with the case that was announced last.
pub(super) fn check(
    kernel: &Kernel,
    device: &dyn GpuDevice,
    announce: &mut dyn FnMut(&dyn std::fmt::Display),
) -> Result<u64, String> {
    let mut random = SplitMix64::new(0x6b17);
    let (mut tried, mut offered) = (0, 0);
    for case in cases::of_gpus() {
        offered += 1;
        let (m, n, k) = case.shape();
        let signature = Signature::ternary(m as u64, n as u64, k as u64, 1);
        if !kernel.claims(&signature).map_err(|failure| failure.to_string())? {
            continue;
        }
        tried += 1;
        announce(&format_args!("[{m}, {k}] x [{n}, {k}]ᵀ, {}, on {}", case.values(), device.name()));
        let (weights, mut x) = case.inputs(&mut random);
        let packed = case.weights(kernel, &weights)?;
        // What a row that is not finite makes of a device's arithmetic is left open.
        for scale in x.resize(m, k).scale {
            *scale = if scale.is_finite() { *scale } else { 1.0 };
        }
        run(kernel, device, (&packed, &weights, case.scale()), (n, &x), close)?;
        x.resize(m, k).scale.fill(1.0);
        run(kernel, device, (&packed, &weights, 1.0), (n, &x), |got, want| got == want)?;
    }
    if tried == 0 {
        return Err(format!("it supports none of the {offered} cases that kernels are tried on"));
    }
    Ok(tried)
}

fn run(
    kernel: &Kernel,
    device: &dyn GpuDevice,
    (packed, canonical, scale): (&[u8], &[u8], f32),
    (n, x): (usize, &Activations),
    right: impl Fn(f32, f32) -> bool,
) -> Result<(), String> {
    let (m, k) = (x.m(), x.k());
    let mut expected = vec![0f32; m * n];
    reference::matmul(canonical, n, k, scale, x.q(), x.stride(), x.scale(), m, &mut expected, n);
    let stride = n + OTHERS;
    let operands = GpuOperands::new(packed, scale, x, n, stride, COLUMN);
    // And a row that is not its own.
    let mut y = vec![POISON; (m + 1) * stride];
    device.run(kernel, &operands, &mut y)?;
    cases::compare(&y, &expected, (n, stride, COLUMN), right)
}

impl Case {
    /// Canonical weights as the kernel reads them: if it packs, packed between walls, and unpacked again.
    fn weights(&self, kernel: &Kernel, canonical: &[u8]) -> Result<Vec<u8>, String> {
        if kernel.layout().is_none() {
            return Ok(canonical.to_vec());
        }
        let (_, n, k) = self.shape();
        if let Some(contained) = kernel.contained() {
            // The child before this one has tried it between walls.
            let size = kernel.packed_bytes(n, k).map_err(|failure| failure.to_string())?;
            let mut packed = vec![0; size.ok_or("it supports the shape, and can't pack it")?];
            let result = contained.pack(kernel, (n, k), canonical, &mut packed);
            return result.map(|()| packed).map_err(|failure| format!("pack: {failure}"));
        }
        let walled = self.input("the canonical weights", canonical, CANONICAL_ALIGNMENT)?;
        Ok(self.pack(kernel, &walled, n, k)?.bytes().to_vec())
    }
}
