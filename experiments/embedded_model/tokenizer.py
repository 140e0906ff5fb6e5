"""The embedded model's byte-level BPE and the token streams it trains on."""

from pathlib import Path

import numpy
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from besa_exp.texts.embedded.text import EmbeddedText

BOS, EOS = "<|begin|>", "<|end|>"
VOCABULARY, WINDOW = 2048, 512


def load_or_train_tokenizer(documents: tuple[str, ...], folder: Path) -> PreTrainedTokenizerFast:
    """Byte-level BPE; puts BOS before a text when special tokens are asked for."""
    if folder.exists():
        return AutoTokenizer.from_pretrained(folder)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=EOS,
        model_max_length=WINDOW,
        clean_up_tokenization_spaces=False,
    )
    fast.save_pretrained(folder)
    return fast


def encode(tokenizer: PreTrainedTokenizerFast, text: EmbeddedText, folder: Path) -> Path:
    """Writes one stream of uint16 token ids: BOS, document, EOS, BOS, document, EOS, and so on."""
    path = folder / f"tokens-{text.sha256[:12]}.npy"
    if not path.exists():
        encodings = tokenizer.backend_tokenizer.encode_batch(list(text.documents))
        ids = [numpy.array([*encoding.ids, tokenizer.eos_token_id], dtype=numpy.uint16) for encoding in encodings]
        numpy.save(path, numpy.concatenate(ids))
    return path
