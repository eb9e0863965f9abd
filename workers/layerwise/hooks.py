"""Register and remove forward hooks together; read and replace the hidden state in a layer's output."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn


class Hooks(ExitStack):
    """Register forward hooks on modules; leaving the context removes all of them."""

    def before(self, module: nn.Module, hook: Callable[[tuple[Any, ...], dict[str, Any]], None]) -> None:
        """Call ``hook(args, kwargs)`` before each forward call of ``module``."""
        own = module.register_forward_pre_hook(lambda _, args, kwargs: hook(args, kwargs), with_kwargs=True)
        self.callback(own.remove)

    def after(self, module: nn.Module, hook: Callable[[Any], Any]) -> None:
        """Call ``hook(output)`` after each forward call of ``module``; unless it is None, its result is the output."""
        self.callback(module.register_forward_hook(lambda _, args, output: hook(output)).remove)


def hidden_of(output: Any) -> Tensor:
    """Return the hidden state ``[batch, tokens, hidden]`` in a decoder layer's output, which may be a tuple."""
    state: Tensor = output[0] if isinstance(output, tuple) else output
    return state


def with_hidden(output: Any, hidden: Tensor) -> Any:
    """Return a decoder layer's output with another hidden state in it."""
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden
