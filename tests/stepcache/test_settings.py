"""Settings of step caches: what cannot be is an error that says what can."""

import dataclasses
import json

import pytest

from vidgen.config import JobConfig, frames_digest, parse_job
from vidgen.stepcache.cache import make_cache
from vidgen.stepcache.calibration import BUILTIN, read_calibration, with_calibration
from vidgen.stepcache.settings import METHODS, CacheSettings

WRONG = {
    "method": ({"method": "fast"}, "method=fast: there are none, tea"),
    "threshold": ({"method": "tea", "threshold": -0.1}, "threshold=-0.1: need 0"),
    "no number": ({"method": "tea", "threshold": float("nan")}, "threshold=nan"),
    "threshold of a clock": ({"method": "taylor", "threshold": 0.1}, "take gated_taylor"),
    "threshold of layers": ({"method": "delta", "threshold": 0.1}, "method=delta: it skips by the clock"),
    "order of layers": ({"method": "delta", "order": 1}, "order=1 with method=delta: it forecasts nothing"),
    "threshold of a region": ({"method": "region", "threshold": 0.1}, "method=region: it skips by the clock"),
    "order of a region": ({"method": "region", "order": 1}, "order=1 with method=region: it forecasts"),
    "ratio": ({"method": "region", "ratio": -1.0}, "ratio=-1.0: need a share of 0 to 1"),
    "highest": ({"method": "region", "highest": 2.0}, "highest=2.0: need a share of 0 to 1"),
    "ratio of another": ({"method": "delta", "ratio": 0.5}, "ratio=0.5 with method=delta: is of region"),
    "layers": ({"method": "delta", "layers": 1.5}, "layers=1.5: need a share of 0 to 1"),
    "boundary": ({"method": "delta", "boundary": -0.1}, "boundary=-0.1: need a share of 0 to 1"),
    "layers of another": ({"method": "tea", "layers": 0.5}, "layers=0.5 with method=tea: is of delta"),
    "warm up": ({"warm_up_steps": 0}, "warm_up_steps=0: need at least 1"),
    "last steps": ({"last_steps": -1}, "last_steps=-1: need at least 0"),
    "skips": ({"max_skips": -1}, "max_skips=-1"),
    "order": ({"order": 9}, "order=9: need 0 to 4"),
    "coefficients": ({"coefficients": ()}, "need one finite number"),
    "short curve": ({"magnitudes": ((1.0, 1.0),)}, "two pairs or more"),
    "ascending curve": ({"magnitudes": ((0.0, 1.0), (1.0, 1.0))}, "descending"),
    "no magnitude": ({"magnitudes": ((1.0, 1.0), (0.5, 0.0))}, "magnitude above 0"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_is_an_error_of_one_line(case: str):
    given, message = WRONG[case]
    with pytest.raises(ValueError, match=message) as caught:
        CacheSettings(**given)
    assert "\n" not in str(caught.value)


def test_settings_do_not_change():
    with pytest.raises(dataclasses.FrozenInstanceError):
        CacheSettings().threshold = 0.5  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("name", METHODS)
def test_every_name_has_a_cache_but_none(name: str):
    cache = make_cache(with_calibration(CacheSettings(method=name), is_builtin=True))
    assert (cache is None) == (name == "none")


def test_magnitudes_must_come_from_somewhere():
    with pytest.raises(ValueError, match="vidgen measure calibration"):
        make_cache(CacheSettings(method="mag"))


def test_a_calibration_is_read_from_its_file(tmp_path):
    found = read_calibration(BUILTIN)
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"magnitudes": [[1, 2], [0.5, 1]], "coefficients": [2, 0]}))
    mine = str(path)
    assert with_calibration(CacheSettings(method="mag"), is_builtin=True).magnitudes == found["magnitudes"]
    tea = with_calibration(CacheSettings(method="tea", calibration=mine), is_builtin=True)
    assert tea.coefficients == (2.0, 0.0)
    path.write_text("[]")
    with pytest.raises(ValueError, match="no calibration"):
        read_calibration(path)
    with pytest.raises(ValueError, match="cannot be read"):
        read_calibration(tmp_path / "none.json")


def test_a_job_says_which_cache_and_jobs_from_before_go_on():
    job = parse_job({"cache": {"method": "tea", "threshold": "0.1"}})
    assert job.cache == CacheSettings(method="tea", threshold=0.1)
    assert frames_digest(job) != frames_digest(JobConfig())
    with pytest.raises(ValueError, match=r"cache.treshold; did you mean threshold\?"):
        parse_job({"cache": {"treshold": 1}})
    with pytest.raises(ValueError, match="method=fast"):
        parse_job({"cache": {"method": "fast"}})
