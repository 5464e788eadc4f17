"""config.json and weights: every spelling and variant is read, and computes what a slow LLaMA
does; whatever is wrong with a folder is one line."""
import math
import os

import pytest
import torch

import llama
from tests.helpers import put
from tests.slow_llama import (AS_4, AS_5, BASE, IDS, INDEX, SCALED, passes, random_checkpoint,
                              reference, same, worst_error)
from text.safetensors_file import save


def test_what_is_not_given_is_as_transformers_has_it(tmp_path):
    """Rejects LLaMA-3's own values, or a refusal, for a file that leaves them out."""
    put(tmp_path, {"config.json": BASE | dict(rms_norm_eps=None)})
    c = llama.read_config(tmp_path)
    assert (c.eps, c.context, c.theta, c.tied) == (1e-6, 2048, 1e4, False)


ONCE = {k.replace("rope_", ""): v for k, v in SCALED.items()}                # "type" was its name
VARIANTS = {
    "a kv head for each query head": dict(num_key_value_heads=4),
    "kv heads and head size not given": dict(num_key_value_heads=None, head_dim=None),
    "one kv head for all": dict(num_key_value_heads=1),
    "heads wider than the model": dict(head_dim=12),
    "tied": dict(tie_word_embeddings=True),
    "what LLaMA has not, not given": dict(
        attention_bias=None, hidden_act=None, partial_rotary_factor=None, mlp_bias=None),
    "LLaMA-3, Transformers 4": dict(rope_theta=500.0, rope_scaling=None, torch_dtype="float32"),
    "LLaMA-3, Transformers 5": dict(rope_parameters=dict(rope_type="default", rope_theta=500.0)),
    "LLaMA-3.1, Transformers 4": AS_4,
    "LLaMA-3.1, first spelling": dict(AS_4, rope_scaling=ONCE),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_every_row_of_every_variant_is_llama(tmp_path, name):
    """Rejects a forward, a mask or a reading of config.json wrong for some kind of row or
    variant (LLaMA-3.1 as Transformers 5 spells it: test_clasp.py)."""
    assert worst_error(tmp_path, overrides=VARIANTS[name]) < 1e-12


@pytest.mark.parametrize("stored, shards", [
    (torch.float32, 1), (torch.float16, 3), (torch.bfloat16, 3)], ids=str)
def test_weights_arrive_unchanged_from_one_file_or_shards(tmp_path, stored, shards):
    """Rejects a loader that rounds or misplaces part of a fused matrix, or keeps the memory map."""
    c, w = random_checkpoint(tmp_path, AS_5, dtype=stored, shards=shards)
    model = llama.Llama.load(tmp_path, "cpu", torch.float64)
    half = llama.Llama.load(tmp_path, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16 and half.head(half.embed).dtype == torch.float32
    was = [x.clone() for x in (half.embed, half.norm, *half.layers[1])]
    random_checkpoint(tmp_path, AS_5, seed=1, dtype=stored, shards=shards)
    assert all(map(torch.equal, was, (half.embed, half.norm, *half.layers[1])))
    logits, _ = passes(model, model.cache(12), IDS, (12,))
    assert same(logits, reference(c, w, IDS)[0])


def test_on_a_cpu_the_default_is_float32_and_elsewhere_bfloat16(tmp_path):
    """Rejects twice the memory on a GPU; the meta device stands in for one. And matrices that a CPU
    would read across its rows, in float32; elsewhere they stay as they lie in the file."""
    random_checkpoint(tmp_path)
    cpu = llama.Llama.load(tmp_path)
    elsewhere = llama.Llama.load(tmp_path, "meta")
    assert (cpu.dtype, elsewhere.dtype) == (torch.float32, torch.bfloat16)
    for name in ("qkv", "out", "gate_up", "down"):
        assert getattr(cpu.layers[1], name).is_contiguous()
        assert getattr(elsewhere.layers[1], name).t().is_contiguous()


def test_tied_weights_may_stand_under_either_name_or_both(tmp_path):
    """Rejects a loader that wants one of two names, and two tables of which one is passed over; a
    refusal of the rotary frequencies that old checkpoints hold."""
    _, w = random_checkpoint(tmp_path, dict(tie_word_embeddings=True))
    w["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    table = w.pop("model.embed_tokens.weight")
    for names in (["lm_head"], ["model.embed_tokens"], ["lm_head", "model.embed_tokens"]):
        tables = {f"{name}.weight": table.clone() for name in names}
        save(w | tables, tmp_path / "model.safetensors", {})
        model = llama.Llama.load(tmp_path)
        assert model.embed.equal(table.float()) and model.lm_head is model.embed
    save(w | tables | {"lm_head.weight": table + 1}, tmp_path / "model.safetensors", {})
    with pytest.raises(llama.ModelError, match="lm_head.weight differs from"):
        llama.Llama.load(tmp_path)


def test_the_index_says_which_shard_a_tensor_comes_from(tmp_path):
    """Rejects a stale copy in another shard, of which the last that is read wins."""
    random_checkpoint(tmp_path, shards=2)
    right = llama.Llama.load(tmp_path)
    two = {"model.norm.weight": right.norm, "lm_head.weight": right.lm_head}
    for shard in tmp_path.glob("*.safetensors"):
        with llama.safe_open(shard, "pt") as file:
            w = {name: file.get_tensor(name) for name in file.keys()}
        save({name: x + 1 for name, x in two.items()} | w, shard, {})
    again = llama.Llama.load(tmp_path)
    assert again.norm.equal(right.norm) and again.lm_head.equal(right.lm_head)


def configure(**overrides):
    """The files of BASE with overrides in config.json; `...` takes a key away."""
    return {CONFIG: {k: v for k, v in {**BASE, **overrides}.items() if v is not ...}}


def weights(edit):
    """A function that puts one file of edited weights in the place of a folder's shards."""
    def harm(folder):
        (folder / INDEX).unlink()
        w = random_checkpoint(folder)[1]
        edit(w)
        save(w, folder / "model.safetensors", {"format": "pt"})
    return harm


CONFIG = "config.json"
K, NORM = "model.layers.0.self_attn.k_proj.weight", "model.norm.weight"
SHARD = "model-2-of-2.safetensors"
BROKEN = [              # what harms the folder: files or a function; what is said
    (configure(model_type="mistral"), "model_type = 'mistral' is not supported"),
    (configure(architectures=["LlamaForSequenceClassification"]), "SequenceClassification"),
    (configure(rope_scaling=dict(type="linear", factor=2.0)), "rope_type = 'linear'"),
    (configure(rope_parameters=dict(rope_type="yarn", rope_theta=1e4)), "rope_type = 'yarn'"),
    (configure(rope_scaling=dict(factor=8.0)), "rope_type = 'unnamed'"),
    (configure(rope_scaling="yarn"), "rope_scaling = 'yarn'"),
    (configure(rope_scaling=dict(rope_type="llama3", factor=8)), "low_freq_factor is None"),
    (configure(**{**AS_4, "rope_scaling": dict(SCALED, high_freq_factor=1.0)}), "do not fit"),
    (configure(rope_parameters=dict(AS_5["rope_parameters"], partial_rotary_factor=0.5)),
     "partial_rotary_factor = 0.5"),
    (configure(attention_bias=True), "attention_bias"), (configure(mlp_bias=True), "mlp_bias"),
    (configure(quantization_config=dict(bits=4)), "quantization_config"),
    (configure(hidden_act="gelu"), "= 'gelu'"),
    (configure(tie_word_embeddings="yes"), "tie_word_embeddings = 'yes'"),
    (configure(hidden_size=...), "hidden_size is None, not a whole number above 0"),
    *[(configure(num_hidden_layers=v), f"num_hidden_layers is {v}, not a whole number above 0")
      for v in (True, -1, 0, "wide", 2.5, math.inf, [1])],
    (configure(head_dim=7), "do not fit"), (configure(num_key_value_heads=3), "do not fit"),
    ({CONFIG: None}, "config.json: cannot be read"), ({CONFIG: b"{]"}, "cannot be read"),
    ({CONFIG: b"[1]"}, "a JSON object"), ({CONFIG: b"\xff\xfe"}, "cannot be read"),
    (weights(lambda w: w.pop(NORM)), f"the weights lack {NORM}"),
    (weights(lambda w: w.update(extra=torch.ones(2), more=torch.ones(1))),
     "2 weights too many, such as extra"),
    (weights(lambda w: w.update({NORM: torch.ones(1)})), f"{NORM} has torch.float32, shape [1]"),
    (weights(lambda w: w.update({K: w[K].T.contiguous()})), f"{K} has torch.float64, shape [32, "),
    (weights(lambda w: w.update({K: w[K].to(torch.int8)})), f"{K} has torch.int8"),
    ({SHARD: None}, f"{SHARD}: missing, broken"),
    (lambda d: os.truncate(d / SHARD, (d / SHARD).stat().st_size - 9), f"{SHARD}: missing, broken"),
    ({INDEX: dict(weight_map=[1])}, "weight_map does not say where"),
    ({INDEX: {}}, "the weights lack model.embed"), ({INDEX: None}, "model.safetensors: missing")]


@pytest.mark.parametrize("harm, said", BROKEN)
def test_what_is_wrong_with_a_folder_is_named_in_one_line(tmp_path, harm, said):
    """Rejects a traceback, a setting silently ignored, strict=False."""
    random_checkpoint(tmp_path, shards=2)
    assert llama.Llama.load(tmp_path)                  # it was whole before
    if callable(harm):
        harm(tmp_path)
    else:
        put(tmp_path, harm)
    with pytest.raises(llama.ModelError) as e:
        llama.Llama.load(tmp_path)
    assert said in str(e.value) and "\n" not in str(e.value)
