"""FeatureTap: read the outputs or inputs of named modules while a model runs, without changing the model.

    with FeatureTap(model, {"mid": "layer2.0"}) as tap:
        logits = model(images)
    loss = hint_mse(tap["mid"], teacher_features)

One forward hook a tap; nothing is copied, so a tap costs a function call and the memory of the tensor it holds.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from kdcore.errors import InputError, did_you_mean

Select = Callable[[Any], Any]
INPUT = ":input"  # after a module's name: its first argument in the place of its output


class FeatureTap:
    """Context manager that holds the latest output of some named sub-modules, or what they were given.

    module: the model; names are those of `module.named_modules()` ("" is the model itself). Under DDP or another
        wrapper give the wrapped model, or the wrapper's own names.
    names: {alias: module name}, or an iterable of module names, which are then their own aliases. "layer4:input" is the
        first argument of `layer4` in the place of its output, as it is when the call ends: a module that writes into
        its argument has changed it.
    detach: hold values without their graph (for a frozen teacher outside no_grad).
    index: the element to keep of a tuple or list; a tensor is kept whole.
    select: a function from the module's output (or input) to the tensor to keep, or {alias: function} for some of the
        taps (the others keep it as it is). `index` and `select` exclude each other.

    Hooks exist only inside `with`, also when the block raises. Values stay readable after the block and are cleared
    when the tap is entered again (or by `clear`), and when the block raised. A module called several times keeps its
    last output (activation checkpointing calls it again in backward). Entering an open tap again only clears it.
    Keep one tap open over many steps if you like, but `clear()` each step so that no stale value is read.
    torch.compile ignores hooks that appear after its first call: open the tap before it, or tap the plain model.

    Raises InputError: a name the model does not have, an output that is not a tensor, a tap that was never reached.

    >>> import torch
    >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
    >>> with FeatureTap(model, {"hidden": "1"}) as tap:
    ...     _ = model(torch.zeros(4, 2))
    >>> tap["hidden"].shape
    torch.Size([4, 3])
    """

    def __init__(
        self,
        module: nn.Module,
        names: Mapping[str, str] | Iterable[str],
        *,
        detach: bool = False,
        index: int | None = None,
        select: Select | Mapping[str, Select] | None = None,
    ):
        if isinstance(names, str):
            raise InputError(f"names is the string {names!r}; give a mapping or a list, for example [{names!r}]")
        self.names = dict(names) if isinstance(names, Mapping) else {name: name for name in names}
        if not self.names:
            raise InputError("names is empty; name at least one module to tap")
        if index is not None and select is not None:
            raise InputError("index and select are both given; index=i is short for select=lambda output: output[i]")
        self.detach = detach
        self._modules = _find(module, self.names)
        self._selects = _selectors(self.names, index, select)
        self._values: dict[str, Tensor] = {}
        self._handles: list[RemovableHandle] = []
        self._depth = 0

    def __enter__(self) -> FeatureTap:
        self._values.clear()
        if self._depth == 0:
            for alias, module in self._modules.items():
                self._handles.append(module.register_forward_hook(self._hook(alias), with_kwargs=True))
        self._depth += 1
        return self

    def __exit__(self, exception_type, exception, traceback) -> None:
        self._depth -= 1
        if self._depth == 0:
            for handle in self._handles:
                handle.remove()
            self._handles.clear()
        if exception_type is not None:
            self._values.clear()

    def __getitem__(self, alias: str) -> Tensor:
        if alias not in self.names:
            raise InputError(f"no tap is called {alias!r}{did_you_mean(alias, self.names)}")
        if alias not in self._values:
            raise InputError(
                f"tap {alias!r} was never reached: module {self.names[alias]!r} did not run since the tap was "
                "opened or cleared; run the model inside the with block and check that its forward uses this module"
            )
        return self._values[alias]

    def __contains__(self, alias: object) -> bool:
        """Whether the tap holds a value now."""
        return alias in self._values

    def as_dict(self) -> dict[str, Tensor]:
        """All values by alias, in the order of the names; raises InputError when one was never reached."""
        return {alias: self[alias] for alias in self.names}

    def clear(self) -> None:
        """Forget the values (and free their graphs); the hooks stay."""
        self._values.clear()

    def _hook(self, alias: str) -> Callable[[nn.Module, Any, Mapping[str, Any], Any], None]:
        select, values, detach, name = self._selects.get(alias), self._values, self.detach, self.names[alias]

        def keep(module: nn.Module, args: Any, kwargs: Mapping[str, Any], output: Any) -> None:
            found = next(iter((*args, *kwargs.values())), None) if name.endswith(INPUT) else output
            value = found if select is None else select(found)
            if not isinstance(value, Tensor):
                given = "was given" if name.endswith(INPUT) else "gave"
                raise InputError(
                    f"tap {alias!r}: module {name!r} ({type(module).__name__}) {given} a {type(value).__name__}, "
                    "not a tensor; pick one with index= or select="
                )
            values[alias] = value.detach() if detach else value

        return keep


def _find(module: nn.Module, names: Mapping[str, str]) -> dict[str, nn.Module]:
    known = dict(module.named_modules(remove_duplicate=False))
    plain = {alias: name.removesuffix(INPUT) for alias, name in names.items()}
    for alias, name in plain.items():
        if name not in known:
            raise InputError(f"tap {alias!r}: {type(module).__name__} has no module {name!r}{_near(name, known)}")
    return {alias: known[name] for alias, name in plain.items()}


def _near(name: str, known: Iterable[str]) -> str:
    """A near full name if there is one, else the children of the deepest part of `name` that exists."""
    known = [k for k in known if k]
    if difflib.get_close_matches(name, known, n=1, cutoff=0.6):
        return did_you_mean(name, known)
    parts = name.split(".")
    for depth in range(len(parts) - 1, -1, -1):
        prefix = "".join(f"{part}." for part in parts[:depth])
        children = [k for k in known if k.startswith(prefix) and "." not in k[len(prefix) :]]
        if children:
            return did_you_mean(name, children)
    return ""


def _element(index: int, output: Any) -> Any:
    """output[index] of a sequence; a tensor stays whole, because indexing would cut the batch."""
    if isinstance(output, Tensor):
        return output
    try:
        return output[index]
    except (IndexError, KeyError, TypeError) as error:
        size = f" of {len(output)} elements" if hasattr(output, "__len__") else ""
        raise InputError(f"index is {index}, but a tapped module gave a {type(output).__name__}{size}") from error


def _selectors(
    names: Mapping[str, str], index: int | None, select: Select | Mapping[str, Select] | None
) -> dict[str, Select]:
    if index is not None:
        return dict.fromkeys(names, partial(_element, index))
    if select is None:
        return {}
    if isinstance(select, Mapping):
        for alias in select:
            if alias not in names:
                raise InputError(f"select names the tap {alias!r}, which does not exist{did_you_mean(alias, names)}")
        return dict(select)
    return dict.fromkeys(names, select)
