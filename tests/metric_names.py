"""Which metrics the sources export: for whatever names them, dashboards, alerts, scaling policies, the runbook."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]


def exported() -> set[str]:
    """Names of samples of all metrics in our sources."""
    found: set[str] = set()
    for folder in ("libs", "services"):
        for path in (ROOT / folder).glob("*/src/**/*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Call):
                    found |= samples_of(node)
                elif isinstance(node, ast.Tuple) and node.elts:  # rows of a table of gauges
                    found |= {name for name in [text_of(node.elts[0])] if name}
    return found


def samples_of(call: ast.Call) -> set[str]:
    """What a call that makes a metric exports; empty for another call."""
    name = text_of(call.args[0]) if call.args else ""
    maker = call.func.attr if isinstance(call.func, ast.Attribute) else call.func.id if isinstance(call.func, ast.Name) else ""
    if not name:
        return set()
    if "counter" in maker.lower():
        return {f"{name}_total"}
    if "histogram" in maker.lower():
        return {f"{name}_bucket", f"{name}_sum", f"{name}_count"}
    return {name}


def text_of(node: ast.expr) -> str:
    """A name of a metric, or nothing."""
    is_name = isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("baton_")
    return node.value if is_name else ""  # type: ignore[union-attr,attr-defined]
