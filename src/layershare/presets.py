"""Published sharing schemes, by their published names. Knows no torch.

Each takes the number of positions and of unique layers and returns, for every position, the index of the unique
layer that it uses. ``PRESETS`` is the whole list.
"""

from collections.abc import Callable

from layershare.errors import PlanError, nearest

Assignment = tuple[int, ...]


def all_(length: int, unique: int = 1) -> Assignment:
    """One layer everywhere: ALBERT (Lan et al., 2019, 1909.11942), after the Universal Transformer (1807.03819)."""
    return (0,) * length


def sequence(length: int, unique: int) -> Assignment:
    """Runs of neighbours, as even as possible: position i uses i // (N / M) (Takase & Kiyono, 2021, 2104.06022)."""
    return tuple(position * unique // length for position in range(length))


def cycle(length: int, unique: int) -> Assignment:
    """The M layers over and over: position i uses i mod M (Takase & Kiyono, 2021, 2104.06022)."""
    return tuple(position % unique for position in range(length))


def cycle_rev(length: int, unique: int) -> Assignment:
    """As ``cycle``, but the last round (whole or not) runs backwards (Takase & Kiyono, 2021, 2104.06022)."""
    turn = max(-(-length // unique) - 1, 1) * unique
    forward = cycle(length, unique)
    return forward[:turn] + tuple(unique - 1 - i for i in forward[turn:])


def middle_cycle(length: int, unique: int) -> Assignment:
    """First and last stay unique, the middle cycles (Mixture-of-Recursions, Bae et al., 2025, 2507.10524)."""
    return (0, *(1 + i for i in cycle(length - 2, unique - 2)), unique - 1)


def sandwich(length: int, unique: int = 3) -> Assignment:
    """First and last stay unique, all between share one (Subformer, Reid et al., 2021, 2101.00234)."""
    return (0, *(1,) * (length - 2), 2)


def adjacent(length: int, unique: int) -> Assignment:
    """Each layer runs several times in a row before the next (MobileLLM-LS, Liu et al., 2024, 2402.14905).

    The paper repeats every layer equally often; where M does not divide N, the runs are those of ``sequence``.
    """
    return sequence(length, unique)


PRESETS: dict[str, Callable[[int, int], Assignment]] = {
    "all": all_,
    "sequence": sequence,
    "cycle": cycle,
    "cycle_rev": cycle_rev,
    "middle_cycle": middle_cycle,
    "sandwich": sandwich,
    "adjacent": adjacent,
}
# Fewest unique layers with which a scheme makes sense, and the only number where it has no choice.
LEAST = {"middle_cycle": 3, "sandwich": 3}
FIXED = {"all": 1, "sandwich": 3}


def unique_choices(preset: str, length: int) -> range:
    """The numbers of unique layers that ``preset`` offers on a stack of ``length`` layers, smallest first."""
    check(preset)
    if preset in FIXED:
        return range(FIXED[preset], FIXED[preset] + 1) if FIXED[preset] <= length else range(0)
    return range(LEAST.get(preset, 1), length + 1)


def assign(preset: str, length: int, unique: int) -> Assignment:
    """The unique layer of each position. Raises PlanError if the preset is unknown or ``unique`` does not suit it."""
    choices = unique_choices(preset, length)
    if unique not in choices:
        offer = (
            f"{choices[0]} to {choices[-1]}" if len(choices) > 1 else ", ".join(map(str, choices)) or "none"
        )
        raise PlanError(f"preset {preset!r} on {length} layers takes unique = {offer}, given: {unique}.")
    return PRESETS[preset](length, unique)


def check(preset: str) -> None:
    """Raise PlanError, naming the nearest preset, unless ``preset`` exists."""
    if preset not in PRESETS:
        raise PlanError(f"unknown preset {preset!r}.", nearest(preset, PRESETS))
