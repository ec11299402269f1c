"""A stage of a run: a folder that appears whole or not at all and says what it was made from.  No torch.

While it is made, everything is in ``OUT.part``. What is there stays after an interruption, and the same call goes on
with it, unless the inputs are others. The finished folder holds ``layershare.json``: its inputs (hashes and settings,
no times) and what was noted. A second call with equal inputs finds it and makes nothing.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from layershare.errors import LayershareError, StoreError
from layershare.result import write_atomic

RECORD = "layershare.json"


def make(
    out: Path, inputs: Mapping[str, Any], fill: Callable[[Path], Mapping[str, Any]], *, replace: bool = False
) -> bool:
    """Have ``out`` made from ``inputs`` by ``fill``; False where it is there already.

    ``fill`` gets the path of a folder to make, which must appear whole or not at all (see
    :func:`layershare.store.open.new_folder`), and returns what the record shall hold beside the inputs.
    ``replace``: a stage of other inputs in ``out`` gives way, once the new one is whole.

    Raises StoreError if ``out`` holds something else, or (without ``replace``) a stage of other inputs.
    """
    wanted = json.loads(json.dumps(inputs))
    refuse_foreign(out)
    old = record(out)
    if old is not None:
        if old["inputs"] == wanted:
            return False
        if not replace:
            was = old["inputs"]
            changed = next(
                name for name in wanted | was if name not in was or was[name] != wanted.get(name, ...)
            )
            raise StoreError(
                f"{out} holds the result of a run with another {changed}.",
                "Choose another folder, or --overwrite.",
            )
    part = part_of(out)
    made, begun = part / "made", part / "inputs.json"
    if part.exists() and any(part.iterdir()):
        _clear(part, begun, wanted, replace=replace)
    part.mkdir(parents=True, exist_ok=True)
    write_atomic(begun, json.dumps(wanted))
    if record(made) is None:
        # Where it was killed between the last file and the record, only the notes are lost.
        notes = {} if made.exists() else _filled(fill, made, part)
        write_atomic(made / RECORD, json.dumps({"inputs": wanted, **notes}, indent=1) + "\n")
    if old is not None:
        out.replace(part / "old")
    elif out.exists():
        out.rmdir()
    made.replace(out)
    shutil.rmtree(part)
    return True


def discard(out: Path) -> None:
    """Take ``out`` away, a folder of a run, and what there is of an unfinished one. Raises StoreError where that is
    somebody else's."""
    refuse_foreign(out)
    part = part_of(out)
    if part.exists() and any(part.iterdir()):
        _refuse_foreign_part(part)
    for old in (out, part):
        shutil.rmtree(old, ignore_errors=True)


def _clear(part: Path, begun: Path, wanted: Mapping[str, Any], *, replace: bool) -> None:
    """Take an unfinished run with other inputs away: its checkpoints do not fit. Raises StoreError where they would be
    missed, or something else is there."""
    _refuse_foreign_part(part)
    if (was := json.loads(begun.read_text())) == wanted:
        return
    if not replace and any(part.rglob("checkpoint-*")):
        changed = next(name for name in wanted if was.get(name, ...) != wanted[name])
        raise StoreError(
            f"{part} holds an interrupted run with another {changed}.",
            "Run its command again to finish it, choose another folder, or --overwrite.",
        )
    shutil.rmtree(part)


def _refuse_foreign_part(part: Path) -> None:
    if not (part / "inputs.json").is_file():
        raise StoreError(f"{part} exists and is not of a run.", "Move it away, or choose another folder.")


def _filled(fill: Callable[[Path], Mapping[str, Any]], made: Path, part: Path) -> Mapping[str, Any]:
    """What ``fill`` notes. Where it is refused before anything was begun, nothing is left of it."""
    try:
        return fill(made)
    except LayershareError:
        if [file.name for file in part.iterdir()] == ["inputs.json"]:
            shutil.rmtree(part)
        raise


def record(folder: Path) -> dict[str, Any] | None:
    """What a finished stage says of itself; None for any other folder, or none."""
    return json.loads((folder / RECORD).read_text()) if (folder / RECORD).is_file() else None


def matches(folder: Path, inputs: Mapping[str, Any]) -> bool:
    """Whether ``folder`` is the finished stage of these inputs."""
    return (found := record(folder)) is not None and found["inputs"] == json.loads(json.dumps(inputs))


def refuse_foreign(out: Path) -> None:
    """Raise StoreError where ``out`` holds something that no run of stages made."""
    if out.is_file() or (out.is_dir() and any(out.iterdir()) and record(out) is None):
        raise StoreError(
            f"{out} exists and is not a folder of a run.", "Choose another folder, or empty it first."
        )


def part_of(out: Path) -> Path:
    """Where ``out`` is made."""
    return out.with_name(f"{out.name}.part")


def fingerprint(folder: Path) -> str:
    """A hash of the config and all weights of a model folder, or of an adapter folder."""
    digest = hashlib.sha256()
    names = (folder / name for name in ("config.json", "adapter_config.json"))
    for file in sorted([*filter(Path.is_file, names), *folder.glob("*.safetensors")]):
        digest.update(file.name.encode())
        digest.update(hash_of(file).digest())
    return digest.hexdigest()


def hash_of(file: Path) -> Any:
    """The SHA-256 of a file, as an object of hashlib; of a folder, that of the names and bytes of all files in it."""
    if file.is_dir():
        found = hashlib.sha256()
        for one in sorted(file.rglob("*")):
            if one.is_file():
                found.update(f"{one.relative_to(file)} {hash_of(one).hexdigest()}\n".encode())
        return found
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256")
