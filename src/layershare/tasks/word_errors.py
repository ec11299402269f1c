"""How wrong transcripts are, by words and by characters, as jiwer counts them."""

from collections.abc import Callable, Sequence

from layershare.tasks.seq2seq import needs


def measure(normalize: str, written: Sequence[str], true: Sequence[str]) -> dict[str, float]:
    """``wer`` and ``cer`` of all texts together; 0 is best, and more than 1 is possible."""
    try:
        import jiwer
    except ImportError as error:
        raise needs("jiwer", error, "speech") from None
    plain = normalizer(normalize)
    ours, theirs = [plain(one) for one in written], [plain(one) for one in true]
    return {"wer": float(jiwer.wer(theirs, ours)), "cer": float(jiwer.cer(theirs, ours))}


def normalizer(name: str) -> Callable[[str], str]:
    """What makes two texts equal that differ only in what does not count, see
    :class:`~layershare.tasks.speech_recognition.Settings`. Those of Whisper (Radford et al. 2022, arXiv 2212.04356);
    spellings of English as they are."""
    from transformers.models.whisper.english_normalizer import BasicTextNormalizer, EnglishTextNormalizer

    if name == "none":
        return lambda one: " ".join(one.split())
    made = BasicTextNormalizer() if name == "basic" else EnglishTextNormalizer({})
    return lambda one: " ".join(made(one).split())
