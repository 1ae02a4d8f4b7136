"""A forward whose own text says that SiLU follows GroupNorm gets that pair as one call.

    h = self.norm(h)
    h = self.act(h)          becomes      h = in_turn((self.norm, self.act, self.conv), h)
    h = self.conv(h)

and so does self.conv(silu(self.norm(h))). Only a value that nobody else can see disappears: an inner call's result, or a
name that the next statement overwrites. `in_turn` looks at every call at what the layers are at that time, so the new
forward computes what the old one does whatever becomes of them. Everything else, control flow above all, stays as written.
"""

import ast
import copy
import functools
import inspect
import linecache
import types
from collections.abc import Callable
from typing import NamedTuple

from torch import nn

from fastdiff.accelerate.layers import in_turn
from fastdiff.accelerate.swap import Fast

HELPER = "_fastdiff_in_turn"
SUNK = 3  # statements behind an `if` that may follow a norm in one of its branches: activation, dropout, convolution


class Unreadable(Exception):
    """Why a forward cannot be rewritten."""


class Chain(NamedTuple):
    """A norm's attribute and the references called in turn on its result."""

    norm: str
    then: tuple[ast.expr, ...]


class Rewritten(Fast):
    """A module whose forward is `rewrite`'s."""

    @classmethod
    def members(cls, base, *names):
        try:
            return {"forward": rewrite(base, names)[0]}
        except Unreadable:  # unpickled where the source is not: the own forward computes the same
            return {}


def _reference(node: ast.expr) -> bool:
    """a, a.b, a.b.c: looking it up changes nothing."""
    return isinstance(node, ast.Name) or (isinstance(node, ast.Attribute) and _reference(node.value))


def _applies(node: ast.expr) -> bool:
    """reference(argument)"""
    return (
        isinstance(node, ast.Call)
        and _reference(node.func)
        and len(node.args) == 1
        and not node.keywords
        and not isinstance(node.args[0], ast.Starred)
    )


def _mentions(node: ast.AST, name: str) -> bool:
    return any(isinstance(n, ast.Name) and n.id == name for n in ast.walk(node))


def _target(statement: ast.stmt) -> str | None:
    """T of `T = ...`."""
    if isinstance(statement, ast.Assign) and len(statement.targets) == 1 and isinstance(statement.targets[0], ast.Name):
        return statement.targets[0].id
    return None


def _continues(statement: ast.stmt, name: str | None) -> bool:
    """`T = reference(T)`, the reference not being T's own."""
    if name is None or _target(statement) != name or not _applies(statement.value):  # type: ignore[attr-defined]
        return False
    function, argument = statement.value.func, statement.value.args[0]  # type: ignore[attr-defined]
    return isinstance(argument, ast.Name) and argument.id == name and not _mentions(function, name)


class _Rewriter(ast.NodeTransformer):
    def __init__(self, this: str, norms: tuple[str, ...], cells: tuple[str, ...]):
        self.this, self.norms, self.cells = this, norms, cells
        self.chains: list[Chain] = []
        self.depth = 0

    def _norm(self, node: ast.expr) -> str | None:
        own = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == self.this
        return node.attr if own and node.attr in self.norms else None  # type: ignore[attr-defined]

    def _unfold(self, node: ast.expr) -> tuple[list[ast.expr], ast.expr] | None:
        """f(g(self.norm(x))) -> [self.norm, g, f], x; None where no norm is in the chain."""
        called: list[ast.expr] = []
        while _applies(node):
            assert isinstance(node, ast.Call)
            called.insert(0, node.func)
            node = node.args[0]
            if self._norm(called[0]):
                return called, node
        return None

    def visit_Call(self, node):
        found = self._unfold(node)
        if found is None or len(found[0]) == 1:
            return self.generic_visit(node)
        called, argument = found
        self.chains.append(Chain(self._norm(called[0]) or "", tuple(called[1:])))
        layers = ast.Tuple(called, ast.Load())
        call = ast.Call(ast.Name(HELPER, ast.Load()), [layers, self.visit(argument)], [])
        return ast.copy_location(call, node)

    def _ends_in_norm(self, statements: list[ast.stmt], name: str) -> bool:
        if not statements:
            return False
        last = statements[-1]
        if isinstance(last, ast.If):
            return self._ends_in_norm(last.body, name) or self._ends_in_norm(last.orelse, name)
        return _target(last) == name and self._unfold(last.value) is not None  # type: ignore[attr-defined]

    def _joined(self, statements: list[ast.stmt]) -> list[ast.stmt]:
        """Each `T = norm(...)` with the `T = f(T)` that follow it in one statement, inside branches too."""
        out: list[ast.stmt] = []
        for statement in statements:
            last = out[-1] if out else None
            name = _target(statement)
            if last is None or name is None or name in self.cells or not _continues(statement, name):
                out.append(statement)
            elif _target(last) == name and self._unfold(last.value) is not None:  # type: ignore[attr-defined]
                function = statement.value.func  # type: ignore[attr-defined]
                last.value = ast.copy_location(ast.Call(function, [last.value], []), statement)  # type: ignore[attr-defined]
            elif isinstance(last, ast.If) and self._takes(last, name):
                last.body.append(copy.deepcopy(statement))
                last.orelse.append(statement)
            else:
                out.append(statement)
        return out

    def _takes(self, branches: ast.If, name: str) -> bool:
        """A norm ends one of the branches, at most SUNK statements back: what follows the `if` may as well end them all."""
        return any(
            self._ends_in_norm(branch[: len(branch) - k], name)
            and all(_continues(s, name) for s in branch[len(branch) - k :])
            for branch in (branches.body, branches.orelse)
            for k in range(min(SUNK, len(branch)))
        )

    def visit_FunctionDef(self, node):
        """The forward itself; functions and classes inside it stay as they are."""
        self.depth += 1
        node = self.generic_visit(node) if self.depth == 1 else node
        self.depth -= 1
        return node

    def _leave(self, node):
        return node

    # A handler of exceptions could see the name before it is overwritten.
    visit_Lambda = visit_ClassDef = visit_AsyncFunctionDef = visit_Try = visit_TryStar = _leave

    def generic_visit(self, node):
        for field in ("body", "orelse", "finalbody"):
            statements = getattr(node, field, None)
            if isinstance(statements, list):
                setattr(node, field, self._joined(statements))
        return super().generic_visit(node)


class _Text(NamedTuple):
    """A function's syntax tree and its file's imports: how a call is compiled depends on whether a name was imported."""

    node: ast.FunctionDef
    imports: list[ast.stmt]


def _imports(statements: list[ast.stmt]) -> list[ast.stmt]:
    """Those of a module's own scope."""
    found: list[ast.stmt] = []
    for statement in statements:
        if isinstance(statement, (ast.Import, ast.ImportFrom)):
            found.append(statement)
        elif not isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            inner = [getattr(statement, field, []) for field in ("body", "orelse", "finalbody", "handlers")]
            found += _imports([s for part in inner if isinstance(part, list) for s in part])
    return found


def _compiled(text: _Text, free: tuple[str, ...], of: types.CodeType) -> types.CodeType:
    """The code of a function whose free variables are `free`."""
    arguments = ast.arguments([], [ast.arg(name) for name in free], None, [], [], None, [])
    outer = ast.FunctionDef("outer", arguments, [text.node], [], None)
    if "type_params" in ast.FunctionDef._fields:
        outer.type_params = []  # type: ignore[attr-defined]
    module = ast.fix_missing_locations(ast.Module([*text.imports, outer], []))
    code: types.CodeType = compile(module, of.co_filename, "exec", dont_inherit=True)
    for name in ("outer", of.co_name):
        code = next(c for c in code.co_consts if isinstance(c, types.CodeType) and c.co_name == name)
    return code


def _same(a: types.CodeType, b: types.CodeType) -> bool:
    def constants(code):
        return [c if not isinstance(c, types.CodeType) else c.co_name for c in code.co_consts]

    fields = ("co_code", "co_names", "co_varnames", "co_freevars")
    return all(getattr(a, f) == getattr(b, f) for f in fields) and constants(a) == constants(b)


def _read(function: types.FunctionType) -> _Text:
    """The function's text, which compiles to the code that it runs."""
    code = function.__code__
    try:
        tree = ast.parse("".join(linecache.getlines(code.co_filename, function.__globals__)))
    except SyntaxError:
        raise Unreadable("the source of its forward cannot be read") from None
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef) or node.name != code.co_name or not node.args.args:
            continue
        if min([node.lineno, *(d.lineno for d in node.decorator_list)]) == code.co_firstlineno:
            node.decorator_list = []
            text = _Text(node, _imports(tree.body))
            if not _same(_compiled(text, code.co_freevars, code), code):
                raise Unreadable("its forward is not what its source says")
            return text
    raise Unreadable("the source of its forward cannot be found")


def _with_code(function: types.FunctionType, code: types.CodeType, cells: dict) -> types.FunctionType:
    closure = tuple(cells[name] for name in code.co_freevars)
    made = types.FunctionType(code, function.__globals__, function.__name__, function.__defaults__, closure)
    made.__kwdefaults__, made.__annotations__ = function.__kwdefaults__, function.__annotations__
    made.__qualname__, made.__module__, made.__doc__ = function.__qualname__, function.__module__, function.__doc__
    made.__dict__.update(function.__dict__)
    return made


def _cells(function: types.FunctionType) -> dict:
    return dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))


def _content(cell) -> object:
    """What a cell of a closure holds; None where nothing yet."""
    try:
        return cell.cell_contents
    except ValueError:
        return None


def _undecorated(function: Callable) -> tuple[types.FunctionType, list[types.FunctionType]]:
    """The function below decorators that keep it in a closure, and these, outermost first."""
    around: list[types.FunctionType] = []
    while isinstance(function, types.FunctionType) and hasattr(function, "__wrapped__"):
        inner = function.__wrapped__
        if not any(_content(cell) is inner for cell in _cells(function).values()):
            raise Unreadable("its forward is decorated in a way that hides it")
        around.append(function)
        function = inner
    if not isinstance(function, types.FunctionType):
        raise Unreadable("its forward is not written in Python")
    return function, around


def rewrite(cls: type[nn.Module], norms: tuple[str, ...]) -> tuple[types.FunctionType, list[Chain], types.FunctionType]:
    """cls.forward with the chains that begin at an attribute in `norms` joined; the chains; the function they are in."""
    return _rewritten(inspect.getattr_static(cls, "forward"), norms)


@functools.cache
def _rewritten(forward: Callable, norms: tuple[str, ...]):
    function, around = _undecorated(forward)
    text = _read(function)
    rewriter = _Rewriter(text.node.args.args[0].arg, norms, function.__code__.co_cellvars)
    text = text._replace(node=rewriter.visit(text.node))
    free = (*function.__code__.co_freevars, HELPER)
    cells = _cells(function) | {HELPER: types.CellType(in_turn)}
    made = _with_code(function, _compiled(text, free, function.__code__), cells)
    for wrapper in reversed(around):
        inner = wrapper.__wrapped__  # type: ignore[attr-defined]
        replaced = {n: types.CellType(made) if _content(c) is inner else c for n, c in _cells(wrapper).items()}
        below, made = made, _with_code(wrapper, wrapper.__code__, replaced)
        made.__wrapped__ = below  # type: ignore[attr-defined]
    return made, rewriter.chains, function


def resolve(node: ast.expr, module: nn.Module, function: types.FunctionType) -> object:
    """What a reference in module's forward means now; None where that is not known outside it."""
    if isinstance(node, ast.Attribute):
        return getattr(resolve(node.value, module, function), node.attr, None)
    assert isinstance(node, ast.Name)
    if node.id == function.__code__.co_varnames[0]:
        return module
    local = node.id in (*function.__code__.co_varnames, *function.__code__.co_cellvars, *function.__code__.co_freevars)
    return None if local else function.__globals__.get(node.id)
