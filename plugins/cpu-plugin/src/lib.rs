//! [`bitnet_burn_cpu`]'s kernels as a plugin that can be loaded at run time.
//!
//! bitnet-burn links these kernels in. This library is the same descriptor behind the exported symbol,
//! for hosts that load plugins only, and to run the built-in kernels through everything that a foreign
//! plugin goes through.

bitnet_burn_plugin::export_plugin!(bitnet_burn_cpu::PLUGIN);
