"""The policy that settings name."""

from vidgen.sparsity.adaspa import AdaSpa
from vidgen.sparsity.fixed import Fixed
from vidgen.sparsity.policy import Policy
from vidgen.sparsity.scheduled import Method, Scheduled
from vidgen.sparsity.settings import SparsitySettings
from vidgen.sparsity.svg2 import SVG2


def make_policy(settings: SparsitySettings) -> Policy | None:
    """The policy, all that is left open filled in; None for "none"."""
    if settings.policy == "none":
        return None
    settings = settings.resolved()
    return Scheduled(settings=settings, method=_method(settings))


def _method(settings: SparsitySettings) -> Method:
    blocks = {"query_block": settings.blocks[0], "key_block": settings.blocks[1]}
    may_see_more = not settings.restore  # what is restored is what the very layout leaves out
    if settings.policy == "adaspa":
        return AdaSpa(
            density=settings.density,
            recall=settings.recall,
            head_adaptive=settings.head_adaptive,
            may_see_more=may_see_more,
            **blocks,
        )
    if settings.policy == "svg2":
        return SVG2(
            query_clusters=settings.query_clusters,
            key_clusters=settings.key_clusters,
            top_p=settings.top_p,
            min_share=settings.min_share,
            first_iterations=settings.first_iterations,
            next_iterations=settings.next_iterations,
            may_see_more=may_see_more,
            **blocks,
        )
    return Fixed(settings=settings)
