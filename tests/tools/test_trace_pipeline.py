"""tools/trace_pipeline.py: what it reads, draws, writes for Chrome, and refuses."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vidgen.parallel.evidence import COLUMNS, SpanFile

_PATH = Path(__file__).resolve().parents[2] / "tools" / "trace_pipeline.py"
_spec = importlib.util.spec_from_file_location("trace_pipeline", _PATH)
assert _spec is not None and _spec.loader is not None
tool = importlib.util.module_from_spec(_spec)
sys.modules["trace_pipeline"] = tool  # where a dataclass looks up its module
_spec.loader.exec_module(tool)

EPOCH_S = 1795254760.0


def simulate(
    num_ranks: int = 4, num_blocks: int = 8, num_steps: int = 6, took_s: float = 0.1
) -> list[list[float]]:
    """Rows of a render with two guidance branches; a block's next step waits for its own last one."""
    rows, free_s, back_s = [], [EPOCH_S] * num_ranks, {}
    for tick in range(num_blocks + num_steps - 1):
        for block in reversed(range(max(0, tick - num_steps + 1), min(num_blocks - 1, tick) + 1)):
            step = tick - block
            for run in range(2):
                ready_s = back_s.get((block, step), EPOCH_S)
                for rank in range(num_ranks):
                    start_s = max(free_s[rank], ready_s)
                    free_s[rank] = ready_s = start_s + took_s
                    rows.append([0, rank, tick, block, step, run, round(start_s, 6), round(ready_s, 6)])
                back_s[block, step + 1] = max(ready_s, back_s.get((block, step + 1), 0))
    return rows


def write(job: Path, rows: list[list[float]], end: str = "") -> Path:
    """The job's folder, with a trace."""
    job.mkdir(exist_ok=True)
    (job / "trace.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [COLUMNS, *rows]) + end)
    return job


def test_columns_are_those_that_the_engine_writes(tmp_path: Path):
    SpanFile(tmp_path / "trace.jsonl").write(0, [(1, (3, 2, 1, 0, EPOCH_S, EPOCH_S + 0.5))])
    (span,) = tool.read_trace(tmp_path).tolist()
    assert COLUMNS == tool.COLUMNS and span == (0, 1, 3, 2, 1, 0, 0.0, 0.5)


@pytest.mark.parametrize("end", ["[0, 1, 2", "[0, 1, 2, 3, 4, 0, 1795254760.", "[", "\n"])
def test_a_last_line_that_is_cut_is_left_out(tmp_path: Path, end: str):
    rows = simulate(num_blocks=2, num_steps=2)
    assert len(tool.read_trace(write(tmp_path, rows, end))) == len(rows) == 4 * 2 * 2 * 2


def test_a_row_behind_the_cut_of_a_killed_process_counts(tmp_path: Path):
    row = [0, 0, 0, 0, 0, 0, EPOCH_S, EPOCH_S + 1]
    again = json.dumps([1, *row[1:6], EPOCH_S + 3, EPOCH_S + 4])
    job = write(tmp_path, [row], f"[0, 0, 0, 0, 1, 0, 17952{again}\n{again}\n")
    assert tool.read_trace(job)["attempt"].tolist() == [0, 1, 1]


def test_times_begin_with_the_first_start_and_lines_may_come_in_any_order(tmp_path: Path):
    rows = simulate(num_blocks=2, num_steps=2)
    spans = tool.read_trace(write(tmp_path, rows[::-1]))
    assert spans["start_s"][0] == 0 and np.all(np.diff(spans["start_s"]) >= 0)
    assert spans["stop_s"].max() == pytest.approx(max(row[-1] for row in rows) - EPOCH_S)


def test_share_and_gap_of_each_rank_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    times = [(0, 0, 0.0, 1.0), (0, 0, 1.5, 2.0), (0, 1, 0.5, 1.0), (1, 1, 3.0, 4.0)]
    rows = [[a, rank, 0, 0, 0, 0, EPOCH_S + start, EPOCH_S + stop] for a, rank, start, stop in times]
    job, png = str(write(tmp_path, rows)), str(tmp_path / "a.png")
    assert tool.main([job, "-o", png]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first == "rank 0: 2 spans, busy 37.5%, longest gap 500.0 ms at 1.000 s"
    assert second == "rank 1: 2 spans, busy 37.5%, longest gap 2000.0 ms at 1.000 s (restart)"
    assert tool.main([job, "-o", png, "--from-s", "0.5", "--to-s", "1.5"]) == 0
    assert capsys.readouterr().out.startswith("rank 0: 2 spans, busy 50.0%")


def test_spans_that_overlap_count_once(tmp_path: Path):
    rows = [[0, 0, 0, 0, 0, 0, EPOCH_S, EPOCH_S + 4], [0, 0, 0, 1, 0, 0, EPOCH_S + 1, EPOCH_S + 2]]
    assert tool.look(tool.read_trace(write(tmp_path, rows))).busy_shares == [1.0]


def test_ticks_start_where_rank_0_starts_them_whatever_is_shown(tmp_path: Path):
    spans = tool.read_trace(write(tmp_path, simulate()))
    whole, part = tool.look(spans), tool.look(spans, 2.0, 5.0)
    assert whole.ticks["tick"].tolist() == list(range(13))
    assert set(part.ticks["start_s"]) == {start for start in whole.ticks["start_s"] if 2 <= start <= 5}


@pytest.mark.parametrize("num_ranks", [1, 4, 40])
def test_png_is_2000_wide_and_as_high_as_its_ranks_need(tmp_path: Path, num_ranks: int):
    job, png = write(tmp_path, simulate(num_ranks, 3, 3)), tmp_path / "a.png"
    assert tool.main([str(job), "-o", str(png)]) == 0
    with Image.open(png) as image:
        assert image.format == "PNG" and image.size == (2000, 250 + {1: 62, 4: 250, 40: 2000}[num_ranks])
        assert len(np.unique(np.asarray(image.convert("RGB")).reshape(-1, 3), axis=0)) > 50


def test_many_spans_and_many_restarts_can_be_drawn(tmp_path: Path):
    rows = [[i // 500, i % 2, i, i, i % 50, 0, EPOCH_S + i, EPOCH_S + i + 1.5] for i in range(20_000)]
    job, png = write(tmp_path / "$x$ 视频", rows), tmp_path / "a.png"
    assert tool.main([str(job), "-o", str(png)]) == 0
    assert tool.main([str(job), "-o", str(png), "--from-s", "499.6", "--to-s", "499.7"]) == 0


def test_chrome_trace_holds_every_span(tmp_path: Path):
    rows, chrome = simulate(), tmp_path / "a.json"
    rows[-1][0] = 1
    words = [str(write(tmp_path, rows)), "-o", str(tmp_path / "a.png"), "--chrome", str(chrome)]
    assert tool.main([*words, "--from-s", "1", "--to-s", "2"]) == 0
    events = json.loads(chrome.read_text())["traceEvents"]
    found = {
        (e["pid"], e["tid"], e["args"]["tick"], e["name"], e["args"]["run"], e["ts"], e["ts"] + e["dur"])
        for e in events
        if e["ph"] == "X"
    }
    assert found == {
        (a, rank, tick, f"block {block} step {step}", run, *(round((s - EPOCH_S) * 1e6) for s in times))
        for a, rank, tick, block, step, run, *times in rows
    }
    names = {(e["pid"], e["tid"], e["args"]["name"]) for e in events if e["name"] == "thread_name"}
    assert names == {(0, rank, f"rank {rank}") for rank in range(4)} | {(1, 3, "rank 3")}


ROW = [0, 0, 0, 0, 0, 0, EPOCH_S, EPOCH_S + 1]
BROKEN = {
    "cut": "[0, 0, 0",
    "words": "hello",
    "short": "[0, 0]",
    "true": "[true, 0, 0, 0, 0, 0, 1.0, 2.0]",
    "negative": "[0, -1, 0, 0, 0, 0, 1.0, 2.0]",
    "backwards": "[0, 0, 0, 0, 0, 0, 2.0, 1.0]",
    "endless": "[0, 0, 0, 0, 0, 0, 2.0, Infinity]",
    "float": "[0, 0.5, 0, 0, 0, 0, 1.0, 2.0]",
    "object": "{}",
}


def refused(words: list[str], folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on stderr; the files that were there stay as they were."""
    png, chrome = folder / "old.png", folder / "old.json"
    png.write_text("old")
    chrome.write_text("old")
    code = tool.main(["-o", str(png), "--chrome", str(chrome), *words])
    out, err = capsys.readouterr()
    assert code == 2 and not out and err.startswith("trace_pipeline: error: ") and err.count("\n") == 1
    assert png.read_text() == chrome.read_text() == "old"
    return err


@pytest.mark.parametrize("line", BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_line_in_the_middle_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str], line: str):
    job = write(tmp_path, [ROW], line + "\n" + json.dumps(ROW) + "\n")
    err = refused([str(job)], tmp_path, capsys)
    assert "trace.jsonl, line 3: " in err and repr(line) in err


@pytest.mark.parametrize("text", ["", "\n", "[1, 2]\n", '["attempt", "ra', json.dumps(COLUMNS)])
def test_a_trace_without_spans_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str):
    (tmp_path / "trace.jsonl").write_text(text)
    assert "; wait " in refused([str(tmp_path)], tmp_path, capsys)


def test_a_folder_that_is_no_job_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert "no such folder" in refused([str(tmp_path / "nowhere")], tmp_path, capsys)
    assert "no trace.jsonl" in refused([str(tmp_path)], tmp_path, capsys)


@pytest.mark.parametrize(
    "words",
    ["--from-s 5 --to-s 5", "--from-s 5 --to-s 4", "--from-s 900", "--to-s -1", "--from-s nan", "--to-s x"],
)
def test_a_view_of_nothing_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], words: str):
    err = refused([str(write(tmp_path, simulate())), *words.split()], tmp_path, capsys)
    assert words.split()[0] in err and words.split()[1] in err


@pytest.mark.parametrize("words", ["-o a.pdf", "-o nowhere/a.png", "--chrome a.txt", "--zoom 3"])
def test_a_file_it_cannot_make_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], words: str):
    assert words.split()[1] in refused([str(write(tmp_path, [ROW])), *words.split()], tmp_path, capsys)
