"""Checkpoint folders: what loads, what is refused by name, and round trips bit for bit."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import llada
from llada.errors import UserError
from llada.model import hf
from llada.model.hf import (
    convert,
    find_device,
    find_dtype,
    load_model,
    load_state,
    open_state,
    read_config,
    save_model,
)
from llada.model.rotary import RopeScaling
from llada.model.transformer import ModelConfig, Transformer

MakeModel = Callable[..., Transformer]
TOKENS = torch.arange(12).reshape(2, 6)


def read_all(folder: Path) -> dict[str, Tensor]:
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype
        assert torch.equal(a[name], b[name]), name


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_weights(folder: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = {name: t.clone() for name, t in load_file(folder / "model.safetensors").items()}
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize("name", ["llada_gqa", "llada_mha"])
@pytest.mark.parametrize("shard_bytes", [None, 20_000])
def test_official_layout_round_trips_bit_for_bit(
    golden_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, shard_bytes: int | None
) -> None:
    official = golden_dir / name
    if shard_bytes:
        monkeypatch.setattr(hf, "SHARD_BYTES", shard_bytes)
    config = convert(official, tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "back")
    assert_same(read_all(tmp_path / "back"), read_all(official))
    stored = json.loads((official / "config.json").read_text())
    written = json.loads((tmp_path / "back" / "config.json").read_text())
    shared = {key for key in stored if key in written} - {"torch_dtype", "mlp_ratio"}
    assert {key: written[key] for key in shared} == {key: stored[key] for key in shared}
    assert read_config(tmp_path / "back") == (config, "llada")
    assert read_config(tmp_path / "ours") == (config, "ours")
    num_files = len(list((tmp_path / "back").glob("*.safetensors")))
    assert (num_files > 3) if shard_bytes else (num_files == 1)
    if shard_bytes:
        index = json.loads((tmp_path / "back" / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == 4 * config.num_parameters
        assert index["weight_map"].keys() == read_all(official).keys()
    tokens = torch.arange(20)[None]
    assert torch.equal(load_model(tmp_path / "back")(tokens), load_model(official)(tokens))


def test_public_load_returns_a_network_in_evaluation_mode(golden_dir: Path) -> None:
    model, tokenizer = llada.load(golden_dir / "llada_gqa", dtype=torch.bfloat16)
    assert tokenizer is None
    assert not model.training
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.config.mask_token_id == 133
    assert model.config.max_length == 160
    assert model.config.kv_heads == 2


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("layout", ["ours", "llada", "llama"])
def test_every_layout_gives_the_same_logits(
    make_model: MakeModel, tmp_path: Path, layout: hf.Layout, tied: bool
) -> None:
    model = make_model(tie_embeddings=tied, rope_theta=1234.0, rms_norm_eps=1e-6)
    save_model(model, tmp_path, layout=layout)
    loaded = load_model(tmp_path)
    assert loaded.config == model.config
    assert torch.equal(loaded(TOKENS), model(TOKENS))
    assert (loaded.lm_head.weight is loaded.embed.weight) == tied
    heads = {"ours": "lm_head.weight", "llada": "model.transformer.ff_out.weight", "llama": "lm_head.weight"}
    assert (heads[layout] in read_all(tmp_path)) == (not tied)


@pytest.mark.parametrize("tied", [False, True])
def test_rows_of_stored_tensors_are_read_alone(make_model: MakeModel, tmp_path: Path, tied: bool) -> None:
    model = make_model(tie_embeddings=tied)
    save_model(model, tmp_path, layout="llada")
    stored = open_state(tmp_path, *read_config(tmp_path))
    parameters = dict(model.named_parameters())
    assert stored.keys() == parameters.keys()
    for name, parameter in parameters.items():
        assert torch.equal(stored[name][2:5], parameter[2:5])
        assert torch.equal(stored[name][:], parameter)


def test_a_tied_copy_of_the_head_is_accepted_only_when_equal(make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model(tie_embeddings=True)
    save_model(model, tmp_path, layout="llama")
    edit_weights(tmp_path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    assert torch.equal(load_model(tmp_path)(TOKENS), model(TOKENS))
    edit_weights(tmp_path, lambda t: t["lm_head.weight"].add_(1))
    with pytest.raises(UserError, match=r"tied.*lm_head\.weight"):
        load_model(tmp_path)


def test_missing_unused_and_misshaped_tensors_are_named(make_model: MakeModel, tmp_path: Path) -> None:
    save_model(make_model(), tmp_path, layout="llada")
    gone = "model.transformer.blocks.1.up_proj.weight"
    edit_weights(tmp_path, lambda t: t.update({"surplus.bias": t.pop(gone)}))
    with pytest.raises(UserError, match=r"missing.*blocks\.1\.up_proj.*unused.*surplus\.bias"):
        load_model(tmp_path)
    edit_weights(tmp_path, lambda t: t.update({gone: t.pop("surplus.bias").T.contiguous()}))
    with pytest.raises(UserError, match=r"blocks\.1\.up_proj.*\(24, 20\).*\(20, 24\)"):
        load_model(tmp_path)


def test_a_damaged_weight_file_is_named(make_model: MakeModel, tmp_path: Path) -> None:
    save_model(make_model(), tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(UserError, match=r"model\.safetensors is damaged .*copy or download it again"):
        load_model(tmp_path)


def test_a_missing_shard_is_named(golden_dir: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(golden_dir / "llada_gqa", tmp_path / "copy", copy_function=shutil.copy)
    folder.chmod(0o755)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="model-00002-of-00002"):
        load_model(folder)


def test_folders_that_are_no_checkpoints_are_refused(make_model: MakeModel, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"config\.json") as caught:
        load_model(tmp_path)
    assert isinstance(caught.value, UserError)
    assert str(caught.value) == f"{tmp_path} is no checkpoint: it has no config.json"
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(UserError, match="'bert'"):
        load_model(tmp_path)
    save_model(make_model(), tmp_path)
    edit_config(tmp_path, num_experts=8)
    with pytest.raises(UserError, match="num_experts"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("layout", "change"),
    [
        ("llada", {"include_bias": True}),
        ("llada", {"attention_layer_norm": True}),
        ("llada", {"layer_norm_type": "default"}),
        ("llada", {"rope": False}),
        ("llama", {"hidden_act": "gelu"}),
        ("llama", {"attention_bias": True}),
        ("llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 8.0}}),
    ],
    ids=str,
)
def test_what_the_network_cannot_express_is_refused(
    make_model: MakeModel, tmp_path: Path, layout: hf.Layout, change: dict[str, object]
) -> None:
    save_model(make_model(), tmp_path, layout=layout)
    edit_config(tmp_path, **change)
    with pytest.raises(UserError, match="not supported"):
        load_model(tmp_path)


def test_illada_config_without_mask_id_gets_the_documented_one(make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model(tie_embeddings=True, mask_token_id=5)
    save_model(model, tmp_path, layout="llama")
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "illada"
    del config["mask_token_id"]
    config["eos_token_id"] = [1, 2]
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": config.pop("rope_theta")}
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = load_model(tmp_path)
    assert loaded.config == model.config
    assert torch.equal(loaded(TOKENS), model(TOKENS))


def test_autoregressive_llama_becomes_a_masked_start(make_model: MakeModel, tmp_path: Path) -> None:
    ar = make_model(causal=True, mask_token_id=None)
    save_model(ar, tmp_path / "ar", layout="llama")
    (tmp_path / "ar" / "tokenizer_config.json").write_text("{}")
    assert json.loads((tmp_path / "ar" / "config.json").read_text())["model_type"] == "llama"
    loaded = load_model(tmp_path / "ar")
    assert loaded.config.causal
    assert loaded.config.mask_token_id is None
    assert torch.equal(loaded(TOKENS), ar(TOKENS))
    config = convert(tmp_path / "ar", tmp_path / "masked", mask_token_id=20)
    assert (tmp_path / "masked" / "tokenizer_config.json").read_text() == "{}"
    masked = load_model(tmp_path / "masked")
    assert masked.config == config == dataclasses.replace(ar.config, causal=False, mask_token_id=20)
    for name, tensor in masked.state_dict().items():
        same = (tensor == ar.state_dict()[name]).reshape(len(tensor), -1).all(1)
        assert (~same).nonzero().flatten().tolist() == (
            [20] if name in ("embed.weight", "lm_head.weight") else []
        )
    assert not torch.allclose(masked(TOKENS), ar(TOKENS), atol=1e-3)
    grown = convert(tmp_path / "ar", tmp_path / "grown", mask_token_id=23)
    assert grown.vocab_size == 64
    longer = load_model(tmp_path / "grown")
    assert torch.equal(longer.embed.weight[:23], ar.embed.weight)
    plain = dataclasses.replace(ar.config, causal=False)
    bidirectional = Transformer(plain)
    bidirectional.load_state_dict(ar.state_dict())
    torch.testing.assert_close(longer(TOKENS)[..., :23], bidirectional(TOKENS))
    with pytest.raises(UserError, match="mask_token_id 24 lies outside the 23 .* the first behind them, 23"):
        convert(tmp_path / "ar", tmp_path / "outside", mask_token_id=24)
    convert(
        tmp_path / "masked", tmp_path / "renamed", mask_token_id=3
    )  # a mask that is trained is not drawn anew
    assert_same(dict(load_model(tmp_path / "renamed").state_dict()), dict(masked.state_dict()))


LINEAR = RopeScaling("linear", factor=2.0)
QWEN = {"d_model": 24, "num_heads": 4, "qk_norm": True, "head_width": 16}
DREAM = {"qkv_bias": True, "shift": True}
KINDS: list[dict] = [
    {},
    {"qkv_bias": True},
    QWEN,
    {"qkv_bias": True, "qk_norm": True},
    {"shift": True},
    DREAM,
    {"rope_scaling": LINEAR},
]


@pytest.mark.parametrize("layout", ["ours", "llada", "llama"])
@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_biases_head_norms_and_widths_are_kept_or_refused(
    make_model: MakeModel, tmp_path: Path, layout: hf.Layout, kind: dict, causal: bool
) -> None:
    model = make_model(causal=causal, **kind)
    for name, parameter in model.named_parameters():
        if name.endswith((".bias", "q_norm.weight", "k_norm.weight")):
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(len(name)))
    unheard_of = {
        "ours": False,
        "llada": kind in KINDS[2:] or causal,
        "llama": kind in KINDS[3:5] or (kind == DREAM and causal),
    }
    if unheard_of[layout]:
        with pytest.raises(UserError, match=r"no place in|keep it in our layout"):
            save_model(model, tmp_path, layout=layout)
        return
    save_model(model, tmp_path, layout=layout)
    loaded = load_model(tmp_path)
    assert loaded.config == model.config
    assert_same(dict(loaded.state_dict()), dict(model.state_dict()))
    assert torch.equal(loaded(TOKENS), model(TOKENS))


# Of a context of 12 positions; of 8 pairs of columns the first is kept, the next two lie in between.
SCALED_ROPE: dict[str, dict] = {
    "linear": {"factor": 3.0},
    "llama3": {
        "factor": 8.0,
        "original_max_position_embeddings": 12,
        "low_freq_factor": 0.1,
        "high_freq_factor": 1.0,
    },
    "yarn": {
        "factor": 8.0,
        "original_max_position_embeddings": 12,
        "beta_fast": 1.0,
        "beta_slow": 0.1,
    },
}


@pytest.mark.parametrize(
    ("family", "rope", "tied"),
    [
        ("Llama", "default", False),
        ("Llama", "llama3", True),
        ("Qwen2", "default", True),
        ("Qwen2", "yarn", False),
        ("Qwen3", "default", False),
        ("Qwen3", "linear", True),
    ],
)
def test_networks_of_transformers_give_the_same_logits(
    tmp_path: Path, family: str, rope: str, tied: bool
) -> None:
    """Read from its folder, and read by transformers from ours; and made a start for diffusion, at step 0 and as long as
    attention is causal, the autoregressive network to the bit. Scaled rotary positions go beyond their original context."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    shape = {"hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 2, "vocab_size": 23}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32}
    heads |= {"head_dim": 16} if family == "Qwen3" else {}
    if rope != "default":
        shape["hidden_size"] = 64  # heads of 16
        heads["rope_parameters"] = {"rope_type": rope, "rope_theta": 1e4, **SCALED_ROPE[rope]}
    settings = {"bos_token_id": 0, "eos_token_id": 1, "tie_word_embeddings": tied, "initializer_range": 0.3}
    config = getattr(transformers, f"{family}Config")(**shape, **heads, **settings)
    theirs = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    for name, parameter in theirs.named_parameters():
        if "bias" in name or "norm" in name:  # which are born as if they were not there
            torch.nn.init.normal_(parameter, 1.0, 0.3)
    theirs.save_pretrained(tmp_path / "theirs")
    tokens = torch.randint(0, 22, (3, 17), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = theirs(tokens).logits
        ours = load_model(tmp_path / "theirs")
        torch.testing.assert_close(ours(tokens), expected, atol=1e-5, rtol=0)
        assert expected.std() > 0.1
        if rope != "default":
            plain = Transformer(dataclasses.replace(ours.config, rope_scaling=RopeScaling())).eval()
            plain.load_state_dict(ours.state_dict())
            assert not torch.allclose(plain(tokens), expected, atol=1e-2)
            save_model(ours, tmp_path / "ours")
            assert torch.equal(load_model(tmp_path / "ours")(tokens), ours(tokens))

        save_model(ours, tmp_path / "back", layout="llama")
        back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back").eval()
        assert type(back) is type(theirs)
        assert torch.equal(back(tokens).logits, expected)

        convert(tmp_path / "theirs", tmp_path / "start", mask_token_id=22)
        start = load_model(tmp_path / "start")
        assert not torch.allclose(start(tokens), expected, atol=1e-2)
        causal = Transformer(dataclasses.replace(start.config, causal=True)).eval()
        causal.load_state_dict(start.state_dict())
        assert torch.equal(causal(tokens)[..., :22], ours(tokens)[..., :22])  # all but the mask's

        convert(tmp_path / "theirs", tmp_path / "shifted", mask_token_id=22, shift=True)
        shifted = load_model(tmp_path / "shifted")
        causal = Transformer(dataclasses.replace(shifted.config, causal=True)).eval()
        causal.load_state_dict(shifted.state_dict())
        # What each position predicts of itself is what the autoregressive network says of it, from those before.
        torch.testing.assert_close(causal(tokens)[:, 1:, :22], expected[:, :-1, :22], atol=1e-5, rtol=0)
        assert torch.equal(causal(tokens)[:, 1:, :22], ours(tokens)[:, :-1, :22])


def test_causal_network_has_no_place_in_lladas_layout(make_model: MakeModel, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="causal"):
        save_model(make_model(causal=True), tmp_path, layout="llada")
    assert not (tmp_path / "config.json").exists()


def test_blocks_are_kept_in_our_layout_alone(make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model(block_length=4)
    save_model(model, tmp_path / "ours")
    loaded = load_model(tmp_path / "ours")
    assert loaded.config == model.config
    assert torch.equal(loaded(TOKENS), model(TOKENS))
    for layout in ("llada", "llama"):
        with pytest.raises(UserError, match=rf"block-causal network \(block_length 4\) .* layout {layout}"):
            convert(tmp_path / "ours", tmp_path / layout, layout=layout)
        assert not (tmp_path / layout / "config.json").exists()
    save_model(make_model(), tmp_path / "plain")
    assert "block_length" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    save_model(make_model(), tmp_path / "llada", layout="llada")
    config = json.loads((tmp_path / "llada" / "config.json").read_text())
    (tmp_path / "llada" / "config.json").write_text(json.dumps({**config, "block_length": 4}))
    with pytest.raises(UserError, match="block_length = 4 is not known here"):
        load_model(tmp_path / "llada")


def test_dtype_is_kept_or_changed_on_request(make_model: MakeModel, tmp_path: Path) -> None:
    save_model(make_model().to(torch.bfloat16), tmp_path, layout="llada")
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert load_model(tmp_path).embed.weight.dtype == torch.bfloat16
    assert load_model(tmp_path, dtype=torch.float32).embed.weight.dtype == torch.float32


def test_saving_over_a_sharded_folder_leaves_no_stale_shards(
    make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(hf, "SHARD_BYTES", 4000)
        save_model(make_model(0), tmp_path)
    new = make_model(1)
    save_model(new, tmp_path)
    assert torch.equal(load_model(tmp_path)(TOKENS), new(TOKENS))


def test_converting_a_folder_onto_itself_is_refused(make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model()
    save_model(model, tmp_path)
    with pytest.raises(UserError, match="itself"):
        convert(tmp_path, tmp_path)
    assert torch.equal(load_model(tmp_path)(TOKENS), model(TOKENS))


def test_tensor_names_are_one_to_one(make_model: MakeModel) -> None:
    config: ModelConfig = make_model().config
    for layout in ("ours", "llada", "llama"):
        names = hf.tensor_names(config, layout)
        assert set(names) == {name for name, _ in make_model().named_parameters()}
        assert len(set(names.values())) == len(names)


def test_load_state_gives_our_names(make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model()
    save_model(model, tmp_path, layout="llada")
    config, layout = read_config(tmp_path)
    assert_same(load_state(tmp_path, config, layout), dict(model.state_dict()))


def test_norms_in_float32_beside_matrices_in_bfloat16_are_computed(
    make_model: MakeModel, tmp_path: Path
) -> None:
    """Everything is held in the widest precision of the file, which loses nothing."""
    model = make_model().to(torch.bfloat16)
    save_model(model, tmp_path)
    edit_weights(tmp_path, lambda t: t.update({k: v.float() for k, v in t.items() if "norm" in k}))
    loaded = load_model(tmp_path)
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    assert torch.equal(loaded(TOKENS), model.float()(TOKENS))
    assert load_model(tmp_path, dtype="bf16").norm.weight.dtype == torch.bfloat16


def test_precisions_have_their_usual_names() -> None:
    assert {find_dtype(name) for name in ("bf16", "bfloat16", "torch.bfloat16", torch.bfloat16)} == {
        torch.bfloat16
    }
    assert find_dtype("fp32") == find_dtype("float32") == torch.float32
    assert find_dtype(None) is None
    for bad in ("float17", "int8", "complex64", torch.int8, torch.complex64, "", "zeros"):
        with pytest.raises(UserError, match="is none that weights have; try bfloat16"):
            find_dtype(bad)


def test_devices_are_those_that_there_are() -> None:
    assert find_device(None) == find_device("cpu") == torch.device("cpu")
    with pytest.raises(UserError, match="device 'gpu7' is none that there is; try cpu or cuda"):
        find_device("gpu7")
    with pytest.raises(UserError, match=r"there is no device cuda:99 on this machine; it has \d+ of CUDA"):
        find_device("cuda:99")


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_quantised_weights_are_refused_by_name(
    make_model: MakeModel, tmp_path: Path, dtype: torch.dtype
) -> None:
    save_model(make_model(), tmp_path)
    edit_weights(
        tmp_path, lambda t: t.update({"layers.0.q_proj.weight": t["layers.0.q_proj.weight"].to(dtype)})
    )
    with pytest.raises(UserError, match=r"layers\.0\.q_proj\.weight is .*quantised"):
        load_model(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": {"a": 3}}'])
def test_a_damaged_index_is_named(make_model: MakeModel, tmp_path: Path, content: str) -> None:
    save_model(make_model(), tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(UserError, match=r"model\.safetensors\.index\.json"):
        load_model(tmp_path)


@pytest.mark.parametrize("content", [b"", b"version https://git-lfs.github.com/spec/v1\n", b"\x00" * 64])
def test_what_is_no_weight_file_is_named(make_model: MakeModel, tmp_path: Path, content: bytes) -> None:
    save_model(make_model(), tmp_path)
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=r"model\.safetensors is damaged"):
        load_model(tmp_path)
