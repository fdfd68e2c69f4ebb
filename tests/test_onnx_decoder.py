"""The decoder of ONNX Runtime: the same network and tokens; 8-bit weights leave rows alone."""

import sys

import numpy as np
import pytest
import torch
from rounding import assert_equal_to_rounding, forward_sums
from tiny_models import both_kinds, random_ids, tiny

from common import UserError
from inference import ChatModel
from model import TorchDecoder, apply_lora
from model.decoder import CHUNK
from model.onnx_decoder import BLOCK, OnnxDecoder, quantize

SHAPE = {"dim": 128, "n_heads": 4}  # heads of 32: ONNX Runtime takes multiples of 16


def play(decoder, model=None):
    """Logits of prompts and steps of three rows, one of which is replaced on the way."""
    rows = [ids.tolist() for ids in random_ids(1, 20)[0].split([3, 9, 8])]
    found, wanted = [], []

    def compare(logits, ids):
        found.append(logits)
        if model is not None:
            with torch.no_grad():
                wanted.append(model(torch.tensor([ids])).logits[0, -1])

    for i, ids in enumerate(rows):
        compare(decoder.prefill(i, ids), ids)
    for step in range(20):
        tokens = random_ids(3, seed=step)
        for ids, token in zip(rows, tokens.tolist(), strict=True):
            ids.append(token)
        for logits, ids in zip(decoder.step(tokens.tolist()), rows, strict=True):
            compare(logits, ids)
        if step == 9:
            rows[0] = rows[1][:7] + random_ids(4)[:4].tolist()
            compare(decoder.prefill(0, rows[0]), rows[0])
    return torch.stack(found), torch.stack(wanted) if wanted else None


@both_kinds
def test_in_full_precision_it_is_the_model(use_moe):
    model = tiny(**SHAPE, use_moe=use_moe)
    found, wanted = play(OnnxDecoder(model, 3, bits=32), model)
    assert_equal_to_rounding(found, wanted, forward_sums(model.config, 29))


@torch.no_grad()
def test_all_logits_of_a_prompt_are_the_model_s():
    model = tiny(**SHAPE, max_seq_len=2 * CHUNK)
    prompt = random_ids(1, CHUNK + 7)
    parts = list(OnnxDecoder(model, 2, bits=32).prefill_in_chunks(1, prompt[0].tolist(), True))
    assert [len(part) for part in parts] == [CHUNK // 2, CHUNK // 2, 7]
    wanted = model(prompt).logits[0]
    torch.testing.assert_close(torch.cat(parts), wanted, rtol=1e-3, atol=1e-3)


def test_other_experts_and_no_scaling():
    model = tiny(**SHAPE, use_moe=True, norm_topk_prob=False, n_shared_experts=0)
    found, wanted = play(OnnxDecoder(model, 3, bits=32), model)
    assert_equal_to_rounding(found, wanted, forward_sums(model.config, 29))


@both_kinds
def test_the_adapter_in_use_is_part_of_it(use_moe):
    model = tiny(**SHAPE, use_moe=use_moe)
    before, _ = play(OnnxDecoder(model, 3, bits=32))
    apply_lora(model, rank=4)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(".B"):
                weight.normal_(std=0.1)
    found, wanted = play(OnnxDecoder(model, 3, bits=32), model.eval())
    assert_equal_to_rounding(found, wanted, forward_sums(model.config, 29))
    assert (found - before).abs().max() > 0.1


def test_it_grows_to_the_context_and_no_further():
    model = tiny(**SHAPE, max_seq_len=300)
    decoder = OnnxDecoder(model, bits=32)
    ids = random_ids(1, 300)
    decoder.prefill(0, ids[0, :2].tolist())
    for token in ids[0, 2:].tolist():
        logits = decoder.step([token])
    with torch.no_grad():
        wanted = model(ids).logits[:, -1]
    assert_equal_to_rounding(logits, wanted, forward_sums(model.config, 300))
    with pytest.raises(ValueError, match="max_seq_len 300"):
        decoder.step([3])


@both_kinds
def test_with_8_bits_a_row_does_not_depend_on_the_others(use_moe):
    model = tiny(**SHAPE, use_moe=use_moe)
    together, alone = OnnxDecoder(model, 3), OnnxDecoder(model, 1)
    prompt = random_ids(9).tolist()
    for i in range(3):
        together.prefill(i, random_ids(5 + 2 * i, seed=7 + i).tolist() if i else prompt)
    alone.prefill(0, prompt)
    for step in range(8):
        tokens = random_ids(3, seed=step).tolist()
        first = together.step(tokens)[0]
        by_itself = alone.step(tokens[:1])[0]
        assert_equal_to_rounding(first, by_itself, forward_sums(model.config, 17))


def test_8_bits_come_close():
    """A weight is rounded by half a step of its block at most; the logits hardly change."""
    weight = torch.randn(48, 100)
    values, scales = quantize(weight)
    assert values.shape == (48, 4, BLOCK) and values.dtype == torch.uint8
    steps = scales.view(48, 4, 1)
    back = ((values.float() - 128) * steps).flatten(1)[:, :100]
    largest = torch.nn.functional.pad(weight, (0, 28)).view(48, 4, BLOCK).abs().amax(-1, True)
    assert_equal_to_rounding(steps, largest / 127, sums=1)
    bound = steps.expand(-1, -1, BLOCK).flatten(1)[:, :100] / 2
    assert ((back - weight).abs() <= bound * 1.001).all()
    model = tiny(**SHAPE)
    found, wanted = play(OnnxDecoder(model, 3), model)
    assert 0 < (found - wanted).abs().mean() < 0.1 * wanted.abs().mean()


def test_heads_that_it_cannot_take():
    with pytest.raises(ValueError, match="head size 8"):
        OnnxDecoder(tiny())


@both_kinds
def test_greedy_tokens_are_those_of_pytorch(use_moe):
    """Alone and in a batch, after long prompts, and where prompts begin alike."""
    model = tiny(**SHAPE, use_moe=use_moe, max_seq_len=2 * CHUNK)
    prompts = [random_ids(n, seed=n) for n in (1, 9, CHUNK + 70)]
    begin_alike = [torch.cat((prompt, random_ids(5, seed=3))) for prompt in prompts]
    options = {"max_new_tokens": 24, "eos_token_id": -1}
    for rows in (1, 3):
        decoders = TorchDecoder(model, rows), OnnxDecoder(model, rows, bits=32)
        for asked in (prompts, begin_alike, prompts):
            wanted, found = (model.batch_generate(asked, decoder=d, **options) for d in decoders)
            for ids, other in zip(wanted, found, strict=True):
                assert len(ids) == 24 and torch.equal(ids, other)


def test_weights_are_not_copied():
    """All that ONNX Runtime reads as it is stored is the model's own memory."""
    model = tiny(**SHAPE)
    shared = [weight.ctypes.data for weight in OnnxDecoder(model, bits=32).weights.values()]
    own = {weight.data_ptr() for weight in model.parameters() if weight.ndim == 2}
    assert own <= set(shared)


@pytest.mark.parametrize("engine", [None, "torch", "onnx", "int8"])
@pytest.mark.parametrize("why_not", ["", "package", "head size"])
def test_which_engine_computes(engine, why_not, monkeypatch, tokenizer):
    """What is asked for, or a reason; by default ONNX Runtime in full precision where it can."""
    model = tiny() if why_not == "head size" else tiny(**SHAPE)
    if why_not == "package":
        monkeypatch.setitem(sys.modules, "onnxruntime", None)
        monkeypatch.delitem(sys.modules, "model.onnx_decoder")
    if why_not and engine in ("onnx", "int8"):
        flag = {"onnx": "--engine onnx", "int8": "--quantize int8"}[engine]
        with pytest.raises(UserError, match=f"{flag}: .*{why_not}|{flag}: needs onnxruntime: pip"):
            ChatModel("m", model, tokenizer, True, engine)
        return
    decoder = ChatModel("m", model, tokenizer, True, engine).decoder
    if why_not or engine == "torch":
        assert isinstance(decoder, TorchDecoder)
    else:
        assert isinstance(decoder, OnnxDecoder)
        assert any(w.dtype == np.uint8 for w in decoder.weights.values()) == (engine == "int8")
