"""`vidgen plan`: the table and the JSON tell the same, the choice is the quickest, bad input is one line."""

import json
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import pytest
import yaml

from vidgen.config import parse_job
from vidgen.parallel.planner.hardware import dump_hardware, load_hardware

Run = Callable[..., Any]
ASKED = ("plan", "--num-frames", 65, "--num-inference-steps", 4, "--hardware", "cpu")


def planned(run: Run, *more: object) -> dict[str, Any]:
    ran = run(*ASKED, *more, "--json")
    assert ran.code == 0, ran.err
    return json.loads(ran.out)


def test_the_choice_is_the_quickest_that_fits_and_uses_all_ranks(run: Run):
    found = planned(run, "--ranks", 4)
    fitting = [plan for plan in found["plans"] if plan["fits"]]
    assert found["choice"] == fitting[0] == min(fitting, key=lambda plan: plan["seconds"])
    assert all(prod(plan["axes"].values()) == 4 == found["ranks"] for plan in found["plans"])
    assert {"full", "lockstep P4 C2 G4"} <= {plan["video"] for plan in found["plans"]}
    assert not any(plan["lossy"] for plan in found["plans"])


def test_the_table_says_what_the_json_says(run: Run):
    found = planned(run, "--ranks", 2)
    lines = run(*ASKED, "--ranks", 2, "--top", 5).out.splitlines()
    assert lines[0].startswith("model builtin, latents 17x4x4, num_inference_steps 4")
    assert lines[1].split() == "video ranks time first frame GiB a rank use sent GiB".split()
    for line, plan in zip(lines[2:7], found["plans"], strict=False):
        axes = " x ".join(f"{axis} {size}" for axis, size in plan["axes"].items() if size > 1)
        assert line.strip().startswith(plan["video"])
        assert plan["video"] in line and axes in line and f"{plan['seconds']:.2f} s" in line
        assert f"{plan['utilisation']:.0%}" in line
    assert lines[7] == f"... and {len(found['plans']) - 5} slower plans (--top)"
    assert found["choice"]["video"] in lines[8]
    start = next(index for index, line in enumerate(lines) if line.startswith("rows with the same"))
    told = dict(line.strip().split(": ", 1) for line in lines[start + 1 :])
    assert told == found["why_not"]


def test_settings_of_the_choice_are_those_of_a_job(run: Run):
    choice = planned(run, "--ranks", 2)["choice"]
    job = parse_job({"prompt": "x", **choice["settings"]})
    assert job.parallel.ranks == 2 and job.queue.timetable == choice["settings"]["queue"]["timetable"]


def test_with_a_timetable_only_its_video_is_planned(run: Run):
    found = planned(run, "--ranks", 2, "--timetable", "dualparal", "--block-frames", 5)
    assert {plan["video"] for plan in found["plans"]} == {"dualparal P5 C2 recompute"}
    assert {tuple(plan["settings"]["queue"].values())[:2] for plan in found["plans"]} == {("dualparal", 5)}


def test_approximations_are_asked_for_and_marked(run: Run):
    found = planned(run, "--ranks", 2, "--lossy")
    lossy = {plan["video"] for plan in found["plans"] if plan["lossy"]}
    assert lossy == {"pipefusion P4 warm-up 1"}
    assert "pipefusion P4 warm-up 1 (lossy)" in run(*ASKED, "--ranks", 2, "--lossy", "--top", 99).out


def test_without_guidance_there_are_no_branches_to_share(run: Run):
    found = planned(run, "--ranks", 2, "--guidance-scale", 1)
    assert all(plan["axes"]["guidance"] == 1 for plan in found["plans"])


def test_a_step_cache_is_counted_where_its_steps_are_known(run: Run):
    asked = ("--ranks", 2, "--num-inference-steps", 20)
    whole = planned(run, *asked)
    taylor, tea = (planned(run, *asked, "--cache", method) for method in ("taylor", "tea"))
    assert "cache" not in whole
    assert taylor["cache"] == "taylor (10 of 20 steps skipped)"
    assert tea["cache"].startswith("tea (which steps it skips is not known beforehand")
    seconds = {(plan["video"], str(plan["axes"])): plan["seconds"] for plan in whole["plans"]}
    shares = [plan["seconds"] / seconds[plan["video"], str(plan["axes"])] for plan in taylor["plans"]]
    assert 0.4 < min(shares) < max(shares) < 1
    assert "buffer" not in " ".join(plan["video"] for plan in taylor["plans"])  # it knows no cache


def test_sparse_attention_is_said_to_count_as_dense(run: Run):
    found = planned(run, "--ranks", 2, "--sparsity", "adaspa")
    assert found["sparsity"] == "adaspa (times are those of dense attention)"
    assert all(plan["axes"]["ulysses"] == plan["axes"]["ring"] == 1 for plan in found["plans"])


def test_no_plan_is_one_that_a_render_would_refuse(run: Run):
    found = planned(run, "--ranks", 2, "--cache", "delta", "--num-inference-steps", 20)
    assert "run in part" in found["cache"]
    assert all(plan["axes"]["ulysses"] == plan["axes"]["ring"] == 1 for plan in found["plans"])
    assert not {"lockstep", "buffer"} & {plan["video"].split()[0] for plan in found["plans"]}


def test_a_profile_of_ones_own_is_taken_and_what_does_not_fit_is_told(run: Run):
    values = dump_hardware(load_hardware("cpu")) | {"name": "tiny", "memory_bytes": 2**20}
    Path("tiny.yaml").write_text(yaml.safe_dump(values))
    ran = run(*ASKED[:-1], "tiny.yaml", "--ranks", 2)
    assert ran.code == 2 and "no plan fits; the smallest is " in ran.err and "GiB of 0.0" in ran.err


def test_rates_that_were_not_measured_are_said_to_be_so(run: Run):
    ran = run(*ASKED[:-1], "4090", "--ranks", 2)
    assert ran.code == 0 and "rates of NVIDIA GeForce RTX 4090: not measured" in ran.out


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--hardware", "abacus"), "hardware=abacus: no such profile or file; take 4090, cpu, h100, h200"),
        (("--ranks", "two"), "need a whole number from 1 to 4096, or auto"),
        (("--ranks", "auto"), "--ranks auto: a plan is for a number of ranks; give one"),
        (("--ranks", "97"), "no way to share the work of this video among so many ranks; take fewer"),
        (("--size", "big"), "--size 'big': need WIDTHxHEIGHT"),
        (("--size", "33x32"), "width=33: need a multiple of 8; try 32"),
        (("--top", "0"), "--top"),
        (("--model", "nowhere"), "model=nowhere: no such model"),
    ],
)
def test_bad_input_is_refused_in_one_line(flags: tuple[str, ...], says: str, refused: Callable[..., str]):
    assert says in refused(*ASKED, *flags)


def test_a_broken_profile_is_refused_in_one_line(refused: Callable[..., str]):
    Path("broken.yaml").write_text("name: [")
    assert "hardware=broken.yaml: not a YAML file" in refused(*ASKED[:-1], "broken.yaml")
    Path("broken.yaml").write_text("name: x\nflops: 3\n")
    assert "unknown key flops; known: name, source" in refused(*ASKED[:-1], "broken.yaml")


def test_known_sizes_are_planned_without_a_checkpoint(run: Run):
    asked = ("plan", "--model", "wan-1.3b", "--num-frames", 1025, "--ranks", 8, "--hardware", "4090")
    ran = run(*asked, "--no-decode", "--json")
    assert ran.code == 0, ran.err
    found = json.loads(ran.out)
    assert found["latents"] == "257x60x104" and found["num_inference_steps"] == 50

    def quickest(video: str, *axes: str) -> dict[str, Any]:
        fitting = [plan for plan in found["plans"] if plan["fits"] and plan["video"] == video]
        return next(p for p in fitting if {axis for axis, size in p["axes"].items() if size > 1} == set(axes))

    queue = quickest("dualparal P8 C8 recompute", "stages")
    for axis in ("ulysses", "ring"):  # the paper: up to 6.54 times and 1.48 times
        whole = quickest("full", axis)
        assert (
            whole["seconds"] > 3 * queue["seconds"] and whole["memory_bytes"] > 1.48 * queue["memory_bytes"]
        )
