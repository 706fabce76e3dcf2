"""freeze(model): a copy for inference whose recurrent layers and cells run on prepacked weights.

The frozen modules themselves are in frozen.py; here models are copied and their modules change
their classes, as in convert.py.
"""

from functools import cache
from typing import Any, TypeVar

from torch import nn

from ._frozen_kinds import FROZEN, RECURRENT, frozen_base, obstacle
from ._frozen_weights import copied, current_values, refusal_of, weights_of
from .call_spec import weight_format
from .convert import derive, reduce_by, user_class
from .frozen import Frozen
from .nn.added import class_of, is_added
from .own_cell import AddedCell

Module = TypeVar("Module", bound=nn.Module)


def _new(cls: type, *args: Any) -> nn.Module:
    """An empty instance of the class that a frozen instance of `cls` has (for pickle)."""
    kind = _frozen_class(cls)
    empty: nn.Module = kind.__new__(kind, *args)
    return empty


def _new_added(own: AddedCell, is_layer: bool) -> nn.Module:
    """`_new` for an added cell's class, which pickle does not find by name."""
    return _new(class_of(own, is_layer))


def _reduce_added(self: Any, protocol: Any) -> Any:
    """`__reduce_ex__` of the frozen classes that are made for those of added cells."""
    return _new_added, (self.own, isinstance(self, nn.RNNBase)), self.__getstate__()


@cache
def _frozen_class(cls: type) -> type[nn.Module]:
    """The frozen class for one of torch's, rnnkern's or an added cell's, or of the user's that
    delegates."""
    base = frozen_base(cls)
    if is_added(cls):
        return derive(cls, (cls, base), {"_original": cls, "__reduce_ex__": _reduce_added})
    if cls in FROZEN or cls.__module__.startswith("rnnkern.nn."):
        return base
    members = {"_original": cls, "__reduce_ex__": reduce_by(_new)}
    return derive(cls, (cls, base), members)


def _recurrent(model: nn.Module) -> list[tuple[str, nn.Module]]:
    return [found for found in model.named_modules() if isinstance(found[1], RECURRENT)]


def _freeze(module: Any, weights: str) -> None:
    """Turns a layer or cell of a copied model into a frozen one, in place."""
    if not isinstance(module, Frozen):
        target = _frozen_class(user_class(module))
        values = current_values(module)
        if reason := refusal_of(weights_of(values), weights):
            raise ValueError(reason)
        object.__setattr__(module, "__class__", target)
        for name in values:
            vars(module).pop(name, None)
            module._parameters.pop(name, None)
        module._buffers.update(values)
    elif reason := refusal_of(module.current_weights(), weights):
        raise ValueError(reason)
    module._format = weights
    module.eval()
    module._pack()


def freeze(module: Module, weights: str = "float32") -> Module:
    """A copy for inference: every recurrent layer and cell in it runs on weights packed once.

    module   a layer, a cell or a whole model: torch.nn's recurrent layers and cells, rnnkern's,
             those of `rnnkern.cells`, and subclasses whose `forward` reaches theirs through
             `super()` alone
    weights  "float32" rounds nothing, whatever the dtype is: results have the bits of the layer's.
             "bfloat16" and "int8" are for float32 layers, and round the weight matrices; "int8"
             also rounds inputs and h in each step. Biases, sums and states stay float32

    The original is untouched. A frozen module is called as the layer is. It is a snapshot: later
    changes of the original's weights are not seen; `refresh` takes them over. Weights are buffers
    under torch.nn's names, so that state_dict fits the layer, and load_state_dict packs anew. Calls
    do not read them: after a change in place, `refresh` does. Weights take their memory twice.
    Reparametrised ones are taken with their current values. Autocast does not change the dtype of
    the computation, nor do torch's settings for float32 products.

    Raises ValueError, with the name of the layer, for one that cannot be frozen: on another device
    than the CPU, of size zero, of a dtype that the kernels or `weights` do not take, or a subclass
    that does more than to call its base. A call raises RuntimeError where a gradient is asked for.

    >>> frozen = rnnkern.freeze(model)
    >>> with torch.inference_mode():
    ...     output, (h_n, c_n) = frozen.lstm(x)
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"expected a torch.nn.Module, got {type(module).__name__}")
    weight_format(weights, "float32")  # a wrong name
    parts = dict(_recurrent(module))
    for name, part in parts.items():
        if reason := obstacle(part):
            raise ValueError(f"{name or 'the module itself'} cannot be frozen: {reason}")
    frozen = copied(module, parts.values())
    for name, part in _recurrent(frozen):
        try:
            _freeze(part, weights)
        except ValueError as error:
            raise ValueError(f"{name or 'the module itself'} cannot be frozen: {error}") from None
    return frozen


def refresh(frozen: nn.Module, source: nn.Module | None = None) -> None:
    """Packs the weights of all frozen layers and cells in `frozen` anew, in place.

    source  the model that was frozen, or one like it: its recurrent layers' weights are taken over.
            None: the frozen modules' own buffers, after they were changed in place

    Other modules stay as they are; `load_state_dict` takes over all of a model.

    Raises ValueError where the source has no layer of a frozen one's name, or one with weights of
    other names, shapes or dtypes.
    """
    parts = {name: m for name, m in frozen.named_modules() if isinstance(m, Frozen)}
    if source is None:
        for part in parts.values():
            part.refresh()
        return
    found = dict(source.named_modules())
    if missing := sorted(parts.keys() - found.keys()):
        raise ValueError(f"the source has no module {missing[0]}")
    weights = {name: part.weights_like(name, found[name]) for name, part in parts.items()}
    for name, part in parts.items():
        part.take_over(weights[name])
