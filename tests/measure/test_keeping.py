"""Results that are kept: none is measured twice, a cut loses one at most, and no file mixes two
measurements."""

import json
from pathlib import Path

import pytest

from vidgen.measure.keeping import kept_rows

WHAT = {"measure": "squares", "sizes": (1, 2)}


class Squares:
    def __init__(self, last: int = 99) -> None:
        self.asked: list[int] = []
        self.last = last

    def __call__(self, index: int) -> dict[str, int]:
        if index > self.last:
            raise KeyboardInterrupt
        self.asked.append(index)
        return {"square": index**2}


ALL = [{"square": index**2} for index in range(5)]


def test_without_a_file_all_are_measured():
    squares = Squares()
    assert list(kept_rows(None, WHAT, 5, squares)) == ALL
    assert squares.asked == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("cut", [0, 1, 9])
def test_what_is_in_the_file_is_not_measured_again(tmp_path: Path, cut: int):
    path = tmp_path / "kept.jsonl"
    with pytest.raises(KeyboardInterrupt):
        list(kept_rows(path, WHAT, 5, Squares(last=2)))
    text = path.read_text()
    path.write_text(text[: len(text) - cut])
    squares = Squares()
    assert list(kept_rows(path, WHAT, 5, squares)) == ALL
    assert squares.asked == ([3, 4] if not cut else [2, 3, 4])
    assert [json.loads(line) for line in path.read_text().splitlines()[1:]] == ALL
    assert list(kept_rows(path, WHAT, 5, Squares(last=-1))) == ALL


@pytest.mark.parametrize("text", ["not JSON\n", "half a line", '{"measure": "cubes"}\n'])
def test_a_file_of_something_else_is_an_error_and_stays_as_it_is(tmp_path: Path, text: str):
    path = tmp_path / "kept.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match="give another file"):
        list(kept_rows(path, WHAT, 5, Squares()))
    assert path.read_text() == text


def test_a_file_that_cannot_be_written_is_an_error(tmp_path: Path):
    with pytest.raises(ValueError, match="give another file"):
        list(kept_rows(tmp_path / "no" / "kept.jsonl", WHAT, 5, Squares()))
