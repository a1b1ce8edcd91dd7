//! What the file of a library says before it is loaded.

use object::elf::STB_GNU_UNIQUE;
use object::read::elf::ElfFile64;
use object::{Endianness, Object as _, ObjectSymbol as _};

use super::shown;

/// A warning, if an ELF file defines symbols that the loader keeps once for the whole process: g++ makes such of the
/// statics of inline functions and of inline variables. A second plugin that has the same inline function then shares
/// the first one's variable.
pub(crate) fn shared_statics(library: &[u8]) -> Option<String> {
    let file = ElfFile64::<Endianness>::parse(library).ok()?;
    let mut unique = file
        .dynamic_symbols()
        .filter(|symbol| symbol.is_definition() && symbol.elf_symbol().st_bind() == STB_GNU_UNIQUE);
    let first = unique.next()?;
    let name = shown(&String::from_utf8_lossy(first.name_bytes().unwrap_or_default()));
    let others = match unique.count() {
        0 => String::new(),
        count => format!(" and {count} more"),
    };
    Some(format!(
        "it shares variables with every other library of the process that has the same inline functions: {name}{others} \
         (STB_GNU_UNIQUE); compile it with -fno-gnu-unique"
    ))
}
