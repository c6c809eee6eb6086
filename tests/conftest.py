"""What holds for every test: one torch thread, repeatable hypothesis examples, no GPU test without a GPU."""

import signal
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

try:
    import hypothesis
except ModuleNotFoundError:  # a bare CUDA machine runs the gpu tests without it
    pass
else:
    hypothesis.settings.register_profile("vidgen", deadline=None, derandomize=True)
    hypothesis.settings.load_profile("vidgen")

# a shell's background jobs ignore it, and all that they start: tests send it and wait for what it does
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# xdist runs a process per core already, and one thread adds numbers up in the same order everywhere
torch.set_num_threads(1)


def _cuda_works() -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a CUDA build of torch warns on a machine without a driver
        return torch.cuda.is_available()


# files that start Ray, which takes seconds of every core: one worker of xdist has them all, one after another
ON_RAY = {
    "families/test_wan_jobs.py",
    "parallel/test_driver_faults.py",
    "parallel/test_faults.py",
    "parallel/test_low_delay.py",
    "parallel/test_node_loss.py",
    "parallel/test_on_ray.py",
    "parallel/test_schemes_on_ray.py",
    "parallel/test_standing.py",
    "serve/test_ranks.py",
}
# folders whose files take longest: begun first, they do not keep one worker busy when the others are done;
# before all of them those of the command line, which must find no Ray that tests before them have left
FIRST = ("cli", "serve", "render", "families", "kernels", "parallel")


def _file(item: pytest.Item) -> str:
    return item.path.relative_to(Path(__file__).parent).as_posix()


def _place(item: pytest.Item) -> int:
    file = _file(item)
    room = file.partition("/")[0]
    if file in ON_RAY:
        return -1
    return FIRST.index(room) if room in FIRST else len(FIRST)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """A worker at a time for every file, and one for all those on Ray."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return "ray" if file.removeprefix("tests/") in ON_RAY else file

    return ByFile(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=_place)
    if _cuda_works():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device: torch.cuda.is_available() is False")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """True under `-m gpu` where there is no gpu test: a bare CUDA machine could not even import some."""
    if config.option.markexpr != "gpu":
        return None
    files = collection_path.rglob("test_*.py") if collection_path.is_dir() else [collection_path]
    return None if any("mark.gpu" in file.read_text(encoding="utf-8") for file in files) else True
