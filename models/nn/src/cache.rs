//! The KV cache: what attention has seen of each sequence, and what gated DeltaNets remember of it.

use std::sync::atomic::{AtomicU64, Ordering};

pub use bitnet_burn_backends::CacheType;
use bitnet_burn_backends::devices;
use bitnet_burn_backends::ops::{self, CacheLayer, DeltaNetState};
use bitnet_burn_backends::{AttentionArgs, DeltaNetShape};
use bitnet_burn_manager::memory::PageArena;
use burn::tensor::{Device, Tensor};

/// What a cache can't do.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CacheError {
    /// The device has no such type.
    #[error("the device {device} does not support a KV cache of {}; use f32", .cache_type.name())]
    Type {
        /// The type.
        cache_type: CacheType,
        /// The device.
        device: String,
    },
    /// The context is full.
    #[error(
        "position {position} is beyond the context of {capacity}; shorten the prompt, or truncate the sequence"
    )]
    Full {
        /// The position that was to be written.
        position: usize,
        /// Positions that a sequence can have.
        capacity: usize,
    },
    /// The positions before are forgotten.
    #[error(
        "a sequence can't be cut to {length} positions: of those, the first {forgotten} were forgotten when it was full"
    )]
    Forgotten {
        /// The length that was asked for.
        length: usize,
        /// Positions that are there no more.
        forgotten: usize,
    },
    /// There is no such sequence.
    #[error("there is no sequence {0} in the KV cache")]
    Unknown(usize),
    /// It was made for another model, or a sequence is another cache's.
    #[error("the KV cache does not fit: {0}")]
    Foreign(String),
}

/// Names a sequence in a [`KvCache`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SequenceId {
    slot: usize,
    /// The cache's number.
    cache: u64,
}

/// Keys and values by sequence and layer, [kv heads, room, head_dim] each, on the layer's device.
///
/// A sequence grows in place; its room doubles when it is full, so a token costs no copy of the
/// history. [`fork`](Self::fork) shares the history until one of the two is written to.
///
/// Layers with a gated DeltaNet have a state in place of keys and values. It can't be cut, only kept:
/// [`snapshot`](Self::snapshot), [`truncate`](Self::truncate).
#[derive(Debug)]
pub struct KvCache {
    /// Tells caches apart, so that none takes another's sequence for its own.
    number: u64,
    slots: Vec<Option<Slot>>,
    n_kv_heads: usize,
    head_dim: usize,
    capacity: usize,
    cache_type: CacheType,
    /// Of each layer.
    devices: Vec<Device>,
    /// By layer: whether it has a state in place of keys and values. Empty: none has.
    delta_nets: Vec<bool>,
    /// Whether a sequence that is full forgets.
    sliding: bool,
    /// Whether a sequence has room for the whole capacity from its beginning.
    preallocated: bool,
}

#[derive(Clone, Debug)]
struct Slot {
    length: usize,
    /// Its first positions that are there no more.
    forgotten: usize,
    room: usize,
    layers: Vec<LayerHistory>,
    /// A length that it had, and the states of its layers then.
    snapshot: Option<(usize, Vec<Option<DeltaNetState>>)>,
}

#[derive(Clone, Debug)]
#[allow(clippy::large_enum_variant, reason = "a few of them for each layer; a box would cost a token more")]
enum LayerHistory {
    /// Keys and values; `None` only while an operation holds them.
    Keys(Option<(CacheLayer, CacheLayer)>),
    /// A state.
    State {
        /// Behind all positions of the sequence; `None` at its beginning.
        now: Option<DeltaNetState>,
        /// Behind the rows of a forward pass that is not complete.
        next: Option<DeltaNetState>,
    },
}

/// Positions that a sequence first has room for.
const FIRST_ROOM: usize = 128;

impl KvCache {
    /// An empty cache.
    ///
    /// # Arguments
    /// * `capacity`: positions that a sequence can have at most
    ///
    /// # Errors
    /// If the device does not support the type.
    pub fn new(
        [n_layers, n_kv_heads, head_dim]: [usize; 3],
        capacity: usize,
        cache_type: CacheType,
        device: &Device,
    ) -> Result<Self, CacheError> {
        Self::on_devices([n_kv_heads, head_dim], capacity, cache_type, vec![device.clone(); n_layers])
    }

    /// An empty cache with a device for each layer.
    ///
    /// # Errors
    /// If one of them does not support the type.
    pub fn on_devices(
        [n_kv_heads, head_dim]: [usize; 2],
        capacity: usize,
        cache_type: CacheType,
        devices: Vec<Device>,
    ) -> Result<Self, CacheError> {
        for (i, device) in devices.iter().enumerate() {
            // Layers of one device follow each other.
            let known = i > 0 && devices[i - 1] == *device;
            if !known && !CacheLayer::supported(cache_type, head_dim, device) {
                return Err(CacheError::Type { cache_type, device: devices::name(device) });
            }
        }
        static CACHES: AtomicU64 = AtomicU64::new(0);
        let number = CACHES.fetch_add(1, Ordering::Relaxed);
        let (slots, delta_nets, sliding, preallocated) = (Vec::new(), Vec::new(), false, false);
        Ok(Self {
            number,
            slots,
            n_kv_heads,
            head_dim,
            capacity,
            cache_type,
            devices,
            delta_nets,
            sliding,
            preallocated,
        })
    }

    /// The same for a model that has gated DeltaNets, by layer.
    ///
    /// # Panics
    /// If there are other numbers of layers.
    pub fn with_delta_nets(mut self, layers: &[bool]) -> Self {
        assert_eq!(layers.len(), self.devices.len(), "layers that have a DeltaNet or not");
        self.delta_nets = layers.to_vec();
        self
    }

    fn has_delta_net(&self, layer: usize) -> bool {
        self.delta_nets.get(layer) == Some(&true)
    }

    /// Whether [`truncate`](Self::truncate) needs a [`snapshot`](Self::snapshot) to keep a part of a sequence.
    pub fn needs_snapshots(&self) -> bool {
        self.delta_nets.contains(&true)
    }

    /// The same as a sliding window: a sequence that is full forgets its oldest positions, an eighth of the capacity at
    /// once, and goes on. Later positions keep their numbers, and attention, which sees differences of positions alone,
    /// looks back over what is left. What the forgotten ones left in the keys and values of later positions stays. When
    /// a prompt's chunk makes room, it makes it for all of its rows: beyond the capacity, results depend on chunks.
    pub fn sliding(mut self) -> Self {
        self.sliding = true;
        self
    }

    /// The same with the memory for all positions taken when a sequence begins, so that none grows later. On Flex and on
    /// GPUs; NdArray's memory is promised then, and given page by page.
    pub fn preallocated(mut self) -> Self {
        self.preallocated = true;
        self
    }

    /// Positions that a sequence can have, or, as a sliding window, look back over.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Whether a sequence can go on.
    ///
    /// # Errors
    /// If there is no such sequence.
    pub fn has_room(&self, id: SequenceId) -> Result<bool, CacheError> {
        let kept = self.kept(id)?;
        Ok(self.sliding && self.capacity > 0 || kept < self.capacity)
    }

    /// Type of the values.
    pub fn cache_type(&self) -> CacheType {
        self.cache_type
    }

    /// The device of each layer's keys and values.
    pub fn devices(&self) -> &[Device] {
        &self.devices
    }

    /// Begins a sequence, with room for `expected` positions before it first grows.
    pub fn add_sequence(&mut self, expected: usize) -> SequenceId {
        let expected = if self.preallocated { self.capacity } else { expected };
        let room = expected.max(FIRST_ROOM).min(self.capacity.max(1));
        // All layers of a sequence grow together, and end together.
        let arena = if self.preallocated { PageArena::committed() } else { PageArena::default() };
        let empty = |device| self.empty(room, device, &arena);
        let layer = |(layer, device)| match self.has_delta_net(layer) {
            true => LayerHistory::State { now: None, next: None },
            false => LayerHistory::Keys(Some((empty(device), empty(device)))),
        };
        let layers = self.devices.iter().enumerate().map(layer).collect();
        self.insert(Slot { length: 0, forgotten: 0, room, layers, snapshot: None })
    }

    fn insert(&mut self, slot: Slot) -> SequenceId {
        let free = self.slots.iter().position(Option::is_none).unwrap_or_else(|| {
            self.slots.push(None);
            self.slots.len() - 1
        });
        self.slots[free] = Some(slot);
        SequenceId { slot: free, cache: self.number }
    }

    fn empty(&self, room: usize, device: &Device, arena: &PageArena) -> CacheLayer {
        let shape = [self.n_kv_heads, room, self.head_dim];
        CacheLayer::zeros(self.cache_type, shape, device, arena)
    }

    fn slot(&self, id: SequenceId) -> Result<&Slot, CacheError> {
        self.own(id)?;
        self.slots.get(id.slot).and_then(Option::as_ref).ok_or(CacheError::Unknown(id.slot))
    }

    fn slot_mut(&mut self, id: SequenceId) -> Result<&mut Slot, CacheError> {
        self.own(id)?;
        self.slots.get_mut(id.slot).and_then(Option::as_mut).ok_or(CacheError::Unknown(id.slot))
    }

    fn own(&self, id: SequenceId) -> Result<(), CacheError> {
        match id.cache == self.number {
            true => Ok(()),
            false => Err(CacheError::Foreign(format!("sequence {} belongs to another cache", id.slot))),
        }
    }

    /// Checks that a layer finds what it needs: keys and values of so many heads, or a DeltaNet's state.
    pub(crate) fn check(&self, layer: usize, heads: Option<[usize; 2]>) -> Result<(), CacheError> {
        let foreign = |problem: String| Err(CacheError::Foreign(problem));
        let (layers, own) = (self.devices.len(), [self.n_kv_heads, self.head_dim]);
        if layer >= layers {
            return foreign(format!("layer {layer} of a model; the cache has {layers} layers"));
        }
        match (heads, self.has_delta_net(layer)) {
            (Some(heads), false) if heads != own => foreign(format!(
                "layer {layer} has {} key heads of {} values; the cache has {} of {}",
                heads[0], heads[1], own[0], own[1]
            )),
            (Some(_), true) => {
                foreign(format!("layer {layer} is attention; the cache has a DeltaNet's state"))
            }
            (None, false) => foreign(format!("layer {layer} is a DeltaNet; the cache has keys and values")),
            _ => Ok(()),
        }
    }

    /// Positions of a sequence that are there: all, but for a sliding window.
    ///
    /// # Errors
    /// If there is no such sequence.
    pub fn kept(&self, id: SequenceId) -> Result<usize, CacheError> {
        let slot = self.slot(id)?;
        Ok(slot.length - slot.forgotten)
    }

    /// Positions of a sequence, those included that a sliding window forgot.
    ///
    /// # Errors
    /// If there is no such sequence.
    pub fn length(&self, id: SequenceId) -> Result<usize, CacheError> {
        Ok(self.slot(id)?.length)
    }

    /// Forgets all positions from `length` on; does nothing if the sequence is not that long. Gives the length that the
    /// sequence has then. Of a model with gated DeltaNets that may be less: the length of the last
    /// [`snapshot`](Self::snapshot), or 0 if there is none at or before `length`.
    ///
    /// # Errors
    /// If there is no such sequence, or a sliding window forgot positions before `length` that would be the last.
    pub fn truncate(&mut self, id: SequenceId, length: usize) -> Result<usize, CacheError> {
        let needs_snapshots = self.needs_snapshots();
        let slot = self.slot_mut(id)?;
        if length < slot.forgotten {
            return Err(CacheError::Forgotten { length, forgotten: slot.forgotten });
        }
        if length >= slot.length {
            return Ok(slot.length);
        }
        slot.length = length;
        if needs_snapshots {
            slot.snapshot = slot.snapshot.take().filter(|(at, _)| *at <= length && *at >= slot.forgotten);
            let (at, states) = slot.snapshot.clone().unwrap_or_default();
            slot.length = at;
            slot.forgotten = slot.forgotten.min(at);
            let mut states = states.into_iter();
            for layer in &mut slot.layers {
                if let LayerHistory::State { now, next } = layer {
                    (*now, *next) = (states.next().flatten(), None);
                }
            }
        }
        Ok(slot.length)
    }

    /// Keeps the states of a sequence's gated DeltaNets as they are now, in place of those that were kept before, so that
    /// [`truncate`](Self::truncate) can go back to its present length. Does nothing for a model that has none.
    ///
    /// # Errors
    /// If there is no such sequence.
    pub fn snapshot(&mut self, id: SequenceId) -> Result<(), CacheError> {
        if !self.needs_snapshots() {
            return Ok(());
        }
        let slot = self.slot_mut(id)?;
        let states = slot.layers.iter().filter_map(|layer| match layer {
            LayerHistory::State { now, .. } => Some(now.clone()),
            LayerHistory::Keys(_) => None,
        });
        slot.snapshot = Some((slot.length, states.collect()));
        Ok(())
    }

    /// A new sequence with the same history.
    ///
    /// # Errors
    /// If there is no such sequence.
    pub fn fork(&mut self, id: SequenceId) -> Result<SequenceId, CacheError> {
        let slot = self.slot(id)?.clone();
        Ok(self.insert(slot))
    }

    /// Ends a sequence.
    ///
    /// # Errors
    /// If there is no such sequence.
    pub fn remove(&mut self, id: SequenceId) -> Result<(), CacheError> {
        self.slot(id)?;
        self.slots[id.slot] = None;
        Ok(())
    }

    /// Bytes of all sequences' keys, values and states (shared histories count for each).
    pub fn bytes(&self) -> usize {
        let position = self.n_kv_heads * 2 * self.cache_type.row_bytes(self.head_dim);
        let of_slot = |slot: &Slot| -> usize {
            let of_layer = |layer: &LayerHistory| match layer {
                LayerHistory::Keys(_) => slot.room * position,
                LayerHistory::State { now, .. } => now.as_ref().map_or(0, DeltaNetState::bytes),
            };
            let kept = slot.snapshot.iter().flat_map(|(_, states)| states).flatten();
            slot.layers.iter().map(of_layer).chain(kept.map(DeltaNetState::bytes)).sum()
        };
        self.slots.iter().flatten().map(of_slot).sum()
    }

    /// Makes room for `rows` more positions.
    ///
    /// # Errors
    /// If the context is full.
    pub(crate) fn reserve(&mut self, id: SequenceId, rows: usize) -> Result<(), CacheError> {
        let (kept, room) = (self.kept(id)?, self.slot(id)?.room);
        let needed = kept + rows;
        if needed > self.capacity {
            if self.sliding && rows <= self.capacity {
                return self.forget(id, needed - self.capacity);
            }
            let position = self.slot(id)?.length + rows - 1;
            return Err(CacheError::Full { position, capacity: self.capacity });
        }
        if needed <= room {
            return Ok(());
        }
        let new_room = needed.max(room * 2).min(self.capacity);
        let arena = PageArena::default();
        for layer in 0..self.devices.len() {
            let Some((k, v)) = self.take(id, layer)? else { continue };
            let grow = |old| self.empty(new_room, &self.devices[layer], &arena).with_positions(old, kept);
            let grown = (grow(k), grow(v));
            self.slot_mut(id)?.layers[layer] = LayerHistory::Keys(Some(grown));
        }
        self.slot_mut(id)?.room = new_room;
        Ok(())
    }

    /// Forgets at least so many of a sequence's oldest positions; then it has room for its whole capacity.
    fn forget(&mut self, id: SequenceId, at_least: usize) -> Result<(), CacheError> {
        let kept = self.kept(id)?;
        let count = at_least.next_multiple_of((self.capacity / 8).max(1)).min(kept);
        let arena = PageArena::default();
        for layer in 0..self.devices.len() {
            let Some((k, v)) = self.take(id, layer)? else { continue };
            let rest = |old: CacheLayer| {
                let empty = self.empty(self.capacity, &self.devices[layer], &arena);
                match kept - count {
                    0 => empty,
                    rest => empty.with_positions(old.from_position(count), rest),
                }
            };
            let rest = (rest(k), rest(v));
            self.slot_mut(id)?.layers[layer] = LayerHistory::Keys(Some(rest));
        }
        let capacity = self.capacity;
        let slot = self.slot_mut(id)?;
        slot.forgotten += count;
        slot.room = capacity;
        Ok(())
    }

    /// Attention of rows qkv [M, (heads + 2 * kv heads) * head_dim] of one layer, at the angles of their positions,
    /// behind what the sequence has, of which a row sees the window's positions: appends their keys and values, and gives
    /// the context [M, heads * head_dim]. The length moves on with [`advance`](Self::advance), after all layers.
    pub(crate) fn attend(
        &mut self,
        id: SequenceId,
        layer: usize,
        qkv: Tensor<2>,
        angles: (Tensor<2>, Tensor<2>),
        (n_heads, window): (usize, Option<usize>),
    ) -> Result<Tensor<2>, CacheError> {
        let (n_kv_heads, head_dim) = (self.n_kv_heads, self.head_dim);
        let position = self.kept(id)?;
        let args = AttentionArgs { n_heads, n_kv_heads, head_dim, position, window };
        // Taken out, so that the operation is the only owner and writes in place.
        let caches = self.take(id, layer)?.expect("attention has keys and values");
        let (context, caches) = ops::cached_attention(qkv, angles, caches, args);
        self.slot_mut(id)?.layers[layer] = LayerHistory::Keys(Some(caches));
        Ok(context)
    }

    /// The keys and values of a layer, which are put back after an operation; `None` for one that has a state.
    fn take(&mut self, id: SequenceId, layer: usize) -> Result<Option<(CacheLayer, CacheLayer)>, CacheError> {
        Ok(match &mut self.slot_mut(id)?.layers[layer] {
            LayerHistory::Keys(keys) => Some(keys.take().expect("no operation holds them")),
            LayerHistory::State { .. } => None,
        })
    }

    /// The state of a layer's DeltaNet behind all positions of a sequence.
    ///
    /// # Panics
    /// If the layer has keys and values.
    pub(crate) fn delta_net(
        &self,
        id: SequenceId,
        layer: usize,
        shape: &DeltaNetShape,
    ) -> Result<DeltaNetState, CacheError> {
        match &self.slot(id)?.layers[layer] {
            LayerHistory::State { now: Some(state), .. } => Ok(state.clone()),
            LayerHistory::State { now: None, .. } => Ok(DeltaNetState::zeros(shape, &self.devices[layer])),
            LayerHistory::Keys(_) => panic!("a DeltaNet in layer {layer}, which has keys and values"),
        }
    }

    /// The state of a layer's DeltaNet behind further rows. It counts when the rows do: [`advance`](Self::advance).
    pub(crate) fn set_delta_net(
        &mut self,
        id: SequenceId,
        layer: usize,
        state: DeltaNetState,
    ) -> Result<(), CacheError> {
        if let LayerHistory::State { next, .. } = &mut self.slot_mut(id)?.layers[layer] {
            *next = Some(state);
        }
        Ok(())
    }

    /// Counts `rows` appended positions.
    pub(crate) fn advance(&mut self, id: SequenceId, rows: usize) -> Result<(), CacheError> {
        let slot = self.slot_mut(id)?;
        slot.length += rows;
        for layer in &mut slot.layers {
            if let LayerHistory::State { now, next } = layer
                && next.is_some()
            {
                *now = next.take();
            }
        }
        Ok(())
    }
}
