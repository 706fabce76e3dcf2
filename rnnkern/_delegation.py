"""Whether the `forward` of a subclass only prepares a call of torch.nn's, or replaces it.

It is read from the compiled code: what `forward` and everything of the user's that it reaches call
by name. In doubt the answer is that it replaces.
"""

import dis
import re
from collections.abc import Collection, Iterator, Sequence
from types import BuiltinFunctionType, CodeType, FunctionType
from typing import Any

from .nn import _torch_twin

# Names by which code reaches torch's kernels or a layer's weights past its forward.
_KERNEL = re.compile(
    r"_VF|_C|_VariableFunctions|ops|_rnn_impls|(quantized_)?(lstm|gru|rnn_tanh|rnn_relu)(_cell)?"
    r"|_?thnn_.*|_?cudnn_rnn.*|mkldnn_rnn.*|functional_call"
)
_WEIGHT = re.compile(
    r"(weight|bias)_((ih|hh|hr).*)?|_?all_weights|_flat_weight.*|_parameters|__dict__|vars"
)
# Names by which code reaches anything.
_OPAQUE = frozenset({"eval", "exec", "mro", "__mro__", "__base__", "__bases__", "__getattribute__"})
_CLASSES = frozenset({*_torch_twin.NAMES, "RNNBase", "RNNCellBase"})
_TORCHS = frozenset({_torch_twin.RNNBase, _torch_twin.RNNCellBase, *_torch_twin.CLASSES.values()})


def _codes(code: CodeType) -> Iterator[CodeType]:
    if code.co_name == "__annotate__":  # Python 3.14: annotations, which no call evaluates
        return
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


def _names(function: FunctionType) -> tuple[set[str], set[str]]:
    """(globals, attributes) that a function and those defined in it mention."""
    variables: set[str] = set()
    attributes: set[str] = set()
    for code in _codes(function.__code__):
        for step in dis.get_instructions(code):
            if step.opcode in dis.hasname:
                of_globals = step.opname in ("LOAD_GLOBAL", "LOAD_NAME")
                (variables if of_globals else attributes).add(step.argval)
    return variables, attributes


def _functions(attribute: Any) -> list[FunctionType]:
    """The Python functions behind a member of a class: methods of all kinds and properties."""
    if isinstance(attribute, FunctionType):
        return [attribute]
    if isinstance(attribute, property):
        found = [attribute.fget, attribute.fset, attribute.fdel]
    else:  # classmethod, staticmethod; functools.cached_property
        found = [getattr(attribute, "__func__", None), getattr(attribute, "func", None)]
    return [f for f in found if isinstance(f, FunctionType)]


def _strings(function: FunctionType) -> Iterator[str]:
    for code in _codes(function.__code__):
        yield from (text for text in code.co_consts if isinstance(text, str))


def _cells(function: FunctionType) -> Iterator[tuple[str, Any]]:
    """What a function takes from the functions around it: a decorator's wrapper the function."""
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            yield name, cell.cell_contents
        except ValueError:  # not filled yet
            continue


def _suspect(function: FunctionType) -> str | None:
    """What a function itself mentions of torch's kernels, the weights or torch's classes."""
    variables, attributes = _names(function)
    for name in sorted(variables | attributes):
        if _KERNEL.fullmatch(name):
            return f"calls {name}"
        if _WEIGHT.fullmatch(name) or name in _OPAQUE:
            return f"uses {name}"
        if name in _CLASSES & attributes:
            return f"names {name}"
    for text in _strings(function):
        if _WEIGHT.fullmatch(text):
            return f"uses {text!r}"
    return None


def _reached(function: FunctionType, kinds: Sequence[type]) -> Iterator[tuple[str, Any]]:
    """Names and values of what a function may call: cells, globals, members of the classes."""
    yield from _cells(function)
    variables, attributes = _names(function)
    for name in sorted(variables & function.__globals__.keys()):
        yield name, function.__globals__[name]
    for name in sorted(attributes):
        for kind in kinds:
            for found in _functions(vars(kind).get(name)):
                yield name, found


def _reach_of(start: FunctionType, kinds: Sequence[type]) -> str | None:
    """What the function, or one that it reaches, does besides calling super(); None if nothing."""
    todo, done = [start], {start}
    while todo:
        function = todo.pop()
        if suspect := _suspect(function):
            return suspect
        for name, value in _reached(function, kinds):
            if isinstance(value, type) and value in _TORCHS:
                return f"names {name}"
            if isinstance(value, BuiltinFunctionType) and _KERNEL.fullmatch(value.__name__):
                return f"calls {name}"
            if not isinstance(value, FunctionType) or value in done:
                continue
            if value.__module__.partition(".")[0] != "torch":
                done.add(value)
                todo.append(value)
    return None


def _with_wrapped(function: FunctionType) -> Iterator[FunctionType]:
    """The function and those that it decorates."""
    yield function
    for _, value in _cells(function):
        if isinstance(value, FunctionType) and value is not function:
            yield value


def _calls_super(function: FunctionType) -> bool:
    variables, attributes = _names(function)
    return "super" in variables and "forward" in attributes


def replaces_forward(kinds: Sequence[type]) -> str | None:
    """What makes the `forward` of these classes more than a call of the next one's, in words.

    kinds: the user's classes before torch's in the order of bases. None if every `forward` among
    them reaches torch's layer through super() alone.
    """
    for kind in kinds:
        forward = vars(kind).get("forward")
        if forward is None:
            continue
        if not isinstance(forward, FunctionType):
            return f"{kind.__name__} overrides forward"
        if not any(_calls_super(f) for f in _with_wrapped(forward)):
            return f"{kind.__name__} overrides forward"
        reach = _reach_of(forward, kinds)
        if reach is not None:
            return f"{kind.__name__} overrides forward, which {reach}"
    return None


def ask_their_class(kinds: Collection[type]) -> bool:
    """Whether a method of these classes may look at the exact class of its instance."""
    return any(
        not {"type", "__class__"}.isdisjoint(set().union(*_names(function)))
        for kind in kinds
        for member in vars(kind).values()
        for function in _functions(member)
    )
