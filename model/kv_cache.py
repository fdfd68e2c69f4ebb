"""The cache of `MiniMindLM.forward`, for code that decodes with forward itself."""

import torch
from torch import Tensor


class KVCache:
    """Keys and values of the slots seen so far, for every layer.

    Memory is doubled when it runs out, so that a step writes its own slots and copies no others.
    `length` is the number of slots filled; the model advances it after a pass through all layers.
    """

    def __init__(self, n_layers: int):
        self.length = 0
        self.keys: list[Tensor | None] = [None] * n_layers
        self.values: list[Tensor | None] = [None] * n_layers

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write a layer's new keys and values (B, n_kv_heads, T, head_dim), and return all.

        Where gradients are recorded they are copies: autograd cannot follow a write in place.
        """
        return self._append(self.keys, layer, k), self._append(self.values, layer, v)

    def _append(self, store: list[Tensor | None], layer: int, new: Tensor) -> Tensor:
        old = new[:, :, :0] if store[layer] is None else store[layer]
        past, end = old[:, :, : self.length], self.length + new.shape[2]
        if torch.is_grad_enabled():
            store[layer] = torch.cat((past, new), dim=2)
            return store[layer]
        if end > old.shape[2]:
            slots = max(end, 2 * old.shape[2])
            store[layer] = new.new_zeros(*new.shape[:2], slots, new.shape[3])
            store[layer][:, :, : self.length] = past
        store[layer][:, :, self.length : end] = new
        return store[layer][:, :, :end]
