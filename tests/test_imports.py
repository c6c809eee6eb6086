"""Who may import whom, and where the process may speak: the table ROOMS below, held against every source.

The order is kernels <- model <- denoise <- parallel <- render <- serve, cli (`a <- b`: b imports a). Imports
inside functions count, those under TYPE_CHECKING do not. A new room is a new row.
"""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BARE = frozenset({"torch", "triton", "safetensors", "numpy"})  # what a bare GPU machine has
RAY = BARE | {"ray"}
ACCELERATED = frozenset({"flash_attn", "xformers", "sageattention"})  # what it may have


@dataclass(frozen=True, kw_only=True)
class Room:
    engine: tuple[str, ...] = ()  # parts of vidgen it may import, beside itself
    but_not: tuple[str, ...] = ()  # exceptions from `engine`
    outside: frozenset[str] | None = None  # packages beside the standard library; None: any
    lazy: frozenset[str] = frozenset()  # more of them, inside functions only
    alone: bool = False  # importing it needs no package but `outside`, through all it imports


FACES = ("vidgen.cli", "vidgen.cli_*", "vidgen.__main__", "vidgen.serve")
LAYERS = ("vidgen.types", "vidgen.kernels", "vidgen.model")
MATH = (*LAYERS, "vidgen.conditioning", "vidgen.sparsity", "vidgen.stepcache")
PARTS = (*LAYERS, "vidgen.codec", "vidgen.conditioning.text")  # of the built-in model
FAMILY = (*MATH, "vidgen.codec", "vidgen.builtin", "vidgen.sections", "vidgen.config", "vidgen.denoise")

# The longest key that holds a module is its room.
ROOMS: dict[str, Room] = {
    "vidgen": Room(engine=("vidgen.engine",), outside=frozenset(), alone=True),  # __init__.py only
    "vidgen.types": Room(outside=frozenset({"torch"}), alone=True),
    "vidgen.kernels": Room(outside=BARE, lazy=ACCELERATED, alone=True),
    "vidgen.model": Room(engine=("vidgen.kernels", "vidgen.types"), outside=BARE, alone=True),
    "vidgen.codec": Room(engine=LAYERS, outside=BARE, lazy=frozenset({"diffusers"}), alone=True),
    "vidgen.conditioning": Room(
        engine=LAYERS, outside=BARE, lazy=frozenset({"transformers", "ftfy", "PIL"}), alone=True
    ),
    "vidgen.builtin": Room(engine=PARTS, outside=BARE, alone=True),
    "vidgen.sparsity": Room(engine=("vidgen.kernels",), outside=BARE, alone=True),
    "vidgen.sparsity.settings": Room(outside=frozenset(), alone=True),
    "vidgen.stepcache": Room(engine=LAYERS, outside=BARE, alone=True),
    "vidgen.stepcache.settings": Room(outside=frozenset(), alone=True),
    "vidgen.stepcache.calibration": Room(
        engine=("vidgen.stepcache.settings",), outside=frozenset(), alone=True
    ),
    "vidgen.denoise": Room(engine=MATH),
    "vidgen.denoise.noise": Room(engine=("vidgen.types",), outside=BARE, alone=True),
    "vidgen.denoise.forwards": Room(outside=frozenset(), alone=True),
    "vidgen.denoise.timetable": Room(
        engine=("vidgen.types", "vidgen.denoise.forwards"), outside=frozenset(), alone=True
    ),
    "vidgen.world": Room(outside=BARE, alone=True),
    "vidgen.measure": Room(
        engine=(*MATH, "vidgen.codec", "vidgen.builtin", "vidgen.denoise", "vidgen.world"),
        outside=BARE,
        lazy=frozenset({"lpips"}),
    ),
    "vidgen.train": Room(
        engine=(*PARTS, "vidgen.builtin", "vidgen.denoise", "vidgen.measure", "vidgen.world"),
        outside=BARE,
        alone=True,
    ),
    "vidgen.media": Room(engine=("vidgen.types",)),
    "vidgen.config": Room(
        engine=(
            "vidgen.types",
            "vidgen.sections",
            "vidgen.speeds",
            "vidgen.sparsity.settings",
            "vidgen.stepcache.settings",
        )
    ),
    "vidgen.speeds": Room(
        engine=("vidgen.types", "vidgen.sparsity.settings", "vidgen.stepcache.settings"),
        outside=frozenset(),
        alone=True,
    ),
    "vidgen.sections": Room(engine=("vidgen.types", "vidgen.sparsity.settings")),
    "vidgen.families": Room(engine=FAMILY),
    "vidgen.pictures": Room(engine=("vidgen.config", "vidgen.families.family", "vidgen.media")),
    "vidgen.planning": Room(
        engine=(*FAMILY, "vidgen.families", "vidgen.limits", "vidgen.pictures"), but_not=("vidgen.media",)
    ),
    "vidgen.video": Room(engine=("vidgen.denoise",)),
    "vidgen.inspection": Room(engine=("vidgen",), but_not=(*FACES, "vidgen.train", "vidgen.render")),
    "vidgen.live": Room(engine=("vidgen.engine", "vidgen.media")),
    "vidgen.journal": Room(engine=(*MATH, "vidgen.denoise", "vidgen.config", "vidgen.media")),
    "vidgen.limits": Room(engine=(*MATH, "vidgen.denoise", "vidgen.config")),
    "vidgen.parallel": Room(engine=(*MATH, "vidgen.denoise"), outside=BARE, alone=True),
    "vidgen.parallel.planner.hardware": Room(
        engine=(*MATH, "vidgen.denoise"), outside=BARE, lazy=frozenset({"yaml"}), alone=True
    ),
    "vidgen.parallel.cluster": Room(engine=(), outside=RAY),
    "vidgen.parallel.actors": Room(engine=("vidgen.parallel",), outside=RAY),
    "vidgen.parallel.gang": Room(engine=("vidgen.parallel", "vidgen.denoise"), outside=RAY),
    "vidgen.parallel.coordinator": Room(engine=("vidgen.parallel", "vidgen.denoise"), outside=RAY),
    "vidgen.parallel.standing": Room(engine=("vidgen.parallel",), outside=RAY),
    "vidgen.execute": Room(engine=("vidgen",), but_not=(*FACES, "vidgen.train", "vidgen.render")),
    "vidgen.batch": Room(engine=("vidgen.config", "vidgen.journal")),
    "vidgen.choosing": Room(
        engine=(
            "vidgen.config",
            "vidgen.denoise",
            "vidgen.families",
            "vidgen.parallel",
            "vidgen.planning",
            "vidgen.sharing",
            "vidgen.stepcache",
            "vidgen.types",
        )
    ),
    "vidgen.known_sizes": Room(
        engine=(
            "vidgen.config",
            "vidgen.denoise",
            "vidgen.model",
            "vidgen.parallel",
            "vidgen.sharing",
            "vidgen.stepcache",
            "vidgen.types",
        )
    ),
    "vidgen.sharing": Room(
        engine=(
            "vidgen.config",
            "vidgen.denoise",
            "vidgen.parallel",
            "vidgen.sparsity",
            "vidgen.stepcache.settings",
            "vidgen.types",
        )
    ),
    "vidgen.run": Room(engine=("vidgen",), but_not=(*FACES, "vidgen.train", "vidgen.render")),
    "vidgen.render": Room(engine=("vidgen",), but_not=(*FACES, "vidgen.train")),
    "vidgen.engine": Room(engine=("vidgen",), but_not=(*FACES, "vidgen.train", "vidgen.render")),
    "vidgen.places": Room(engine=("vidgen.planning", "vidgen.limits")),
    "vidgen.products": Room(engine=("vidgen",), but_not=(*FACES, "vidgen.train", "vidgen.render")),
    "vidgen.doctor": Room(engine=("vidgen",), but_not=(*FACES, "vidgen.train")),
    "vidgen.bench": Room(engine=("vidgen",), but_not=(*FACES, "vidgen.train")),
    "vidgen.ablate": Room(engine=("vidgen",), but_not=(*FACES, "vidgen.train")),
    "vidgen.serve": Room(engine=("vidgen",), but_not=("vidgen.train",)),
    "vidgen.cli": Room(engine=("vidgen",)),
    "vidgen.cli_*": Room(engine=("vidgen",)),
    "vidgen.__main__": Room(engine=("vidgen.cli",)),
    "tools": Room(engine=("vidgen",)),
}
# the only places that print or end the process
SPEAKERS = ("vidgen.cli", "vidgen.cli_*", "vidgen.__main__", "vidgen.train.__main__", "tools")


@dataclass(frozen=True, kw_only=True)
class Import:
    name: str  # absolute; `from a import b` gives a.b
    line: int
    in_function: bool


def within(module: str, keys: tuple[str, ...]) -> bool:
    """Whether a module is one of the keys or lies in one; a key may end in * for any ending."""
    return any(
        module == key or module.startswith(key + ".") or (key[-1] == "*" and module.startswith(key[:-1]))
        for key in keys
    )


def room_of(module: str) -> str | None:
    """The row of ROOMS that a module falls under; None when it lies in no room."""
    keys = [key for key in ROOMS if within(module, (key,)) and (key != "vidgen" or module == "vidgen")]
    return max(keys, key=len, default=None)


def sources() -> dict[str, tuple[str, bool]]:
    """Import name of every module -> (its text, whether it is a package); links are not followed."""
    found = {}
    for folder in ("vidgen", "kernels", "parallel", "tools"):
        for parent, _, names in os.walk(ROOT / folder, followlinks=False):
            for path in (Path(parent, name) for name in names if name.endswith(".py")):
                parts = path.relative_to(ROOT).with_suffix("").parts
                if folder in ("kernels", "parallel"):
                    parts = ("vidgen", *parts)
                is_package = parts[-1] == "__init__"
                name = ".".join(parts[:-1] if is_package else parts)
                found[name] = (path.read_text(encoding="utf-8"), is_package)
    return found


def imports(module: str, text: str, is_package: bool = False) -> Iterator[Import]:
    """What a module imports, by statement or by a literal import_module or __import__."""

    def visit(node: ast.AST, in_function: bool) -> Iterator[Import]:
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            for child in node.orelse:
                yield from visit(child, in_function)
            return
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = module.split(".") if is_package else module.split(".")[:-1]
                base = ".".join([*parts[: len(parts) - node.level + 1], *filter(None, [node.module])])
            names = [f"{base}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            if ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
                names = [str(node.args[0].value)]
        for name in names:
            yield Import(name=name, line=getattr(node, "lineno", 0), in_function=in_function)
        is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            yield from visit(child, in_function or is_function)

    return visit(ast.parse(text), False)


def is_allowed(found: Import, key: str) -> bool:
    """Whether a module of this room may import that."""
    room, package = ROOMS[key], found.name.split(".")[0]
    if package == "vidgen":
        mine = found.name == "vidgen.__version__" or within(found.name, (key,) if key != "vidgen" else ())
        return mine or (within(found.name, room.engine) and not within(found.name, room.but_not))
    if package in ("kernels", "parallel"):
        return False  # their names are vidgen.kernels and vidgen.parallel
    if package in sys.stdlib_module_names or room.outside is None:
        return True
    return package in room.outside or (found.in_function and package in room.lazy)


def violations(module: str, text: str, is_package: bool = False) -> list[str]:
    """Forbidden imports of one source, a line each."""
    key = room_of(module)
    assert key is not None
    return [
        f"{module}:{found.line} imports {found.name}, which {key} may not"
        for found in imports(module, text, is_package)
        if not is_allowed(found, key)
    ]


def speaking(module: str, text: str) -> list[str]:
    """Calls of print and exit in a source that must not speak, a line each."""
    if within(module, SPEAKERS):
        return []
    mute = {"print", "exit", "quit", "SystemExit", "sys.exit", "os._exit"}
    return [
        f"{module}:{node.lineno} calls {ast.unparse(node.func)}"
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in mute
    ]


def packages_needed(module: str, known: dict[str, tuple[str, bool]]) -> dict[str, str]:
    """Packages that `import module` imports, through all it reaches -> the chain that leads there."""
    needed, seen, queue = {}, set(), [(module, module)]
    while queue:
        here, chain = queue.pop(0)
        parts = here.split(".")
        for name in (".".join(parts[: i + 1]) for i in range(len(parts))):  # its packages run first
            if name in seen or name not in known:
                continue
            seen.add(name)
            for found in imports(name, *known[name]):
                package = found.name.split(".")[0]
                if found.in_function or package in sys.stdlib_module_names:
                    continue
                if package == "vidgen":
                    queue.append((found.name, f"{chain} -> {found.name}"))
                else:
                    needed.setdefault(package, f"{chain} -> {found.name}")
    return needed


def test_every_module_lies_in_a_room():
    homeless = [name for name in sources() if room_of(name) is None]
    assert not homeless, f"add a row to ROOMS in tests/test_imports.py for: {', '.join(homeless)}"


@pytest.mark.parametrize("key", ROOMS)
def test_a_room_imports_only_what_its_row_allows(key: str):
    mine = {name: source for name, source in sources().items() if room_of(name) == key}
    found = [line for name, source in mine.items() for line in violations(name, *source)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("key", [key for key, room in ROOMS.items() if room.alone])
def test_a_room_that_stands_alone_needs_no_other_package(key: str):
    known, allowed = sources(), ROOMS[key].outside
    assert allowed is not None
    chains = {
        chain
        for name in known
        if room_of(name) == key
        for package, chain in packages_needed(name, known).items()
        if package not in allowed
    }
    assert not chains, "\n".join(sorted(chains))


def test_only_the_faces_print_or_exit():
    found = [line for name, (text, _) in sources().items() for line in speaking(name, text)]
    assert not found, "\n".join(found)


def test_importing_vidgen_is_light():
    heavy = ["torch", "numpy", "av", "decord", "pydantic", "typer", "rich", "yaml"]
    code = f"import sys, vidgen; print([name for name in {heavy} if name in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_kernels_and_parallel_are_linked_into_vidgen():
    for name in ("kernels", "parallel"):
        assert os.readlink(ROOT / "vidgen" / name) == f"../{name}"
        assert not (ROOT / name / "__init__.py").exists(), "the PyPI package of this name would be shadowed"


@pytest.mark.parametrize(
    ("module", "text"),
    [
        ("vidgen.kernels.attention.api", "from vidgen.model import dit"),
        ("vidgen.kernels.attention.api", "import flash_attn"),
        ("vidgen.model.dit", "def f():\n    import vidgen.parallel.topology"),
        ("vidgen.model.dit", "from ..parallel import topology"),
        ("vidgen.model.dit", "import einops"),
        ("vidgen.model.dit", "from kernels.attention import api"),
        ("vidgen.model.dit", "import importlib\nimportlib.import_module('vidgen.render')"),
        ("vidgen.train.trainer", "from vidgen.conditioning import prompts"),
        ("vidgen.denoise.loop", "from vidgen.media.sink import write"),
        ("vidgen.denoise.noise", "from vidgen.denoise import schedule"),
        ("vidgen.denoise.timetable", "import torch"),
        ("vidgen.types", "from vidgen import denoise"),
        ("vidgen.render", "from vidgen import cli"),
        ("vidgen.render", "import vidgen.cli_plan"),
        ("vidgen.bench.machine", "from vidgen.cli import main"),
    ],
)
def test_a_forbidden_import_is_found(module: str, text: str):
    assert len(violations(module, text)) == 1


@pytest.mark.parametrize(
    ("module", "text"),
    [
        ("vidgen.kernels.attention.backends", "def f():\n    import flash_attn"),
        ("vidgen.model.dit", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import vidgen.render"),
        ("vidgen.model.dit", "from vidgen.kernels.attention.api import attention\nfrom . import rope"),
        ("vidgen.train.trainer", "from vidgen.conditioning.text import WordEncoder"),
        ("vidgen.denoise.timetable", "import heapq\nfrom vidgen.types import Item"),
        ("vidgen.serve.api", "from vidgen.cli import main\nimport fastapi"),
    ],
)
def test_an_allowed_import_passes(module: str, text: str):
    assert not violations(module, text)


def test_a_package_reached_through_another_module_is_found():
    known = {
        "vidgen.denoise": ("", True),
        "vidgen.denoise.timetable": ("from vidgen.types import Item", False),
        "vidgen.types": ("import torch", False),
    }
    assert packages_needed("vidgen.denoise.timetable", known) == {
        "torch": "vidgen.denoise.timetable -> vidgen.types.Item -> torch"
    }


def test_speech_is_found():
    assert len(speaking("vidgen.render", "import sys\nprint(1)\nsys.exit(2)\nraise SystemExit(3)")) == 3
    assert not speaking("vidgen.cli_plan", "print(1)")


def test_the_longest_key_is_the_room():
    modules = ("vidgen.denoise.noise", "vidgen.denoise.loop", "vidgen.cli_plan", "vidgen", "vidgen.somewhere")
    rooms = ["vidgen.denoise.noise", "vidgen.denoise", "vidgen.cli_*", "vidgen", None]
    assert [room_of(module) for module in modules] == rooms
