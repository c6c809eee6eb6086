"""Where a job writes, checked before anything is made: nothing is lost by it and there is room."""

import tempfile
from pathlib import Path

from vidgen.limits import disk_bytes, free_disk_bytes, readable
from vidgen.planning import Plan


def check_places(plan: Plan, folder: Path, overwrite: bool) -> None:
    """ValueError unless everything the job writes can be written and nothing is lost by it."""
    job, output = plan.job, plan.job.output
    outputs = {"output": output.path, "save_latents": output.save_latents, "sheet": output.sheet_path}
    taken: dict[Path, str] = {}
    for name, path in outputs.items():
        if path is None:
            continue
        if path.absolute() in taken:
            raise ValueError(f"{name}={path}: is also the {taken[path.absolute()]}; give it another name")
        taken[path.absolute()] = name
        _check_writable(name, path)
        if not path.exists() or overwrite:
            continue
        if path.is_file() or any(path.iterdir()):
            raise ValueError(f"{name}={path}: exists; give another name or --overwrite")
    _check_writable("job", folder)
    if (folder / "job.yaml").exists() and not overwrite:
        raise ValueError(
            f"job={folder}: exists; `vidgen resume {folder}` goes on with it, --overwrite starts anew"
        )
    if folder.exists() and any(folder.iterdir()) and not (folder / "job.yaml").exists():
        raise ValueError(f"job={folder}: is not a job's folder and not empty; choose another --job")
    assert job.height and job.width
    needed = disk_bytes(job, plan.task.model.config.latent_channels, plan.strides)
    free = free_disk_bytes(folder)
    if needed > free:
        raise ValueError(
            f"{job.num_frames} frames need about {readable(needed)} of disk, {readable(free)} are free at "
            f"{folder.absolute().parent}; free some or choose another --job and --output"
        )


def first_missing(path: Path) -> Path | None:
    """The topmost folder that making this path would make; None when it is there."""
    missing = None
    for place in (path.absolute(), *path.absolute().parents):
        if place.exists():
            break
        missing = place
    return missing


def _check_writable(name: str, path: Path) -> None:
    """ValueError unless a file can be made at the nearest folder that is there."""
    there = path.absolute().parent
    while not there.exists():
        there = there.parent
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise ValueError(f"{name}={path}: {there} cannot be written: {error.strerror}") from error
