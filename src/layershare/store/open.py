"""Open models by folder or hub name, with errors in the user's own words. Nothing is downloaded for a folder."""

import errno
import json
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import transformers
from safetensors import SafetensorError
from transformers import PretrainedConfig, PreTrainedModel

from layershare.errors import DependencyError, LayershareError, ModelError, StoreError
from layershare.sharing.carry import plan_of

OURS = ".layershare"
"""A file in a folder that is being filled: what is there is ours to take away."""
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def load_model(model: str | Path, auto_class: str | None = None) -> PreTrainedModel:
    """The model in evaluation mode, on the CPU, in the precision of its checkpoint.

    ``auto_class``: name of the transformers class to load it with, or names, see :func:`auto_class_of`; default the one
    that the checkpoint was saved from.
    Raises ModelError if there is no such model, its weights cannot be read, or its code is not part of transformers.
    """
    config = _config(model)
    cls = auto_class_of(config, auto_class or _class_name(config))
    settings = {"use_safetensors": True, "output_loading_info": True}
    loaded, info = _open(model, lambda source: cls.from_pretrained(source, **settings))
    _refuse_holes(model, loaded, info)
    return loaded.eval()


def auto_class_of(config: PretrainedConfig, names: str) -> Any:
    """The class of transformers called ``names``; of several, with ``|`` between them, the first that knows models with
    this config, or else the first."""
    classes = [getattr(transformers, name) for name in names.split("|")]
    return next(
        (one for one in classes if len(classes) > 1 and type(config) in one._model_mapping), classes[0]
    )


def load_answering(model: str | Path, auto_class: str) -> PreTrainedModel:
    """Like :func:`load_model`, so that it gives the answer that a task needs, whose class this is: as it was saved, or
    without its head where hidden states are the answer. Raises ModelError where it lacks the head."""
    found = load_model(model)
    fit = auto_class_of(found.config, auto_class)._model_mapping.get(type(found.config), None)
    if fit is None or isinstance(found, tuple(fit) if isinstance(fit, list | tuple) else fit):
        return found
    if auto_class == "AutoModel":
        return load_model(model, auto_class)
    raise ModelError(
        f"{model} is a {type(found).__name__}, which gives no answer of a {fit.__name__}.",
        "Name the task that it was trained for, or fine-tune it first.",
    )


def load_under_head(model: str | Path, auto_class: str, **settings: Any) -> PreTrainedModel:
    """Like :func:`load_model`, with a class whose head the checkpoint may lack: it is drawn at random, without a word.

    ``settings``: keys of its config with other values. Raises ModelError also when weights of the layers
    are missing; transformers would only log it.
    """
    cls, logger = auto_class_of(_config(model), auto_class), logging.getLogger("transformers")
    settings |= {"use_safetensors": True, "output_loading_info": True}
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        loaded, info = _open(model, lambda source: cls.from_pretrained(source, **settings))
    finally:
        logger.setLevel(before)
    _refuse_holes(model, loaded, info)
    return loaded.eval()


def _refuse_holes(model: str | Path, loaded: PreTrainedModel, info: Mapping[str, Any]) -> None:
    """Raise ModelError where layers have weights that the checkpoint lacks: transformers draws them at random. What a
    shared model lacks is refused as it is loaded, and some members of ties count as lacking."""
    if plan_of(loaded) is not None:
        return
    layers = tuple(
        f"{name}." for name, module in loaded.named_modules() if isinstance(module, torch.nn.ModuleList)
    )
    if missing := sorted(name for name in info["missing_keys"] if name.startswith(layers)):
        raise ModelError(
            f"{model} lacks {missing[0]} and {len(missing) - 1} more weights of the layers.",
            "It is not a checkpoint of this kind of model.",
        )


def load_tokenizer(model: str | Path) -> Any:
    """The tokenizer of the model. Raises ModelError if it has none."""
    return load_processor(model, "AutoTokenizer")


def load_processor(model: str | Path, auto_class: str) -> Any:
    """What turns texts, images or sounds into what the model reads. Raises ModelError if it has none, and
    DependencyError where that needs a library which is not there.

    auto_class: name of the transformers class to load it with: AutoTokenizer, AutoImageProcessor,
    AutoFeatureExtractor or AutoProcessor; or AutoImageProcessor+AutoTokenizer, for :class:`Processors`.
    Images are prepared with Pillow and numpy, also where torchvision is installed: the same pixels everywhere.
    """
    if "+" in auto_class:
        return Processors(*(load_processor(model, name) for name in auto_class.split("+")))
    options = {"backend": "pil"} if auto_class == "AutoImageProcessor" else {}
    try:
        found = _open(
            model, lambda source: getattr(transformers, auto_class).from_pretrained(source, **options)
        )
    except ImportError as error:
        needs = " ".join(str(error).split())[:200]
        raise DependencyError(
            f"What goes before {model} needs a library that is not installed ({needs}).",
            "pip install 'layershare[vision,speech]'",
        ) from None
    words = found if auto_class == "AutoTokenizer" else None
    if words is not None and set(words.get_vocab()) <= set(words.all_special_tokens):
        # transformers makes one of special tokens alone where there are no files
        raise ModelError(
            f"{model} has no tokenizer.",
            "Save the one that it was trained with there: save_pretrained(FOLDER).",
        )
    return found


@dataclass(frozen=True)
class Processors:
    """What goes before a model of images and texts. transformers' own AutoProcessor has none for an encoder of images
    with a decoder of texts, and would take another image processor where torchvision is installed."""

    image_processor: Any
    tokenizer: Any
    attributes: ClassVar[tuple[str, ...]] = ("image_processor", "tokenizer")

    @property
    def model_max_length(self) -> int:
        """The most tokens of a text."""
        return self.tokenizer.model_max_length

    def save_pretrained(self, folder: str | Path) -> None:
        """Both, side by side, as transformers has them."""
        self.image_processor.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)


def sketch(model: str | Path) -> PreTrainedModel:
    """The model on the meta device, from its config alone: names and shapes, no weights read."""
    config = _config(model)
    name = _class_name(config)
    with torch.device("meta"):
        return _open(model, lambda _: getattr(transformers, name)._from_config(config))


def outline(model: str | Path) -> PreTrainedModel:
    """Like :func:`load_model`, on the meta device: all that a checkpoint says, and no weight read.

    Raises ModelError also when it is quantized, or lacks weights, which loading would draw at random.
    """
    cls = getattr(transformers, _class_name(_config(model)))
    settings = {"use_safetensors": True, "device_map": {"": "meta"}, "output_loading_info": True}
    opened, info = _open(model, lambda source: cls.from_pretrained(source, **settings))
    if getattr(opened, "hf_quantizer", None) is not None:
        raise ModelError(f"{model} is quantized.", "Share it before it is quantized.")
    if missing := sorted(info["missing_keys"]):
        raise ModelError(f"{model} lacks {missing[0]} and {len(missing) - 1} more weights of the model.")
    return opened.eval()


def local_folder(model: str | Path) -> Path:
    """The folder of the model; a hub name is downloaded first: weights in safetensors, config and tokenizer."""
    _config(model)
    if (source := Path(model).expanduser()).is_dir():
        return source
    from huggingface_hub import snapshot_download

    wanted = ["*.safetensors", "*.json", "*.txt", "*.model", "*.spm", "*.jinja", "*.tiktoken", "*.codes"]
    other = ["onnx/*", "openvino/*", "original/*"]
    return Path(
        _open(model, lambda name: snapshot_download(name, allow_patterns=wanted, ignore_patterns=other))
    )


def copy_preprocessing(model: str | Path, folder: Path) -> None:
    """Give ``folder`` what goes before and behind ``model``: its tokenizer or image processor, if one can be loaded,
    and the modules of a Sentence Transformer (pooling, normalisation)."""
    # A model of plain tensors has no processor, one may need a library that is not there, and a speech model without a
    # vocabulary has only half of its type's.
    for name in ("AutoProcessor", "AutoTokenizer", "AutoImageProcessor", "AutoFeatureExtractor"):
        try:
            loaded = load_processor(model, name)
            loaded.save_pretrained(folder)
        except Exception as error:  # transformers raises whatever its processors raise
            logging.getLogger(__name__).debug("%s: %s (%s)", model, name, error)
            continue
        if isinstance(loaded, transformers.ProcessorMixin):  # for want of one it gives a tokenizer
            break
    source = local_folder(model)
    if not (source / "modules.json").is_file():
        return
    for name in ("modules.json", "sentence_bert_config.json", "config_sentence_transformers.json"):
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    for module in json.loads((source / "modules.json").read_text(encoding="utf-8")):
        if module["path"] and (source / module["path"]).is_dir():
            shutil.copytree(source / module["path"], folder / module["path"], dirs_exist_ok=True)


@contextmanager
def new_folder(out: str | Path, *, resume: bool = False) -> Iterator[Path]:
    """A folder to fill, ``OUT.part``, that becomes ``out`` when the block ends well.

    When it does not, the part goes away; with ``resume`` it stays, and the next call finds what is in it, unless
    something given was wrong before there was any checkpoint.
    Raises StoreError, before the block runs, if there is something in ``out``, if the part holds an interrupted run
    that would be lost, or files of somebody else, and when the disk is full.
    """
    out = Path(out).expanduser()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise StoreError(
            f"{out} exists and is not an empty folder.", "Choose another folder, or empty it first."
        )
    part = out.with_name(f"{out.name}.part")
    if part.exists():
        _refuse_lost(part, resume=resume)
    if not resume:
        shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir(parents=True, exist_ok=True)
        (part / OURS).touch()
    except OSError as error:
        raise StoreError(f"{out}: cannot be made ({error.strerror}).", "Choose another folder.") from error
    try:
        yield part
        part.replace(out)
        (out / OURS).unlink(missing_ok=True)
    except BaseException as error:
        if not resume or (isinstance(error, LayershareError) and not any(part.rglob("checkpoint-*"))):
            shutil.rmtree(part, ignore_errors=True)
        if isinstance(error, OSError) and error.errno in FULL:
            where = error.filename or out
            raise StoreError(
                f"{where}: cannot be written ({error.strerror}).", "Choose another disk."
            ) from error
        raise


def _refuse_lost(part: Path, *, resume: bool) -> None:
    if any(part.iterdir()) and not (part / OURS).exists():
        raise StoreError(
            f"{part} exists and was not made by layershare.", "Move it away, or choose another folder."
        )
    if not resume and any(part.rglob("checkpoint-*")):
        raise StoreError(
            f"{part} holds an interrupted run.",
            "Run its command again to finish it, delete it, or choose another folder.",
        )


def _config(model: str | Path) -> PretrainedConfig:
    return _open(model, transformers.AutoConfig.from_pretrained)


def _class_name(config: PretrainedConfig) -> str:
    name = next(iter(config.architectures or ()), "AutoModel")
    return name if hasattr(transformers, name) else "AutoModel"


def _open(model: str | Path, get: Callable[[str], Any]) -> Any:
    source = Path(model).expanduser()
    if source.is_file():
        raise ModelError(f"{model} is a file, a model is a folder or a hub name.")
    if not source.is_dir() and (isinstance(model, Path) or str(model).startswith((".", "/", "~"))):
        raise ModelError(f"{model}: no such folder.")
    if source.is_dir() and not (source / "config.json").is_file():
        raise ModelError(f"{model} has no config.json, so it is not a model folder.")
    try:
        return get(str(source) if source.is_dir() else str(model))
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = next(
            (line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__
        )
        where = "" if source.is_dir() else ": no such folder, and the hub did not give it"
        raise ModelError(f"{model}{where} ({reason})") from error
