"""What watching costs: a run with a LiveRun in view beside the same run with the LiveRun out of view, in a real kernel.

    python benchmarks/live_overhead.py [--pairs 20] [--steps 4]

SmolLM2-135M, NF4, r=16 on all linear layers, batches of 8 chats of one length. Within one run the widget is in view for some steps
and out of view for as many, so that a slow moment of the machine meets both; a step after a change is left out. A ratio is the time
of a step in view over that of one out of view, in one pair of blocks. Out of view a LiveRun neither looks at the adapter nor draws.
There is no browser here: its work is done by another process, which shares this machine's cores with the run.
"""
import argparse, json, os, statistics
from pathlib import Path
import nbformat
from nbclient import NotebookClient
from qlora_step import cpu_name

ROOT = Path(__file__).resolve().parents[1]

SETUP = """
from collections import Counter
from lora_nb.all import *
model, tok = load_model("smollm2", quant=NF4(double=True))
data = chat_data(example_data(), tok, max_len=256, val="split")
length = Counter(len(s.input_ids) for s in data.train).most_common(1)[0][0]
data.train = [s for s in data.train if len(s.input_ids)==length]
data.val = data.val[:8]
add_lora(model, r=16, alpha=32)
r = Trainer(model, data, lr=1e-4, epochs=8*2*(PAIRS+1)*STEPS/len(data.train), batch_size=8, eval_every=10**6, out="FOLDER/run").start()
live = LiveRun(r)
blocks, drawn, refresh = [[]], [], live.refresh
def counted(*args):
    drawn.append(len(blocks)-1)
    return refresh(*args)
def step(e):
    if e["kind"]!="step": return
    blocks[-1].append(e["time"])
    if len(blocks[-1])>STEPS:
        blocks.append([e["time"]])
        live.watcher.last = -1e9 if len(blocks)%2 else None
live.refresh = counted
r.subscribe(step)
display(live)
r.wait(progress=False)
print(json.dumps(dict(blocks=blocks, drawn=drawn, spectra=[e["time"] for e in r.events if e["kind"]=="spectrum"])))"""


def measure(pairs, steps, folder):
    cell = nbformat.v4.new_code_cell('import json'+SETUP.replace('PAIRS', str(pairs)).replace('STEPS', str(steps)).replace('FOLDER', folder))
    NotebookClient(nbformat.v4.new_notebook(cells=[cell]), timeout=3600, resources={'metadata': {'path': str(ROOT)}}).execute()
    return json.loads(next(o.text for o in cell.outputs if o.get('name')=='stdout').strip().splitlines()[-1])


if __name__=='__main__':
    import tempfile
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    p.add_argument('--pairs', type=int, default=20)
    p.add_argument('--steps', type=int, default=4, help='steps of each block that count')
    args = p.parse_args()
    with tempfile.TemporaryDirectory() as folder: got = measure(args.pairs, args.steps+1, folder)
    took = [(b[-1]-b[1])/(len(b)-2) for b in got['blocks'] if len(b)==args.steps+2][1:]    # the first block warms up; blocks 1, 3, … are in view
    ratios = sorted(on/off for on,off in zip(took[::2], took[1::2]))
    seconds = [b[-1]-b[0] for b in got['blocks'][1::2]]
    seen = sum(any(b[0]<=t<=b[-1] for b in got['blocks'][1::2]) for t in got['spectra'])
    print(f"{cpu_name()}, {os.cpu_count()} cores; {len(ratios)} pairs; a step takes {statistics.median(took[1::2]):.3f} s; in view {len([b for b in got['drawn'] if b%2])/sum(seconds):.1f} refreshes/s, {seen/sum(seconds):.1f} spectra/s")
    print(f"in view over out of view: min {ratios[0]:.3f}, quartiles {ratios[len(ratios)//4]:.3f} {ratios[3*len(ratios)//4]:.3f}, median {statistics.median(ratios):.3f}, max {ratios[-1]:.3f}")
