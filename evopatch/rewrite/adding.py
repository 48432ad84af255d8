"""Loops that call the parts of a block one by one, and add what each gives to what it was given."""

from __future__ import annotations

import ast


def parts_of(loop: ast.For) -> list[str]:
    """The names of a block's parts in `for attn, ff in self.layers`, or `for i, (attn, ff) in enumerate(self.layers)`;
    none where a loop has one name for a block."""
    target: ast.expr = loop.target
    counted = isinstance(loop.iter, ast.Call) and ast.unparse(loop.iter.func) == "enumerate"
    if counted and isinstance(target, ast.Tuple) and len(target.elts) == 2:
        target = target.elts[1]
    names = target.elts if isinstance(target, ast.Tuple) else []
    return [name.id for name in names if isinstance(name, ast.Name)] if len(names) > 1 else []


def adds_up(loop: ast.For) -> tuple[bool, bool]:
    """Whether a loop runs `x = attn(x) + x` and `x = ff(x) + x`, for every part in order and with nothing in between;
    and whether it looks at the tokens before the first of these steps, or after the last."""
    parts = parts_of(loop)
    steps = [_step(statement) for statement in loop.body]
    called = [step[0] if step is not None else "" for step in steps]
    if not parts or parts[0] not in called:
        return False, False
    first = called.index(parts[0])
    own = steps[first : first + len(parts)]
    tokens = {step[1] for step in own if step is not None}
    others = loop.body[:first] + loop.body[first + len(parts) :] + loop.orelse
    names = {node.id for other in others for node in ast.walk(other) if isinstance(node, ast.Name)}
    in_order = [step[0] for step in own if step is not None] == parts and len(tokens) == 1
    if not in_order or names.intersection(parts):
        return False, False
    return True, bool(names & tokens)


def _step(statement: ast.stmt) -> tuple[str, str] | None:
    """The part and the tokens of `x = part(x) + x`, `x = x + part(x)` or `x += part(x)`."""
    target: ast.expr
    if isinstance(statement, ast.AugAssign) and isinstance(statement.op, ast.Add):
        sides, target = [statement.value, statement.target], statement.target
    elif isinstance(statement, ast.Assign) and len(statement.targets) == 1 and isinstance(statement.value, ast.BinOp):
        if not isinstance(statement.value.op, ast.Add):
            return None
        sides, target = [statement.value.left, statement.value.right], statement.targets[0]
    else:
        return None
    calls = [side for side in sides if isinstance(side, ast.Call)]
    names = [side.id for side in sides if isinstance(side, ast.Name)]
    if not isinstance(target, ast.Name) or len(calls) != 1 or names != [target.id]:
        return None
    (call,) = calls
    given = [argument.id for argument in call.args if isinstance(argument, ast.Name)]
    alone = given == [target.id] and len(call.args) == 1 and not call.keywords
    return (call.func.id, target.id) if isinstance(call.func, ast.Name) and alone else None
