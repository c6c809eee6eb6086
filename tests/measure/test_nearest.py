"""A remembered clip is found among training clips, and a fresh one is as far from them as fresh ones are."""

import random

import torch

from vidgen.measure.nearest import nearest
from vidgen.world import WORLDS, render_clips


def test_a_remembered_clip_is_found_and_a_fresh_one_is_not_near_any():
    trained, held_out = WORLDS["small"].split()
    rng = random.Random(3)
    training = render_clips(rng.choices(trained, k=60), num_frames=8, size=16, rng=rng)
    fresh = render_clips(rng.sample(held_out, 6), num_frames=8, size=16, rng=rng)
    noise = torch.randn(training[41].shape, generator=torch.Generator().manual_seed(0))
    remembered = training[41] + 0.02 * noise
    found = nearest(torch.cat([remembered.unsqueeze(0), fresh]), training.split(25))
    assert torch.equal(found.clips_N3FYX[0], training[41])
    assert abs(found.distance_N[0] - 0.02) < 0.002
    assert (found.distance_N[1:] > 5 * found.distance_N[0]).all()


def test_the_nearest_does_not_depend_on_the_batches():
    rng = random.Random(0)
    clips = render_clips(rng.choices(WORLDS["small"].scenes(), k=30), num_frames=4, size=16, rng=rng)
    one, many = (nearest(clips[:5] + 0.1, clips[5:].split(size)) for size in (25, 4))
    assert torch.equal(one.clips_N3FYX, many.clips_N3FYX)
    assert torch.allclose(one.distance_N, many.distance_N)
