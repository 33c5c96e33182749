"""Queries, keys and values of an attention: three layers by their public names, or one product where weights rest.

Joined, the three weights lie one after the other in memory and the layers' own are views of that, so that nothing is
stored twice and no name changes. What is computed is the same sums.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class AttentionProjections(nn.Module):
    """Owns `to_q`, `to_k` and `to_v`, linear layers without bias, which its subclass makes."""

    joined: Tensor | None = None  # the weights of all three, or of keys and values if these are made of something else

    def project(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries of `x`, `b n c`, keys and values of `context`, `b m d`; None: of x."""
        of_x = x if context is None else context
        if self.joined is None:
            return self.to_q(x), self.to_k(of_x), self.to_v(of_x)
        if context is None:
            return F.linear(x, self.joined).chunk(3, dim=-1)
        keys_and_values = self.joined[-2 * self.to_k.out_features :]
        return self.to_q(x), *F.linear(of_x, keys_and_values).chunk(2, dim=-1)

    def join(self) -> None:
        """Lay the weights side by side; they must not be trained, and moving or converting them undoes it."""
        layers = [self.to_q, self.to_k, self.to_v]
        if any(layer.weight.requires_grad for layer in layers):
            raise ValueError("weights that are trained stay apart: the optimiser knows them one by one")
        if self.to_q.in_features != self.to_k.in_features:
            layers = layers[1:]
        joined = torch.cat([layer.weight.detach() for layer in layers])
        parts = joined.split([layer.out_features for layer in layers])
        for layer, part in zip(layers, parts, strict=True):
            layer.weight.data = part
        self.joined = joined

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        self.joined = None
        return super()._apply(fn, recurse)


def join_projections(network: nn.Module) -> int:
    """Join those of every attention in a frozen network, in place; returns in how many."""
    attentions = [layer for layer in network.modules() if isinstance(layer, AttentionProjections)]
    for layer in attentions:
        layer.join()
    return len(attentions)
