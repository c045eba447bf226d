"""A QLoRA training step: this package beside peft + bitsandbytes, on the same model, data, adapter and optimizer.

    python benchmarks/qlora_step.py [--settings all,chat,checkpoint] [--beside peft,trl] [--dtype float32] [--rounds 5] [--steps 2] [--threads N]

SmolLM2-135M, NF4 with double quantisation, r=16 on all linear layers, AdamW. Each side lives in a fresh process of its own and
waits while the other works; the sides take turns within a round, so that a slow moment of the machine meets both. A ratio is ours
over theirs within one round (tokens/s: above 1 means that we are faster); min, median and max are over the rounds. Peak memory is
what a fresh process holds beyond its imports, from loading to the last step. Both sides read model and tokenizer from one folder. `--agree 50` compares the losses of 50 steps.
`--beside trl` takes the loss of TRL's SFTTrainer, which computes accuracy and entropy beside it, over the same peft model.

    all         4 × 256 tokens of prose, every token labelled
    chat        nbs/data/lora_qa.jsonl, answers labelled, 4 samples to a batch as they come; tokens/s counts labelled tokens
    checkpoint  as `all`, with gradient checkpointing on both sides
    long        1 × 512 tokens, every token labelled
    short       1 × 2 tokens
    dense       as `all`, LoRA on the unquantised model
"""
import argparse, gc, math, multiprocessing, os, platform, random, statistics, sys, tempfile, threading, time, traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT/'nbs/data/lora_qa.jsonl'
SETTINGS = ('all', 'chat', 'checkpoint', 'long', 'short', 'dense')

# -- what both sides share ---------------------------------------------------------------------------------------------------

def status(key):
    "A line of /proc/self/status in bytes; None where there is no such file."
    try: lines = Path('/proc/self/status').read_text().splitlines()
    except OSError: return None
    return next((int(l.split()[1])*1024 for l in lines if l.startswith(key+':')), None)

class Memory:
    "Bytes beyond what was held when this was made: CUDA's where there is a GPU, else the process's."
    def __init__(self, cuda):
        import torch
        self.cuda,self.torch = cuda,torch
        if cuda: torch.cuda.reset_peak_memory_stats()
        else:
            try: Path('/proc/self/clear_refs').write_text('5') # VmHWM starts again from here
            except OSError: pass
        self.start = torch.cuda.memory_allocated() if cuda else status('VmRSS') or 0
        self.anonymous = status('RssAnon') or 0
    def peak(self):
        if self.cuda: return self.torch.cuda.max_memory_allocated()-self.start
        return (status('VmHWM') or 0)-self.start
    def during(self, f):
        "The most that was held while f() ran, without files that are merely mapped; sampled."
        if self.cuda:
            self.torch.cuda.reset_peak_memory_stats(); f(); return self.peak()
        most,done = [0],threading.Event()
        def watch():
            while not done.wait(.004): most[0] = max(most[0], status('RssAnon') or 0)
        t = threading.Thread(target=watch); t.start()
        try: f()
        finally: done.set(); t.join()
        return most[0]-self.anonymous

def prose(tok, batch, length, count):
    "Batches of rows of `length` tokens from the Python manual's topics, every token labelled."
    from pydoc_data.topics import topics
    ids = tok('\n\n'.join(topics.values())[:6*batch*length*count], add_special_tokens=False).input_ids
    rows = [ids[i*length:(i+1)*length] for i in range(batch*count)]
    return [[(r, r) for r in rows[i:i+batch]] for i in range(0, len(rows), batch)]

def chats(tok, batch, count):
    from lora_nb.data import chat_data
    samples = chat_data(DATA, tok, val='split').train
    random.Random(0).shuffle(samples)
    return [[(s.input_ids, s.labels) for s in samples[i:i+batch]] for i in range(0, batch*count, batch)]

def make_batches(setting, tok, count):
    if setting=='chat': return chats(tok, 4, count)
    return prose(tok, *{'long': (1, 512), 'short': (1, 2)}.get(setting, (4, 256)), count)

def learned(rows): return sum(l!=-100 for _,labels in rows for l in labels[1:])

def start_A(path, A):
    "Fill A (r, in) with numbers that depend on the layer's path alone, so that both sides start alike."
    import torch, zlib
    g = torch.Generator().manual_seed(zlib.crc32(path.encode()))
    with torch.no_grad(): A.copy_((torch.rand(A.shape, generator=g)*2-1)/math.sqrt(A.shape[1]))

# -- the sides: each gives (parameters, loss of a batch) ----------------------------------------------------------------------

def ours(setting, dtype, device, folder):
    import torch
    from lora_nb.adapter import add_lora
    from lora_nb.data import Sample, collate
    from lora_nb.fast import fast_loss
    from lora_nb.models import load_model
    from lora_nb.quantize import NF4
    model,_ = load_model(folder, quant=None if setting=='dense' else NF4(double=True), dtype=dtype, device=device)
    adapter = add_lora(model, r=16, alpha=32, targets='all-linear')
    for path,layer in adapter.layers.items(): start_A(path, layer.A['default'])
    if setting=='checkpoint': model.gradient_checkpointing_enable(dict(use_reentrant=False))
    model.train()
    def loss(rows):
        batch = collate([Sample(ids, labels, 0) for ids,labels in rows], model.config.pad_token_id or 0)
        return fast_loss(model, {k: v.to(device) for k,v in batch.items()})
    return list(adapter.parameters()),loss

def general(setting, dtype, device, folder):
    "This package without its fast path, for comparison."
    import lora_nb.fast, lora_nb.loss
    lora_nb.fast.fast_loss = lora_nb.loss.model_loss
    return ours(setting, dtype, device, folder)

def peft_model(setting, dtype, device, folder):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
    AutoTokenizer.from_pretrained(folder) # load_model brings one along
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type='nf4', bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, quantization_config=None if setting=='dense' else nf4, device_map={'': device})
    if setting=='checkpoint':
        model.gradient_checkpointing_enable(dict(use_reentrant=False)); model.enable_input_require_grads()
    model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules='all-linear', task_type='CAUSAL_LM'))
    for name,p in model.named_parameters():
        if '.lora_A.' in name: start_A(name.removeprefix('base_model.model.').split('.lora_A.')[0], p)
    model.config.use_cache = False
    return model.train()

def padded(rows, pad, device):
    import torch
    n = max(len(ids) for ids,_ in rows)
    fill = lambda xs,v: xs+[v]*(n-len(xs))
    batch = dict(input_ids=[fill(i, pad) for i,_ in rows], labels=[fill(l, -100) for _,l in rows], attention_mask=[fill([1]*len(i), 0) for i,_ in rows])
    return {k: torch.tensor(v, device=device) for k,v in batch.items()}

def peft(setting, dtype, device, folder):
    model = peft_model(setting, dtype, device, folder)
    pad = model.config.pad_token_id or 0
    return [p for p in model.parameters() if p.requires_grad],lambda rows: model(**padded(rows, pad, device)).loss

def trl(setting, dtype, device, folder):
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer
    model = peft_model(setting, dtype, device, folder)
    pad = model.config.pad_token_id or 0
    args = SFTConfig(output_dir=str(Path(folder).parent/'trl'), report_to='none', gradient_checkpointing=setting=='checkpoint', bf16=False, use_cpu=device.type=='cpu', max_length=None)
    trainer = SFTTrainer(model=model, args=args, train_dataset=Dataset.from_dict(dict(input_ids=[[1, 2, 3]])), processing_class=AutoTokenizer.from_pretrained(folder))
    model.train()
    return [p for p in model.parameters() if p.requires_grad],lambda rows: trainer.compute_loss(model, padded(rows, pad, device))

SIDES = dict(ours=ours, general=general, peft=peft, trl=trl)

# -- one side's process -------------------------------------------------------------------------------------------------------

def work(side, setting, dtype, threads, clock, folder, count, pipe):
    "Load, then answer 'step' with (seconds, loss), 'memory' with bytes, until the pipe closes."
    try:
        import torch, transformers, transformers.models.llama.modeling_llama, transformers.models.llama.tokenization_llama # noqa
        import bitsandbytes, lora_nb.fast, lora_nb.models, lora_nb.adapter # noqa
        if side in ('peft', 'trl'): import peft # noqa
        if side=='trl': import trl # noqa
        transformers.logging.set_verbosity_error(); transformers.logging.disable_progress_bar()
        if threads: torch.set_num_threads(threads)
        now = getattr(time, clock)
        device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
        dtype = getattr(torch, dtype)
        from transformers import AutoTokenizer
        batches = make_batches(setting, AutoTokenizer.from_pretrained(folder), count)
        gc.collect()
        memory,t = Memory(device.type=='cuda'),now()
        params,loss_of = SIDES[side](setting, dtype, device, folder)
        opt = torch.optim.AdamW(params, lr=2e-4, fused=True)
        def step(i):
            loss = loss_of(batches[i%len(batches)])
            loss.backward(); opt.step(); opt.zero_grad()
            return loss.detach()
        def timed(i):
            if device.type=='cpu':
                t = now(); l = float(step(i)); return now()-t,l
            a,b = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            a.record(); l = step(i); b.record(); torch.cuda.synchronize()
            return a.elapsed_time(b)/1e3,float(l)
        first = timed(0)[1]
        pipe.send(dict(ready=now()-t, loss=first, trained=sum(p.numel() for p in params),
                       labels=[learned(b) for b in batches], tokens=[sum(len(i) for i,_ in b) for b in batches]))
        while (order := pipe.recv()) is not None:
            what,i = order
            if what=='step': pipe.send(timed(i))
            elif what=='memory': pipe.send((memory.peak(), memory.during(lambda: step(i))))
    except EOFError: pass
    except BaseException:
        traceback.print_exc()
        pipe.send(None)

class Side:
    def __init__(self, name, *args):
        ctx = multiprocessing.get_context('spawn')
        self.name,(self.pipe,theirs) = name,ctx.Pipe()
        self.process = ctx.Process(target=work, args=(name, *args, theirs), daemon=True)
        self.process.start(); theirs.close()
        self.info = self.answer()
    def answer(self):
        a = self.pipe.recv()
        if a is None: raise SystemExit(f'{self.name} failed; its error is above.')
        return a
    def ask(self, *order): self.pipe.send(order); return self.answer()
    def close(self):
        self.pipe.send(None); self.process.join(20)

def dense_folder(where, dtype):
    "The built-in model's weights as transformers saves them, written by a process of its own."
    import subprocess
    code = ("import sys, torch; from lora_nb.models import load_model, save_model; "
            f"m, tok = load_model('smollm2', dtype=torch.{dtype}, device='cpu'); save_model(m, sys.argv[1], tok)")
    subprocess.run([sys.executable, '-c', code, str(where)], check=True)
    return str(where)

# -- the comparison -----------------------------------------------------------------------------------------------------------

def line(title, ratios, better, unit=''):
    r = sorted(ratios)
    print(f'{title:<34} ours/theirs  min {r[0]:.2f}  median {statistics.median(r):.2f}  max {r[-1]:.2f}   {unit}', flush=True)

def compare(setting, a, folder):
    count = max(a.agree+1, a.rounds*a.steps+2)
    sides = [Side(n, setting, a.dtype, a.threads, a.clock, folder, count) for n in (a.ours, *a.beside.split(','))]
    speed,losses = {s.name: [] for s in sides},{s.name: [s.info['loss']] for s in sides}
    what = 'labels' if setting=='chat' else 'tokens'
    for r in range(a.rounds):
        steps = [1+r*a.steps+k for k in range(a.steps)]
        for s in (sides, sides[::-1])[r%2]:
            got = [s.ask('step', i) for i in steps]
            speed[s.name].append(sum(s.info[what][i] for i in steps)/sum(t for t,_ in got))
            losses[s.name] += [l for _,l in got]
    for i in range(1+a.rounds*a.steps, a.agree):
        for s in sides: losses[s.name].append(s.ask('step', i)[1])
    for s in sides: s.memory = s.ask('memory', 0)
    for s in sides: s.close()
    for s in sides[1:]: report(setting, what, sides[0], s, speed, losses)

def report(setting, what, ours, theirs, speed, losses):
    alike = ours.info['trained']==theirs.info['trained']
    print(f"\n{setting}, beside {theirs.name}: " + (f"{ours.info['trained']:,} trained parameters on both sides" if alike else f"NOT the same parameters: {ours.info['trained']} and {theirs.info['trained']}"))
    x,y = speed[ours.name],speed[theirs.name]
    line('labelled tokens/s' if setting=='chat' else 'tokens/s', [a/b for a,b in zip(x, y)], 1, f'ours {statistics.median(x):.1f}, theirs {statistics.median(y):.1f}')
    for k,title in enumerate(('peak memory, load and steps', 'peak memory of a step, no files')):
        print(f'{title:<34} ours/theirs  {ours.memory[k]/theirs.memory[k]:.2f}   ours {ours.memory[k]/2**20:.0f} MB, theirs {theirs.memory[k]/2**20:.0f} MB')
    print(f'{"load to first step":<34} ours/theirs  {ours.info["ready"]/theirs.info["ready"]:.2f}   ours {ours.info["ready"]:.1f} s, theirs {theirs.info["ready"]:.1f} s')
    x,y = losses[ours.name],losses[theirs.name]
    print(f'{"loss":<34} {len(x)} steps, largest difference {max(abs(a-b) for a,b in zip(x, y)):.1e}; first {x[0]:.4f} and {y[0]:.4f}, last {x[-1]:.4f} and {y[-1]:.4f}', flush=True)

def cpu_name():
    try: info = dict(l.split(':', 1) for l in Path('/proc/cpuinfo').read_text().split('\n\n')[0].splitlines() if ':' in l)
    except OSError: return platform.processor()
    info = {k.strip(): v.strip() for k,v in info.items()}
    return f"{info.get('model name')} (family {info.get('cpu family')}, model {info.get('model')})"

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--settings', default='all,chat,checkpoint', help=', '.join(SETTINGS))
    p.add_argument('--beside', default='peft', help='peft, trl, or both with a comma')
    p.add_argument('--dtype', default='float32', choices=('float32', 'bfloat16', 'float16'))
    p.add_argument('--rounds', type=int, default=5)
    p.add_argument('--steps', type=int, default=2, help='steps of each side in a round')
    p.add_argument('--agree', type=int, default=0, help='compare the losses of this many steps')
    p.add_argument('--threads', type=int, help="torch's threads in each process; default: torch's own choice")
    p.add_argument('--clock', default='perf_counter', choices=('perf_counter', 'process_time'), help="'process_time': seconds of the CPU, for a machine that others use too; with --threads 1")
    p.add_argument('--ours', default='ours', choices=('ours', 'general'), help="'general': without the fast path")
    a = p.parse_args()
    import torch, transformers, peft, bitsandbytes
    bf16 = '' if a.dtype!='bfloat16' or torch.cuda.is_available() else ', in hardware' if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported() else ', emulated'
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else f'{cpu_name()}, {os.cpu_count()} cores, {a.threads or torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}'
    print(f'torch {torch.__version__}, transformers {transformers.__version__}, peft {peft.__version__}, bitsandbytes {bitsandbytes.__version__}; {where}; {a.dtype}{bf16}; {a.clock}')
    with tempfile.TemporaryDirectory() as tmp:
        folder = dense_folder(Path(tmp)/'smollm2', a.dtype)
        for setting in a.settings.split(','):
            if setting not in SETTINGS: raise SystemExit(f"No setting '{setting}'. There are: {', '.join(SETTINGS)}.")
            compare(setting, a, folder)

if __name__ == '__main__': main()
