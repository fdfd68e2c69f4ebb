import json
import os
from pathlib import Path

import pytest
import torch

from common import SaveError, UserError, write_atomically
from model import LMConfig, MiniMindLM, load_model, load_weights, save_weights, weights_path
from training.setup import check_output

TINY = LMConfig(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=64)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return MiniMindLM(TINY)


def test_names(tmp_path):
    assert weights_path(tmp_path, "pretrain", LMConfig()) == tmp_path / "pretrain_512.pth"
    moe = LMConfig(dim=640, use_moe=True)
    assert weights_path(tmp_path, "full_sft", moe) == tmp_path / "full_sft_640_moe.pth"


def test_a_plain_state_dict_and_its_description(tmp_path, model):
    path = tmp_path / "pretrain_32.pth"
    save_weights(path, model, TINY, "pretrain", "abc")
    state = torch.load(path, weights_only=True)
    assert state.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(state[name], tensor), name
    assert state["output.weight"].data_ptr() == state["tok_embeddings.weight"].data_ptr()
    about = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    assert about["stage"] == "pretrain"
    assert about["tokenizer"] == "abc"
    assert about["config"]["dim"] == 32
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "pretrain_32.json",
        "pretrain_32.pth",
    ]


def test_load_model_rebuilds_the_shape(tmp_path, model):
    path = tmp_path / "x.pth"
    save_weights(path, model, TINY, "pretrain", "abc")
    again = load_model(path, LMConfig(), "abc")
    ids = torch.arange(10)[None]
    assert torch.equal(again.eval()(ids).logits, model.eval()(ids).logits)


def test_half_precision_is_half_the_size_and_loads(tmp_path, model):
    full, half = tmp_path / "full.pth", tmp_path / "half.pth"
    save_weights(full, model, TINY, "pretrain", "abc")
    save_weights(half, model, TINY, "pretrain", "abc", torch.float16)
    assert half.stat().st_size < 0.65 * full.stat().st_size
    other = MiniMindLM(TINY)
    load_weights(half, other, "abc")
    assert other.norm.weight.dtype == torch.float32
    assert torch.equal(other.output.weight, model.output.weight.half().float())


def test_what_fails_half_way_leaves_the_old_file(tmp_path):
    path = tmp_path / "weights.pth"
    path.write_bytes(b"old")

    def fail(file):
        file.write(b"new")
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space"):
        write_atomically(path, fail)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_weights_of_another_shape_are_named(tmp_path, model):
    path = tmp_path / "x.pth"
    save_weights(path, model, TINY, "pretrain", "abc")
    wider = MiniMindLM(LMConfig(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=64))
    deeper = MiniMindLM(LMConfig(dim=32, n_layers=3, n_heads=4, n_kv_heads=2, vocab_size=64))
    with pytest.raises(UserError, match="--dim is 32 there, 64 here"):
        load_weights(path, wider, "abc")
    with pytest.raises(UserError, match="--n_layers is 2 there, 3 here"):
        load_weights(path, deeper, "abc")
    path.with_suffix(".json").unlink()
    with pytest.raises(UserError, match=r"tok_embeddings.weight is \(64, 32\) there, \(64, 64\)"):
        load_weights(path, wider, "abc")
    with pytest.raises(UserError, match=r"layers\.2\..* is missing there"):
        load_weights(path, deeper, "abc")
    with pytest.raises(UserError, match="holds another model"):
        check_output(path, deeper)
    shallower = MiniMindLM(LMConfig(dim=32, n_layers=1, n_heads=4, n_kv_heads=2, vocab_size=64))
    with pytest.raises(UserError, match="there, missing here"):
        check_output(path, shallower)
    check_output(path, model)


def test_weights_of_another_tokenizer_are_refused(tmp_path, model):
    path = tmp_path / "x.pth"
    save_weights(path, model, TINY, "pretrain", "abc")
    with pytest.raises(UserError, match="another tokenizer"):
        load_weights(path, model, "def")
    path.with_suffix(".json").unlink()
    load_weights(path, model, "def")


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", '{"stage": 1, "tokenizer": 2, "config": {"dim": 7}}']
)
def test_a_damaged_description_is_named(tmp_path, model, text):
    path = tmp_path / "x.pth"
    save_weights(path, model, TINY, "pretrain", "abc")
    path.with_suffix(".json").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=r"x\.json"):
        load_model(path, TINY, "abc")


@pytest.mark.skipif(os.name == "nt", reason="needs /dev/null")
def test_an_unwritable_folder_is_named(model):
    with pytest.raises(UserError, match="--out_dir"):
        check_output(Path("/dev/null/out/x.pth"), model)


@pytest.mark.skipif(os.name == "nt", reason="needs a limit on the size of files")
def test_what_cannot_be_saved_is_said_in_a_line_and_the_old_file_is_kept(tmp_path, model):
    import resource

    path = tmp_path / "x.pth"
    save_weights(path, model, TINY, "pretrain", "abc")
    before = path.read_bytes()
    with torch.no_grad():
        model.norm.weight.add_(1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    # Python ignores the signal that comes with it, so that writing fails as on a full disk.
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))
    try:
        with pytest.raises(SaveError) as raised:
            save_weights(path, model, TINY, "pretrain", "abc")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert str(raised.value).startswith(f"{path}: cannot be saved (")
    assert "\n" not in str(raised.value)
    assert path.read_bytes() == before
    assert {file.name for file in tmp_path.iterdir()} == {"x.pth", "x.json"}


def test_a_damaged_end_of_the_file_is_refused(tmp_path, model):
    """The end of a zip file says where everything is; some of its bytes do not matter."""
    path = tmp_path / "x.pth"
    save_weights(path, model, TINY, "pretrain", "abc")
    whole = path.read_bytes()
    refused = 0
    for at in range(1, 150):
        path.write_bytes(whole[:-at] + bytes([whole[-at] ^ 255]) + whole[len(whole) - at + 1 :])
        try:
            load_weights(path, model, "abc")
        except UserError as error:
            assert str(error).startswith(f"{path}: ")
            refused += 1
    assert refused > 75


class Malicious:
    def __reduce__(self):
        return print, ("run by unpickling",)


def test_damaged_and_dangerous_files_are_refused(tmp_path, model, capsys):
    path = tmp_path / "x.pth"
    save_weights(path, model, TINY, "pretrain", "abc")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="damaged"):
        load_weights(path, model, "abc")
    path.write_bytes(b"")
    with pytest.raises(UserError, match="damaged"):
        load_weights(path, model, "abc")
    torch.save({"norm.weight": Malicious()}, path)
    with pytest.raises(UserError, match="refused"):
        load_weights(path, model, "abc")
    assert "run by unpickling" not in capsys.readouterr().out
    torch.save([1, 2], path)
    with pytest.raises(UserError, match="not a state_dict"):
        load_weights(path, model, "abc")


def test_weights_of_other_heads_are_refused_although_their_shapes_fit(tmp_path, model):
    path = tmp_path / "pretrain_32.pth"
    save_weights(path, model, TINY, "pretrain", "abc")
    other = MiniMindLM(LMConfig(dim=32, n_layers=2, n_heads=2, n_kv_heads=1, vocab_size=64))
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    assert shapes == {name: tensor.shape for name, tensor in other.state_dict().items()}
    with pytest.raises(UserError, match="n_heads is 4 there, 2 here"):
        load_weights(path, other, "abc")
