"""What a piece of a render takes on a machine: seconds and bytes sent.

Linear work is divided by the lanes that share a frame's tokens; attention by those that share its heads or
pass its keys around. What is not divided is the text's keys, the embedding and the projection: a lane embeds
whole windows and projects whole frames.
"""

from dataclasses import dataclass

from vidgen.denoise.lockstep import Clips
from vidgen.parallel.planner.hardware import Hardware
from vidgen.parallel.planner.work import (
    Film,
    attention_flops,
    end_flops,
    first_channels,
    linear_flops,
    out_channels,
    share,
)
from vidgen.parallel.simulation.workload import Item
from vidgen.parallel.topology import Lanes, Topology, balanced

FLOAT_BYTES = 4
NOISE_ROWS = 7  # vectors of the model's width per frame that go with a message's tokens


@dataclass(frozen=True, slots=True)
class LayerCost:
    """One layer, one run of the model, on a rank of the slowest lane."""

    linear_s: float
    attention_s: float
    exchange_s: float  # waiting for other lanes, beyond what attention hides
    sent_bytes: float

    @property
    def seconds(self) -> float:
        return self.linear_s + self.attention_s + self.exchange_s


class CostModel:
    """Times of a film's work for lanes on a machine: those of a rank that has its cores alone."""

    def __init__(
        self, film: Film, hardware: Hardware, lanes: Lanes, num_ranks: int, clips: Clips | None = None
    ) -> None:
        self.film, self.hardware, self.lanes, self.clips = film, hardware, lanes, clips
        self.num_ranks = num_ranks
        is_stacked = film.stacked and film.branches > 1
        self.batch = film.branches if is_stacked and lanes.guidance == 1 else 1
        self.runs = 1 if is_stacked or lanes.guidance > 1 else film.branches

    def lane_frames(self, item: Item) -> int:
        """Frames of a window that the fullest lane holds, whether they run or not."""
        if self.clips is None:
            return item.window
        return min(item.window, share(self.clips.num_clips, self.lanes.clip) * self.clips.clip_frames)

    def foreign_frames(self, item: Item) -> int:
        """Frames whose keys come from elsewhere: kept from other blocks, or with other lanes."""
        if self.clips is None:
            return item.context
        around = 2 * self.clips.halo_frames + self.clips.global_frames
        return min(around, item.window - self.lane_frames(item))

    def calls(self, item: Item) -> tuple[int, float, float]:
        """(calls of self-attention in a lane, frames of queries and of keys in each)."""
        if self.clips is None:
            return 1, item.running * self.batch, item.window + item.context
        middle = self.clips.num_clips // 2
        seen = len(self.clips.window(middle)) + len(self.clips.globals(middle))
        num_clips = share(self.clips.num_clips, self.lanes.clip)
        return num_clips, self.lane_frames(item) * self.batch / num_clips, seen

    def layer(self, item: Item) -> LayerCost:
        """One layer's work on a window."""
        film, lanes, hardware = self.film, self.lanes, self.hardware
        dit, tokens = film.dit, film.tokens_per_frame
        frames = self.lane_frames(item) if self.clips is not None else item.running
        local = self.batch * frames * share(tokens, lanes.sequence)
        linear_s = hardware.layer_rate(dit.dtype).seconds_of(linear_flops(dit, local, film.text_tokens))
        if item.context or item.part.tokens < 1:  # keys kept are turned, and joined to those just made
            joined = self.batch * (item.window + item.context) * share(tokens, lanes.sequence)
            linear_s += hardware.joining.seconds_of(joined * dit.width)
        num_calls, queries, keys = self.calls(item)
        if self.clips is not None:  # each clip's keys are put together, some of them turned
            seen = self.batch * keys * share(tokens, lanes.sequence)
            linear_s += num_calls * hardware.joining.seconds_of(seen * dit.width)
        of_ring = share(tokens, lanes.ring)
        one_call = attention_flops(self._heads * dit.width, queries * of_ring, keys * of_ring)
        round_s = hardware.attention_rate(dit.dtype).seconds_of(one_call) * num_calls
        exchange_s, sent = self._exchanges(item, round_s)
        return LayerCost(linear_s, round_s * lanes.ring, exchange_s, sent)

    @property
    def _heads(self) -> float:
        """The share of the heads that the fullest lane attends with."""
        return share(self.film.dit.num_heads, self.lanes.ulysses) / self.film.dit.num_heads

    def _exchanges(self, item: Item, round_s: float) -> tuple[float, float]:
        """(seconds that a layer waits for messages, bytes that it sends)."""
        film, lanes = self.film, self.lanes
        rate, row = self.hardware.collective(self.num_ranks), film.dit.width * film.token_bytes
        local, seconds, sent = share(film.tokens_per_frame, lanes.sequence), 0.0, 0.0
        frames, foreign = self.batch * self.lane_frames(item), self.batch * self.foreign_frames(item)
        keys = frames + foreign
        if lanes.ulysses > 1:  # queries, keys, values to their heads; what was attended back
            away = (lanes.ulysses - 1) / lanes.ulysses
            for num_bytes in ((frames + 2 * keys) * local * row * away, frames * local * row * away):
                seconds += rate.seconds_of(num_bytes) + (lanes.ulysses - 2) * rate.latency_s
                sent += num_bytes
        if lanes.ring > 1:  # keys and values go round while those at hand are attended to
            num_bytes = 2 * keys * share(film.tokens_per_frame, lanes.ring) * row * self._heads
            seconds += (lanes.ring - 1) * max(0.0, rate.seconds_of(num_bytes) - round_s)
            sent += (lanes.ring - 1) * num_bytes
        if lanes.clip > 1:  # halos, and the frames that all clips see
            num_bytes = 2 * foreign * local * row
            seconds += rate.seconds_of(num_bytes) + (lanes.clip - 2) * rate.latency_s
            sent += num_bytes
        return seconds, sent

    def first_s(self, item: Item) -> float:
        """Embedding a window, beside the layers."""
        tokens = item.window * self.batch * self.film.tokens_per_frame
        flops = end_flops(self.film.dit, tokens, first_channels(self.film.dit))
        return self.hardware.ends.seconds_of(flops)

    def last_s(self, item: Item) -> float:
        """Gathering the tokens of the blocks' own frames, and projecting them."""
        tokens = item.own * self.batch * self.film.tokens_per_frame
        seconds = self.hardware.ends.seconds_of(end_flops(self.film.dit, tokens, out_channels(self.film.dit)))
        return seconds + self.hardware.collective(self.num_ranks).seconds_of(self._gathered_bytes(item))

    def solver_s(self, item: Item) -> float:
        """Making a forward's window and taking its step, after the other branch's velocities have come."""
        seconds = self.hardware.solver.seconds_of(item.own * self.film.elements_per_frame)
        return seconds + self.hardware.collective(self.num_ranks).seconds_of(self._velocity_bytes(item))

    def step_bytes(self, item: Item) -> float:
        """What a lane sends for a run of the model beside its layers' exchanges and its stages' messages."""
        return self._gathered_bytes(item) + self._velocity_bytes(item)

    def _gathered_bytes(self, item: Item) -> float:
        """Of last layers' tokens, which each lane sends to those that hold the others."""
        away = 1 - 1 / (self.lanes.sequence * self.lanes.clip)
        tokens = item.own * self.batch * self.film.tokens_per_frame
        return tokens * self.film.dit.width * self.film.token_bytes * away

    def _velocity_bytes(self, item: Item) -> float:
        """Of a branch's velocities, which the lane of the other one needs."""
        is_split = self.lanes.guidance > 1
        return item.own * self.film.elements_per_frame * FLOAT_BYTES * is_split

    def stage_s(self, topology: Topology, item: Item) -> list[float]:
        """Seconds of one run of the model, stage by stage, without the solver's."""
        layer_s, left_out = self.layer(item).seconds, item.part.left_out
        held = [topology.stage(rank).layers for rank in range(topology.num_stages)]
        counts = [sum(layer not in left_out for layer in layers) for layers in held]
        seconds = [self.hardware.item_s + count * layer_s for count in counts]
        seconds[0] += self.first_s(item)
        seconds[-1] += self.last_s(item)
        return seconds

    def cut(self, num_stages: int, item: Item) -> Topology:
        """The layers cut so that the slowest stage is fastest, as a render cuts them."""
        layer_s, first_s, last_s = self.layer(item).seconds, self.first_s(item), self.last_s(item)
        cut = balanced(self.film.dit.num_layers, num_stages, layer=layer_s, first=first_s, last=last_s)
        return Topology(cut.layers_per_stage, self.lanes)

    def hop_bytes(self, item: Item) -> int:
        """Of a message from stage to stage."""
        film, frames = self.film, self.lane_frames(item)
        tokens = frames * share(film.tokens_per_frame, self.lanes.sequence)
        rows = tokens + frames * NOISE_ROWS + film.text_tokens + film.dit.image_tokens
        return self.batch * rows * film.dit.width * film.token_bytes

    def result_bytes(self, item: Item) -> int:
        """Of a message from the last stage to the first."""
        tokens = item.own * self.film.tokens_per_frame
        return self.batch * tokens * out_channels(self.film.dit) * self.film.token_bytes
