"""Forms as the JSON that they stand for."""

import json
import re
from collections.abc import Iterable
from typing import Any

from vidgen.serve.errors import invalid

STRUCTURED = ("segments", "output", "lora", "extra_params", "input_reference")


def form_values(pairs: Iterable[tuple[str, str]]) -> dict[str, Any]:
    """The fields of a form as a JSON body would have them.

    Structured ones are JSON, or come in brackets as OpenAI's client writes them: `output[crf]`,
    `segments[][prompt]`. ApiError for a field that is there twice or broken.
    """
    found: dict[str, Any] = {}
    lists: dict[str, dict[str, list[str]]] = {}
    for name, value in pairs:
        match = re.fullmatch(r"(\w+)(\[\])?(?:\[(\w+)\])?", name)
        outer, is_list, inner = match.groups() if match else (name, None, None)
        if is_list:
            lists.setdefault(outer, {}).setdefault(inner or "", []).append(value)
        elif (
            inner is not None and isinstance(found.setdefault(outer, {}), dict) and inner not in found[outer]
        ):
            found[outer][inner] = value
        elif inner is None and outer not in found:
            found[outer] = _from_json(outer, value) if outer in STRUCTURED else value
        else:
            raise invalid(f"{name!r:.100} is in the form twice; give it once", outer)
    for outer, columns in lists.items():
        counts = {len(column) for column in columns.values()}
        if outer in found or len(counts) > 1 or ("" in columns and len(columns) > 1):
            raise invalid(f"{outer}: its parts do not fit together; give it as JSON text", outer)
        rows = zip(*columns.values(), strict=True)
        found[outer] = [row[0] if "" in columns else dict(zip(columns, row, strict=True)) for row in rows]
    return found


def _from_json(name: str, text: str) -> Any:
    """What a structured field of a form says; a LoRA's name may stand as it is."""
    if name == "lora" and not text.lstrip().startswith(("{", "[")):
        return text
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise invalid(f"{name}={text!r:.100}: need JSON text", name) from None
