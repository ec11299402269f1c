"""The tiny models and data that the pages of docs/examples find where they name real ones.

A page names a model by its hub name and a file by a name of its own. Here each has a maker: a folder of that name, with
a random model of the same family in it, comes before the hub. A page with a new name needs an entry here.
"""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from conftest import TOKENS, WORDS, build

Maker = Callable[[Path, Any], None]
"""(path to make, word tokenizer)"""


def model(kind: str, head: str | None = None, **sizes: Any) -> Maker:
    """A kind of conftest, as the class ``head`` of transformers."""

    def make(path: Path, tokenizer: Any) -> None:
        import transformers

        found = build(kind, **sizes)
        if head is not None:
            found = getattr(transformers, head)(found.config)
        found.save_pretrained(path)
        tokenizer.save_pretrained(path)

    return make


def marian(path: Path, tokenizer: Any) -> None:
    import torch
    from transformers import MarianConfig, MarianMTModel

    torch.manual_seed(0)
    sizes: dict[str, Any] = dict(
        vocab_size=len(TOKENS), d_model=16, encoder_layers=4, decoder_layers=4, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, max_position_embeddings=64,
        pad_token_id=0, bos_token_id=2, eos_token_id=3, decoder_start_token_id=0, forced_eos_token_id=3,
    )  # fmt: skip
    MarianMTModel(MarianConfig(**sizes)).save_pretrained(path)
    tokenizer.save_pretrained(path)


def rows(make: Callable[[random.Random], dict[str, Any]], count: int = 40) -> Maker:
    """A file of so many rows, as its ending says."""

    def write(path: Path, tokenizer: Any) -> None:
        draw = random.Random(0)
        found = [make(draw) for _ in range(count)]
        if path.suffix == ".csv":
            lines = [",".join(found[0]), *(",".join(map(str, row.values())) for row in found)]
        elif path.suffix == ".txt":
            lines = [f"{row['text']}\n" for row in found]
        else:
            lines = [json.dumps(row) for row in found]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")

    return write


def some(draw: random.Random, count: int = 6) -> str:
    return " ".join(draw.choices(WORDS.split(), k=count))


def tagged(draw: random.Random) -> dict[str, Any]:
    words = some(draw).split()
    return {"words": words, "tags": ["B-ANIMAL" if word in ("cat", "dog", "bird") else "O" for word in words]}


def photos(path: Path, tokenizer: Any) -> None:
    """Dark images of label 0 and light ones of label 1."""
    import numpy as np
    from PIL import Image

    draw = np.random.default_rng(0)
    for label in "01":
        (path / label).mkdir(parents=True)
        for number in range(1, 11):
            pixels = draw.integers(128 * int(label), 128 * int(label) + 128, (28, 28), dtype=np.uint8)
            Image.fromarray(pixels).save(path / label / f"{number:04}.png")


def sounds(path: Path, tokenizer: Any) -> None:
    """Low and high tones."""
    import numpy as np
    import soundfile

    for label, pitch in (("low", 200), ("high", 2000)):
        (path / label).mkdir(parents=True)
        for number in range(10):
            time = np.arange(800 + 50 * number) / 8000
            soundfile.write(path / label / f"{number:02}.wav", np.sin(2 * np.pi * pitch * time), 8000)


def wav2vec2(path: Path, tokenizer: Any) -> None:
    import torch
    from transformers import Wav2Vec2Config, Wav2Vec2FeatureExtractor, Wav2Vec2Model

    torch.manual_seed(0)
    sizes: dict[str, Any] = dict(
        hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=32, conv_dim=[8, 8],
        conv_kernel=[40, 4], conv_stride=[20, 4], num_feat_extract_layers=2, feat_extract_norm="layer",
        do_stable_layer_norm=True, num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2, mask_time_prob=0.0,
        layerdrop=0.0, classifier_proj_size=16,
    )  # fmt: skip
    Wav2Vec2Model(Wav2Vec2Config(**sizes)).save_pretrained(path)
    Wav2Vec2FeatureExtractor(return_attention_mask=True).save_pretrained(path)


def spoken(path: Path, tokenizer: Any) -> None:
    """Tones, and words for them; 8 words at the most."""
    import numpy as np
    import soundfile

    draw, lines = random.Random(0), ["audio,text"]
    folder = path.parent / f"{path.stem}-files"
    folder.mkdir()
    for number in range(20):
        time = np.arange(1000 + 80 * number) / 8000
        soundfile.write(folder / f"{number:02}.wav", np.sin(2 * np.pi * (200 + 100 * number) * time), 8000)
        lines.append(f"{folder.name}/{number:02}.wav,{some(draw, 1 + number % 8)}")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def whisper(path: Path, tokenizer: Any) -> None:
    import torch
    from transformers import (
        WhisperConfig,
        WhisperFeatureExtractor,
        WhisperForConditionalGeneration,
        WhisperProcessor,
    )

    torch.manual_seed(0)
    sizes: dict[str, Any] = dict(
        vocab_size=len(TOKENS), d_model=16, encoder_layers=4, decoder_layers=4, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, max_source_positions=50,
        max_target_positions=64, pad_token_id=0, bos_token_id=2, eos_token_id=3, decoder_start_token_id=2,
    )  # fmt: skip
    WhisperForConditionalGeneration(WhisperConfig(**sizes)).save_pretrained(path)
    WhisperProcessor(WhisperFeatureExtractor(chunk_length=1), tokenizer).save_pretrained(path)


def wav2vec2_ctc(path: Path, tokenizer: Any) -> None:
    """As :func:`wav2vec2`, with the capital letters for a vocabulary."""
    from transformers import AutoConfig, Wav2Vec2CTCTokenizer, Wav2Vec2FeatureExtractor, Wav2Vec2ForCTC
    from transformers import Wav2Vec2Processor as Processor

    wav2vec2(path, tokenizer)
    tokens = ["<pad>", "<s>", "</s>", "<unk>", "|", *"ABCDEFGHIJKLMNOPQRSTUVWXYZ"]
    (path / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    Wav2Vec2ForCTC(AutoConfig.from_pretrained(path, vocab_size=len(tokens))).save_pretrained(path)
    words = Wav2Vec2CTCTokenizer(str(path / "vocab.json"))
    Processor(Wav2Vec2FeatureExtractor(return_attention_mask=True), words).save_pretrained(path)


def speecht5(path: Path, tokenizer: Any) -> None:
    """Two layers of text, four of speech; a step of the decoder makes two frames."""
    import torch
    from transformers import (
        SpeechT5Config,
        SpeechT5FeatureExtractor,
        SpeechT5ForTextToSpeech,
        SpeechT5Processor,
    )

    torch.manual_seed(0)
    sizes: dict[str, Any] = dict(
        vocab_size=len(tokenizer), hidden_size=16, encoder_layers=2, encoder_attention_heads=2, encoder_ffn_dim=32,
        decoder_layers=4, decoder_ffn_dim=32, decoder_attention_heads=2, speech_decoder_prenet_units=16,
        speech_decoder_postnet_units=16, speech_decoder_postnet_layers=2, num_mel_bins=20, max_text_positions=64,
        use_guided_attention_loss=False, positional_dropout=0.0, speaker_embedding_dim=4, encoder_layerdrop=0.0,
        decoder_layerdrop=0.0,
    )  # fmt: skip
    SpeechT5ForTextToSpeech(SpeechT5Config(**sizes)).save_pretrained(path)
    SpeechT5Processor(SpeechT5FeatureExtractor(num_mel_bins=20), tokenizer).save_pretrained(path)


def scattered(path: Path, tokenizer: Any) -> None:
    """Dark images with a grey square of label 0 or a light one of label 1, and where it is."""
    import numpy as np
    from PIL import Image

    draw, lines = random.Random(0), []
    path.mkdir(parents=True)
    for number in range(20):
        x, y, label = draw.randint(0, 40), draw.randint(0, 40), number % 2
        pixels = np.zeros((64, 64), np.uint8)
        pixels[y : y + 20, x : x + 20] = 100 + 150 * label
        Image.fromarray(pixels).save(path / f"{number:04}.png")
        objects = {"bbox": [[x, y, 20, 20]], "category": [str(label)]}
        lines.append(json.dumps({"file_name": f"{number:04}.png", "objects": objects}))
    (path / "metadata.jsonl").write_text("\n".join(lines))


MATERIALS: dict[str, Maker] = {
    "openai/whisper-tiny.en": whisper,
    "facebook/wav2vec2-base-960h": wav2vec2_ctc,
    "microsoft/speecht5_tts": speecht5,
    "recordings.csv": spoken,
    "spoken.csv": spoken,
    "facebook/wav2vec2-base": wav2vec2,
    "scattered": scattered,
    "photos": photos,
    "sounds": sounds,
    "sentence-transformers/all-MiniLM-L6-v2": model("bert"),
    "google-bert/bert-base-cased": model("bert"),
    "google-bert/bert-base-uncased": model("bert", "BertForMaskedLM"),
    "openai-community/gpt2": model("gpt2"),
    "google-t5/t5-small": model("t5"),
    "Helsinki-NLP/opus-mt-en-de": marian,
    "reviews.csv": rows(lambda draw: {"text": some(draw), "label": draw.choice(("negative", "positive"))}),
    "entities.jsonl": rows(tagged),
    "pairs.csv": rows(
        lambda draw: {"sentence1": some(draw), "sentence2": some(draw), "score": round(draw.random() * 5, 2)}
    ),
    "books.txt": rows(lambda draw: {"text": some(draw, 40)}),
    "sentences.jsonl": rows(lambda draw: {"en": some(draw), "de": some(draw)}),
    "articles.jsonl": rows(lambda draw: {"text": some(draw, 12), "summary": some(draw, 4)}),
}
