"""What can be set of sparse attention, and what is best where nothing is said.

Defaults were chosen on the built-in model: those at which it draws what it is asked for as often as with
dense attention (`vidgen bench attention`). Windows cut off too much without restoration, and too early
before half of the steps are done. What is restored takes memory: a tensor like the layer's output per
layer, live block and guidance branch, in checkpoints too.
"""

from dataclasses import dataclass, replace

WINDOWS = ("sliding_tile", "radial", "local")  # policies of a fixed geometry: nothing is searched for
POLICIES = ("none", "adaspa", "svg2", *WINDOWS)

DEFAULT_RECALL = 0.95
DEFAULT_SEARCHES = {"adaspa": (0.2, 0.6)}  # else:
LATE_SEARCH = (0.5,)
LARGE_BLOCK, SMALL_BLOCK = 128, 16  # tokens
BLOCKS_TO_CHOOSE_FROM = 16

Triple = tuple[int, int, int]  # frames, rows, columns


@dataclass(frozen=True, kw_only=True)
class SparsitySettings:
    """Settings of all policies; ValueError for one that cannot be. A share that is 1 is dense attention."""

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012 - read where these settings come from a file

    policy: str = "none"
    density: float | None = None  # adaspa: share of key blocks that is kept; 1: dense, whatever the policy
    recall: float | None = None  # adaspa: share of attention mass to keep; 0.95 where no density is given
    query_block: int | None = None  # tokens; None: 128, or less where there are too few tokens to choose from
    key_block: int | None = None
    search_at: tuple[float, ...] | None = None  # shares of the steps; before the first all is dense
    dense_layers: int = 0  # so many first layers are always dense
    dense_above: float = 0.75  # share of the blocks: a layout with more is not used, and dense attention is
    head_adaptive: bool = True  # adaspa by density: less for heads that need less, and more for others
    restore: bool | None = None  # make up for what is left out (Re-ttention); None: windows and svg2 do
    restore_drift: float = 0.0  # added to the sparse share after each step
    query_clusters: int | None = None  # svg2; None: 100, or an eighth of the tokens where that is less
    key_clusters: int | None = None  # svg2; None: 500, or an eighth
    top_p: float = 0.9  # svg2: share of the estimated attention to keep
    min_share: float = 0.1  # svg2: share of the key clusters to keep at least
    first_iterations: int = 50  # svg2, of k-means from nothing
    next_iterations: int = 2  # svg2, from the centroids of the search before
    tile: Triple = (6, 8, 8)  # sliding_tile; smaller where the grid is, and in equal runs of frames
    window: Triple | tuple[Triple, ...] = (3, 3, 3)  # sliding_tile: odd numbers of tiles; or one per head
    radius: float = 8.0  # local: Euclidean, in tokens of a frame
    frame_radius: int | None = None  # local; None: all frames

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise ValueError(f"policy={self.policy}: there are {', '.join(POLICIES)}")
        for name in ("density", "recall", "top_p"):
            share = getattr(self, name)
            if share is not None and not 0 < share <= 1:
                raise ValueError(f"{name}={share}: need more than 0 and at most 1, the share that is kept")
        for name in ("dense_above", "restore_drift", "min_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)}: need 0 to 1")
        kinds = ("query_block", "key_block", "query_clusters", "key_clusters")
        for name in (*kinds, "first_iterations", "next_iterations"):
            count = getattr(self, name)
            if count is not None and count < 1:
                raise ValueError(f"{name}={count}: need at least 1")
        self._check_when_and_where()
        self._check_together()

    def _check_when_and_where(self) -> None:
        searches = LATE_SEARCH if self.search_at is None else self.search_at
        if not searches or any(not 0 <= share < 1 for share in searches):
            raise ValueError(
                f"search_at={self.search_at}: need one share of the steps or more, each from 0 to below 1"
            )
        if self.dense_layers < 0:
            raise ValueError(f"dense_layers={self.dense_layers}: need 0 or more")
        if len(self.tile) != 3 or min(self.tile) < 1:
            raise ValueError(f"tile={self.tile}: need frames, rows and columns, each at least 1")
        for window in self.windows:
            if len(window) != 3 or any(size < 1 or size % 2 == 0 for size in window):
                raise ValueError(f"window={window}: need three odd numbers of tiles: frames, rows, columns")
        if self.radius < 0 or (self.frame_radius or 0) < 0:
            raise ValueError(f"radius={self.radius}, frame_radius={self.frame_radius}: need 0 or more")

    def _check_together(self) -> None:
        if self.recall is not None and self.density is not None:
            raise ValueError(f"recall={self.recall} and density={self.density}: give one of them")
        if self.recall not in (None, 1) and self.policy != "adaspa":
            raise ValueError(f"recall={self.recall} with policy={self.policy}: only adaspa takes a recall")
        if self.restore_drift and not self.restores:
            raise ValueError(f"restore_drift={self.restore_drift} without restore: set restore=True")

    @property
    def heads_are_alike(self) -> bool:
        """Whether all heads see alike and nothing is kept of them, so that ranks can share them."""
        return self.policy in WINDOWS and not self.restores and len(self.windows) == 1

    @property
    def blocks(self) -> tuple[int, int]:
        """Tokens of a block of queries and of one of keys, once resolved."""
        assert self.query_block and self.key_block
        return self.query_block, self.key_block

    def resolved(self, num_tokens: int = LARGE_BLOCK * BLOCKS_TO_CHOOSE_FROM) -> "SparsitySettings":
        """The same with all filled in: blocks leave a choice among so many tokens."""
        fits = (size for size in (64, 32) if size * BLOCKS_TO_CHOOSE_FROM <= num_tokens)
        size = LARGE_BLOCK if num_tokens >= LARGE_BLOCK * BLOCKS_TO_CHOOSE_FROM else next(fits, SMALL_BLOCK)
        recall = self.recall
        if self.policy == "adaspa" and self.density is None and recall is None:
            recall = DEFAULT_RECALL
        return replace(
            self,
            recall=recall,
            query_block=self.query_block or size,
            key_block=self.key_block or size,
            search_at=self.search_at or DEFAULT_SEARCHES.get(self.policy, LATE_SEARCH),
            restore=self.restores,
        )

    @property
    def windows(self) -> tuple[Triple, ...]:
        """One for all heads, or one per head."""
        return self.window if isinstance(self.window[0], tuple) else (self.window,)  # pyright: ignore

    @property
    def restores(self) -> bool:
        """Whether what is left out is made up for."""
        return self.policy in (*WINDOWS, "svg2") if self.restore is None else self.restore

    @property
    def is_dense(self) -> bool:
        """Whether these settings keep everything."""
        return 1 in (self.density, self.recall) or (self.policy == "svg2" and self.top_p == 1)

    def search_steps(self, num_steps: int) -> tuple[int, ...]:
        """The steps at which a choice is made anew, ascending, once resolved."""
        assert self.search_at
        return tuple(
            sorted({step for share in self.search_at if (step := round(share * num_steps)) < num_steps})
        )
