//! NdArray.

use std::borrow::Cow;

use burn::backend::{NdArray, TensorMetadata};
use burn::tensor::{Shape, TensorData};
use burn_ndarray::NdArrayTensor;

use super::{CacheMut, CacheRef, CacheTensor, HostBackend, Rows};

impl HostBackend for NdArray {
    fn floats(tensor: &NdArrayTensor) -> Cow<'_, [f32]> {
        match tensor {
            NdArrayTensor::F32(storage) => match storage.view().to_slice() {
                Some(values) => Cow::Borrowed(values),
                None => Cow::Owned(storage.view().iter().copied().collect()),
            },
            NdArrayTensor::F64(storage) => Cow::Owned(storage.view().iter().map(|&v| v as f32).collect()),
            other => panic!("bitnet-burn's operations take f32 or f64 tensors, not {:?}", other.dtype()),
        }
    }

    fn rows(tensor: &NdArrayTensor) -> Rows<'_> {
        Rows { values: Self::floats(tensor), stride: tensor.shape()[1] }
    }

    fn words(tensor: &NdArrayTensor) -> Cow<'_, [u32]> {
        match tensor {
            NdArrayTensor::U32(storage) => match storage.view().to_slice() {
                Some(values) => Cow::Borrowed(values),
                None => Cow::Owned(storage.view().iter().copied().collect()),
            },
            other => panic!("packed weights are U32 words, not {:?}", other.dtype()),
        }
    }

    fn indices(tensor: &NdArrayTensor) -> Vec<u32> {
        macro_rules! convert {
            ($($variant:ident),+) => {
                match tensor {
                    $(NdArrayTensor::$variant(s) => {
                        s.view().iter().map(|&i| u32::try_from(i).unwrap_or(u32::MAX)).collect()
                    })+
                    other => panic!("indices are integers, not {:?}", other.dtype()),
                }
            };
        }
        convert!(I64, I32, I16, I8, U64, U32, U16, U8)
    }

    fn tensor(values: Vec<f32>, shape: Shape) -> NdArrayTensor {
        NdArrayTensor::from_data(TensorData::new(values, shape))
    }

    fn cache(cache: &CacheTensor<Self>) -> CacheRef<'_> {
        match cache {
            CacheTensor::Float(NdArrayTensor::F32(storage)) => {
                CacheRef::F32(storage.view().to_slice().expect("a cache is contiguous"))
            }
            CacheTensor::Int8 { codes: NdArrayTensor::I8(codes), scale: NdArrayTensor::F32(scale) } => {
                CacheRef::Int8 {
                    codes: codes.view().to_slice().expect("a cache is contiguous"),
                    scale: scale.view().to_slice().expect("a cache is contiguous"),
                }
            }
            _ => panic!("a KV cache on NdArray is f32, or int8 with scales of f32"),
        }
    }

    fn update_cache(mut cache: CacheTensor<Self>, write: impl FnOnce(CacheMut)) -> CacheTensor<Self> {
        match &mut cache {
            CacheTensor::Float(NdArrayTensor::F32(storage)) => {
                let array = storage.ensure_owned();
                write(CacheMut::F32(array.as_slice_mut().expect("a cache is contiguous")));
            }
            CacheTensor::Int8 { codes: NdArrayTensor::I8(codes), scale: NdArrayTensor::F32(scale) } => {
                write(CacheMut::Int8 {
                    codes: codes.ensure_owned().as_slice_mut().expect("a cache is contiguous"),
                    scale: scale.ensure_owned().as_slice_mut().expect("a cache is contiguous"),
                });
            }
            _ => panic!("a KV cache on NdArray is f32, or int8 with scales of f32"),
        }
        cache
    }
}
