//! Buffers for calls that are not trusted: a guard page on each side, so that one byte too far ends the
//! process at once, or, where a process must live on, marked bytes around the payload.

use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};

use memmap2::MmapMut;

/// Where the payload lies within its pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// Its last byte (up to its alignment) is the page's last.
    End,
    /// Its first byte is the page's first.
    Start,
    /// Aligned as promised, and not better.
    Odd,
}

/// Whether the pages around a buffer are out of bounds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Walls {
    /// Touching them ends the process.
    Pages,
    /// They are marked, and looked at afterwards.
    Marks,
    /// So are a page in front of the buffer and this many bytes behind it. Touching what is beyond ends the process.
    Far(usize),
}

/// A buffer between walls.
pub(crate) struct Walled {
    /// Owns the pages. They are reached through `base` alone: no reference may cover the walls.
    map: MmapMut,
    base: *mut u8,
    /// The pages that may be touched.
    pages: Range<usize>,
    /// The buffer itself.
    payload: Range<usize>,
    name: &'static str,
    walls: Walls,
    /// What it held when it was frozen.
    frozen: Option<Vec<u8>>,
    slot: Option<usize>,
}

/// The mark at offset `i`: no two neighbours are equal, and none is zero.
fn mark(i: usize) -> u8 {
    0x80 | (i as u8).wrapping_mul(37)
}

impl Walled {
    /// A buffer of `size` bytes, aligned to `alignment` (a power of two, at most a page), all marks.
    pub fn new(
        name: &'static str,
        size: usize,
        alignment: usize,
        place: Place,
        walls: Walls,
    ) -> std::io::Result<Self> {
        let page = page_size();
        let (before, behind) = match walls {
            Walls::Far(behind) => (page, behind),
            Walls::Pages | Walls::Marks => (0, 0),
        };
        let inner = (before + size + 2 * alignment + behind).max(1).next_multiple_of(page);
        let mut map = MmapMut::map_anon(inner + 2 * page)?;
        let pages = page..page + inner;
        let start = match place {
            Place::End => (pages.end - behind - size) / alignment * alignment,
            Place::Start => pages.start + before,
            Place::Odd => pages.start + before + alignment,
        };
        for (byte, i) in map[pages.clone()].iter_mut().zip(pages.clone()) {
            *byte = mark(i);
        }
        let base = map.as_mut_ptr();
        let mut buffer =
            Self { map, base, pages, payload: start..start + size, name, walls, frozen: None, slot: None };
        if walls != Walls::Marks {
            buffer.protect(0..page, Access::None)?;
            buffer.protect(page + inner..inner + 2 * page, Access::None)?;
        }
        if walls == Walls::Pages {
            buffer.slot = faults::watch(&buffer);
        }
        Ok(buffer)
    }

    pub fn bytes(&self) -> &[u8] {
        self.part(&self.payload)
    }

    /// A range within the pages that may be touched.
    fn part(&self, range: &Range<usize>) -> &[u8] {
        debug_assert!(self.pages.start <= range.start && range.end <= self.pages.end);
        // SAFETY: within the readable pages of the map, which lives as long as `self`. Kernels write there
        // only while a call that got the pointer runs, and no reference to it is held then.
        unsafe { std::slice::from_raw_parts(self.base.add(range.start), range.len()) }
    }

    pub fn bytes_mut(&mut self) -> &mut [u8] {
        assert!(self.frozen.is_none(), "{} is read-only", self.name);
        // SAFETY: as in `part`; the pages are writable, and `&mut self` is unique.
        unsafe { std::slice::from_raw_parts_mut(self.base.add(self.payload.start), self.payload.len()) }
    }

    pub fn as_ptr(&self) -> *const u8 {
        self.base.wrapping_add(self.payload.start)
    }

    pub fn as_mut_ptr(&mut self) -> *mut u8 {
        self.base.wrapping_add(self.payload.start)
    }

    /// From now on it is read-only.
    pub fn freeze(&mut self) -> std::io::Result<()> {
        self.frozen = Some(self.bytes().to_vec());
        match self.walls {
            Walls::Pages => self.protect(self.pages.clone(), Access::Read),
            Walls::Marks | Walls::Far(_) => Ok(()),
        }
    }

    /// Whether the marks around it, and what was frozen, are still what they were.
    pub fn check(&self) -> Result<(), String> {
        let name = self.name;
        let bytes = |count| if count == 1 { "1 byte".into() } else { format!("{count} bytes") };
        let around = [self.pages.start..self.payload.start, self.payload.end..self.pages.end];
        let strange = |range: &Range<usize>| {
            let wrong = |(i, byte): (usize, &u8)| (*byte != mark(range.start + i)).then_some(range.start + i);
            let mut places = self.part(range).iter().enumerate().filter_map(wrong);
            (places.next(), places.next_back())
        };
        if let (Some(first), last) = strange(&around[0]) {
            let nearest = last.unwrap_or(first);
            return Err(format!("it wrote {} before {name}", bytes(self.payload.start - nearest)));
        }
        if let (Some(nearest), _) = strange(&around[1]) {
            return Err(format!("it wrote {} behind {name}", bytes(nearest + 1 - self.payload.end)));
        }
        match &self.frozen {
            Some(frozen) if frozen != self.bytes() => Err(format!("it wrote into {name}, an input")),
            _ => Ok(()),
        }
    }

    /// Makes whole pages read-only, or takes them out of reach.
    #[cfg(unix)]
    fn protect(&mut self, pages: Range<usize>, access: Access) -> std::io::Result<()> {
        let protection = match access {
            Access::Read => libc::PROT_READ,
            Access::None => libc::PROT_NONE,
        };
        debug_assert!(pages.end <= self.map.len());
        // SAFETY: whole pages of an anonymous map of our own, to which there is no reference now; later ones
        // (`part`, `bytes_mut`) are to pages that allow what they do.
        match unsafe { libc::mprotect(self.base.add(pages.start).cast(), pages.len(), protection) } {
            0 => Ok(()),
            _ => Err(std::io::Error::last_os_error()),
        }
    }

    /// Without pages that can be protected, the marks have to do.
    #[cfg(not(unix))]
    fn protect(&mut self, _: Range<usize>, _: Access) -> std::io::Result<()> {
        Ok(())
    }
}

/// What is left of the access to pages.
enum Access {
    Read,
    None,
}

impl Drop for Walled {
    fn drop(&mut self) {
        if let Some(slot) = self.slot {
            faults::forget(slot);
        }
    }
}

#[cfg(unix)]
fn page_size() -> usize {
    // SAFETY: asks the system for a number.
    let size = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    usize::try_from(size).unwrap_or(1 << 16)
}

#[cfg(not(unix))]
fn page_size() -> usize {
    1 << 16
}

/// Says which buffer a deadly access was next to: a signal handler for the gate's own process.
pub(super) mod faults {
    use super::*;

    /// Buffers that are watched: bounds of the map, of the payload, and the name.
    struct Slot {
        low: AtomicUsize,
        start: AtomicUsize,
        end: AtomicUsize,
        high: AtomicUsize,
        name: AtomicUsize,
        name_length: AtomicUsize,
    }

    static SLOTS: [Slot; 16] = [const {
        Slot {
            low: AtomicUsize::new(0),
            start: AtomicUsize::new(0),
            end: AtomicUsize::new(0),
            high: AtomicUsize::new(0),
            name: AtomicUsize::new(0),
            name_length: AtomicUsize::new(0),
        }
    }; 16];

    /// Enters a buffer. Only the thread that makes buffers calls this. `None` if the table is full: the
    /// message is less precise then.
    pub fn watch(buffer: &Walled) -> Option<usize> {
        let index = SLOTS.iter().position(|slot| slot.high.load(Ordering::Relaxed) == 0)?;
        let (slot, base) = (&SLOTS[index], buffer.base as usize);
        slot.low.store(base, Ordering::Relaxed);
        slot.start.store(base + buffer.payload.start, Ordering::Relaxed);
        slot.end.store(base + buffer.payload.end, Ordering::Relaxed);
        slot.name.store(buffer.name.as_ptr() as usize, Ordering::Relaxed);
        slot.name_length.store(buffer.name.len(), Ordering::Relaxed);
        slot.high.store(base + buffer.map.len(), Ordering::Release);
        Some(index)
    }

    pub fn forget(slot: usize) {
        SLOTS[slot].high.store(0, Ordering::Release);
    }

    #[cfg(unix)]
    pub use self::handler::install;

    #[cfg(unix)]
    mod handler {
        use std::mem::MaybeUninit;
        use std::sync::atomic::AtomicI32;

        use super::*;

        /// Where the message goes.
        static OUT: AtomicI32 = AtomicI32::new(-1);

        /// Has deadly accesses next to a watched buffer described on `out`, as a line of the gate's
        /// protocol, before they end the process.
        pub fn install(out: libc::c_int) -> std::io::Result<()> {
            OUT.store(out, Ordering::Relaxed);
            // SAFETY: an all-zero sigaction is valid; the handler only does what signal handlers may
            // (atomics, sigaction, write), and runs on the stack that std has set up for it.
            unsafe {
                let mut action: libc::sigaction = MaybeUninit::zeroed().assume_init();
                action.sa_sigaction = on_fault as *const () as usize;
                action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
                for signal in [libc::SIGSEGV, libc::SIGBUS] {
                    let old = if signal == libc::SIGSEGV { &raw mut OLD_SEGV } else { &raw mut OLD_BUS };
                    if libc::sigaction(signal, &action, old.cast()) != 0 {
                        return Err(std::io::Error::last_os_error());
                    }
                }
            }
            Ok(())
        }

        /// What std had installed: it tells stack overflows. Written once, before the handler can run.
        static mut OLD_SEGV: MaybeUninit<libc::sigaction> = MaybeUninit::zeroed();
        static mut OLD_BUS: MaybeUninit<libc::sigaction> = MaybeUninit::zeroed();

        extern "C" fn on_fault(signal: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
            // SAFETY: the system passes a filled siginfo to a handler with SA_SIGINFO.
            let address = unsafe { (*info).si_addr() } as usize;
            let mut line = Line { bytes: [0; 256], length: 0 };
            let (write, stack) = interrupted(context);
            if describe(&mut line, address, write, stack) {
                // SAFETY: writes initialised bytes to a descriptor.
                unsafe { libc::write(OUT.load(Ordering::Relaxed), line.bytes.as_ptr().cast(), line.length) };
            }
            // Puts the old handler back and returns: the access happens again, and ends there.
            // SAFETY: filled by `install` before this handler could run.
            unsafe {
                let old = if signal == libc::SIGSEGV { &raw const OLD_SEGV } else { &raw const OLD_BUS };
                libc::sigaction(signal, old.cast(), std::ptr::null_mut());
            }
        }

        /// Whether the processor says that the access was a write, and where the thread's stack ended.
        #[cfg(all(target_os = "linux", target_arch = "x86_64"))]
        fn interrupted(context: *mut libc::c_void) -> (Option<bool>, Option<usize>) {
            // SAFETY: the system passes the interrupted thread's context.
            let registers = unsafe { &(*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs };
            let write = registers[libc::REG_ERR as usize] & 2 != 0;
            (Some(write), Some(registers[libc::REG_RSP as usize] as usize))
        }

        #[cfg(all(target_os = "linux", target_arch = "aarch64"))]
        fn interrupted(context: *mut libc::c_void) -> (Option<bool>, Option<usize>) {
            // SAFETY: the system passes the interrupted thread's context.
            let context = unsafe { &(*context.cast::<libc::ucontext_t>()).uc_mcontext };
            (None, Some(context.sp as usize))
        }

        #[cfg(not(all(target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64"))))]
        fn interrupted(_: *mut libc::c_void) -> (Option<bool>, Option<usize>) {
            (None, None)
        }

        /// A frame that is larger than this is not looked for.
        const FRAME: usize = 64 << 10;

        struct Line {
            bytes: [u8; 256],
            length: usize,
        }

        impl Line {
            fn text(&mut self, text: &[u8]) {
                for &byte in text {
                    if self.length < self.bytes.len() {
                        self.bytes[self.length] = byte;
                        self.length += 1;
                    }
                }
            }

            fn number(&mut self, mut number: usize) {
                let (mut digits, mut at) = ([0u8; 20], 20);
                loop {
                    at -= 1;
                    digits[at] = b'0' + (number % 10) as u8;
                    number /= 10;
                    if number == 0 {
                        break;
                    }
                }
                self.text(&digits[at..]);
            }
        }

        /// A line of the protocol, if the address belongs to a watched buffer, or the stack is at its end.
        fn describe(line: &mut Line, address: usize, write: Option<bool>, stack: Option<usize>) -> bool {
            for slot in &SLOTS {
                let high = slot.high.load(Ordering::Acquire);
                if high == 0 || !(slot.low.load(Ordering::Relaxed)..high).contains(&address) {
                    continue;
                }
                let (start, end) = (slot.start.load(Ordering::Relaxed), slot.end.load(Ordering::Relaxed));
                // SAFETY: pointer and length of a static string.
                let name = unsafe {
                    std::slice::from_raw_parts(
                        slot.name.load(Ordering::Relaxed) as *const u8,
                        slot.name_length.load(Ordering::Relaxed),
                    )
                };
                line.text(b"{\"event\":\"fault\",\"what\":\"it ");
                line.text(match write {
                    Some(true) => &b"wrote "[..],
                    Some(false) => &b"read "[..],
                    None => &b"accessed "[..],
                });
                if (start..end).contains(&address) {
                    line.text(b"into ");
                } else {
                    let (before, distance) =
                        if address < start { (true, start - address) } else { (false, address - end + 1) };
                    line.number(distance);
                    line.text(if distance == 1 { &b" byte "[..] } else { &b" bytes "[..] });
                    line.text(if before { b"before " } else { b"behind " });
                }
                line.text(name);
                if (start..end).contains(&address) {
                    line.text(b", an input");
                }
                line.text(b"\"}\n");
                return true;
            }
            if stack.is_some_and(|stack| stack.abs_diff(address) < FRAME) {
                line.text(b"{\"event\":\"fault\",\"what\":\"it used its stack up\"}\n");
                return true;
            }
            false
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_buffer_lies_where_it_should_and_notices_strangers() {
        for walls in [Walls::Marks, Walls::Pages, Walls::Far(100_000)] {
            for place in [Place::End, Place::Start, Place::Odd] {
                for (size, alignment) in [(0, 4), (1, 1), (100, 4), (4096, 64), (5000, 4096)] {
                    let mut buffer = Walled::new("it", size, alignment, place, walls).unwrap();
                    assert_eq!((buffer.as_ptr() as usize) % alignment, 0);
                    if place == Place::Odd && alignment < 4096 {
                        assert_ne!((buffer.as_ptr() as usize) % (2 * alignment), 0);
                    }
                    let behind = if let Walls::Far(behind) = walls { behind } else { 0 };
                    assert!(
                        place != Place::End || buffer.pages.end - buffer.payload.end < alignment + behind
                    );
                    assert!(buffer.pages.end - buffer.payload.end >= behind);
                    buffer.bytes_mut().fill(7);
                    buffer.check().unwrap();
                    buffer.freeze().unwrap();
                    buffer.check().unwrap();
                    assert!(buffer.bytes().iter().all(|&b| b == 7));
                }
            }
        }
        let mut buffer = Walled::new("it", 100, 4, Place::Odd, Walls::Marks).unwrap();
        let payload = buffer.payload.clone();
        let base = buffer.base;
        // SAFETY: all places below are in the pages that may be touched, and no reference to them is held.
        let set = |at: usize, byte: u8| unsafe { base.add(at).write(byte) };
        for (at, message) in [
            (payload.end, "it wrote 1 byte behind it"),
            (payload.end + 9, "it wrote 10 bytes behind it"),
            (payload.start - 1, "it wrote 1 byte before it"),
        ] {
            set(at, 0);
            assert_eq!(buffer.check().unwrap_err(), message);
            set(at, mark(at));
        }
        buffer.freeze().unwrap();
        set(payload.start + 50, 0);
        assert_eq!(buffer.check().unwrap_err(), "it wrote into it, an input");
    }
}
