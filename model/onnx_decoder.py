"""Decoding on a CPU by ONNX Runtime, in fp32 or with 8-bit weights.

Weights are rounded to 8 bits in blocks of 32 inputs that share a scale, and so are the inputs of a
product, token by token: the result of a row does not depend on the other rows. The embedding, the
norms, the routing of experts, attention and its cache stay in fp32.
"""

from collections.abc import Sequence
from functools import reduce
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper, numpy_helper
from onnxruntime import OrtValue
from torch import Tensor, nn

from .decoder import Decoder, applied_weight
from .model import MiniMindLM
from .rotary import rotary_cos_sin

BLOCK = 32  # inputs of a weight that share a scale
# Operators of ONNX Runtime for language models, which ONNX itself lacks.
CONTRIB = {"FusedMatMul", "MatMulNBits", "GroupQueryAttention", "QuickGelu"}


class OnnxDecoder(Decoder):
    """A decoder for CPUs, whose weights have 32 `bits`, or 8 and so a quarter of the bytes to read.

    Making one takes 0.2 s for 26 M parameters: weights are shared with the model, and ONNX Runtime
    adds one copy of its matrices, packed for its kernels. After a change of weights or of the
    active adapter, another must be made. Raises ValueError if ONNX Runtime's attention does not
    support the size of the heads.
    """

    def __init__(self, model: MiniMindLM, rows: int = 1, bits: int = 8):
        super().__init__(rows, model.config.max_seq_len, torch.device("cpu"))
        self.config = model.config
        if self.config.head_dim % 16:
            raise ValueError(f"the head size {self.config.head_dim} is no multiple of 16")
        graph, self.weights = build_graph(model, bits)  # the session may share their memory
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        # Microseconds that a waiting thread spins: as fast as spinning on, and twice as fast beside
        # a busy process. Older versions ignore it.
        options.add_session_config_entry("session.intra_op.spin_duration_us", "50")
        values = [
            OrtValue.ortvalue_from_numpy_with_onnx_type(x, helper.np_dtype_to_tensor_dtype(x.dtype))
            for x in self.weights.values()
        ]
        options.add_external_initializers(list(self.weights), values)
        for name, value in zip(self.weights, values, strict=True):
            options.add_initializer(name, value)  # without it, the embedding would be copied
        self.session = onnxruntime.InferenceSession(
            graph.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        self.cache_names = [
            name for i in range(self.config.n_layers) for name in (f"keys.{i}", f"values.{i}")
        ]
        self.bound: tuple[int, int] | None = None  # caches: first row and number of rows

    def _new_caches(self, capacity: int) -> list[Tensor]:
        config = self.config
        shape = (len(self.tokens), config.n_kv_heads, capacity, config.head_dim)
        return [torch.zeros(shape) for _ in self.cache_names]

    def _resize(self, capacity: int) -> None:
        super()._resize(capacity)
        self.bound = None

    def _extend(self, row: int, chunk: list[int], logits_to_keep: int) -> Tensor:
        return self._run(row, torch.tensor([chunk]), [len(self.tokens[row])], logits_to_keep)[0]

    def _step(self, tokens: Sequence[int], lengths: list[int]) -> Tensor:
        return self._run(0, torch.tensor(tokens)[:, None], lengths, 1)[:, 0]

    def _run(self, first: int, ids: Tensor, lengths: list[int], logits_to_keep: int) -> Tensor:
        """Ids (n, T) for the rows from `first` on → logits (n, logits_to_keep, vocab_size)."""
        n, new = ids.shape
        if self.bound != (first, n):
            self.binding = self.session.io_binding()
            # Inputs and outputs share memory: the caches are written in place.
            for name, cache in zip(self.cache_names, self.caches, strict=True):
                self._bind(name, cache[first : first + n], f"new_{name}")
            self.bound = (first, n)
        last = torch.tensor(lengths, dtype=torch.int32) + (new - 1)
        total = torch.tensor([max(lengths) + new], dtype=torch.int32)
        positions = torch.arange(new - logits_to_keep, new)
        logits = torch.empty(n, logits_to_keep, self.config.vocab_size)
        inputs = {"ids": ids, "last": last, "total": total, "positions": positions}
        for name, tensor in inputs.items():
            self._bind(name, tensor)
        self._bind(None, logits, "logits")
        self.session.run_with_iobinding(self.binding)
        return logits

    def _bind(self, source: str | None, tensor: Tensor, target: str | None = None) -> None:
        dtype = {torch.float32: np.float32, torch.int32: np.int32, torch.int64: np.int64}
        place = ("cpu", 0, dtype[tensor.dtype], tuple(tensor.shape), tensor.data_ptr())
        if source is not None:
            self.binding.bind_input(source, *place)
        if target is not None:
            self.binding.bind_output(target, *place)


class Graph:
    """Collects nodes and weights; methods take and return names of results."""

    def __init__(self, bits: int):
        self.bits = bits
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[TensorProto] = []
        self.weights: dict[str, np.ndarray] = {}  # of constants that are not in the graph's file

    def constant(self, value: Tensor | np.ndarray) -> str:
        """Add a weight or another fixed tensor; large ones share memory with the tensor."""
        if isinstance(value, Tensor):
            value = value.detach().cpu().contiguous().numpy()
        name = f"constant{len(self.constants)}"
        if value.nbytes < 1024:
            self.constants.append(numpy_helper.from_array(value, name))
            return name
        # Copying weights into the graph's file and out of it would take most of the time.
        self.weights[name] = value
        dtype = helper.np_dtype_to_tensor_dtype(value.dtype)
        place = [onnx.StringStringEntryProto(key="location", value="memory")]
        external = {"data_location": TensorProto.EXTERNAL, "external_data": place}
        self.constants.append(TensorProto(name=name, data_type=dtype, dims=value.shape, **external))
        return name

    def add(self, operator: str, *inputs: str, outputs: int = 1, **attributes: Any) -> Any:
        """Add a node and return its result, or a list of several."""
        names = [f"{operator}{len(self.nodes)}.{i}" for i in range(outputs)]
        self.node(operator, inputs, names, **attributes)
        return names[0] if outputs == 1 else names

    def node(self, operator: str, inputs: Any, outputs: list[str], **attributes: Any) -> None:
        """Add a node whose results have given names."""
        domain = "com.microsoft" if operator in CONTRIB else ""
        self.nodes.append(helper.make_node(operator, inputs, outputs, domain=domain, **attributes))

    def product(self, x: str, weight: Tensor) -> str:
        """Multiply x by a weight (out, in)."""
        if self.bits == 32:
            return self.add("FusedMatMul", x, self.constant(weight.float()), transB=1)
        values, scales = quantize(weight.detach().float().cpu())
        quantized = self.constant(values.numpy()), self.constant(scales)
        sizes = {"N": weight.shape[0], "K": weight.shape[1], "bits": 8, "block_size": BLOCK}
        # Level 4: 8-bit inputs.
        return self.add("MatMulNBits", x, *quantized, **sizes, accuracy_level=4)

    def norm(self, x: str, norm: nn.Module) -> str:
        """RMSNorm."""
        return self.add("RMSNormalization", x, self.constant(norm.weight), epsilon=norm.eps)

    def feed_forward(self, x: str, layer: nn.Module) -> str:
        """SwiGLU."""
        gate = self.product(x, applied_weight(layer.w1))
        gate = self.add("QuickGelu", gate, alpha=1.0)  # x · σ(x), that is silu
        up = self.product(x, applied_weight(layer.w3))
        return self.product(self.add("Mul", gate, up), applied_weight(layer.w2))

    def experts(self, x: str, layer: nn.Module) -> str:
        """Mixture of experts: all are computed, and those that are not chosen get weight 0."""
        gate = layer.gate
        scores = self.add(
            "Softmax", self.add("FusedMatMul", x, self.constant(gate.weight), transB=1), axis=-1
        )
        k = self.constant(np.array([gate.top_k]))
        weights, chosen = self.add("TopK", scores, k, outputs=2, axis=-1)
        last_axis = self.constant(np.array([-1]))
        if gate.top_k > 1 and gate.norm_topk_prob:
            weights = self.add("Div", weights, self.add("ReduceSum", weights, last_axis))
        zero = self.constant(torch.zeros(1))
        results = []
        for number, expert in enumerate(layer.experts):
            here = self.add("Equal", chosen, self.constant(np.array([number])))
            weight = self.add("ReduceSum", self.add("Where", here, weights, zero), last_axis)
            results.append(self.add("Mul", self.feed_forward(x, expert), weight))
        if layer.shared_experts is not None:
            results.append(self.feed_forward(x, layer.shared_experts))
        return reduce(lambda first, second: self.add("Add", first, second), results)


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round a weight (out, in) to 8 bits: weight ≈ (values − 128) · scale.

    Returns values (out, blocks, BLOCK) uint8, the last block padded, and scales (out · blocks,).
    """
    blocks = nn.functional.pad(weight, (0, -weight.shape[1] % BLOCK)).unflatten(1, (-1, BLOCK))
    scales = blocks.abs().amax(-1, keepdim=True) / 127
    values = (blocks / scales.clamp(min=torch.finfo(torch.float32).tiny)).round() + 128
    return values.to(torch.uint8), scales.flatten()


def build_graph(model: MiniMindLM, bits: int) -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
    """Convert the model to an ONNX graph that extends rows of a cache.

    Of its inputs, `last` is the slot of each row's last id, `total` the number of slots of the
    longest row, and `positions` are indices into the new ids of the logits to compute. Returns the
    graph and, by name, the weights that are to be added to it.
    """
    config, graph = model.config, Graph(bits)
    table = rotary_cos_sin(config.head_dim, config.max_seq_len, config.rope_theta)
    rotary = [graph.constant(table[..., i]) for i in range(2)]
    x = graph.add("Gather", graph.constant(model.tok_embeddings.weight), "ids")
    slots = ["rows", config.n_kv_heads, "slots", config.head_dim]
    inputs = [
        ("ids", TensorProto.INT64, ["rows", "new"]),
        ("last", TensorProto.INT32, ["rows"]),
        ("total", TensorProto.INT32, [1]),
        ("positions", TensorProto.INT64, ["positions"]),
    ]
    outputs = [("logits", TensorProto.FLOAT, ["rows", "positions", config.vocab_size])]
    for i, block in enumerate(model.layers):
        attention = block.attention
        h = graph.norm(x, block.attention_norm)
        projections = (attention.wq, attention.wk, attention.wv)
        qkv = [graph.product(h, applied_weight(w)) for w in projections]
        caches = [f"keys.{i}", f"values.{i}"]
        inputs += [(name, TensorProto.FLOAT, slots) for name in caches]
        outputs += [(f"new_{name}", TensorProto.FLOAT, slots) for name in caches]
        graph.node(
            "GroupQueryAttention",
            [*qkv, *caches, "last", "total", *rotary],
            [f"attended{i}", *(f"new_{name}" for name in caches)],
            num_heads=config.n_heads,
            kv_num_heads=config.n_kv_heads,
            do_rotary=1,
            rotary_interleaved=1,  # adjacent pairs
        )
        x = graph.add("Add", x, graph.product(f"attended{i}", applied_weight(attention.wo)))
        compute = graph.experts if config.use_moe else graph.feed_forward
        x = graph.add("Add", x, compute(graph.norm(x, block.ffn_norm), block.feed_forward))
    x = graph.add("Gather", x, "positions", axis=1)  # (rows, K, dim)
    logits = graph.product(graph.norm(x, model.norm), model.output.weight)
    graph.node("Identity", [logits], ["logits"])
    ends = [[helper.make_tensor_value_info(*v) for v in values] for values in (inputs, outputs)]
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("com.microsoft", 1)]
    onnx_graph = helper.make_graph(graph.nodes, "MiniMind", *ends, graph.constants)
    return helper.make_model(onnx_graph, opset_imports=opsets, ir_version=11), graph.weights
