"""Open what can be measured: a model folder, or an adapter folder with its base.  Importing it loads no torch."""

import json
from pathlib import Path
from typing import Any

from layershare.errors import ModelError
from layershare.measure.size import bytes_on_disk


def base_of(folder: str | Path) -> Path | None:
    """The folder of the base of an adapter folder; None for a model.

    Raises ModelError where the adapter's base is not where it was.
    """
    settings = Path(folder) / "adapter_config.json"
    if not settings.is_file():
        return None
    name = json.loads(settings.read_text(encoding="utf-8")).get("base_model_name_or_path")
    if not name:
        raise ModelError(f"{settings} does not name its base.", "Set base_model_name_or_path there.")
    from layershare.store.open import local_folder

    try:
        return local_folder(name)
    except ModelError as error:
        raise ModelError(
            f"The base of the adapter {folder} cannot be opened: {error.message}",
            f"Run where it can be found, or set base_model_name_or_path in {settings}.",
        ) from None


def open_measured(folder: str | Path, auto_class: str) -> Any:
    """The model in evaluation mode; of an adapter, the base with the adapter on it."""
    from layershare.store.open import load_model

    base = base_of(folder)
    if base is None:
        return load_model(folder, auto_class)
    from layershare.adapt import load

    return load(load_model(base, auto_class), folder)


def bytes_with_base(folder: str | Path) -> int:
    """Bytes of the weights that running it takes: of an adapter, its base's too."""
    base = base_of(folder)
    return bytes_on_disk(folder) + (bytes_on_disk(base) if base is not None else 0)


def sparsity_of(model: Any) -> float | None:
    """Zeros as a share of the stored weights in the layers' matrices; None where no layers are found."""
    from layershare.prune.masks import sparsity

    try:
        zeros, size = sparsity(model)
    except ModelError:
        return None
    return zeros / size if size else None
