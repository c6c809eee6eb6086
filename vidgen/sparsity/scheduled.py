"""When attention is dense, when a choice is made and how long it is used: the same for every way to choose.

Before the first search all is dense. The first search runs dense where log-sum-exps are needed; later ones
use those that were kept. A state that is for other tokens is dropped, and a search is made at once.
"""

import time
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from vidgen.kernels.attention.api import attention
from vidgen.sparsity.choice import Choice
from vidgen.sparsity.policy import Kind, Place, Report, State
from vidgen.sparsity.restore import drifted, restoration, restored
from vidgen.sparsity.settings import POLICIES, SparsitySettings

# B batch, Q queries, K keys, H heads, D head dimension


@dataclass(frozen=True, kw_only=True, slots=True)
class Chosen:
    """What a method chose."""

    choice: Choice
    recall_H: Tensor | None = None
    kept: dict[str, Tensor] = field(default_factory=dict)  # what it wants back at its next search


class Method(Protocol):
    """A way to choose. One that does not search has one choice for a place, and keeps it by itself."""

    @property
    def searches(self) -> bool: ...

    @property
    def needs_lse(self) -> bool:
        """Whether a search needs the log-sum-exps of dense attention, `lse` of the state."""
        ...

    def choose(self, query_BQHD: Tensor, key_BKHD: Tensor, place: Place, state: State) -> Chosen: ...


class Remembered(dict[str, Tensor]):
    """A state, and the choice that its tensors say, for which backends have prepared. Copies lack that."""

    choice: Choice | None = None

    def __reduce__(self) -> tuple[type, tuple[dict[str, Tensor]]]:
        return dict, (dict(self),)


@dataclass(frozen=True, kw_only=True, slots=True)
class Scheduled:
    """A policy (vidgen/sparsity/policy.py): settings, and the way to choose that they name."""

    settings: SparsitySettings
    method: Method

    @property
    def name(self) -> str:
        return self.settings.policy

    @property
    def heads_are_alike(self) -> bool:
        return self.settings.heads_are_alike

    def attend(
        self, query_BQHD: Tensor, key_BKHD: Tensor, value_BKHD: Tensor, place: Place, state: State
    ) -> tuple[Tensor, State, Report]:
        """As in Policy. ValueError when the tensors are not those of the place."""
        if (query_BQHD.shape[1], key_BKHD.shape[1]) != (place.num_queries, place.num_keys):
            raise ValueError(
                f"{query_BQHD.shape[1]} queries and {key_BKHD.shape[1]} keys: this place needs "
                f"{place.num_queries} and {place.num_keys}"
            )
        step = _Step(self.settings, self.method, (query_BQHD, key_BKHD, value_BKHD), place)
        searches = self.settings.search_steps(place.num_steps)
        begins_at = searches[0] if searches else place.num_steps
        if self.settings.is_dense or place.layer < self.settings.dense_layers or place.step < begins_at:
            return step.dense({})
        if not step.fits(state):
            return step.begin({})
        searched_at, is_dense = state["sizes"][:2].tolist()
        if self.method.searches and any(searched_at < due <= place.step for due in searches):
            return step.begin(state) if is_dense else step.search_again(state)
        return step.dense(state) if is_dense else step.go_on(state)


@dataclass(frozen=True, slots=True)
class _Step:
    """One call of `attend`, and the ways it can go."""

    settings: SparsitySettings
    method: Method
    tensors: tuple[Tensor, Tensor, Tensor]  # query, key, value
    place: Place

    def fits(self, state: State) -> bool:
        """Whether a state is for tokens and settings such as these."""
        return "sizes" in state and state["sizes"].tolist()[2:] == self._sizes()

    def dense(self, state: State) -> tuple[Tensor, State, Report]:
        return attention(*self.tensors), state, self._report(Kind.DENSE, None)

    def begin(self, state: State) -> tuple[Tensor, State, Report]:
        """With a choice where none was in use; of the state a method has what it kept."""
        out, seen = None, None
        known = dict(state)
        if self.method.needs_lse:
            out, known["lse"] = dense_with_lse(*self.tensors)
        chosen, seconds = self._choose(known)
        if self._is_too_much(chosen):
            return self._dense_from_here(known, chosen, seconds, out)
        restoring: dict[str, Tensor] = {}
        if self.settings.restore:
            if out is None:
                out, known["lse"] = dense_with_lse(*self.tensors)
            restoring = self._restoration(chosen, out, known["lse"])
        if out is None:
            seen = chosen.choice
            out, _ = seen.attend(*self.tensors)
        without_search = Kind.DENSE if seen is None else Kind.SPARSE
        kind = Kind.SEARCH if self.method.searches else without_search
        keeps = self.method.searches or self.settings.restore
        state = self._remember(known, chosen, restoring) if keeps else {}
        return out, state, self._report(kind, seen, chosen.recall_H, seconds)

    def search_again(self, state: State) -> tuple[Tensor, State, Report]:
        """With a new choice in place of another. No pass is dense.

        What was restored is carried over: restored attention under the old choice is taken for the full one.
        """
        chosen, seconds = self._choose(state)
        if self._is_too_much(chosen):
            return self._dense_from_here(state, chosen, seconds, None)
        restoring: dict[str, Tensor] = {}
        seen = self._choice_in(state) if self.settings.restore else chosen.choice
        out, _ = seen.attend(*self.tensors)
        if self.settings.restore:
            out = restored(out, state["rho"], state["residual"])
            restoring = self._restoration(chosen, out, state["lse"])
        report = self._report(Kind.SEARCH, seen, chosen.recall_H, seconds)
        return out, self._remember(state, chosen, restoring), report

    def go_on(self, state: State) -> tuple[Tensor, State, Report]:
        """With the choice in use."""
        after = Remembered(state)
        after.choice = choice = self._choice_in(state)
        out, _ = choice.attend(*self.tensors)
        if self.settings.restore:
            out = restored(out, state["rho"], state["residual"])
        if self.settings.restore_drift:
            after["rho"] = drifted(state["rho"], self.settings.restore_drift)
        return out, after, self._report(Kind.SPARSE, choice)

    def _sizes(self) -> list[int]:
        place, settings = self.place, self.settings
        batch, _, num_heads, head_dim = self.tensors[0].shape
        made_by = POLICIES.index(settings.policy), int(settings.restores)
        frames = place.frames_before, place.frames_after
        return [
            *made_by,
            *settings.blocks,
            batch,
            num_heads,
            head_dim,
            *place.grid,
            *frames,
            place.text_tokens,
        ]

    def _choose(self, state: State) -> tuple[Chosen, float]:
        query, key, _ = self.tensors
        started = _now(query.device)
        chosen = self.method.choose(query, key, self.place, state)
        return chosen, _now(query.device) - started if self.method.searches else 0.0

    def _is_too_much(self, chosen: Chosen) -> bool:
        return chosen.choice.layout.work > self.settings.dense_above

    def _dense_from_here(
        self, known: State, chosen: Chosen, seconds: float, out: Tensor | None
    ) -> tuple[Tensor, State, Report]:
        """Dense, until the next search."""
        out = attention(*self.tensors) if out is None else out
        if not self.method.searches:
            return out, {}, self._report(Kind.DENSE, None)
        report = self._report(Kind.SEARCH, None, torch.ones(self.tensors[0].shape[2]), seconds)
        return out, self._remember(known, chosen, {}, is_dense=True), report

    def _restoration(self, chosen: Chosen, full: Tensor, full_lse: Tensor) -> dict[str, Tensor]:
        sparse, sparse_lse = chosen.choice.attend(*self.tensors, return_lse=True)
        assert sparse_lse is not None
        return restoration(full, full_lse, sparse, sparse_lse)

    def _remember(
        self, known: State, chosen: Chosen, restoring: dict[str, Tensor], is_dense: bool = False
    ) -> State:
        # sizes stay on the CPU, where they are read at each step
        sizes = torch.tensor([self.place.step, int(is_dense), *self._sizes()])
        state = Remembered(sizes=sizes, **chosen.kept, **restoring)
        if is_dense:
            return state
        state.choice = chosen.choice
        if self.method.searches:
            state |= chosen.choice.tensors()
            later = any(due > self.place.step for due in self.settings.search_steps(self.place.num_steps))
            if "lse" in known and later:
                state["lse"] = known["lse"]
        return state

    def _choice_in(self, state: State) -> Choice:
        if isinstance(state, Remembered) and state.choice is not None:
            return state.choice
        if not self.method.searches:
            return self.method.choose(*self.tensors[:2], self.place, state).choice
        return Choice.of_tensors(
            state,
            num_queries=self.place.num_queries,
            num_keys=self.place.num_keys,
            query_block=self.settings.blocks[0],
            key_block=self.settings.blocks[1],
            may_see_more=not self.settings.restore,
        )

    def _report(
        self, kind: Kind, seen: Choice | None, recall_H: Tensor | None = None, seconds: float = 0.0
    ) -> Report:
        """Of what was seen in this call; None: everything."""
        num_heads = self.tensors[0].shape[2]
        return Report(
            place=self.place,
            kind=kind,
            density_H=torch.ones(num_heads) if seen is None else seen.density_H.expand(num_heads),
            recall_H=recall_H,
            search_s=seconds,
            layout=None if seen is None else seen.layout,
        )


def dense_with_lse(query_BQHD: Tensor, key_BKHD: Tensor, value_BKHD: Tensor) -> tuple[Tensor, Tensor]:
    """(attention [B, Q, H, D] with the bits that it has without LSE, LSE [B, H, Q])."""
    out, lse = attention(query_BQHD, key_BKHD, value_BKHD, return_lse=True)
    if out.device.type != "cpu":  # the kernel that PyTorch picks there need not be one that tells its LSE
        out = attention(query_BQHD, key_BKHD, value_BKHD)
    return out, lse.contiguous()


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
