"""Tiny random models built from configs: no network, one thread, the same weights every time."""

import os

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
}

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

WORDS = (
    "a the cat dog man woman bird sits runs plays sings on in mat park house guitar song red blue big small"
)
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
TOKENS = [*SPECIAL, *WORDS.split()]

# kind -> (config class, model class, sizes); every stack has four layers
_SAME = dict(hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=32)
_TEXT = dict(vocab_size=len(TOKENS), bos_token_id=2, eos_token_id=3)
_GPT2 = dict(n_embd=16, n_layer=4, n_head=2, n_positions=64)
_T5 = dict(
    d_model=16, d_kv=8, d_ff=32, num_layers=4, num_decoder_layers=4, num_heads=2, decoder_start_token_id=0
)
KINDS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bert": ("BertConfig", "BertModel", _SAME | dict(vocab_size=len(TOKENS), max_position_embeddings=64)),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", _TEXT | _GPT2),
    "llama": ("LlamaConfig", "LlamaForCausalLM", _TEXT | _SAME | dict(num_key_value_heads=1)),
    "t5": ("T5Config", "T5ForConditionalGeneration", _TEXT | _T5 | dict(pad_token_id=0)),
    "vit": ("ViTConfig", "ViTModel", _SAME | dict(image_size=8, patch_size=4)),
}


@pytest.fixture
def tiny() -> Callable[..., Any]:
    """``tiny("llama", tie_word_embeddings=True)``: a model in evaluation mode; sizes and seed can be overridden."""
    return build


@pytest.fixture(params=list(KINDS))
def kind(request: pytest.FixtureRequest) -> str:
    """Each architecture in turn."""
    return request.param


@pytest.fixture
def batch_for() -> Callable[[str], dict[str, Any]]:
    """``batch_for("t5")``: two inputs for ``model(**batch)``, different in every token."""
    return batch


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """A word tokenizer over ``TOKENS`` with BERT's special tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.WordLevel({token: i for i, token in enumerate(TOKENS)}, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    roles = dict(
        zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), SPECIAL, strict=True)
    )
    return PreTrainedTokenizerFast(tokenizer_object=raw, model_max_length=64, **roles)


@pytest.fixture(scope="session")
def bert_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """A saved tiny BERT with its tokenizer. Read it, do not write into it."""
    folder = tmp_path_factory.mktemp("bert")
    build("bert").save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def pairs_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 different sentence pairs with a score, as CSV."""
    import random

    draw = random.Random(0)
    rows = ["sentence1,sentence2,score"]
    for _ in range(120):
        left, right = (draw.sample(WORDS.split(), 8) for _ in range(2))
        rows.append(f"{' '.join(left)},{' '.join(right)},{len(set(left) & set(right)) / 8 * 5:.2f}")
    file = tmp_path_factory.mktemp("pairs") / "pairs.csv"
    file.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def few_pairs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """40 sentence pairs with a score, read and split: few enough that healing does not judge by itself."""
    from layershare.tasks import TASKS

    words = "cat dog man woman bird sits runs plays".split()  # noqa: SIM905
    rows = [f"{a} {b} on a mat,the {b} {a},{len(a)}" for a in words for b in words[:5]]
    file = tmp_path_factory.mktemp("pairs") / "pairs.csv"
    file.write_text("s1,s2,score\n" + "\n".join(rows) + "\n")
    return TASKS["sentence-embedding"].read(file)


def build(kind: str, *, seed: int = 0, **sizes: Any) -> Any:
    import torch
    import transformers

    config, model, default = KINDS[kind]
    torch.manual_seed(seed)
    return getattr(transformers, model)(getattr(transformers, config)(**default | sizes)).eval()


def batch(kind: str) -> dict[str, Any]:
    import torch

    draw = torch.Generator().manual_seed(1)
    if kind == "vit":
        return {"pixel_values": torch.randn(2, 3, 8, 8, generator=draw)}
    ids = torch.randint(len(SPECIAL), len(TOKENS), (2, 6), generator=draw)
    return {"input_ids": ids} | ({"decoder_input_ids": ids.flip(1)} if kind == "t5" else {})
