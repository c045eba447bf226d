"What memory counts, against allocations of known size."
import ctypes, sys, threading
import pytest, torch
from torch import nn
from lora_nb.quantize import own_pages
from lora_nb.memory import KINDS, gpu_memory, held, nbytes, peak_memory, process_memory
from lora_nb import memory

MiB = 2**20
def block(mib): return own_pages(mib*MiB, torch.uint8).fill_(1) # the C library's heap may have room for it already

@pytest.fixture(autouse=True)
def trimmed():
    "What earlier tests freed goes back to the system; a block that lands there would not be seen as growth."
    if sys.platform=="linux": ctypes.CDLL(None).malloc_trim(0)

def test_each_storage_counts_once():
    t = torch.ones(1000)
    assert nbytes([t, t, t[:10], t.view(10, 100), nn.Parameter(t)]) == 4000
    assert nbytes([t[:10]]) == 4000 # a slice keeps its whole storage alive
    assert nbytes([t, t.clone()]) == 8000
    assert nbytes([torch.empty(5, device="meta"), torch.empty(0), None]) == 0

def test_kinds_on_a_step():
    m = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 8))
    m[0].requires_grad_(False)
    m.register_buffer("table", torch.ones(100, dtype=torch.uint8))
    class Adapter:
        def parameters(self): return iter(m[1].parameters())
    opt = torch.optim.AdamW(m[1].parameters())
    m(torch.randn(3, 64)).sum().backward(); opt.step()
    h, n = held(m, Adapter(), opt), (32*8+8)*4
    assert tuple(h) == KINDS
    assert h["base weights"] == (64*32+32)*4 + 100
    assert h["adapter"] == h["gradients"] == n
    assert h["optimizer"] == 2*n + 2*4
    assert abs(sum(h.values()) - process_memory()["rss"]) < 16*MiB
    assert held(m)["base weights"] == (64*32+32)*4 + 100 + n and held(m)["adapter"] == 0

def test_tied_weights_once():
    m = nn.Module(); m.emb, m.head = nn.Embedding(100, 8), nn.Linear(8, 100, bias=False)
    m.head.weight = m.emb.weight
    assert held(m)["base weights"] == 3200

def test_4bit_layers_count_their_packed_bytes():
    from lora_nb.linear4bit import Linear4bit
    from lora_nb.quantize import NF4
    l = Linear4bit.from_linear(nn.Linear(128, 64), NF4(double=True))
    assert l.nbytes <= held(l)["base weights"] <= l.nbytes + 256 # storages may be padded to whole blocks of scales
    assert 128*64//2 < l.nbytes < 128*64//2 + 700

def test_held_wants_a_module():
    with pytest.raises(TypeError, match="needs a torch.nn.Module, and got str"): held("smollm2")

def test_peak_sees_what_is_gone_again():
    with peak_memory() as m: block(64)
    assert 62*MiB < m.growth < 80*MiB and m.after < m.peak - 50*MiB
    assert process_memory()["peak"] >= m.peak

def test_peaks_nest():
    with peak_memory() as outer:
        with peak_memory() as inner: block(80)
        with peak_memory() as second: block(8)
    assert inner.growth > 78*MiB and outer.growth > 78*MiB and second.growth < 40*MiB
    assert not memory._meters

def test_peak_by_sampling(monkeypatch):
    monkeypatch.setattr("builtins.open", lambda *a, _open=open, **k: (_ for _ in ()).throw(PermissionError()) if a[0]=="/proc/self/clear_refs" else _open(*a, **k))
    with peak_memory() as m:
        x = block(64)
        for _ in range(20): x.add_(1)
        del x
    assert m.how == "sampled" and 60*MiB < m.growth < 80*MiB
    assert not any("_watch" in t.name for t in threading.enumerate())

def test_peak_survives_an_error():
    with pytest.raises(KeyError):
        with peak_memory() as m: raise KeyError
    assert m.after and not memory._meters

def test_process_peak_is_not_lost_by_a_reset():
    block(96)
    high = process_memory()["peak"]
    with peak_memory(): pass
    assert process_memory()["peak"] >= high

@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu():
    assert gpu_memory() == []
    with pytest.raises(ValueError, match="no CUDA device"): peak_memory("cuda")

@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_with_a_gpu():
    x = torch.ones(64*MiB//4, device="cuda")
    row = gpu_memory()[0]
    assert row["allocated"] >= 64*MiB and row["reserved"] >= row["allocated"] and row["used"] >= row["reserved"]
    m = nn.Linear(1024, 1024).cuda()
    h = held(m)
    assert h["base weights"] == (1024*1024+1024)*4 and h["activations and rest"] >= 64*MiB
    with peak_memory("cuda") as p: torch.ones(32*MiB//4, device="cuda")
    assert 32*MiB <= p.growth < 40*MiB
