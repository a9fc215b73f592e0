"""Layers and functions under torch.fx.symbolic_trace: one node each, as torch's.

A tracer runs a model with Proxy objects instead of tensors. Each tracer has its own rule for leaf
modules; most take modules of the Python package torch.nn as leaves and call the forward of all
others. So fastrnn's layers and functions record themselves when they are called with a Proxy.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any, TypeVar, cast

import torch
from torch import fx, nn
from torch.fx.proxy import TraceError
from torch.nn.modules import module as torchs

_Function = TypeVar("_Function", bound=Callable[..., Any])


def _proxy_in(values: Iterable[Any]) -> fx.Proxy | None:
    """The first proxy in the values, and in tuples and lists among them."""
    for value in values:
        if isinstance(value, fx.Proxy):
            return value
        if isinstance(value, (tuple, list)):
            found = _proxy_in(value)
            if found is not None:
                return found
    return None


def call_of_module(
    forward: Callable[..., Any], module: nn.Module, input: Any, hx: Any, **options: Any
) -> fx.Proxy | None:
    """Record a call of ``module`` as a node of the graph that is being traced.

    Returns:
        The node's proxy. None if no graph is being traced, if the module is the root of the trace,
        or if a call does more than ``forward``, as in a subclass with its own. torch's forward then
        raises its TraceError.

    Raises:
        TraceError: if the module has forward hooks. The tracer records what they do next to this
            node, which would do it again.
    """
    proxy = _proxy_in((input, hx, *options.values()))
    cls = type(module)
    if (
        proxy is None
        or not isinstance(proxy.tracer, fx.Tracer)
        or proxy.tracer.root is module
        or cls.forward is not forward
        or cls.__call__ is not nn.Module.__call__
        or "forward" in vars(module)
    ):
        return None
    if (
        module._forward_pre_hooks
        or module._forward_hooks
        or torchs._global_forward_pre_hooks
        or torchs._global_forward_hooks
    ):
        raise TraceError(
            f"the forward hooks of {cls.__name__} can't be traced: remove them, or trace with a "
            "Tracer whose is_leaf_module(module, name) is True for this module"
        )
    path = proxy.tracer.path_of_module(module)
    args = (input,) if hx is None else (input, hx)
    return proxy.tracer.create_proxy("call_module", path, args, options)


def call_of_function(function: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Proxy | None:
    """A call of ``function`` as a node of the graph that is being traced; None if none is."""
    proxy = _proxy_in((*args, *kwargs.values()) if kwargs else args)
    if proxy is None:
        return None
    return proxy.tracer.create_proxy("call_function", function, args, kwargs)


def one_node(function: _Function) -> _Function:
    """Make calls of a function of tensors nodes of the graph that is being traced."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling():
            node = call_of_function(call, *args, **kwargs)
            if node is not None:
                return node
        return function(*args, **kwargs)

    return cast(_Function, call)
