"""Values with gradients as one compiled program: operation by operation, each would be compiled by itself."""

from collections.abc import Callable
from typing import Any

import jax


def with_gradients(function: Callable[..., jax.Array], cotangent: Callable[[jax.Array], Any], *arguments: Any) -> Any:
    """`function(*arguments)` and the gradients of all arguments, for the cotangent that belongs to this value."""

    @jax.jit
    def compute(*arguments: Any) -> tuple[jax.Array, ...]:
        value, pullback = jax.vjp(function, *arguments)
        return value, *pullback(cotangent(value))

    return compute(*arguments)
