"""mmcv's configurations: Python assignments, parsed as data and never executed."""

import ast
from typing import Any

MAX_CHARACTERS = 1_000_000


def read_configuration(text: str) -> dict[str, Any]:
    """The assigned names and their values; empty if the text is not Python.

    Values are numbers, strings, lists, dicts and calls of `dict`; tuples become lists, and any
    other expression becomes None.
    """
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
