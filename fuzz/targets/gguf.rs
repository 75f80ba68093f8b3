//! A GGUF file. What our reader accepts, candle's accepts too, and every tensor in it can be read.

#![no_main]

use std::io::Cursor;

use candle_core::Device;
use candle_core::quantized::gguf_file::Content;
use candor::config::Quantization;
use candor::model::{Model, Weights, gguf};
use candor::ops::kernel::Kernel;
use candor::tokenizer::Tokenizer;
use candor_fuzz::folder_with;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let Ok(content) = gguf::read(bytes, bytes.len() as u64) else { return };
    let mut reader = Cursor::new(bytes);
    let reference = Content::read(&mut reader).expect("candle reads what we accept");
    assert_eq!(content.tensor_data_offset, reference.tensor_data_offset);
    for (name, info) in &content.tensor_infos {
        let tensor = content.tensor(&mut reader, name, &Device::Cpu).expect("the tensor was checked");
        assert_eq!(tensor.shape(), &info.shape);
        tensor.dequantize(&Device::Cpu).expect("the type is one that can be converted");
    }
    drop(Tokenizer::from_gguf(&content.metadata));
    let folder = folder_with(&[("model.gguf", bytes)]);
    let weights = Weights::open(folder.path()).expect("it was accepted before");
    for quantization in [None, Some(Quantization::Nf4), Some(Quantization::Q8), Some(Quantization::Keep)] {
        drop(Model::load(&weights, quantization, Kernel::Gemm, &Device::Cpu));
    }
});
