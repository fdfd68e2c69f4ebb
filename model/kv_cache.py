"""The cache of `MiniMindLM.forward`, for code that decodes with forward itself."""

import torch
from torch import Tensor


class KVCache:
    """Keys and values of the slots seen so far, for every layer.

    Memory for `capacity` slots is allocated at the first write and doubled when it runs out, so
    that a step writes its own slots and copies no others.

    Args:
        n_layers: layers of the model.
        capacity: slots to allocate at once.

    Attributes:
        length: slots filled. The model advances it once a pass has gone through all layers.
    """

    def __init__(self, n_layers: int, capacity: int = 0):
        self.length = 0
        self.capacity = capacity
        self.keys: list[Tensor | None] = [None] * n_layers
        self.values: list[Tensor | None] = [None] * n_layers

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write a layer's new keys and values behind the first `length` slots.

        Args:
            layer: index of the layer.
            k, v: (B, n_kv_heads, T, head_dim).

        Returns:
            All keys and values, (B, n_kv_heads, length + T, head_dim). Where gradients are
            recorded they are copies, since autograd cannot follow a write in place.
        """
        return self._append(self.keys, layer, k), self._append(self.values, layer, v)

    def _append(self, store: list[Tensor | None], layer: int, new: Tensor) -> Tensor:
        old = store[layer]
        end = self.length + new.shape[2]
        if torch.is_grad_enabled():
            joined = new if old is None else torch.cat((old[:, :, : self.length], new), dim=2)
            store[layer] = joined
            return joined
        if old is None or end > old.shape[2]:
            slots = max(end, self.capacity, 0 if old is None else 2 * old.shape[2])
            store[layer] = new.new_zeros(*new.shape[:2], slots, new.shape[3])
            if old is not None:
                store[layer][:, :, : self.length] = old[:, :, : self.length]
        store[layer][:, :, self.length : end] = new
        return store[layer][:, :, :end]
