"""How a training step's time and memory grow with layers, width, sequence length and rank.

    python benchmarks/scale.py [--steps 3] [--threads N] [--clock process_time]
    python benchmarks/scale.py --billion [--tokens 512]

Random Llamas in NF4 with double quantisation, LoRA on all linear layers, every token labelled, AdamW; each point in a fresh process.
One number is doubled and doubled again while the others stay. The exponent is the slope of a straight line through the logarithms:
1 means that twice as much of it takes twice as long (or as many bytes). Memory is the most that a step holds beyond imports, sampled.

`--billion`: the 1.2-billion-parameter Llama 3.2 shape with random weights, a step at `tokens` tokens with checkpointing."""
import argparse, gc, math, multiprocessing, time, traceback
from qlora_step import Memory, cpu_name

START = dict(layers=4, width=256, tokens=256, rank=16)
CURVES = dict(layers=(4, 8, 16), width=(256, 512, 1024), tokens=(256, 512, 1024), rank=(8, 32, 128))
VOCAB = 4096

def random_4bit(config, dtype):
    "A Llama whose linear layers are in NF4, made one layer at a time, so that no more than one is ever dense."
    import torch
    from torch import nn
    from lora_nb.linear4bit import Linear4bit
    from lora_nb.models import empty_model, quantisable
    from lora_nb.quantize import NF4
    model = empty_model(config, dtype)
    torch.manual_seed(0)
    for path,l in quantisable(model).items():
        dense = nn.Linear(l.in_features, l.out_features, bias=False, dtype=torch.float32)
        with torch.no_grad(): dense.weight.normal_(0, .02)
        model.set_submodule(path, Linear4bit.from_linear(dense.to(dtype), NF4(double=True)))
    made = {}
    for m in model.modules():
        for n,p in list(m._parameters.items()):
            if p is None or not p.is_meta: continue
            if id(p) not in made: made[id(p)] = nn.Parameter(torch.ones(p.shape, dtype=dtype) if p.ndim==1 else torch.empty(p.shape, dtype=dtype).normal_(0, .02), requires_grad=False)
            m._parameters[n] = made[id(p)]
    return model

def llama(layers, width, vocab=VOCAB, **kwargs):
    from transformers import LlamaConfig
    return LlamaConfig(**{**dict(vocab_size=vocab, hidden_size=width, intermediate_size=4*width, num_hidden_layers=layers, num_attention_heads=width//64, num_key_value_heads=width//64, tie_word_embeddings=True), **kwargs})

def measure(config, tokens, rank, steps, threads, clock, light, dtype, pipe):
    "(seconds a step, bytes of a step, parameters, loss) of one point."
    try:
        import torch, transformers.models.llama.modeling_llama # noqa
        from lora_nb.adapter import add_lora
        from lora_nb.fast import fast_loss, why_general
        if threads: torch.set_num_threads(threads)
        dtype,now = getattr(torch, dtype),getattr(time, clock)
        gc.collect()
        memory = Memory(torch.cuda.is_available())
        model = random_4bit(config, dtype)
        size = sum(getattr(m, 'qweight').numel() for m in model.modules() if hasattr(m, 'qweight'))+sum(p.numel() for p in model.parameters())
        if torch.cuda.is_available(): model = model.cuda()
        adapter = add_lora(model, r=rank)
        if light: model.gradient_checkpointing_enable()
        model.train()
        assert why_general(model) is None, why_general(model)
        opt = torch.optim.AdamW(adapter.parameters(), lr=1e-4, fused=True)
        ids = torch.randint(0, config.vocab_size, (1, tokens), device=model.device)
        def step():
            loss = fast_loss(model, dict(input_ids=ids, labels=ids))
            loss.backward(); opt.step(); opt.zero_grad()
            return loss.item()
        held = memory.during(step)
        times = []
        for _ in range(steps): t = now(); loss = step(); times.append(now()-t)
        pipe.send((min(times), held, memory.peak(), size, loss))
    except BaseException: traceback.print_exc(); pipe.send(None)

def alone(*args):
    ctx = multiprocessing.get_context('spawn')
    mine,theirs = ctx.Pipe()
    p = ctx.Process(target=measure, args=(*args, theirs)); p.start(); theirs.close()
    found = mine.recv(); p.join()
    if found is None: raise SystemExit('A point failed; its error is above.')
    return found

def exponent(xs, ys):
    lx,ly = [math.log(x) for x in xs],[math.log(y) for y in ys]
    mx,my = sum(lx)/len(lx),sum(ly)/len(ly)
    return sum((a-mx)*(b-my) for a,b in zip(lx, ly))/sum((a-mx)**2 for a in lx)

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--steps', type=int, default=3)
    p.add_argument('--threads', type=int, help="torch's threads; default: torch's own choice")
    p.add_argument('--clock', default='perf_counter', choices=('perf_counter', 'process_time'))
    p.add_argument('--billion', action='store_true')
    p.add_argument('--tokens', type=int, default=512, help='for --billion')
    p.add_argument('--dtype', default='float32', choices=('float32', 'bfloat16'))
    a = p.parse_args()
    import torch
    print(f'torch {torch.__version__}; {torch.cuda.get_device_name() if torch.cuda.is_available() else cpu_name()}, {a.threads or torch.get_num_threads()} threads; {a.dtype}; {a.clock}')
    if a.billion:
        config = llama(16, 2048, 128256, intermediate_size=8192, num_attention_heads=32, num_key_value_heads=8, head_dim=64)
        t,held,peak,size,loss = alone(config, a.tokens, 16, 1, a.threads, a.clock, True, a.dtype)
        print(f'{size/1e9:.2f} billion parameters, {a.tokens} tokens, checkpointing: {t:.1f} s a step; a step holds {held/2**30:.2f} GB, the peak from making the model on is {peak/2**30:.2f} GB; loss {loss:.3f}')
        return
    for name,values in CURVES.items():
        rows = []
        for v in values:
            at = {**START, name: v}
            rows.append(alone(llama(at['layers'], at['width']), at['tokens'], at['rank'], a.steps, a.threads, a.clock, False, a.dtype))
            print(f'  {name}={v:<6} {rows[-1][0]*1e3:8.0f} ms a step  {rows[-1][1]/2**20:7.0f} MB', flush=True)
        print(f'{name:<8} time grows as {name}^{exponent(values, [r[0] for r in rows]):.2f}, memory as {name}^{exponent(values, [r[1] for r in rows]):.2f}', flush=True)

if __name__ == '__main__': main()
