"Linear4bit against autograd over the dequantised weight, and against bitsandbytes and transformers through files."
import copy, threading
import pytest, torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.functional import linear
from lora_nb.linear4bit import Linear4bit, free_scratch
from lora_nb.quantize import FP4, INT4, NF4, QuantizedTensor, quantize

@pytest.fixture
def layer(): return Linear4bit.from_linear(nn.Linear(70, 33), NF4(double=True))

@pytest.mark.parametrize("config", [NF4(), FP4(32), INT4(), NF4(64, True)], ids=lambda c: f"{c.codebook.name}-{c.double}")
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(3, 12), (2, 1, 12), (12,)])
def test_gradcheck(config, bias, shape):
    layer = Linear4bit.from_linear(nn.Linear(12, 7, bias=bias), config)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(layer, x)
    want = linear(x, layer.dequantize(torch.float64), None if layer.bias is None else layer.bias.double())
    g = torch.randn_like(want)
    assert torch.allclose(layer(x), want)
    assert torch.allclose(*(torch.autograd.grad(y, x, g)[0] for y in (layer(x), want)))

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(4, 70), (2, 3, 5, 70), (1, 70), (0, 70), (70,)])
def test_is_linear_on_the_dequantised_weight(layer, dtype, shape):
    x, want = torch.randn(shape).to(dtype).requires_grad_(), None
    y = layer(x)
    want = linear(x, layer.dequantize(dtype), layer.bias.to(dtype))
    assert y.dtype == dtype and torch.equal(y, want)
    if x.numel():
        g = torch.randn_like(want)
        assert torch.equal(*(torch.autograd.grad(o, x, g)[0] for o in (y, want)))

def test_nothing_is_trained_unless_asked(layer):
    assert not any(p.requires_grad for p in layer.parameters())
    assert not layer(torch.randn(2, 70)).requires_grad
    layer.bias.requires_grad_()
    layer(torch.randn(3, 70)).sum().backward()
    assert torch.equal(layer.bias.grad, torch.full((33,), 3.))

def test_saves_no_weight():
    layer = Linear4bit.from_linear(nn.Linear(256, 512), NF4())
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t): layer(torch.randn(4, 256, requires_grad=True))
    assert sum(saved) == 0

def test_scratch_is_safe(layer):
    "Layers of different sizes and dtypes in turn, in threads, and after inference_mode."
    other = Linear4bit.from_linear(nn.Linear(70, 200), FP4())
    free_scratch()
    x = torch.randn(4, 70)
    with torch.inference_mode(): layer(x)
    assert torch.equal(layer(x.requires_grad_()), linear(x, layer.dequantize(), layer.bias))
    layer(x).sum().backward()
    want, bad = [linear(x, l.dequantize(), l.bias).detach() for l in (layer, other)], []
    def work():
        for _ in range(50):
            for l, w in zip((layer, other), want):
                if not torch.equal(l(x), w): bad.append(l)
    threads = [threading.Thread(target=work) for _ in range(4)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert not bad

def test_casting_leaves_the_codes_and_scales(layer):
    want = layer.dequantize(torch.float32)
    for cast in (lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.double(), lambda m: m.to("cpu", torch.float16)):
        cast(layer)
        assert layer.weight.dtype == torch.uint8 and layer.nested_absmax.dtype == layer.offset.dtype == torch.float32
        assert torch.equal(layer.dequantize(torch.float32), want)
    assert layer.bias.dtype == torch.float16
    plain = Linear4bit.from_linear(nn.Linear(64, 8), NF4()).bfloat16()
    assert plain.absmax.dtype == torch.float32

def test_autocast(layer):
    with torch.autocast("cpu", torch.bfloat16): assert layer(torch.randn(2, 70)).dtype == torch.bfloat16

def test_moves_and_copies(layer):
    x = torch.randn(3, 70)
    twin = copy.deepcopy(layer)
    assert torch.equal(twin(x), layer(x)) and twin.weight.data_ptr() != layer.weight.data_ptr()
    meta = copy.deepcopy(layer).to("meta")
    assert meta.qweight.packed.is_meta and meta.nested_absmax.is_meta

def test_memory(layer):
    held = sum(t.numel()*t.element_size() for t in [*layer.parameters(), *layer.buffers()])
    assert layer.nbytes == held == layer.qweight.nbytes + 33*4

def test_state_dict_round_trip(layer):
    other = Linear4bit.from_linear(nn.Linear(70, 33), FP4(32))
    assert set(layer.state_dict()) == {"bias", "weight", "weight.absmax", "weight.quant_map", "weight.nested_absmax", "weight.nested_quant_map", "weight.quant_state.bitsandbytes__nf4"}
    other.load_state_dict(layer.state_dict())
    x = torch.randn(3, 70)
    assert torch.equal(other(x), layer(x)) and other.config == layer.config
    model = nn.Sequential(layer, nn.ReLU(), Linear4bit.from_linear(nn.Linear(33, 4, bias=False)))
    fresh = nn.Sequential(other, nn.ReLU(), Linear4bit.from_linear(nn.Linear(33, 4, bias=False)))
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(x), model(x))

def test_a_bad_state_dict_changes_nothing(layer):
    before = {k: t.clone() for k, t in layer.state_dict().items()}
    good = Linear4bit.from_linear(nn.Linear(70, 33), NF4()).state_dict()
    cases = {"no such key|Missing": {}, "expected 4-bit codes": {"weight": torch.randn(33, 70), "bias": torch.ones(33)}, "shape": Linear4bit.from_linear(nn.Linear(64, 33)).state_dict(),
             "bias: shape": {**good, "bias": torch.ones(5)}, "Missing": {k: v for k, v in good.items() if k != "bias"}}
    for says, sd in cases.items():
        with pytest.raises(RuntimeError, match=says): layer.load_state_dict(sd)
        assert all(torch.equal(t, before[k]) for k, t in layer.state_dict().items())
    with pytest.raises(RuntimeError, match="Unexpected.*extra"): layer.load_state_dict({**good, "extra": torch.ones(1)})

@pytest.mark.parametrize("call, kind, says", [
    (lambda: Linear4bit(torch.ones(3, 3)), TypeError, "QuantizedTensor"), (lambda: Linear4bit(quantize(torch.ones(3))), ValueError, "two dimensions"),
    (lambda: Linear4bit(quantize(torch.ones(3, 4)), torch.ones(4)), ValueError, r"expected \(3,\)"),
    (lambda: Linear4bit(quantize(torch.ones(3, 4)))(torch.ones(2, 5)), ValueError, r"expected \(…, 4\)")])
def test_errors(call, kind, says):
    with pytest.raises(kind, match=says): call()

def test_a_bad_weight_is_named():
    lin = nn.Linear(8, 8); lin.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"layers\.0\.q\.weight"): Linear4bit.from_linear(lin, name="layers.0.q")

# transformers, through files

def tiny_llama(**kw):
    from transformers import LlamaConfig, LlamaForCausalLM
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=96, max_position_embeddings=64, **kw)).eval()

def linears(model): return {n: m for n, m in model.named_modules() if type(m) is nn.Linear and n != "lm_head"}

def bnb_config(kind, double):
    from transformers import BitsAndBytesConfig
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=double, bnb_4bit_compute_dtype=torch.float32)

def logits(model):
    with torch.no_grad(): return model(input_ids=torch.arange(24).view(2, 12)).logits

def with_bias(dtype):
    "A tiny Llama whose linear layers have biases that are not zero."
    model = tiny_llama(attention_bias=True, mlp_bias=True).to(dtype)
    g = torch.Generator().manual_seed(0)
    for n, p in model.named_parameters():
        if n.endswith("bias"): p.data.copy_(torch.randn(p.shape, generator=g)*.1)
    return model

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_biases_and_dtypes_go_both_ways(tmp_path, dtype):
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig
    full, near = with_bias(dtype), 1e-6 if dtype == torch.float32 else 2e-2
    full.save_pretrained(tmp_path/"full")
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path/"full", quantization_config=config, dtype=dtype)
    theirs.save_pretrained(tmp_path/"theirs")
    sd, ours = load_file(tmp_path/"theirs"/"model.safetensors"), with_bias(dtype)
    for name, lin in linears(ours).items(): ours.set_submodule(name, Linear4bit(QuantizedTensor.from_state_dict(sd, f"{name}.weight"), torch.zeros_like(lin.bias)))
    assert not ours.load_state_dict(sd, strict=False).unexpected_keys
    assert torch.equal(ours.model.layers[1].mlp.up_proj.bias, full.model.layers[1].mlp.up_proj.bias) and torch.allclose(logits(ours), logits(theirs), atol=near)
    ours.config.quantization_config = config.to_dict()
    ours.config.save_pretrained(tmp_path/"ours")
    mine = {k: v.contiguous() for k, v in ours.state_dict().items()}
    assert mine.keys() == sd.keys() and all(torch.equal(mine[k], sd[k]) for k in sd if "quant_state" not in k)
    save_file(mine, tmp_path/"ours"/"model.safetensors", metadata={"format": "pt"})
    again = AutoModelForCausalLM.from_pretrained(tmp_path/"ours", dtype=dtype)
    assert again.model.layers[0].mlp.up_proj.weight.quant_state.dtype == dtype and torch.equal(logits(again), logits(theirs))

@pytest.mark.parametrize("kind, double", [("nf4", True), ("nf4", False), ("fp4", True)])
def test_a_checkpoint_of_transformers_loads_here(tmp_path, kind, double):
    from transformers import AutoModelForCausalLM
    tiny_llama().save_pretrained(tmp_path/"full")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path/"full", quantization_config=bnb_config(kind, double), dtype=torch.float32)
    theirs.save_pretrained(tmp_path/"four")
    sd = load_file(tmp_path/"four"/"model.safetensors")
    ours = tiny_llama()
    for name in linears(ours): ours.set_submodule(name, Linear4bit(QuantizedTensor.from_state_dict(sd, f"{name}.weight")))
    result = ours.load_state_dict(sd, strict=False)
    assert not result.unexpected_keys and set(result.missing_keys) <= {"lm_head.weight"}
    assert torch.allclose(logits(ours), logits(theirs), atol=1e-6)

@pytest.mark.parametrize("config, kind", [(NF4(double=True), "nf4"), (NF4(128), "nf4"), (FP4(), "fp4")])
def test_a_checkpoint_of_ours_loads_in_transformers(tmp_path, config, kind):
    from transformers import AutoModelForCausalLM
    ours = tiny_llama()
    for name, lin in linears(ours).items(): ours.set_submodule(name, Linear4bit.from_linear(lin, config, name))
    ours.config.quantization_config = bnb_config(kind, config.double).to_dict()
    ours.config.save_pretrained(tmp_path)
    save_file({k: v.contiguous() for k, v in ours.state_dict().items()}, tmp_path/"model.safetensors", metadata={"format": "pt"})
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    import bitsandbytes as bnb
    assert isinstance(theirs.model.layers[0].mlp.up_proj, bnb.nn.Linear4bit)
    for name, m in ours.named_modules():
        if isinstance(m, Linear4bit): assert torch.equal(theirs.get_submodule(name).weight.data, m.weight)
    assert torch.allclose(logits(theirs), logits(ours), atol=1e-6)
