//! A GGUF file's tokenizer as the files of a Hugging Face folder.

use std::collections::HashMap;
use std::path::Path;

use anyhow::{Context, Error, Result};
use candle_core::quantized::gguf_file::Value;
use serde_json::json;
use tokenizers::processors::template::TemplateProcessing;

use super::{Parts, Tokenizer, gguf};
use crate::run::write_whole;

impl Tokenizer {
    /// Writes `tokenizer.json` and `tokenizer_config.json` of the tokenizer that a GGUF file's metadata describes.
    ///
    /// # Errors
    /// As [`from_gguf`](Self::from_gguf), or if the disk fails.
    pub fn write_folder(metadata: &HashMap<String, Value>, folder: &Path) -> Result<()> {
        let Parts { mut tokenizer, bos_token, eos_token, adds_bos, chat_template, .. } = gguf::read(metadata)?;
        // What transformers goes by: `add_bos_token` alone does nothing there.
        if let Some(bos) = bos_token.as_ref().filter(|_| adds_bos) {
            let id = tokenizer.token_to_id(bos).with_context(|| format!("{bos:?} is not in the vocabulary"))?;
            let template = TemplateProcessing::builder()
                .try_single(vec![bos.clone(), "$A".to_string()])
                .and_then(|builder| builder.try_pair(vec![bos.clone(), "$A".to_string(), "$B:1".to_string()]))
                .map_err(Error::msg)?
                .special_tokens(vec![(bos.clone(), id)])
                .build()?;
            tokenizer.with_post_processor(Some(template));
        }
        let text = tokenizer.to_string(true).map_err(Error::from_boxed)?;
        write_whole(&folder.join("tokenizer.json"), text.as_bytes())?;
        let config = json!({
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": bos_token,
            "eos_token": eos_token,
            "add_bos_token": adds_bos,
            "clean_up_tokenization_spaces": false,
            "chat_template": chat_template,
        });
        write_whole(&folder.join("tokenizer_config.json"), &serde_json::to_vec_pretty(&config)?)
    }
}
