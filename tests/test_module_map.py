"""The module map in README.md names every module there is, and none that is not."""

import os
import re
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ENTRY = re.compile(r"^- `(?P<path>[^`]+\.py)`: (?P<phrase>\S.*)$")


def modules() -> list[str]:
    """Paths from the root of all modules; links are not followed, so each has its real place."""
    return sorted(
        path.relative_to(ROOT).as_posix()
        for folder in ("vidgen", "kernels", "parallel", "tools")
        for parent, _, names in os.walk(ROOT / folder, followlinks=False)
        for path in (Path(parent, name) for name in names)
        if path.suffix == ".py" and path.name != "__init__.py"
    )


def map_lines(readme: str) -> list[str]:
    """The list items of the section `## Module map`."""
    match = re.search(r"^## Module map\n(.*?)(?=^## |\Z)", readme, flags=re.DOTALL | re.MULTILINE)
    assert match, "README.md has no section '## Module map'"
    return [line.rstrip() for line in match[1].splitlines() if line.startswith("- ")]


def faults(lines: list[str], paths: list[str]) -> list[str]:
    """What is wrong with a map, a line each, as edits to make in README.md."""
    entries = Counter(match["path"] for line in lines if (match := ENTRY.match(line)))
    malformed = [f"? {line}   (want: - `path.py`: one phrase)" for line in lines if not ENTRY.match(line)]
    missing = [f"+ - `{path}`: ...   (not in the map)" for path in paths if path not in entries]
    stale = [f"- - `{path}`   (no such module)" for path in sorted(entries) if path not in paths]
    double = [f"- - `{path}`   (listed {count} times)" for path, count in entries.items() if count > 1]
    return malformed + missing + stale + double


def test_readme_maps_every_module_and_no_other():
    readme = ROOT / "README.md"
    assert readme.is_file(), "README.md does not exist"
    found = faults(map_lines(readme.read_text(encoding="utf-8")), modules())
    assert not found, "README.md, section Module map:\n" + "\n".join(found)


def test_each_kind_of_fault_is_found():
    entries = "- `a.py`: one\n- `a.py`: two\n- `gone.py`: old\n- b.py\n"
    readme = f"# x\n## Module map\nWords.\n{entries}## Next\n- `c.py`: c\n"
    found = faults(map_lines(readme), ["a.py", "new.py"])
    assert [line[0] for line in found] == ["?", "+", "-", "-"]
    assert "b.py" in found[0] and "new.py" in found[1] and "gone.py" in found[2] and "2 times" in found[3]
