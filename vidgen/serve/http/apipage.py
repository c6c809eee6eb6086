"""The API's description: OpenAPI for programs, and a page of plain HTML that needs no network."""

from collections.abc import Iterable
from html import escape
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel

STYLE = """
:root { color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif; }
body { max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
code, pre { font: 0.9em ui-monospace, monospace; overflow-x: auto; }
summary { cursor: pointer; padding: 0.3rem 0; } td, th { padding: 0.1rem 0.8rem 0.1rem 0; text-align: left; }
td { vertical-align: top; }
"""


def openapi(app: FastAPI, bodies: Iterable[type[BaseModel]]) -> dict[str, Any]:
    """The OpenAPI document, with the schemas of bodies that routes read by hand."""
    if app.openapi_schema is None:
        found = app.openapi()
        schemas = found.setdefault("components", {}).setdefault("schemas", {})
        for model in bodies:
            body = model.model_json_schema(ref_template="#/components/schemas/{model}")
            schemas |= body.pop("$defs", {})
            schemas[model.__name__] = body
        found["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        found["security"] = [{"key": []}, {}]
    assert app.openapi_schema is not None
    return app.openapi_schema


def page(api: dict[str, Any], source: str) -> str:
    """HTML that lists every call with its parameters, its body's fields and its answers."""
    calls = [
        _call(method, path, about, api)
        for path, methods in api["paths"].items()
        for method, about in methods.items()
    ]
    info = api["info"]
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{escape(info['title'])} API</title>"
        f"<meta name=viewport content='width=device-width'><style>{STYLE}</style>"
        f"<h1>{escape(info['title'])} {escape(info['version'])}</h1><p>{escape(info['description'])}</p>"
        "<p>The same for programs: <a href=/openapi.json>/openapi.json</a>. Live sessions: "
        "<code>WS /v1/realtime/video</code>.</p>"
        f"{''.join(calls)}<details><summary>OpenAPI document</summary><pre>{escape(source)}</pre></details>"
    )


def _call(method: str, path: str, about: dict[str, Any], api: dict[str, Any]) -> str:
    rows = [
        (f"{one['name']} ({one['in']})", _kind(one["schema"]), one.get("description", ""))
        for one in about.get("parameters", ())
    ]
    body = about.get("requestBody", {}).get("content", {})
    for name in {content["schema"]["$ref"].rpartition("/")[2] for content in body.values()}:
        fields = api["components"]["schemas"][name]["properties"].items()
        rows += [(field, _kind(schema), schema.get("description", "")) for field, schema in fields]
    cells = "".join(
        f"<tr><td><code>{escape(name)}</code><td><code>{escape(kind)}</code><td>{escape(text)}"
        for name, kind, text in rows
    )
    answers = "".join(
        f"<tr><td><code>{escape(status)}</code><td>{escape(answer.get('description', ''))}"
        for status, answer in about["responses"].items()
    )
    return (
        f"<details><summary><code>{escape(method.upper())} {escape(path)}</code></summary>"
        f"<p>{escape(about.get('description', ''))}</p><table>{cells}</table>"
        f"<h4>Answers</h4><table>{answers}</table></details>"
    )


def _kind(schema: dict[str, Any]) -> str:
    """A field's type in a word."""
    if "enum" in schema:
        return " | ".join(map(str, schema["enum"]))
    if "anyOf" in schema:
        return " | ".join(_kind(case) for case in schema["anyOf"])
    return str(schema.get("type") or schema.get("const") or schema.get("$ref", "any").rpartition("/")[2])
