"""The loop equals design.md's specification, written a second time in plain_specification.py."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from vidgen.denoise.loop import Task
from vidgen.denoise.timetable import Timetable, dualparal
from vidgen.model.context import Context
from vidgen.model.dit import DiT
from vidgen.types import ContextMode

# Largest error over largest latent. The loop is fp32 and the plain one float64, so this is fp32's rounding
# through the steps: 1e-7 to 1e-6 here. Models in float64 would not tighten it, since norms and RoPE
# compute in fp32 by design.
TOLERANCE = 3e-6

RECOMPUTE, CACHE = ContextMode.RECOMPUTE, ContextMode.CACHE
MODELS: dict[str, dict[str, Any]] = {
    "dense": {},
    "window": {"window": (1, 1, 1)},
    "frame-window": {"window": (2, None, None)},
    "built-in": {"patch": (1, 1), "convolutions": True, "linear_skip": True, "num_layers": 3},
}


@dataclass(frozen=True, kw_only=True)
class Case:
    frames: int
    steps: int
    block: int
    context: int
    stride: int = 1
    mode: ContextMode = RECOMPUTE
    anchor: int = 0
    guidance: float = 1.0
    model: str = "dense"
    says: str = field(default="", compare=False)

    def __str__(self) -> str:
        sizes = f"F{self.frames}-T{self.steps}-P{self.block}-C{self.context}-s{self.stride}-A{self.anchor}"
        parts = (self.says, sizes, self.mode.value, f"g{self.guidance:g}", self.model)
        return "-".join(part.replace(" ", "-") for part in parts if part)

    def timetable(self) -> Timetable:
        return dualparal(
            self.frames, self.steps, block_frames=self.block, context_frames=self.context,
            stride=self.stride, mode=self.mode, anchor_frames=self.anchor,
        )  # fmt: skip


CASES = [
    Case(says="dualparal", frames=9, steps=4, block=3, context=2),
    Case(says="dualparal", frames=9, steps=4, block=3, context=2, mode=CACHE),
    Case(says="guided", frames=9, steps=3, block=3, context=2, guidance=3.0),
    Case(says="guided", frames=9, steps=3, block=3, context=2, guidance=3.0, mode=CACHE),
    Case(says="no prompt only", frames=4, steps=3, block=2, context=1, guidance=0.0),
    Case(says="short last block", frames=8, steps=4, block=3, context=2),
    Case(says="short last block", frames=8, steps=4, block=3, context=2, mode=CACHE),
    Case(says="last block shorter than context", frames=7, steps=4, block=3, context=3),
    Case(says="last block shorter than context", frames=7, steps=4, block=3, context=3, mode=CACHE),
    Case(says="no context", frames=6, steps=3, block=2, context=0),
    Case(says="no context", frames=6, steps=3, block=2, context=0, mode=CACHE, anchor=1),
    Case(says="one block", frames=3, steps=3, block=3, context=2, guidance=2.0),
    Case(says="shorter than a block", frames=2, steps=3, block=4, context=2, mode=CACHE),
    Case(says="more steps than blocks", frames=4, steps=6, block=2, context=1),
    Case(says="more blocks than steps", frames=12, steps=3, block=2, context=1, mode=CACHE),
    Case(says="one step", frames=6, steps=1, block=2, context=1),
    Case(says="one step", frames=6, steps=1, block=2, context=1, mode=CACHE),
    Case(says="stride", frames=8, steps=5, block=2, context=2, stride=2),
    Case(says="stride", frames=8, steps=5, block=2, context=2, stride=2, mode=CACHE),
    Case(says="stride", frames=7, steps=4, block=2, context=1, stride=3, mode=CACHE, guidance=2.0),
    Case(says="each block after the last", frames=6, steps=3, block=2, context=2, stride=3),
    Case(says="each block after the last", frames=6, steps=3, block=2, context=2, stride=3, mode=CACHE),
    Case(says="anchor", frames=10, steps=3, block=2, context=1, anchor=2),
    Case(says="anchor", frames=10, steps=3, block=2, context=1, anchor=1, mode=CACHE, guidance=2.0),
    Case(says="anchor and stride", frames=9, steps=4, block=2, context=2, anchor=2, stride=2, mode=CACHE),
    Case(says="frame by frame", frames=4, steps=3, block=1, context=1),
    Case(frames=8, steps=3, block=3, context=2, model="window"),
    Case(frames=8, steps=3, block=3, context=2, anchor=1, mode=CACHE, model="window"),
    Case(frames=8, steps=3, block=3, context=3, anchor=2, guidance=2.0, model="frame-window"),
    Case(frames=8, steps=3, block=3, context=2, guidance=3.0, model="built-in"),
    Case(frames=9, steps=3, block=3, context=2, anchor=2, mode=CACHE, model="built-in"),
]


def plain_latents(plain: Any, task: Task, case: Case) -> list[Tensor]:
    blocks = [task.timetable.block(index) for index in range(task.timetable.num_blocks)]
    return plain.plain_denoise(
        task.model,
        noise=[task.noise(block)[0] for block in blocks],
        texts=[[text[0] for text in task.texts(block)] for block in blocks],
        levels=task.noise_levels,
        guidance_scale=case.guidance,
        context_frames=case.context,
        stride=case.stride,
        cache=case.mode is CACHE,
        anchor_frames=case.anchor,
    )


def relative_error(found: list[Tensor], expected: list[Tensor]) -> float:
    assert [block.shape[1:] for block in found] == [block.shape for block in expected]
    largest = max(block.abs().max() for block in expected)
    return max(
        float((block[0] - other).abs().max() / largest) for block, other in zip(found, expected, strict=True)
    )


@pytest.mark.parametrize("case", CASES, ids=str)
def test_loop_equals_plain_specification(
    case: Case, dit: Callable[..., DiT], task: Any, latents: Any, plain: Any
):
    made = task(case.timetable(), model=dit(**MODELS[case.model]), guidance_scale=case.guidance)
    assert relative_error(latents(made), plain_latents(plain, made, case)) < TOLERANCE


class Meddler:
    """A DiT whose context is tampered with on the way in."""

    def __init__(self, model: DiT, how: str, num_context: int, levels: list[float]) -> None:
        self.model, self.how, self.num_context, self.levels = model, how, num_context, levels

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def forward_and_lend(
        self, latents: Tensor, levels: Tensor, text: Tensor, context: Context, **options: Any
    ) -> Any:
        options.pop("conditioning")  # else these levels would decide nothing
        recomputed = bool((levels[0, 0] != levels[0, -1]).item())
        if self.how == "context at the block's own level" and recomputed:
            levels = levels[:, -1:].expand_as(levels)
        if self.how == "context one step staler in level" and recomputed:
            levels = levels.clone()
            at = min(range(len(self.levels)), key=lambda i: abs(self.levels[i] - float(levels[0, 0])))
            levels[:, : self.num_context] = self.levels[at - 1]
        if self.how == "context latents scaled by 1%" and recomputed:
            latents = latents.clone()
            latents[:, :, : self.num_context] *= 1.01
        if self.how == "nothing after":
            context = replace(context, after=())
        if self.how == "nothing before":
            context = replace(context, before=())
        if self.how == "after comes first":
            context = Context(before=context.after, after=context.before)
        return self.model.forward_and_lend(latents, levels, text, context, **options)


@pytest.mark.parametrize(
    ("how", "mode"),
    [
        ("context at the block's own level", RECOMPUTE),
        ("context one step staler in level", RECOMPUTE),
        ("context latents scaled by 1%", RECOMPUTE),
        ("nothing after", RECOMPUTE),
        ("nothing after", CACHE),
        ("nothing before", CACHE),
        ("after comes first", CACHE),
    ],
)
def test_tolerance_can_tell_a_wrong_context(
    how: str, mode: ContextMode, dit: Any, task: Any, latents: Any, plain: Any
):
    case = Case(frames=9, steps=4, block=3, context=2, mode=mode)
    right = task(case.timetable())
    wrong = replace(right, model=Meddler(dit(), how, case.context, list(right.noise_levels)))  # type: ignore[arg-type]
    assert relative_error(latents(wrong), plain_latents(plain, right, case)) > 50 * TOLERANCE


@pytest.mark.parametrize("field", ["stride", "mode", "anchor_frames", "context_frames"])
def test_every_setting_of_the_queue_changes_the_result(field: str, task: Any, latents: Any):
    other = {"stride": 2, "mode": CACHE, "anchor_frames": 1, "context_frames": 2}
    timetable = dualparal(8, 3, block_frames=2, context_frames=1)
    found = latents(task(replace(timetable, **{field: other[field]})))
    expected = [block[0] for block in latents(task(timetable))]
    assert relative_error(found, expected) > 50 * TOLERANCE


def test_float64_models_return_float64_but_compute_norms_in_fp32(dit: Any):
    """Documents why the tolerance is fp32's: a model converted to float64 runs, no more exactly than fp32."""
    single = dit()
    double = copy.deepcopy(single).double()
    latents, levels, text = torch.randn(1, 3, 2, 4, 6), torch.full((1, 2), 0.5), torch.randn(1, 5, 7)
    out = double(latents.double(), levels.double(), text.double())
    assert out.dtype == torch.float64
    assert 1e-9 < (out - single(latents, levels, text)).abs().max() < 1e-4
