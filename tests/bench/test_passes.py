from dataclasses import replace

from vidgen.bench.passes import middle
from vidgen.parallel.planner.hardware import LinkRate, Rate, load_hardware


def test_the_middle_of_profiles_is_the_median_of_each_figure():
    base = load_hardware("cpu")
    profiles = [
        replace(
            base,
            ends=Rate((1.0, 2.0), (seconds, 3 * seconds)),
            link=LinkRate(seconds, 1 / seconds),
            busy=((1.0, 1.0), (2.0, seconds)),
        )
        for seconds in (1.0, 5.0, 2.0)
    ]
    found = middle(profiles)
    assert found.ends == Rate((1.0, 2.0), (2.0, 6.0)) and found.link == LinkRate(2.0, 0.5)
    assert found.busy == ((1.0, 1.0), (2.0, 2.0)) and found.name == base.name


def test_sizes_that_a_slow_pass_left_out_are_left_out():
    base = load_hardware("cpu")
    long, short = (replace(base, ends=Rate(s, s)) for s in ((1.0, 2.0, 4.0), (1.0, 2.0)))
    assert middle([long, short]).ends.sizes == (1.0, 2.0)
