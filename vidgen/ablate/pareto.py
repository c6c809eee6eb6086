"""Which cells no other one beats."""

from collections.abc import Sequence

from vidgen.measure.keeping import Row


def quality_of(rows: Sequence[Row]) -> str:
    """The figure that says how good cells are: adherence where all have it, else nearness to exact."""
    return "adherence_points" if rows and all("adherence_points" in row for row in rows) else "psnr"


def front(rows: Sequence[Row], quality: str) -> list[Row]:
    """Those that no other one is both as quick and as good as, and better in one; the quickest last.

    A quality of None is that of a video equal to the exact one, to the last bit.
    """
    points = [(row["speed_up"], _value(row[quality]), row) for row in rows]
    best = [
        (speed, good, row)
        for speed, good, row in points
        if not any(
            other_speed >= speed and other_good >= good and (other_speed, other_good) != (speed, good)
            for other_speed, other_good, _ in points
        )
    ]
    return [row for _, _, row in sorted(best, key=lambda point: (point[0], -point[1]))]


def best_within(rows: Sequence[Row], points: float) -> Row | None:
    """The quickest whose adherence is at most so many points below the exact cell's; None without one."""
    good = [row for row in rows if "adherence_points" in row and row["adherence_points"] >= -points]
    return max(good, key=lambda row: row["speed_up"], default=None)


def _value(quality: float | None) -> float:
    return float("inf") if quality is None else quality
