"""A tokenizer of one's own, learnt from the text: byte-level BPE, or WordPiece as BERT has it."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from layershare.errors import ModelError
from layershare.store.open import load_tokenizer

Kind = Literal["byte-level BPE", "WordPiece"]
SENTINELS = tuple(f"<extra_id_{number}>" for number in range(100))
BERT = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}


def train_tokenizer(
    texts: Iterable[str], kind: Kind, size: int, *, sentinels: bool = False, length: int | None = None
) -> Any:
    """A fast tokenizer of at most ``size`` tokens (fewer if the text does not give more), read from a stream.

    ``byte-level BPE`` (Radford et al. 2019) has <pad>, </s> and, with ``sentinels``, the 100 <extra_id_...> of T5,
    and then ends every text with </s>; it knows every byte. ``WordPiece`` is lower case with the five special tokens
    of BERT, and puts [CLS] and [SEP] around a text. ``length``: its ``model_max_length``.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    if kind == "WordPiece":
        roles = BERT
        raw = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        raw.normalizer = normalizers.BertNormalizer(lowercase=True)
        raw.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        raw.decoder = decoders.WordPiece()
        special = list(BERT.values())
        trainer: Any = trainers.WordPieceTrainer(vocab_size=size, special_tokens=special, show_progress=False)
    else:
        roles = {"pad_token": "<pad>", "eos_token": "</s>"}
        raw = Tokenizer(models.BPE())
        raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        raw.decoder = decoders.ByteLevel()
        special = [*roles.values(), *(SENTINELS if sentinels else ())]
        trainer = trainers.BpeTrainer(
            vocab_size=size,
            special_tokens=special,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
    raw.train_from_iterator(texts, trainer)
    if kind == "WordPiece":
        ends = [("[CLS]", raw.token_to_id("[CLS]")), ("[SEP]", raw.token_to_id("[SEP]"))]
        raw.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=ends
        )
    elif sentinels:
        ends = [("</s>", raw.token_to_id("</s>"))]
        raw.post_processor = processors.TemplateProcessing(
            single="$A </s>", pair="$A </s> $B </s>", special_tokens=ends
        )
    extra = {"extra_special_tokens": list(SENTINELS)} if sentinels else {}
    limit = {} if length is None else {"model_max_length": length}
    return PreTrainedTokenizerFast(tokenizer_object=raw, **roles, **extra, **limit)


def words_for(config: Any, texts: Iterable[str]) -> Any:
    """A WordPiece tokenizer of the texts for a model that is made from ``config``, which is told of it in place: of its
    number of tokens, at most the vocabulary asked for, and of those that begin, end and fill up a text."""
    text = config.get_text_config(decoder=True)
    length = getattr(text, "max_position_embeddings", None)
    tokenizer = train_tokenizer(texts, "WordPiece", text.vocab_size, length=length)
    text.vocab_size = len(tokenizer)
    for part in (config, text):
        part.pad_token_id, part.bos_token_id = tokenizer.pad_token_id, tokenizer.cls_token_id
        part.eos_token_id = tokenizer.sep_token_id
    if config.is_encoder_decoder:
        config.decoder_start_token_id = tokenizer.cls_token_id
    return tokenizer


def open_tokenizer(source: str | Path) -> Any:
    """The tokenizer of a model, or one that stands alone in its folder. Raises ModelError if there is none."""
    folder = Path(source).expanduser()
    if not folder.is_dir() or (folder / "config.json").is_file():
        return load_tokenizer(source)
    from transformers import PreTrainedTokenizerFast

    if not (folder / "tokenizer.json").is_file():
        raise ModelError(f"{source} has no tokenizer.json, so it is not the folder of a tokenizer.")
    return PreTrainedTokenizerFast.from_pretrained(folder)
