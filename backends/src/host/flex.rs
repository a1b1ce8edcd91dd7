//! Flex: tensors are views of shared bytes.

use std::borrow::Cow;

use burn::backend::Flex;
use burn::tensor::{Bytes, DType, Element, Shape, bf16, f16};
use burn_flex::{FlexTensor, Layout};

use super::{CacheMut, CacheRef, CacheTensor, HostBackend, Rows, ScaleValues};

fn contiguous<E: Element + bytemuck::Pod>(tensor: &FlexTensor) -> Cow<'_, [E]> {
    match tensor.layout().contiguous_offsets() {
        Some((from, to)) => Cow::Borrowed(&tensor.storage::<E>()[from..to]),
        None => Cow::Owned(tensor.to_contiguous().as_slice::<E>().expect("contiguous now").to_vec()),
    }
}

fn whole<E: Element + bytemuck::Pod>(cache: &FlexTensor) -> &[E] {
    cache.as_slice().expect("a cache is contiguous")
}

fn whole_mut<E: Element + bytemuck::Pod>(cache: &mut FlexTensor) -> &mut [E] {
    let (from, to) = cache.layout().contiguous_offsets().expect("a cache is contiguous");
    &mut cache.storage_mut()[from..to]
}

impl HostBackend for Flex {
    fn floats(tensor: &FlexTensor) -> Cow<'_, [f32]> {
        match tensor.dtype() {
            DType::F32 => contiguous::<f32>(tensor),
            DType::F16 => Cow::Owned(contiguous::<f16>(tensor).iter().map(|v| v.to_f32()).collect()),
            DType::BF16 => Cow::Owned(contiguous::<bf16>(tensor).iter().map(|v| v.to_f32()).collect()),
            DType::F64 => Cow::Owned(contiguous::<f64>(tensor).iter().map(|&v| v as f32).collect()),
            other => panic!("bitnet-burn's operations take f32, f16, bf16 or f64 tensors, not {other:?}"),
        }
    }

    fn rows(tensor: &FlexTensor) -> Rows<'_> {
        let layout = tensor.layout();
        if tensor.dtype() == DType::F32
            && let [stride, 1] = layout.strides()
            && let Ok(stride) = usize::try_from(*stride)
        {
            let [m, k] = layout.shape()[..] else { panic!("rows of a tensor of rank 2") };
            let from = layout.start_offset();
            let length = if m == 0 { 0 } else { (m - 1) * stride + k };
            return Rows { values: Cow::Borrowed(&tensor.storage::<f32>()[from..from + length]), stride };
        }
        let stride = layout.shape()[1];
        Rows { values: Self::floats(tensor), stride }
    }

    fn scales(tensor: &FlexTensor) -> ScaleValues<'_> {
        match tensor.dtype() {
            DType::F16 => ScaleValues::F16(match contiguous::<f16>(tensor) {
                Cow::Borrowed(values) => Cow::Borrowed(bytemuck::cast_slice(values)),
                Cow::Owned(values) => Cow::Owned(bytemuck::cast_vec(values)),
            }),
            _ => ScaleValues::F32(Self::floats(tensor)),
        }
    }

    fn words(tensor: &FlexTensor) -> Cow<'_, [u32]> {
        assert_eq!(tensor.dtype(), DType::U32, "packed weights are U32 words");
        contiguous::<u32>(tensor)
    }

    fn indices(tensor: &FlexTensor) -> Vec<u32> {
        let data = tensor.clone().into_data();
        data.iter::<i64>().map(|i| u32::try_from(i).unwrap_or(u32::MAX)).collect()
    }

    fn tensor(values: Vec<f32>, shape: Shape) -> FlexTensor {
        FlexTensor::new(Bytes::from_elems(values), Layout::contiguous(shape), DType::F32)
    }

    fn cache(cache: &CacheTensor<Self>) -> CacheRef<'_> {
        match cache {
            CacheTensor::Float(tensor) => match tensor.dtype() {
                DType::F16 => CacheRef::F16(whole(tensor)),
                DType::F32 => CacheRef::F32(whole(tensor)),
                other => panic!("a KV cache of floats is f32 or f16, not {other:?}"),
            },
            CacheTensor::Int8 { codes, scale } => CacheRef::Int8 { codes: whole(codes), scale: whole(scale) },
        }
    }

    fn update_cache(mut cache: CacheTensor<Self>, write: impl FnOnce(CacheMut)) -> CacheTensor<Self> {
        match &mut cache {
            CacheTensor::Float(tensor) => match tensor.dtype() {
                DType::F16 => write(CacheMut::F16(whole_mut(tensor))),
                DType::F32 => write(CacheMut::F32(whole_mut(tensor))),
                other => panic!("a KV cache of floats is f32 or f16, not {other:?}"),
            },
            CacheTensor::Int8 { codes, scale } => {
                write(CacheMut::Int8 { codes: whole_mut(codes), scale: whole_mut(scale) });
            }
        }
        cache
    }
}
