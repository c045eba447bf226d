"What `plan` says, against published figures, against what is held, and against a measured peak."
import runpy
from pathlib import Path
import pytest, torch
from transformers import AutoConfig, Phi3Config
from lora_nb.adapter import add_lora
from lora_nb.fit import CARDS, CONTEXT, SHAPES, Card, adapter_params, card, job_bytes, meta_model, n_params, packed_bytes, plan, shape_config, smaller, weight_bytes
from lora_nb.memory import KINDS, held
from lora_nb.models import quantisable
from lora_nb.quantize import FP4, NF4, quantize

# parameters as the makers' own checkpoints hold them, tied ones once
PUBLISHED = {"smollm2-135m": 134515008, "smollm2-360m": 361821120, "smollm2-1.7b": 1711376384, "llama-33b": 32528943616, "llama-65b": 65285660672, "llama2-7b": 6738415616,
             "llama2-13b": 13015864320, "llama2-70b": 68976648192, "llama3-8b": 8030261248, "llama3-70b": 70553706496, "llama3.2-1b": 1235814400, "llama3.2-3b": 3212749824,
             "qwen2.5-0.5b": 494032768, "qwen2.5-1.5b": 1543714304, "qwen2.5-7b": 7615616512, "qwen2.5-32b": 32763876352, "qwen3-0.6b": 596049920, "qwen3-4b": 4022468096,
             "qwen3-8b": 8190735360, "qwen3-30b-a3b": 30532122624, "mistral-7b": 7241732096, "mixtral-8x7b": 46702792704, "gemma-2b": 2506172416, "gemma2-9b": 9241705984,
             "gemma3-1b": 999885952, "phi3-mini": 3821079552, "phi4": 14659507200}

@pytest.mark.parametrize("name", SHAPES)
def test_a_shape_has_the_published_number_of_parameters(name):
    if name == "gpt3-175b": assert round(n_params(name)/1e9) == 175
    else: assert n_params(name) == PUBLISHED[name]

@pytest.mark.parametrize("r, targets, millions", [(1, ["q_proj", "v_proj"], 4.7), (4, ["q_proj", "v_proj"], 18.9), (8, ["q_proj", "v_proj"], 37.7), (8, ["q_proj"], 18.9), (2, ["q_proj", "k_proj", "v_proj", "out_proj"], 18.9), (64, ["q_proj", "v_proj"], 302.0)])
def test_gpt3_adapters_are_as_large_as_the_lora_paper_says(r, targets, millions):
    assert round(adapter_params(meta_model("gpt3-175b"), r, targets)/1e6, 1) == millions  # arXiv 2106.09685, tables 4, 5 and 6

def test_qlora_65b_fits_on_48_gb():
    paper = dict(r=64, seq=512, batch=1, checkpointing=True, optimizer="paged_adamw8bit")
    assert plan("llama-65b", gpu=48, **paper).fits and not plan("llama-65b", quant=None, gpu=80, **paper).fits
    assert 120 < n_params("llama-65b")*2/2**30 < 125

@pytest.mark.parametrize("q", [NF4(), NF4(double=True), NF4(32), FP4(256, True)], ids=["nf4", "double", "32", "fp4"])
@pytest.mark.parametrize("n", [1, 63, 64, 1000, 4096*33+7])
def test_packed_bytes_are_those_of_the_tensor(q, n):
    assert packed_bytes(n, q) == quantize(torch.randn(n), q).nbytes

@pytest.mark.parametrize("quant", [NF4(double=True), NF4(), None], ids=["double", "nf4", "none"])
def test_weights_and_adapter_of_the_real_model(quant, smol):
    if quant == NF4(double=True):
        model, _ = smol
        real = held(model)["base weights"]
        said = plan("smollm2", quant, gpu="T4", dtype=model.dtype).kinds["base weights"]
        assert abs(said-real) < .005*real
    full = meta_model("smollm2")
    assert weight_bytes(full, quant, torch.float32) == sum(p.numel()*4 for p in full.parameters()) - (sum(4*l.weight.numel()-packed_bytes(l.weight.numel(), quant) for l in quantisable(full).values()) if quant else 0)

def test_adapter_gradients_and_optimizer_of_a_real_step(llama):
    adapter = add_lora(llama, r=4)
    p = plan(llama.config, None, r=4, gpu="T4")
    assert p.kinds["adapter"] == p.kinds["gradients"] == sum(t.numel()*4 for t in adapter.parameters()) and p.kinds["optimizer"] == 2*p.kinds["adapter"]

def test_mixed_plans_and_experts():
    whole, mixed = (plan("smollm2", q, gpu="T4").kinds["base weights"] for q in (NF4(), {"*.down_proj": None, "": NF4()}))
    assert mixed > whole
    with pytest.warns(UserWarning, match="fused experts"): p = plan("qwen3-30b-a3b", gpu="H100")
    assert p.kinds["base weights"] > 50*2**30 and "unquantised" in repr(p)

@pytest.mark.parametrize("ask", [dict(config="llama3-8b", seq=2048, gpu="T4"), dict(config="llama2-70b", seq=4096, batch=4, gpu="RTX 4090"), dict(config="qwen2.5-7b", quant=None, gpu="RTX 3060"), dict(config="gemma-2b", seq=512, batch=64, gpu="L4", r=128)])
def test_longest_largest_and_changes_are_exact(ask):
    p = plan(**ask)
    for name, best in (("seq", p.longest), ("batch", p.largest)):
        at = lambda n: plan(**ask | {name: n}).fits
        assert (best == 0 and not at(1)) or (at(best) and not at(best+1))
    changes = p.changes()
    assert len(changes) <= 3 and (p.fits or all(c.total < p.total for _, c in changes))
    assert all(sum(job_bytes(c.job, c.card.before).values()) == c.total for _, c in changes)

def test_each_change_is_smaller_and_what_costs_nothing_comes_first():
    job = plan("llama3-8b", NF4(), gpu="T4").job
    steps = smaller(job)
    assert steps[0][0] == "double quantisation" and all(sum(job_bytes(j).values()) < sum(job_bytes(job).values()) for _, j in steps)

def test_more_of_anything_takes_more():
    base = dict(seq=512, batch=4, r=16, gpu="L4")
    t = lambda **k: plan("qwen2.5-1.5b", **base | k).total
    assert t() < t(seq=1024) and t() < t(batch=8) and t() < t(r=32) and t() < t(quant=None) and t(checkpointing=True) < t() and t(optimizer="adamw8bit") < t()
    phi = lambda **k: plan("phi3-mini", **base | k).total           # no fast path: a dropped copy of each input is kept
    assert phi() < phi(dropout=.1) and t() == t(dropout=.1)

def test_from_a_folder_and_a_config(tmp_path):
    config = Phi3Config(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, pad_token_id=0)
    config.save_pretrained(tmp_path)
    assert plan(tmp_path, gpu="T4").kinds == plan(config, gpu="T4").kinds == plan(AutoConfig.from_pretrained(tmp_path), gpu="T4").kinds
    assert list(plan(config, gpu="T4").kinds) == list(KINDS) and not plan(config, gpu="T4").job.fast

@pytest.mark.parametrize("name, dtype", [("Tesla T4", torch.float16), ("Tesla V100-SXM2-16GB", torch.float16), ("NVIDIA L4", torch.bfloat16), ("NVIDIA GeForce RTX 4090", torch.bfloat16)])
def test_the_name_that_a_card_gives_itself_tells_its_dtype(monkeypatch, name, dtype):
    "And fp16 trains under autocast, which takes the general path."
    monkeypatch.setattr("lora_nb.fit.card", lambda gpu: Card(name, 16*2**30, CONTEXT, True))
    job = plan("qwen2.5-7b").job
    assert job.dtype is dtype and job.fast == (dtype is torch.bfloat16)

@pytest.mark.parametrize("bad, says", [(dict(config="lama3-8b"), "Nearest: llama3-8b"), (dict(seq=0), "seq=0"), (dict(batch=1.5), "batch=1.5"), (dict(r=True), "r=True"), (dict(optimizer="adam"), "Nearest: adamw"), (dict(gpu="T40"), "Nearest: T4"), (dict(gpu=True), "No card"),
                                       (dict(targets="q_prj"), "Nearest: 'q_proj'"), (dict(quant={"*.down": None}), "No linear layer matches")])
def test_what_is_not_known(bad, says):
    with pytest.raises((ValueError, FileNotFoundError, KeyError), match=says): plan(**bad)

def test_remote_code_is_not_run(tmp_path):
    (tmp_path/"config.json").write_text('{"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config"}}')
    with pytest.raises(ValueError, match="trust_remote_code"): plan(tmp_path)

def test_cards():
    assert card("t4").total == CARDS["T4"]*2**20 and card(16).total == 16*2**30 and card("cpu").total > card("cpu").before > 2**27

def test_the_plan_is_near_the_measured_peak():
    bench = runpy.run_path(str(Path(__file__).parents[1]/"benchmarks/plan.py"))
    said, peak = bench["apart"](0)
    assert .9 < said/peak < 1.1, (said, peak)
