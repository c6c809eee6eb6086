"""How large the code is: lines by room, what exceeds the house style's aims, change since a revision."""

import argparse
import ast
import io
import os
import subprocess
import sys
import tarfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("vidgen", "parallel", "kernels", "tools", "tests")
ROOM_DEPTH = {"vidgen": 2, "kernels": 2}  # elsewhere the folder itself is the room
MAX_FILE_LINES = 300
MAX_FUNCTION_LINES = 40
MAX_POSITIONAL_ARGS = 6

Sources = dict[str, str]  # path from the root -> text


def sources_now() -> Sources:
    """Every Python file of the working tree; links are not followed, so nothing counts twice."""
    return {
        path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
        for folder in FOLDERS
        for parent, _, names in os.walk(ROOT / folder, followlinks=False)
        for path in (Path(parent, name) for name in sorted(names))
        if path.suffix == ".py"
    }


def sources_at(revision: str) -> Sources:
    """The same files as they were in a revision of git."""
    archive = subprocess.run(
        ["git", "archive", "--format=tar", revision], cwd=ROOT, capture_output=True, check=False
    )
    if archive.returncode:
        raise ValueError(f"--diff {revision}: {archive.stderr.decode().strip()}")
    sources = {}
    with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as tar:
        for member in tar:
            if member.isfile() and member.name.endswith(".py") and member.name.startswith(FOLDERS):
                stream = tar.extractfile(member)
                assert stream is not None
                sources[member.name] = stream.read().decode()
    return sources


def room_of(path: str) -> str:
    """The room a file belongs to, e.g. vidgen/model, kernels/attention, tests."""
    folders = path.split("/")[:-1]
    return "/".join(folders[: ROOM_DEPTH.get(folders[0], 1)])


def count_lines(sources: Sources) -> Counter[str]:
    return Counter({path: len(text.splitlines()) for path, text in sources.items()})


def by_room(num_lines: Counter[str]) -> Counter[str]:
    rooms: Counter[str] = Counter()
    for path, count in num_lines.items():
        rooms[room_of(path)] += count
    return rooms


def large_functions(path: str, text: str) -> Iterator[str]:
    """A line for each function that is too long or takes too many arguments by position."""
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        length = (node.end_lineno or node.lineno) - node.lineno + 1
        num_args = len(node.args.posonlyargs) + len(node.args.args)
        num_args -= bool(node.args.args) and node.args.args[0].arg in ("self", "cls")
        if length > MAX_FUNCTION_LINES:
            yield f"{path}:{node.lineno} {node.name}: {length} lines"
        if num_args > MAX_POSITIONAL_ARGS:
            yield f"{path}:{node.lineno} {node.name}: {num_args} positional arguments"


def report(sources: Sources) -> str:
    num_lines = count_lines(sources)
    num_files = Counter(room_of(path) for path in sources)
    lines = [f"{'room':24} {'files':>5} {'lines':>6}"]
    rooms = sorted(by_room(num_lines).items())
    lines += [f"{room:24} {num_files[room]:5} {count:6}" for room, count in rooms]
    too_long = [f"{path}: {n}" for path, n in num_lines.most_common() if n > MAX_FILE_LINES]
    large = [line for path, text in sorted(sources.items()) for line in large_functions(path, text)]
    aims = f"{MAX_FUNCTION_LINES} lines or {MAX_POSITIONAL_ARGS} positional arguments"
    for title, found in ((f"files over {MAX_FILE_LINES} lines", too_long), (f"functions over {aims}", large)):
        lines += ["", f"{title}: {len(found) or 'none'}", *(f"  {line}" for line in found)]
    return "\n".join([*lines, "", summary(sources)])


def summary(sources: Sources) -> str:
    """The report in one line."""
    num_lines = count_lines(sources)
    num_long = sum(n > MAX_FILE_LINES for n in num_lines.values())
    num_large = sum(1 for path, text in sources.items() for _ in large_functions(path, text))
    return (
        f"{len(sources)} files, {num_lines.total():,} lines, "
        f"{num_long} files and {num_large} functions above the aim"
    )


def difference(before: Sources, after: Sources) -> str:
    """Files and rooms whose size changed, old and new line counts, and the total."""
    lines = []
    for title, old, new in (
        ("file", count_lines(before), count_lines(after)),
        ("room", by_room(count_lines(before)), by_room(count_lines(after))),
    ):
        lines.append(f"{title:48} {'before':>6} {'after':>6} {'change':>6}")
        changed = sorted(name for name in old.keys() | new.keys() if old[name] != new[name])
        lines += [f"{name:48} {old[name]:6} {new[name]:6} {new[name] - old[name]:+6}" for name in changed]
        lines += [f"{'all':48} {old.total():6} {new.total():6} {new.total() - old.total():+6}", ""]
    return "\n".join(lines[:-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--brief", action="store_true", help="one line only")
    kind.add_argument("--diff", metavar="REV", help="change of the working tree against a revision of git")
    arguments = parser.parse_args()
    try:
        if arguments.diff:
            print(difference(sources_at(arguments.diff), sources_now()))
        else:
            print((summary if arguments.brief else report)(sources_now()))
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
