"Byte parity with bitsandbytes on the CPU, in both directions, over random shapes, dtypes, blocksizes and scales; the edges; the errors."
import copy, json, sys
import bitsandbytes as bnb, bitsandbytes.functional as bnbF
import psutil, pytest, torch
from hypothesis import HealthCheck, given, settings, strategies as st
from lora_nb import quantize as Q
from lora_nb.codebook import Codebook, fit_codebook, fp4, gaussian_error, int4, nf4
from lora_nb.quantize import BLOCKSIZES, FP4, INT4, NF4, QuantConfig, QuantizedTensor, dynamic_map, own_pages, quantize

TYPES = {"nf4": NF4, "fp4": FP4}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

def theirs(w, kind, blocksize, double):
    "bitsandbytes' tensors by their key names, and its own reading of them."
    packed, state = bnbF.quantize_4bit(w.contiguous(), blocksize=blocksize, quant_type=kind, compress_statistics=double)
    keys = {"weight": packed, **{f"weight.{k}": v for k, v in state.as_dict(packed=True).items()}}
    state.shape, state.dtype = torch.Size([w.numel()]), torch.float32   # flat: its AVX-512 kernel misreads rows that end inside a block
    with torch.compiler.set_stance("force_eager"): back = bnbF.dequantize_4bit(packed, state)
    return keys, back.reshape(w.shape)

def same(mine, other):
    assert mine.keys() == other.keys()
    for k in mine: assert mine[k].dtype == other[k].dtype and torch.equal(mine[k], other[k]), k

@st.composite
def weights(draw):
    shape = draw(st.lists(st.integers(1, 40), min_size=1, max_size=3) | st.tuples(st.integers(1, 64), st.integers(1, 300)))
    dtype = draw(st.sampled_from(DTYPES))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    w = torch.randn(*shape, generator=g)
    if draw(st.booleans()): w = (w*8).round()/8                             # many ties and zeros
    if draw(st.booleans()): w = w * (torch.rand(*shape, generator=g) > .9)  # sparse: blocks of zeros
    w = w * 10.**draw(st.integers(-38, 4))
    if dtype == torch.float16: w = w.clamp(-65504, 65504)
    return w.to(dtype)

@settings(max_examples=200, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(weights(), st.sampled_from(["nf4", "fp4"]), st.sampled_from(BLOCKSIZES), st.booleans())
def test_bytes_are_bitsandbytes(w, kind, blocksize, double):
    q = quantize(w, TYPES[kind](blocksize, double))
    keys, back = theirs(w, kind, blocksize, double)
    same(q.state_dict("weight"), keys)
    assert torch.equal(q.dequantize(torch.float32), back)

@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", TYPES)
def test_large(kind, dtype, double):
    "Many chunks, and enough scales for several nested blocks."
    w = torch.randn(769, 1030, generator=torch.Generator().manual_seed(1)).to(dtype)
    q, (keys, back) = quantize(w, TYPES[kind](64, double)), theirs(w, kind, 64, double)
    same(q.state_dict("weight"), keys)
    assert torch.equal(q.dequantize(torch.float32), back)
    for d in DTYPES: assert torch.equal(q.dequantize(d), back.to(d))
    assert torch.equal(q.dequantize(torch.float64), back.double())

def test_ranks_are_exact():
    "The table against bisection: every border, its neighbours, and a million floats."
    for book in (nf4, fp4, int4, fit_codebook(torch.randn(4096, generator=torch.Generator().manual_seed(0)))):
        mid = book.bounds()[0].clamp(-1, 1)
        x = [mid, torch.tensor([0., -0., 1e-45, -1e-45, 1e-38, 1.0000001, -1.0000001]), torch.linspace(-1, 1, 1000003)]
        for away in (2., -2.): x += [(mid := torch.nextafter(mid, torch.tensor(away))) for _ in range(3)]
        x = torch.cat(x)
        assert Q._bins(book, "cpu") is not None and torch.equal(Q._ranks(x, book).long(), torch.bucketize(x, book.bounds()[0]))

def test_levels_too_close_for_a_table():
    close = Codebook("close", (*torch.linspace(-1, 1, 12).tolist(), .5, .5001, .5002, .5003))
    assert Q._bins(close, "cpu") is None
    w = torch.randn(8, 64)
    q = quantize(w, QuantConfig(close))
    s = w.abs().amax(1, keepdim=True)
    assert torch.equal(q.codes.long(), close.nearest(w*(1/s)))

def test_reference_and_kernel_agree():
    w = torch.randn(200, 331)
    for cfg in (NF4(128), FP4(128, True)):
        q = quantize(w, cfg)
        for d in DTYPES:
            ref = Q._dequantize_torch(q.packed.flatten(), q.scales, q.codebook, 128, torch.empty(w.numel(), dtype=d))
            assert torch.equal(q.dequantize(d).flatten(), ref)

def test_the_bnb_backend_on_the_cpu():
    "What runs on CUDA, through the same operator."
    w = torch.randn(64, 64)
    for book in (nf4, fp4):
        for mine, other in zip(Q._quantize_torch(w.flatten(), book, 64), Q._quantize_bnb(w.flatten(), book, 64)): assert torch.equal(mine, other)

def test_dynamic_map(): assert torch.equal(dynamic_map(), bnbF.create_dynamic_map())

def test_scale_codes():
    "The 8-bit type on its own, over many values, zeros and subnormal blocks."
    g = torch.Generator().manual_seed(0)
    for scales in (torch.rand(600_000, generator=g), torch.rand(1000, generator=g)*1e-38, torch.ones(700), torch.tensor([3.]), torch.randn(5000, generator=g).exp()):
        offset = scales.mean()
        codes, state = bnbF.quantize_blockwise(scales - offset, blocksize=256)
        mine, absmax, mean = Q._quantize_scales(scales)
        assert torch.equal(mine, codes) and torch.equal(absmax, state.absmax) and mean == offset
        assert torch.equal(Q._dequantize_scales(mine, absmax, mean), bnbF.dequantize_blockwise(codes, state) + offset)

def test_scale_cells_at_every_border():
    "The places where the 8-bit code changes, 40 floats to each side, against bitsandbytes, whose processor may fuse what we round twice."
    cells = Q._scale_cells("cpu").long()
    edge = (cells.diff() != 0).nonzero().flatten() + 1
    v = [near := ((edge.double()-.5)/65535*2 - 1).float()]
    for away in (2., -2.):
        w = near
        for _ in range(40): v.append(w := torch.nextafter(w, torch.tensor(away)))
    v = torch.cat(v)
    x = torch.zeros(-(-len(v)//255), 256); x[:,0] = 1; x[:,1:] = torch.nn.functional.pad(v, (0, -len(v) % 255)).view(-1, 255)
    codes = bnbF.quantize_blockwise(x.flatten(), blocksize=256)[0].view(-1, 256)[:,1:].flatten()[:len(v)]
    assert torch.equal(cells[((v+1)*.5*65535 + .5).int()], codes.long()) and codes.unique().numel() == len(edge) + 1 == 249

@pytest.mark.parametrize("config", [NF4(), FP4(32), INT4(128), NF4(64, True), INT4(64, True)], ids=lambda c: f"{c.codebook.name}-{c.blocksize}-{c.double}")
@pytest.mark.parametrize("shape", [(0,), (0, 8), (), (1,), (5,), (7, 13), (3, 5, 7), (1, 4097)])
def test_shapes(shape, config):
    w = torch.randn(shape)
    q = quantize(w, config)
    assert q.shape == w.shape and q.dequantize().shape == w.shape and q.packed.dtype == torch.uint8 and q.packed.shape == ((w.numel()+1)//2, 1)
    assert q.codes.shape == w.shape
    back = QuantizedTensor.from_state_dict(q.state_dict("a.weight"), "a.weight")
    assert torch.equal(back.dequantize(), q.dequantize()) and back.config == q.config
    assert (q.dequantize() - w).abs().max().item() <= w.abs().max().item()*.35 if w.numel() else True

def test_zero_blocks_stay_zero():
    w = torch.zeros(3, 100); w[2, 10:20] = 1
    for config in (NF4(), FP4(), INT4(), NF4(4096)):
        back = quantize(w, config).dequantize()
        assert torch.equal(back, w)
    for config in (NF4(double=True), INT4(double=True)): assert torch.isfinite(quantize(w, config).dequantize()).all()
    assert quantize(torch.zeros(4, 64), NF4(double=True)).dequantize().abs().max() == 0

@pytest.mark.parametrize("value, dtype", [(1e-38, torch.float32), (1e-38, torch.bfloat16), (6e-8, torch.float16), (65504., torch.float16), (65504., torch.float32), (3e38, torch.float32)])
@pytest.mark.parametrize("kind", TYPES)
def test_extremes(kind, value, dtype):
    w = (torch.linspace(-1, 1, 2*64+10)*value).to(dtype)
    q, (keys, back) = quantize(w, TYPES[kind]()), theirs(w, kind, 64, False)
    same(q.state_dict("weight"), keys)
    assert torch.isfinite(q.dequantize()).all() and torch.equal(q.dequantize(torch.float32), back)

def test_strides_do_not_matter():
    w = torch.randn(96, 130)
    for view in (w.t(), w[::2, 1:], w.expand(2, 96, 130), w.flip(0)):
        a, b = quantize(view, NF4(double=True)), quantize(view.contiguous(), NF4(double=True))
        same(a.state_dict(), b.state_dict())
    assert quantize(torch.nn.Parameter(w)).dequantize().requires_grad is False

@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("book", [nf4, fp4], ids=lambda b: b.name)
def test_every_dtype_has_its_kernel(book, dtype):
    "Without one, a 4-bit layer takes thirty times as long to read; what AVX512 flushes to zero in bf16 is no reason to refuse it."
    from bitsandbytes.cextension import lib
    assert (Q._kernel(book, dtype) is not None) == hasattr(lib, f"cdequantize_blockwise_cpu_{book.name}_{Q._TYPES[dtype]}")

@pytest.mark.parametrize("where", [(0, 0), (5, 77), (9, 99)])
@pytest.mark.parametrize("value, words", [(float("nan"), "1 NaN and 0 infinite"), (float("-inf"), "0 NaN and 1 infinite")])
def test_not_finite(where, value, words):
    w = torch.randn(10, 100); w[where] = value
    for config in (NF4(), INT4(4096), FP4(64, True)):
        with pytest.raises(ValueError, match=rf"model\.layers\.3\.q_proj\.weight \(10, 100\): {words} of 1000"): quantize(w, config, name="model.layers.3.q_proj.weight")
    big = torch.zeros(600, 600); big[500] = value
    with pytest.raises(ValueError, match="600"): quantize(big)

@pytest.mark.parametrize("call, kind, says", [
    (lambda: quantize(torch.ones(3, dtype=torch.int64)), TypeError, "int64"), (lambda: quantize(torch.ones(3, dtype=torch.float64)), TypeError, "float64"),
    (lambda: quantize([1.]), TypeError, "list"), (lambda: quantize(torch.ones(3), "nf4"), TypeError, "NF4"), (lambda: NF4(48), ValueError, "48"),
    (lambda: quantize(torch.ones(3, device="meta")), ValueError, "meta"), (lambda: QuantConfig("nf4"), TypeError, "Codebook"),
    (lambda: quantize(torch.ones(3)).error(torch.ones(4)), ValueError, "shape"), (lambda: quantize(torch.ones(3)).dequantize(out=torch.empty(4)), ValueError, "expected")])
def test_errors(call, kind, says):
    with pytest.raises(kind, match=says): call()

def test_bits_per_param():
    w = torch.randn(1024, 1024)
    assert quantize(w).bits_per_param == 4.5 == NF4().bits_per_param
    q = quantize(w, NF4(double=True))
    assert round(q.bits_per_param, 3) == 4.127 == round(NF4(double=True).bits_per_param, 3)
    assert q.nbytes == w.numel()//2 + w.numel()//64 + 4*w.numel()//64//256 + 4
    assert NF4(32).bits_per_param == 5 and NF4(4096).bits_per_param == 4 + 1/128

@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("blocksize", [64, 256])
def test_through_params4bit(kind, double, blocksize):
    "Ours to bitsandbytes' parameter and back, with what it writes itself."
    w = torch.randn(48, 80).bfloat16()
    q = quantize(w, TYPES[kind](blocksize, double))
    sd = q.state_dict("weight")
    param = bnb.nn.Params4bit.from_prequantized(sd["weight"], {k.removeprefix("weight."): v for k, v in sd.items() if k != "weight"}, device="cpu")
    assert torch.equal(bnbF.dequantize_4bit(param.data, param.quant_state), q.dequantize()) and param.quant_type == kind and param.compress_statistics == double
    again = {"weight": param.data, **{f"weight.{k}": v for k, v in param.quant_state.as_dict(packed=True).items()}}
    same(sd, again)
    back = QuantizedTensor.from_state_dict(again)
    assert back.config == q.config and back.shape == w.shape and back.dtype == w.dtype and torch.equal(back.dequantize(), q.dequantize())

def test_other_storage_dtype():
    "Codes that a checkpoint keeps in bfloat16 elements (bnb_4bit_quant_storage)."
    w = torch.randn(16, 64)
    packed, state = bnbF.quantize_4bit(w, quant_type="nf4", quant_storage=torch.bfloat16)
    q = QuantizedTensor.from_state_dict({"weight": packed, **{f"weight.{k}": v for k, v in state.as_dict(packed=True).items()}})
    assert torch.equal(q.packed, quantize(w).packed)

def test_another_8_bit_map():
    "bitsandbytes before 0.49 wrote -1 as the lowest of the 256 levels on a CPU; what a checkpoint says is used."
    sd = quantize(torch.randn(64, 512), NF4(double=True)).state_dict()
    sd["weight.nested_quant_map"] = sd["weight.nested_quant_map"].clone(); sd["weight.nested_quant_map"][0] = -1
    sd["weight.absmax"] = torch.zeros_like(sd["weight.absmax"])
    q = QuantizedTensor.from_state_dict(sd)
    state = bnbF.QuantState.from_dict({k.removeprefix("weight."): v for k, v in sd.items() if k != "weight"}, device="cpu")
    assert torch.equal(q.dequantize(), bnbF.dequantize_4bit(sd["weight"], state))
    assert torch.equal(q.state_dict()["weight.nested_quant_map"], sd["weight.nested_quant_map"])

@pytest.mark.parametrize("break_it, says", [
    (lambda sd: sd.pop("weight"), "no such key"), (lambda sd: sd.pop("weight.absmax"), "'absmax' is missing"), (lambda sd: sd.pop("weight.quant_state.bitsandbytes__nf4"), "expected 4-bit codes"),
    (lambda sd: sd.update({"weight": sd["weight"][:-3]}), "codes: 1021 .* expected 1024"), (lambda sd: sd.update({"weight.absmax": sd["weight.absmax"][:5]}), "scales: 5 of"),
    (lambda sd: sd.update({"weight.quant_state.bitsandbytes__nf4": torch.tensor([1, 2], dtype=torch.uint8)}), "not a 4-bit checkpoint"),
    (lambda sd: sd.pop("weight.nested_quant_map"), "'nested_quant_map' is missing"), (lambda sd: sd.update({"weight.quant_map": torch.ones(3)}), "expected 16")])
def test_broken_checkpoints(break_it, says):
    sd = quantize(torch.randn(32, 64), NF4(double=True)).state_dict()
    break_it(sd)
    with pytest.raises(ValueError, match=says): QuantizedTensor.from_state_dict(sd)

def test_own_types_are_not_called_bitsandbytes():
    w = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    fitted = quantize(w, QuantConfig(fit_codebook(w)))
    for q, key in ((quantize(w, INT4()), "weight.quant_state.lora_nb__int4"), (fitted, "weight.quant_state.lora_nb__lloyd")):
        assert key in q.state_dict() and QuantizedTensor.from_state_dict(q.state_dict()).config == q.config
    assert fitted.error(w) < quantize(w).error(w)
    with pytest.raises(ValueError): bnbF.QuantState.from_dict({k.removeprefix("weight."): v for k, v in fitted.state_dict().items() if k != "weight"}, device="cpu")

def test_gaussian_error_of_the_bytes():
    "What comes back from the codes errs by the integral over the levels, within 1 %."
    w = torch.randn(2048, 2048, generator=torch.Generator().manual_seed(0))
    for config in (NF4(), FP4(), INT4(), NF4(256)):
        mse = (quantize(w, config).dequantize() - w).pow(2).mean().item()
        assert abs(mse/gaussian_error(config.codebook, config.blocksize) - 1) < .01

def test_to_and_repr():
    q = quantize(torch.randn(4, 64), NF4(double=True))
    assert q.to("cpu") is q and "4.1" not in repr(q) or "nf4" in repr(q)
    m = q.to("meta")
    assert m.packed.is_meta and m.absmax.is_meta and m.nested_absmax.is_meta and m.offset.is_meta and m.config == q.config

def test_out_is_written_and_nothing_else():
    w = torch.randn(10, 70)
    q, out = quantize(w), torch.full((12, 70), 7.)
    assert q.dequantize(out=out[1:11]).data_ptr() == out[1:11].data_ptr()
    assert torch.equal(out[1:11], q.dequantize()) and (out[[0, 11]] == 7).all()

def test_concurrent_calls():
    from concurrent.futures import ThreadPoolExecutor
    ws = [torch.randn(300, 500, generator=torch.Generator().manual_seed(i)) for i in range(6)]
    with ThreadPoolExecutor(4) as pool: together = list(pool.map(lambda w: quantize(w, NF4(double=True)), ws))
    for w, q in zip(ws, together): same(q.state_dict(), quantize(w, NF4(double=True)).state_dict())

@pytest.mark.parametrize("threads", [1, 3])
def test_many_pieces_give_the_same_bytes_with_any_number_of_threads(threads):
    w, n = torch.randn(2000, 700, generator=torch.Generator().manual_seed(0)), torch.get_num_threads()
    want = quantize(w, INT4(double=True))
    torch.set_num_threads(threads)
    try:
        same(quantize(w, INT4(double=True)).state_dict(), want.state_dict())
        q = quantize(w, INT4())
        assert torch.equal(q.dequantize(), (int4.table()[q.codes.long()].view(-1, 64)*q.scales[:,None]).view(w.shape))
        with torch.inference_mode(): inside = quantize(w, NF4(double=True)); back = inside.dequantize()
    finally: torch.set_num_threads(n)
    assert back.is_inference() and torch.equal(back, quantize(w, NF4(double=True)).dequantize())


# Where tensors lie

@pytest.mark.parametrize('shape, dtype', [((), torch.float32), ((0, 7), torch.bfloat16), (5, torch.uint8), (2**17, torch.uint8), ((300, 1001), torch.float16), ((513, 512), torch.float32)])
def test_own_pages_are_a_tensor_like_any(shape, dtype):
    t, u = own_pages(shape, dtype).fill_(1), own_pages(shape, dtype).fill_(2)
    assert t.shape == torch.empty(shape).shape and t.dtype == dtype and t.is_contiguous() and (t == 1).all() and (u == 2).all()
    assert torch.equal(t.clone(), t) and torch.equal(copy.deepcopy(t), t)


@pytest.mark.skipif(sys.platform != 'linux', reason='pages of their own are for Linux')
def test_what_stays_leaves_no_holes():
    "Large tensors that go, each followed by a smaller one that stays: the process grows by those that stay."
    rss, stay = lambda: psutil.Process().memory_info().rss, []
    for i in range(3): own_pages(2**22, torch.float32).fill_(i)
    before = rss()
    for i in range(100):
        own_pages(2**20+2**14*i, torch.float32).fill_(i)       # 4 MB and more, gone at once
        stay.append(own_pages(2**20, torch.uint8).fill_(i))    # 1 MB
    assert rss()-before < 1.1*100*2**20
    del stay
    assert rss()-before < 2**23
