"""The configuration that is saved beside arrays: plain data, held against an allow-list when it is read."""

import math
from collections.abc import Mapping
from typing import Any


def plain(value: Any, where: str, depth: int = 0) -> Any:
    """`value` as JSON gives it back; TypeError where it is anything but plain data that any reader can hold."""
    if depth > 32:
        raise TypeError(f"{where[:80]}...: plain data of at most 32 levels expected")
    if value is None or isinstance(value, bool | str):
        return value
    if (isinstance(value, int) and -(2**63) <= value < 2**63) or (isinstance(value, float) and math.isfinite(value)):
        return value
    if isinstance(value, list | tuple):
        return [plain(v, f"{where}[{i}]", depth + 1) for i, v in enumerate(value)]
    if isinstance(value, dict) and all(isinstance(k, str) for k in value):
        return {k: plain(v, f"{where}[{k!r}]", depth + 1) for k, v in value.items()}
    shown = f"{value!r:.80}" if not isinstance(value, int) else "an integer of more than 64 bits"
    raise TypeError(f"{where}: plain data expected, with finite numbers of 64 bits, got {shown}")


def check_allowed(where: str, config: Any, allowed: Mapping[str, Any] | None) -> None:
    """ValueError where a configuration has an entry, or an entry a value, that is not allowed.

    `allowed` tells of each entry its values: a type, or a tuple, list or set of types and values, where `list[int]` is
    a list of integers. None allows everything.
    """
    if allowed is None:
        return
    if not isinstance(config, dict):
        raise ValueError(f"{where}: a config with entries expected, got {config!r:.80}")
    for name, value in config.items():
        if name not in allowed:
            raise ValueError(f"{where}: config has {name!r:.80}, which is none of {', '.join(allowed)}")
        options = allowed[name] if isinstance(allowed[name], tuple | list | set | frozenset) else [allowed[name]]
        if not any(_is(value, option) for option in options):
            shown = ", ".join(getattr(o, "__name__", repr(o)) if o != list[int] else "list[int]" for o in options)
            raise ValueError(f"{where}: config[{name!r}] is {value!r:.80}, and {shown} is allowed")


def _is(value: Any, option: Any) -> bool:
    if option == list[int]:
        return isinstance(value, list) and all(type(v) is int for v in value)
    if isinstance(option, type):
        return type(value) is option  # True is no integer here
    return type(value) is type(option) and value == option
