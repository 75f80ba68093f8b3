//! SentencePiece's byte-pair tokenizer as GGUF files keep it: tokens with scores instead of merges.
//!
//! SentencePiece joins whichever neighbors make the token of the highest score. Here every way of joining two tokens to
//! a third becomes a merge, ordered by that score, as in the `tokenizer.json` that transformers makes of such a model.

use anyhow::{Result, ensure};
use tokenizers::decoders::byte_fallback::ByteFallback;
use tokenizers::decoders::fuse::Fuse;
use tokenizers::decoders::sequence::Sequence;
use tokenizers::models::bpe::{BPE, Merges, Vocab};
use tokenizers::normalizers::replace::Replace;

/// A token is cut in two at every place, so its length is limited; no known vocabulary comes near.
const MAX_BYTES: usize = 1024;

/// The tokenizer of `tokens`, of which those with a true `joined` come about by joining others; what no token spells
/// becomes bytes, or `unknown`.
pub(super) fn tokenizer(
    tokens: &[&str],
    scores: &[f32],
    joined: impl Fn(usize) -> bool,
    unknown: Option<&str>,
) -> Result<tokenizers::Tokenizer> {
    let vocabulary: Vocab = tokens.iter().zip(0..).map(|(token, id)| ((*token).to_owned(), id)).collect();
    ensure!(vocabulary.len() == tokens.len(), "`tokenizer.ggml.tokens` lists a token twice");
    let mut builder = BPE::builder();
    if let Some(unknown) = unknown {
        builder = builder.unk_token(unknown.to_owned()).fuse_unk(true);
    }
    let merges = merges(tokens, scores, joined, &vocabulary)?;
    let bpe = builder.vocab_and_merges(vocabulary, merges).byte_fallback(true).build();
    let space = |from: &str, to: &str| Replace::new(from, to).map_err(anyhow::Error::from_boxed);
    let decoders = vec![space("▁", " ")?.into(), ByteFallback::new().into(), Fuse::new().into()];
    let mut tokenizer = tokenizers::Tokenizer::new(bpe.map_err(anyhow::Error::from_boxed)?);
    tokenizer.with_decoder(Some(Sequence::new(decoders)));
    tokenizer.with_normalizer(Some(space(" ", "▁")?)).map_err(anyhow::Error::from_boxed)?;
    Ok(tokenizer)
}

/// Every way to join two tokens to a third, the highest score first.
fn merges(tokens: &[&str], scores: &[f32], joined: impl Fn(usize) -> bool, vocabulary: &Vocab) -> Result<Merges> {
    let mut merges = Vec::new();
    for (id, token) in tokens.iter().enumerate().filter(|(id, _)| joined(*id)) {
        let (score, bytes) = (scores[id], token.len());
        ensure!(score.is_finite(), "`tokenizer.ggml.scores` row {id} is {score}");
        ensure!(bytes <= MAX_BYTES, "`tokenizer.ggml.tokens` row {id} has {bytes} bytes, more than {MAX_BYTES}");
        let halves = token.char_indices().skip(1).map(|(middle, _)| token.split_at(middle));
        let known = halves.filter(|(left, right)| vocabulary.contains_key(*left) && vocabulary.contains_key(*right));
        merges.extend(known.map(|(left, right)| (score, left, right)));
    }
    merges.sort_by(|(a, ..), (b, ..)| b.total_cmp(a));
    Ok(merges.into_iter().map(|(_, left, right)| (left.to_owned(), right.to_owned())).collect())
}
