"""Quantise, dequantise, forward and backward: this package beside bitsandbytes (and torchao's NF4 where it imports).

    python benchmarks/quantize.py [--size 4096] [--rounds 7] [--threads N]

One process. In each round the peers take turns on the same tensors, so that a slow moment of the machine meets all of them;
a ratio is peer's time over ours within one round, and min, median and max are over the rounds. Above 1 means that we are faster."""
import argparse, importlib, statistics, time
import bitsandbytes as bnb, bitsandbytes.functional as bnbF
import torch
from torch import nn
from lora_nb.linear4bit import Linear4bit
from lora_nb.quantize import FP4, NF4, quantize

def torchao_nf4():
    "to_nf4 and linear_nf4, wherever this version of torchao keeps them, or (None, None)."
    for place in ("torchao.quantization.quantize_.workflows.nf4.nf4_tensor", "torchao.dtypes.nf4tensor"):
        try: m = importlib.import_module(place)
        except ImportError: continue
        return m.to_nf4, m.linear_nf4
    return None, None

to_nf4, linear_nf4 = torchao_nf4()

def seconds(fn):
    t = time.perf_counter(); fn()
    if torch.cuda.is_available(): torch.cuda.synchronize()
    return time.perf_counter() - t

def compare(title, rounds, **fns):
    "Times the functions in turn; the first is ours, the others are its peers."
    for fn in fns.values(): fn()
    times = {name: [] for name in fns}
    for r in range(rounds):
        for name in (list(fns), list(fns)[::-1])[r % 2]: times[name].append(seconds(fns[name]))
    ours, *peers = fns
    ms = "  ".join(f"{n} {1e3*statistics.median(t):.1f} ms" for n, t in times.items())
    for p in peers:
        ratio = sorted(b/a for a, b in zip(times[ours], times[p]))
        print(f"{title:<44} {p}/ours  min {ratio[0]:.2f}  median {statistics.median(ratio):.2f}  max {ratio[-1]:.2f}   ({ms})", flush=True)

def bnb_layer(linear, device):
    "bitsandbytes' layer of the same weight, NF4 with double quantisation, computing in its input's dtype."
    layer = bnb.nn.Linear4bit(linear.in_features, linear.out_features, bias=False, quant_type="nf4", compress_statistics=True)
    layer.weight = bnb.nn.Params4bit(linear.weight.data.clone(), requires_grad=False, quant_type="nf4", compress_statistics=True)
    return layer.to(device).train()

def main(size, rounds, device):
    torch.manual_seed(0)
    w = torch.randn(size, size, device=device)
    for dtype in (torch.bfloat16, torch.float32):
        x, name = w.to(dtype), str(dtype).removeprefix("torch.")
        fns = dict(ours=lambda: quantize(x, NF4()), bitsandbytes=lambda: bnbF.quantize_4bit(x, quant_type="nf4"))
        compare(f"quantise NF4, {size}×{size} {name}", rounds, **fns)
        fns = dict(ours=lambda: quantize(x, NF4(double=True)), bitsandbytes=lambda: bnbF.quantize_4bit(x, quant_type="nf4", compress_statistics=True))
        if to_nf4: fns["torchao"] = lambda: to_nf4(x, 64, 256)
        compare(f"quantise NF4 double, {size}×{size} {name}", rounds, **fns)
    x = w.bfloat16()
    compare(f"quantise FP4, {size}×{size} bfloat16", rounds, ours=lambda: quantize(x, FP4()), bitsandbytes=lambda: bnbF.quantize_4bit(x, quant_type="fp4"))

    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for double in (False, True):
            x = w.to(dtype)
            q, (packed, state) = quantize(x, NF4(double=double)), bnbF.quantize_4bit(x, quant_type="nf4", compress_statistics=double)
            fns = dict(ours=lambda: q.dequantize(), bitsandbytes=lambda: bnbF.dequantize_4bit(packed, state))
            if to_nf4 and double: ao = to_nf4(x, 64, 256); fns["torchao"] = lambda: ao.get_original_weight()
            compare(f"dequantise{' double' if double else ''}, new {str(dtype).removeprefix('torch.')} result", rounds, **fns)
    q, (packed, state), out = quantize(w), bnbF.quantize_4bit(w, quant_type="nf4"), torch.empty_like(w)
    compare("dequantise float32 into a buffer of ours", rounds, ours=lambda: q.dequantize(out=out), bitsandbytes=lambda: bnbF.dequantize_4bit(packed, state))

    linear = nn.Linear(size//2, size//2, bias=False, device=device)
    ours, theirs = Linear4bit.from_linear(linear, NF4(double=True)), bnb_layer(linear, device)
    if to_nf4: weight = to_nf4(linear.weight.data, 64, 256)
    for tokens in (1, 32, 1024):
        x = torch.randn(tokens, size//2, device=device, requires_grad=True)
        run = lambda layer: torch.autograd.grad(layer(x).sum(), x)
        assert torch.allclose(run(ours)[0], run(theirs)[0], rtol=1e-4, atol=1e-4) and torch.allclose(ours(x), theirs(x), rtol=1e-4, atol=1e-4)
        fns = dict(ours=lambda: run(ours), bitsandbytes=lambda: run(theirs))
        if to_nf4: fns["torchao"] = lambda: run(lambda x: linear_nf4(x, weight))
        compare(f"forward+backward, {tokens} tokens, {size//2}×{size//2} fp32", rounds, **fns)

if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--size", type=int, default=4096, help="rows and columns of the matrix; the layer has half")
    p.add_argument("--rounds", type=int, default=7)
    p.add_argument("--threads", type=int, help="torch's threads; default: torch's own choice")
    a = p.parse_args()
    if a.threads: torch.set_num_threads(a.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(f"torch {torch.__version__}, bitsandbytes {bnb.__version__}, {'torchao NF4' if to_nf4 else 'no torchao'}, {device}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}")
    main(a.size, a.rounds, device)
