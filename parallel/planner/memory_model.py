"""What the ranks of a plan hold at most, from shapes. About right, rather over than under."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from math import ceil

from vidgen.denoise.timetable import Timetable
from vidgen.parallel.links import DEPTH_BYTES, DEPTHS
from vidgen.parallel.planner.cost_model import FLOAT_BYTES, CostModel
from vidgen.parallel.planner.steps import Steps, all_steps
from vidgen.parallel.planner.work import (
    first_parameters,
    largest_item,
    last_parameters,
    layer_parameters,
    share,
)
from vidgen.parallel.simulation.workload import WHOLE, Item
from vidgen.parallel.topology import Stage, Topology
from vidgen.types import ContextMode

HIDDEN_COPIES = 24  # tensors of the width of the model alive in a layer; see vidgen/limits.py
HIDDEN_COPIES_ON_GPU = 6  # of bf16 on an H200: 18 beside weights, with the feed-forward's and the keys
PIXEL_COPIES = 6
LATENT_COPIES = 3  # latents beside those of live blocks: what a solver remembers, what a step makes


@dataclass(frozen=True, kw_only=True, slots=True)
class Memory:
    """Bytes that one process holds, by what they are for."""

    process: int
    weights: int = 0
    activations: int = 0
    keys: int = 0  # and values, that blocks or patches lend one another
    cache: int = 0  # what a step cache keeps of live blocks
    latents: int = 0
    messages: int = 0
    decoding: int = 0

    @property
    def total(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self))

    @property
    def largest(self) -> str:
        """What takes most."""
        return max((field.name for field in fields(self)), key=lambda name: getattr(self, name))


def rank_memory(
    model: CostModel, topology: Topology, timetable: Timetable, steps: Steps | None = None
) -> tuple[Memory, ...]:
    """Of every stage of a lane, and last of the decoder's process; a render of one process has no other."""
    item = largest_item(timetable, model.clips)
    decoding = _decoding(model, timetable)
    process, steps = model.hardware.process_bytes, steps or all_steps(timetable)
    if topology.num_ranks == 1:
        return (_of_stage(model, topology.stage(0), timetable, item, steps, decoding, is_alone=True),)
    stages = [topology.stage(rank) for rank in range(topology.num_stages)]
    held = [_of_stage(model, stage, timetable, item, steps, 0, is_alone=False) for stage in stages]
    return (*held, Memory(process=process, decoding=decoding))


def _of_stage(
    model: CostModel,
    stage: Stage,
    timetable: Timetable,
    item: Item,
    steps: Steps,
    decoding: int,
    *,
    is_alone: bool,
) -> Memory:
    film, dit = model.film, model.film.dit
    numbers = len(stage.layers) * layer_parameters(dit)
    numbers += first_parameters(dit) if stage.is_first else 0
    numbers += last_parameters(dit) if stage.is_last else 0
    width = 1 if dit.dtype == "fp8" else film.token_bytes
    messages = 0 if is_alone else _messages(model, stage, item)
    return Memory(
        process=model.hardware.process_bytes,
        weights=numbers * film.num_experts * width,
        activations=_activations(model, item, stage),
        keys=_keys(model, timetable, len(stage.layers), item),
        cache=_cache(model, timetable, stage, item, steps),
        latents=_latents(model, timetable) if stage.is_first else 0,
        messages=messages,
        decoding=decoding,
    )


def _activations(model: CostModel, item: Item, stage: Stage) -> int:
    """Of one run of the model."""
    film, dit = model.film, model.film.dit
    tokens, lanes = film.tokens_per_frame, model.lanes
    local = share(tokens, lanes.sequence)
    frames = model.lane_frames(item)
    keys = frames + model.foreign_frames(item)
    copies = HIDDEN_COPIES if model.hardware.shares_memory else HIDDEN_COPIES_ON_GPU
    numbers = frames * local * (copies * dit.width + 2 * dit.ffn_width) + keys * local * 4 * dit.width
    if lanes.ulysses > 1:  # what is sent and what comes, beside what is at hand
        numbers += (2 * frames + 2 * keys) * local * dit.width
    if lanes.ring > 1:  # the keys and values that are on their way
        numbers += 4 * keys * local * dit.width
    if (stage.is_first or stage.is_last) and lanes.sequence * lanes.clip > 1:
        numbers += 2 * item.window * tokens * dit.width  # whole windows at the ends
    return model.batch * numbers * film.token_bytes


def _keys(model: CostModel, timetable: Timetable, num_layers: int, item: Item) -> int:
    """Keys and values that this stage's layers keep from one forward to another."""
    film, context = model.film, timetable.context_frames
    live = _num_live(timetable)
    is_recompute = timetable.mode == ContextMode.RECOMPUTE or timetable.joint
    lenders = 2 * context * (live > 1) + timetable.anchor_frames * (timetable.num_blocks > 2)
    if not is_recompute and timetable.num_blocks > 1:  # of the last tick, which hold until this one has ended
        lenders += 2 * live * context
    collected = item.window if lenders else 0
    if timetable.is_patched:  # of this tick, of the tick before, and together as one patch sees them
        lenders, collected = 3 * timetable.num_frames, timetable.num_frames
    runs = model.runs * model.batch
    row = 2 * share(film.tokens_per_frame, model.lanes.sequence) * film.dit.width * film.token_bytes
    return (lenders * runs + collected * model.batch) * num_layers * row


def _cache(model: CostModel, timetable: Timetable, stage: Stage, item: Item, steps: Steps) -> int:
    """What a step cache keeps here of live blocks."""
    film = model.film
    if film.cache is None:
        return 0
    settings, width, runs = film.cache.settings, film.dit.width, model.runs * model.batch
    frames, own = model.lane_frames(item), min(timetable.block_frames, timetable.num_frames)
    context, lends = timetable.context_frames, timetable.context_frames + timetable.anchor_frames > 0
    now = [part != WHOLE for part in steps.parts]
    at_next = [*now[1:], False]
    rows = 0  # of the model's width, for each token of a frame
    if settings.skips_forwards:  # keys and values that were lent last
        rows = _num_live(timetable) * 2 * len(stage.layers) * context
    if settings.skips_layers:  # changes of all tokens, and of lending blocks their keys and values
        left_out = [sum(layer in part.left_out for layer in stage.layers) for part in steps.parts]
        kept = _most(timetable, [one or other for one, other in zip(now, at_next, strict=True)])
        rows = kept * max(left_out) * (frames + 2 * own * lends)
    if settings.skips_tokens:  # keys and values of whole windows and the last tokens: old and new
        kept = _most(timetable, [one + other for one, other in zip(now, at_next, strict=True)])
        rows = kept * (2 * len(stage.layers) * frames + own)
    held = rows * share(film.tokens_per_frame, model.lanes.sequence) * width * film.token_bytes
    if stage.is_first and not settings.skips_layers:  # outputs
        outputs = (1 + (settings.order or 0)) * own * film.elements_per_frame
        held += _num_live(timetable) * outputs * FLOAT_BYTES
    return runs * held


def _most(timetable: Timetable, at_steps: Sequence[int]) -> int:
    """The largest sum over the blocks of a tick, of what there is of a block at each step."""
    firsts, live = range(timetable.num_steps), _num_live(timetable)
    return max(sum(at_steps[first :: timetable.stride][:live]) for first in firsts)


def _num_live(timetable: Timetable) -> int:
    """Blocks of a tick."""
    return min(ceil(timetable.num_steps / timetable.stride), timetable.num_blocks)


def _latents(model: CostModel, timetable: Timetable) -> int:
    film, own = model.film, min(timetable.block_frames, timetable.num_frames)
    live = min(timetable.num_steps // timetable.stride + 1, timetable.num_blocks)
    live = timetable.num_blocks if timetable.is_patched else live
    return (live + LATENT_COPIES) * own * film.elements_per_frame * FLOAT_BYTES


def _messages(model: CostModel, stage: Stage, item: Item) -> int:
    """Buffers at a stage's two ends."""
    if stage.num_stages == 1:
        return 0
    hop, result = model.hop_bytes(item), model.result_bytes(item)
    fewest, most = DEPTHS
    depth = max(fewest, min(most, DEPTH_BYTES // max(1, hop)))
    back = stage.num_stages * (1 + depth)
    incoming = back * result if stage.is_first else depth * hop
    outgoing = back * result if stage.is_last else depth * hop
    return incoming + outgoing


def _decoding(model: CostModel, timetable: Timetable) -> int:
    """Of one block's frames; a codec's own weights are not known here."""
    film = model.film
    own = min(timetable.block_frames, timetable.num_frames)
    pixels = 3 * own * film.pixels_per_frame
    return film.decode_bytes + ceil(pixels * (PIXEL_COPIES * FLOAT_BYTES + 2))
