"""What a policy did in a run, added up: density, recall and search time per layer and head."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vidgen.kernels.attention.layout import BlockLayout
from vidgen.sparsity.policy import Kind, Report

# H heads


@dataclass
class _Layer:
    calls: dict[Kind, int] = field(default_factory=lambda: dict.fromkeys(Kind, 0))
    density_H: Tensor | float = 0.0
    recall_H: Tensor | float = 0.0
    num_recalls: int = 0
    search_s: float = 0.0
    layout: BlockLayout | None = None


class Tally:
    """Hears reports, one by one, and sums them up."""

    def __init__(self) -> None:
        self._layers: dict[int, _Layer] = {}

    def __call__(self, report: Report) -> None:
        layer = self._layers.setdefault(report.place.layer, _Layer())
        layer.calls[report.kind] += 1
        layer.density_H = layer.density_H + report.density_H
        layer.search_s += report.search_s
        layer.layout = report.layout or layer.layout
        if report.recall_H is not None:
            layer.recall_H = layer.recall_H + report.recall_H
            layer.num_recalls += 1

    def layouts(self) -> dict[int, BlockLayout]:
        """The newest layout of each layer that has used one."""
        return {number: layer.layout for number, layer in sorted(self._layers.items()) if layer.layout}

    def layers(self) -> list[dict[str, Any]]:
        """A row per layer, ready for JSON: calls by kind, mean density and recall per head, search time."""
        rows = []
        for number, layer in sorted(self._layers.items()):
            calls = sum(layer.calls.values())
            recall = layer.recall_H / layer.num_recalls if layer.num_recalls else None
            rows.append(
                {
                    "layer": number,
                    **{kind.value: count for kind, count in layer.calls.items()},
                    "density_per_head": _rounded(layer.density_H / calls),
                    "recall_per_head": None if recall is None else _rounded(recall),
                    "search_s": round(layer.search_s, 4),
                }
            )
        return rows


def summarise(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The rows of all layers as one: calls by kind, means over layers and heads, search seconds."""
    densities = [value for row in rows for value in row["density_per_head"]]
    recalls = [value for row in rows for value in row["recall_per_head"] or ()]
    return {
        **{kind.value: sum(row[kind.value] for row in rows) for kind in Kind},
        "density": round(sum(densities) / len(densities), 4) if densities else None,
        "recall": round(sum(recalls) / len(recalls), 4) if recalls else None,
        "search_s": round(sum(row["search_s"] for row in rows), 4),
    }


def _rounded(values_H: Tensor | float) -> list[float]:
    return [round(value, 4) for value in torch.as_tensor(values_H).flatten().tolist()]
