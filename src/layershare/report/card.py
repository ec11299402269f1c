"""The model card: README.md for the Hugging Face hub, with the front matter that the hub reads."""

import json
import re
from pathlib import Path

from layershare.result import Result
from layershare.tasks import TASKS

PIPELINE_TAGS = {
    "sentence-embedding": "sentence-similarity",
    "text-classification": "text-classification",
    "token-classification": "token-classification",
    "masked-lm": "fill-mask",
    "causal-lm": "text-generation",
    "translation": "translation",
    "summarization": "summarization",
    "image-classification": "image-classification",
    "image-to-text": "image-to-text",
    "object-detection": "object-detection",
    "zero-shot-image-classification": "zero-shot-image-classification",
    "audio-classification": "audio-classification",
    "speech-recognition": "automatic-speech-recognition",
    "text-to-speech": "text-to-speech",
}
LIMITS = (
    "Quality was measured on the data named above and on nothing else.",
    "Licence, intended use and biases are those of the original model.",
)
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def model_card(result: Result) -> str:
    """``result`` as a README: front matter, the before/after table, how to load it, and how it was made."""
    name = _name(result.source) or "this model"
    sections = [
        front_matter(result),
        f"# {name}, layers shared",
        f"{result.headline()}.  Made with layershare.",
        f"## Before and after\n\n{result.markdown()}",
        _loading(result),
        f"## The plan\n\n```\n{result.plan_picture.rstrip()}\n```" if result.plan_picture else "",
        _making(result),
        "## Limits\n\n" + "\n".join(f"- {line}" for line in [*LIMITS, *result.notes]),
    ]
    return "\n\n".join(filter(None, sections)) + "\n"


def front_matter(result: Result) -> str:
    """The YAML block.  Values are written as JSON, which is YAML, so that no name can break it."""
    lines = ["---", "library_name: transformers", "tags:", "- layershare", "- parameter-sharing"]
    if tag := PIPELINE_TAGS.get(result.task):
        lines.append(f"pipeline_tag: {tag}")
    if is_hub_name(result.source):
        lines.append(f"base_model: {json.dumps(result.source)}")
    return "\n".join([*lines, "---"])


def is_hub_name(source: str) -> bool:
    """Whether ``source`` is ``owner/name`` and no folder here: a local path must not become a link."""
    return bool(HUB_NAME.fullmatch(source)) and not source.startswith(".") and not Path(source).exists()


def _name(source: str) -> str:
    """A hub name in full, of a local folder only its own name: a card is published, paths are private."""
    return source if is_hub_name(source) else Path(source).name


def _loading(result: Result) -> str:
    auto, *others = TASKS[result.task].auto_class.split("|") if result.task in TASKS else ["AutoModel"]
    before = TASKS[result.task].processor.split("+") if result.task in TASKS else ["AutoTokenizer"]
    names = ["tokenizer" if one == "AutoTokenizer" else "processor" for one in before]
    opened = "\n".join(
        f'{name} = {one}.from_pretrained("FOLDER")' for name, one in zip(names, before, strict=True)
    )
    return f"""## Use

```python
import layershare  # so that transformers can read shared layers
from transformers import {", ".join([auto, *before])}{f"  # or {', '.join(others)}, by its type" if others else ""}

model = {auto}.from_pretrained("FOLDER")
{opened}
```

Without `import layershare`, transformers refuses to load it."""


def _making(result: Result) -> str:
    files = result.data.get("files", {})
    sizes = result.data.get("sizes", {})
    facts = [
        f"- command: `{result.command}`" if result.command else "",
        f"- seed: {result.seed}" if result.seed is not None else "",
        *(f"- data: {Path(name).name}, sha256 `{sha256}`" for name, sha256 in dict(files).items()),
        "- rows: " + ", ".join(f"{name} {rows:,}" for name, rows in sizes.items()) if sizes else "",
        "- versions: " + ", ".join(f"{name} {version}" for name, version in result.versions.items()),
        f"- measured on: {result.machine}" if result.machine else "",
    ]
    return "## How it was made\n\n" + "\n".join(filter(None, facts))
