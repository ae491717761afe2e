"""mmcv's configurations: Python text of assignments, read as data; nothing of it is ever run."""

import ast
from typing import Any

MAX_CHARACTERS = 1_000_000


def read_configuration(text: str) -> dict[str, Any]:
    """The names assigned and what to: numbers, texts, lists, tuples, dicts and calls of `dict`;
    anything else is None. Empty where the text is no Python."""
    if len(text) > MAX_CHARACTERS:
        return {}
    try:
        module = ast.parse(text)
        return {
            target.id: _value(statement.value)
            for statement in module.body
            if isinstance(statement, ast.Assign)
            for target in statement.targets
            if isinstance(target, ast.Name)
        }
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return {}


def _value(node: ast.expr | None) -> Any:
    match node:
        case ast.Constant(value=value):
            return value
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as value)):
            return -value
        case ast.List(elts=items) | ast.Tuple(elts=items):
            return [_value(item) for item in items]
        case ast.Dict(keys=keys, values=values):
            return {_value(k): _value(v) for k, v in zip(keys, values, strict=True) if k}
        case ast.Call(func=ast.Name(id="dict"), keywords=keywords):
            return {k.arg: _value(k.value) for k in keywords if k.arg}
    return None
