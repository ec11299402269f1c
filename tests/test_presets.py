"""Published schemes against tables written by hand from the papers."""

import pytest

from layershare.errors import PlanError
from layershare.presets import PRESETS, assign, unique_choices

TABLES = [
    ("all", 4, 1, "0000"),
    # Takase & Kiyono (2021), figure 1 and algorithm 1
    ("sequence", 6, 3, "001122"),
    ("sequence", 12, 4, "000111222333"),
    ("sequence", 6, 6, "012345"),
    ("cycle", 6, 3, "012012"),
    ("cycle", 9, 3, "012012012"),
    ("cycle", 7, 3, "0120120"),
    ("cycle_rev", 6, 3, "012210"),
    ("cycle_rev", 9, 3, "012012210"),
    ("cycle_rev", 8, 2, "01010110"),
    ("cycle_rev", 7, 3, "0120122"),  # i <= M (ceil(N / M) - 1) forwards, then M - ((i - 1) mod M)
    ("cycle_rev", 5, 3, "01221"),
    ("cycle_rev", 4, 4, "0123"),
    ("cycle_rev", 4, 1, "0000"),
    # Mixture-of-Recursions (Bae et al., 2025), table of sharing strategies: first and last unique
    ("middle_cycle", 8, 5, "01231234"),
    ("middle_cycle", 6, 3, "011112"),
    ("middle_cycle", 5, 5, "01234"),
    # Subformer (Reid et al., 2021), figure 1
    ("sandwich", 6, 3, "011112"),
    ("sandwich", 3, 3, "012"),
    # MobileLLM (Liu et al., 2024), figure 6b
    ("adjacent", 6, 3, "001122"),
    ("adjacent", 12, 6, "001122334455"),
    ("adjacent", 6, 1, "000000"),
]


@pytest.mark.parametrize(("preset", "length", "unique", "table"), TABLES)
def test_table(preset, length, unique, table):
    assert "".join(map(str, assign(preset, length, unique))) == table


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("length", range(1, 14))
def test_every_unique_layer_is_used_and_numbered_in_order(preset, length):
    for unique in unique_choices(preset, length):
        assignment = assign(preset, length, unique)
        assert len(assignment) == length
        assert list(dict.fromkeys(assignment)) == list(range(unique))


@pytest.mark.parametrize("preset", ["sequence", "adjacent"])
def test_runs_are_even(preset):
    for length in range(1, 14):
        for unique in range(1, length + 1):
            assignment = assign(preset, length, unique)
            runs = [assignment.count(i) for i in range(unique)]
            assert list(assignment) == sorted(assignment)
            assert max(runs) - min(runs) <= 1


@pytest.mark.parametrize(
    ("preset", "unique", "words"),
    [
        ("cicle", 2, "unknown preset 'cicle'. Did you mean 'cycle'?"),
        ("cycle", 0, "takes unique = 1 to 6, given: 0"),
        ("cycle", 7, "preset 'cycle' on 6 layers takes unique = 1 to 6, given: 7"),
        ("middle_cycle", 2, "takes unique = 3 to 6, given: 2"),
        ("all", 2, "takes unique = 1, given: 2"),
        ("sandwich", 4, "takes unique = 3, given: 4"),
    ],
)
def test_wrong_choices_are_named(preset, unique, words):
    with pytest.raises(PlanError) as caught:
        assign(preset, 6, unique)
    assert words in str(caught.value)


def test_short_stacks_have_no_sandwich():
    with pytest.raises(PlanError, match="takes unique = none, given: 3"):
        assign("sandwich", 2, 3)
