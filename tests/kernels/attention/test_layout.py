"""Laws of the layouts."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vidgen.kernels.attention.layout import SlidingWindow3D

radii = st.none() | st.integers(0, 6)


@st.composite
def windows(draw: st.DrawFn) -> SlidingWindow3D:
    grid = draw(st.integers(1, 5)), draw(st.integers(1, 4)), draw(st.integers(1, 4))
    before, after = draw(st.integers(0, 3)), draw(st.integers(0, 3))
    return SlidingWindow3D(
        grid=grid,
        radius=(draw(radii), draw(radii), draw(radii)),
        key_frames=before + grid[0] + after,
        frame_offset=before,
    )


@given(windows())
def test_a_query_frame_sees_the_frames_within_the_radius_and_always_itself(window: SlidingWindow3D):
    for frame in range(window.grid[0]):
        own, radius = frame + window.frame_offset, window.radius[0]
        start, stop = window.key_frame_range(frame)
        near = [key for key in range(window.key_frames) if radius is None or abs(key - own) <= radius]
        assert list(range(start, stop)) == near
        assert own in near


@given(windows())
def test_within_frames_seeing_is_mutual_and_includes_oneself(window: SlidingWindow3D):
    mask = window.spatial_mask()
    if mask is None:
        assert window.radius[1:] == (None, None)
        return
    assert mask.shape == (window.tokens_per_frame, window.tokens_per_frame)
    assert mask.diagonal().all()
    assert (mask == mask.T).all()


@pytest.mark.parametrize(("frames", "key_frames", "frame_offset"), [(3, 2, 0), (3, 4, 2), (3, 4, -1)])
def test_query_frames_outside_the_key_frames_are_an_error(frames: int, key_frames: int, frame_offset: int):
    with pytest.raises(ValueError, match=f"{key_frames} key frames"):
        SlidingWindow3D(
            grid=(frames, 2, 2), radius=(1, 1, 1), key_frames=key_frames, frame_offset=frame_offset
        )


def test_a_negative_radius_is_an_error():
    with pytest.raises(ValueError, match="radius"):
        SlidingWindow3D(grid=(3, 2, 2), radius=(1, -1, 1), key_frames=3)
