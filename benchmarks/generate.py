"""Generation with an adapter on a 4-bit base: this package beside peft + bitsandbytes.

    python benchmarks/generate.py [--tokens 48] [--rounds 5] [--dtype float32] [--threads N] [--clock process_time]

SmolLM2-135M, NF4 with double quantisation, r=16 on all linear layers, one question, greedy, `tokens` new tokens; the adapter beside
its base ("unmerged") and merged into 4 bits. Each side lives in a process of its own; they take turns within a round. Ratios are
tokens/s of ours over theirs, min, median and max over the rounds: above 1 means that we are faster."""
import argparse, gc, multiprocessing, statistics, tempfile, time, traceback
from contextlib import nullcontext
from pathlib import Path
from qlora_step import cpu_name, dense_folder, line, peft_model, start_A

QUESTION = 'What does a LoRA adapter add to a frozen layer?'

def start_B(path, B):
    import torch, zlib
    g = torch.Generator().manual_seed(zlib.crc32(path.encode())+1)
    with torch.no_grad(): B.copy_(torch.randn(B.shape, generator=g)*.01)

def ours(dtype, device, folder):
    from lora_nb.adapter import add_lora
    from lora_nb.merge import merge_in_place
    from lora_nb.models import load_model
    from lora_nb.quantize import NF4
    model,tok = load_model('smollm2', quant=NF4(double=True), dtype=dtype, device=device)
    adapter = add_lora(model, r=16, alpha=32, targets='all-linear')
    for path,l in adapter.layers.items(): start_A(path, l.A['default']); start_B(path, l.B['default'])
    def merge():
        merge_in_place(model, dtype='4bit')
        return model
    return model,tok,merge

def peft(dtype, device, folder):
    from transformers import AutoTokenizer
    model = peft_model('all', dtype, device, folder).eval()
    for name,p in model.named_parameters():
        if '.lora_B.' in name: start_B(name.removeprefix('base_model.model.').split('.lora_B.')[0], p)
    return model,AutoTokenizer.from_pretrained(folder),model.merge_and_unload

def work(side, dtype, threads, clock, tokens, folder, pipe):
    "Answers 'generate' with (seconds, token ids), 'merge' with None, until the pipe closes."
    try:
        import torch, transformers, transformers.models.llama.modeling_llama, bitsandbytes, lora_nb.merge, lora_nb.fast # noqa
        transformers.logging.set_verbosity_error(); transformers.logging.disable_progress_bar()
        if threads: torch.set_num_threads(threads)
        device,now = torch.device('cuda' if torch.cuda.is_available() else 'cpu'),getattr(time, clock)
        model,tok,merge = dict(ours=ours, peft=peft)[side](getattr(torch, dtype), device, folder)
        text = tok.apply_chat_template([dict(role='user', content=QUESTION)], tokenize=False, add_generation_prompt=True)
        x = tok(text, return_tensors='pt', add_special_tokens=False).to(device)
        settings = dict(max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, temperature=None, top_p=None, top_k=None, use_cache=True)
        @torch.no_grad()
        def generate():
            t = now()
            with lora_nb.fast.fast_decoding(model) if side=='ours' else nullcontext(): y = model.generate(**x, **settings)
            if device.type=='cuda': torch.cuda.synchronize()
            return now()-t,y[0, x['input_ids'].shape[1]:].tolist()
        generate(); gc.collect()
        pipe.send(True)
        while (order := pipe.recv()) is not None:
            if order=='generate': pipe.send(generate())
            else: model = merge(); generate(); pipe.send(True)
    except EOFError: pass
    except BaseException:
        traceback.print_exc(); pipe.send(None)

class Side:
    def __init__(self, name, *args):
        ctx = multiprocessing.get_context('spawn')
        self.name,(self.pipe,theirs) = name,ctx.Pipe()
        self.process = ctx.Process(target=work, args=(name, *args, theirs), daemon=True)
        self.process.start(); theirs.close(); self.answer()
    def answer(self):
        a = self.pipe.recv()
        if a is None: raise SystemExit(f'{self.name} failed; its error is above.')
        return a
    def ask(self, order): self.pipe.send(order); return self.answer()

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--tokens', type=int, default=48)
    p.add_argument('--rounds', type=int, default=5)
    p.add_argument('--dtype', default='float32', choices=('float32', 'bfloat16', 'float16'))
    p.add_argument('--threads', type=int, help="torch's threads in each process; default: torch's own choice")
    p.add_argument('--clock', default='perf_counter', choices=('perf_counter', 'process_time'), help="'process_time': seconds of the CPU, for a machine that others use too; with --threads 1")
    a = p.parse_args()
    import torch, transformers, peft, bitsandbytes
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else cpu_name()
    print(f'torch {torch.__version__}, transformers {transformers.__version__}, peft {peft.__version__}, bitsandbytes {bitsandbytes.__version__}; {where}, {a.threads or torch.get_num_threads()} threads; {a.dtype}; {a.clock}')
    with tempfile.TemporaryDirectory() as tmp:
        folder = dense_folder(Path(tmp)/'smollm2', a.dtype)
        sides = [Side(n, a.dtype, a.threads, a.clock, a.tokens, folder) for n in ('ours', 'peft')]
        for what in ('unmerged', 'merged'):
            if what=='merged':
                for s in sides: s.ask('merge')
            speed,ids = {s.name: [] for s in sides},{}
            for r in range(a.rounds):
                for s in (sides, sides[::-1])[r%2]:
                    t,ids[s.name] = s.ask('generate')
                    speed[s.name].append(a.tokens/t)
            same = next((i for i,(x,y) in enumerate(zip(ids['ours'], ids['peft'])) if x!=y), a.tokens)
            line(f'{what}, tokens/s', [x/y for x,y in zip(speed['ours'], speed['peft'])], 1,
                 f"ours {statistics.median(speed['ours']):.1f}, theirs {statistics.median(speed['peft']):.1f}; the first {same} of {a.tokens} tokens are the same")
        for s in sides: s.pipe.send(None); s.process.join(20)

if __name__ == '__main__': main()
