"""Mutants of the rules: one changed node of the syntax tree of a rule, a helper, or the plain JAX around it."""

import ast
import dataclasses
import importlib
import importlib.abc
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import fcfunc

ROOT = Path(fcfunc.__file__).parent
MODULES = {
    f"fcfunc.{'.'.join(path.relative_to(ROOT).with_suffix('').parts)}": path
    for path in sorted([*ROOT.glob("ops/_[a-z]*.py"), *ROOT.glob("losses/_[a-z]*.py")])
}
RELOADED = ("fcfunc.ops", "fcfunc.losses", "tests.rules")

NOT_OF_RULES = {"check_affine", "checked_options", "_norm_arguments", "mean"}
"""Functions that only check arguments, and `losses.mean`. The tests of rules do not cover them."""

OPERATORS = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.Pow: ast.Mult,
    ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.FloorDiv: ast.Mult,
}  # fmt: skip
COMPARISONS = {
    ast.Lt: (ast.LtE, ast.Gt), ast.LtE: (ast.Lt, ast.GtE), ast.Gt: (ast.GtE, ast.Lt), ast.GtE: (ast.Gt, ast.LtE),
    ast.Eq: (ast.NotEq,), ast.NotEq: (ast.Eq,), ast.Is: (ast.IsNot,), ast.IsNot: (ast.Is,),
    ast.In: (ast.NotIn,), ast.NotIn: (ast.In,),
}  # fmt: skip
SIBLINGS = {
    "max": "min", "sum": "mean", "mean": "sum", "exp": "expm1", "expm1": "exp", "log": "log1p", "maximum": "minimum",
    "isnan": "isinf", "any": "all", "zeros": "ones", "sqrt": "exp", "rsqrt": "exp", "jnp.inf": "jnp.nan", "abs": "sign",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Mutant:
    """A mutant: its location, its change, and the tree of its module, which is valid until the next mutant is made."""

    module: str
    function: str
    line: int
    change: str
    tree: ast.Module

    @property
    def key(self) -> str:
        """The name of the mutant. It has no line number, so that changes elsewhere in the file do not affect it."""
        return f"{self.module.removeprefix('fcfunc.')}.{self.function}: {self.change}"


def mutants_of(module: str) -> Iterator[Mutant]:
    """Yields every mutant of the functions of a module, in the order of the file."""
    tree = ast.parse(MODULES[module].read_text())
    for function in tree.body:
        if isinstance(function, ast.FunctionDef) and function.name not in NOT_OF_RULES:
            seen: dict[str, int] = {}
            for line, change in _changes(function, tree):
                seen[change] = seen.get(change, 0) + 1
                count = f" ({seen[change]})" if seen[change] > 1 else ""
                yield Mutant(module, function.name, line, change + count, tree)


def _changes(function: ast.FunctionDef, tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yields each change of a function. The tree has the change only until the next one is requested."""
    names = _local_names(function)
    for node, parent, field, index in list(_nodes(function)):
        for new in _alternatives(node, names):
            line = getattr(node, "lineno", function.lineno)
            ast.copy_location(new, node) if hasattr(node, "lineno") else None
            _put(parent, field, index, new)
            ast.fix_missing_locations(tree)
            yield line, f"`{ast.unparse(node)}` to `{ast.unparse(new)}`" + _within(parent, node)
            _put(parent, field, index, node)


def _within(parent: ast.AST, node: ast.AST) -> str:
    """The expression around a name or a number, which is not specific enough by itself."""
    return f" in `{ast.unparse(parent)[:80]}`" if isinstance(node, ast.Constant | ast.Name | ast.expr_context) else ""


def _nodes(function: ast.FunctionDef) -> Iterator[tuple[ast.AST, ast.AST, str, int | None]]:
    """The nodes of the body outside of docstrings, argument checks and error messages, with their positions."""

    def visit(parent):
        for field, value in ast.iter_fields(parent):
            for index, node in enumerate(value) if isinstance(value, list) else [(None, value)]:
                declares = field in ("args", "returns", "annotation") and not isinstance(parent, ast.Call)
                if not isinstance(node, ast.AST) or declares or _refuses(node):
                    continue
                yield node, parent, field, index
                yield from visit(node)

    yield from visit(ast.Module(function.body, []))


def _refuses(node: ast.AST) -> bool:
    """Whether a statement or expression only documents or checks."""
    if isinstance(node, ast.If | ast.For) and all(isinstance(s, ast.Raise) for s in node.body):
        return True
    if isinstance(node, ast.ExceptHandler):
        return True
    if isinstance(node, ast.Expr | ast.Raise):
        return True
    return isinstance(node, ast.Call) and ast.unparse(node.func).startswith("_arguments.")


def _local_names(function: ast.FunctionDef) -> list[str]:
    arguments = function.args
    names = [a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
    stored = [n.id for n in ast.walk(function) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)]
    return list(dict.fromkeys([*names, *stored]))


def _alternatives(node: ast.AST, names: list[str]) -> Iterator[ast.AST]:
    match node:
        case ast.BinOp(left, op, right):
            if type(op) in OPERATORS:
                yield ast.BinOp(left, OPERATORS[type(op)](), right)
            yield left
            yield right
        case ast.UnaryOp(op, operand) if not isinstance(operand, ast.Constant):
            yield operand
        case ast.Compare(left, [op], [right]):
            for other in COMPARISONS.get(type(op), ()):
                yield ast.Compare(left, [other()], [right])
        case ast.BoolOp(op, values):
            yield ast.BoolOp(ast.Or() if isinstance(op, ast.And) else ast.And(), values)
            for i in range(len(values)):
                rest = values[:i] + values[i + 1 :]
                yield rest[0] if len(rest) == 1 else ast.BoolOp(op, rest)
        case ast.IfExp(_, body, orelse):
            yield body
            yield orelse
        case ast.If(test, body, orelse):
            for always in (True, False):
                if not isinstance(test, ast.Constant):
                    yield ast.If(ast.Constant(always), body, orelse)
        case ast.Constant(value) if isinstance(value, bool):
            yield ast.Constant(not value)
        case ast.Constant(value) if isinstance(value, int | float):
            yield ast.Constant(value + 1 if isinstance(value, int) else value * 1.1 if value else 1.0)
        case ast.Assign([ast.Name(target)], value) if _names_in(value) & {target}:
            yield ast.Pass()
        case ast.Call(func, args, keywords):
            positional = [a for a in args if not isinstance(a, ast.Starred)]
            if positional and not isinstance(positional[0], ast.GeneratorExp):
                yield positional[0]
            if isinstance(func, ast.Attribute) and not args and not isinstance(func.value, ast.Name):
                yield func.value
            if isinstance(func, ast.Attribute) and func.attr in ("astype", "reshape"):
                yield func.value
            for i in range(len(keywords)):
                yield ast.Call(func, args, keywords[:i] + keywords[i + 1 :])
            symmetric = isinstance(func, ast.Attribute) and func.attr in ("maximum", "minimum")
            swappable = len(positional) > 1 and positional == args and not symmetric
            if swappable and ast.dump(args[0]) != ast.dump(args[1]):
                yield ast.Call(func, [args[1], args[0], *args[2:]], keywords)
        case ast.Attribute(value, attr) if attr in SIBLINGS:
            yield ast.Attribute(value, SIBLINGS[attr], ast.Load())
        case ast.Return(ast.Tuple([first, second, *rest])):
            yield ast.Return(ast.Tuple([second, first, *rest], ast.Load()))
        case ast.Name(name, ast.Load()) if name in names and len(names) > 1:
            yield ast.Name(names[names.index(name) - 1], ast.Load())


def _names_in(node: ast.AST) -> set[str]:
    return {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}


def _put(parent: ast.AST, field: str, index: int | None, node: ast.AST) -> None:
    if index is None:
        setattr(parent, field, node)
    else:
        getattr(parent, field)[index] = node


class _Changed(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports one module from a changed tree."""

    def __init__(self, mutant: Mutant):
        self.mutant = mutant

    def find_spec(self, fullname, path=None, target=None):
        if fullname == self.mutant.module:
            return importlib.util.spec_from_loader(fullname, self, origin=str(MODULES[fullname]))
        return None

    def exec_module(self, module):
        exec(compile(self.mutant.tree, str(MODULES[self.mutant.module]), "exec"), vars(module))


def rules_with(mutant: Mutant | None) -> ModuleType:
    """Imports the table of rules with one module replaced by a mutant; restores the earlier imports."""
    kept = {name: module for name, module in sys.modules.items() if name.startswith(RELOADED)}
    finders = [] if mutant is None else [_Changed(mutant)]
    sys.meta_path[:0] = finders
    try:
        for name in kept:
            del sys.modules[name]
            parent, _, child = name.rpartition(".")
            delattr(sys.modules.get(parent, kept.get(parent)), child)
        return importlib.import_module("tests.rules")
    finally:
        del sys.meta_path[: len(finders)]
        for name in [name for name in sys.modules if name.startswith(RELOADED)]:
            del sys.modules[name]
        sys.modules.update(kept)
        for name, module in kept.items():
            parent, _, child = name.rpartition(".")
            setattr(sys.modules[parent], child, module)
