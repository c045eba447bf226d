"""What watching costs: a run with a LiveRun on it beside the same run with none, in a real kernel.

    python benchmarks/live_overhead.py [--rounds 3] [--steps 20]

SmolLM2-135M, NF4, r=16 on all linear layers, the chat data in batches of 8. Rounds alternate; the ratio is the watched run's time
from its first step to its last over the unwatched one's. Beside the mean over the steps stand the widget's drawings in a second.
There is no browser here: its work is done by another process, which shares this machine's cores with the run.
"""
import argparse, json, statistics
from pathlib import Path
import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[1]

SETUP = """
from lora_nb.all import *
import torch
model, tok = load_model("smollm2", quant=NF4(double=True))
data = chat_data(example_data(), tok, max_len=256, val="split")
data.val = data.val[:8]
add_lora(model, r=16, alpha=32)
rounds = []
def run(i, watched): return Trainer(model, data, lr=1e-4, epochs=STEPS*8/len(data.train), batch_size=8, eval_every=10**6, out=f"FOLDER/{i}-{watched}").start()
def seconds(run): return float(run.log.time.iloc[-1]-run.log.time.iloc[0])
"""
PLAIN = "r = run({i}, False).wait(progress=False)\nplain = seconds(r)"
WATCHED = """r = run({i}, True)
live = LiveRun(r)
drawn, refresh = [], live.refresh
def counted(*args):
    drawn.append(r.events[-1]["time"])
    return refresh(*args)
live.refresh = counted
display(live)
r.wait(progress=False)
rounds.append((plain, seconds(r), len(drawn)/seconds(r), len([e for e in r.events if e["kind"]=="spectrum"])))"""


def measure(rounds, steps, folder):
    cell = nbformat.v4.new_code_cell
    last = cell("import json\nprint(json.dumps(rounds))")
    warm = "run('warm', False).wait(progress=False)"
    cells = [cell(SETUP.replace('STEPS', str(steps)).replace('FOLDER', folder)), cell(warm), *[cell(c.format(i=i)) for i in range(rounds) for c in (PLAIN, WATCHED)], last]
    NotebookClient(nbformat.v4.new_notebook(cells=cells), timeout=3600, resources={'metadata': {'path': str(ROOT)}}).execute()
    return json.loads(last.outputs[0].text)


if __name__=='__main__':
    import tempfile
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    p.add_argument('--rounds', type=int, default=3)
    p.add_argument('--steps', type=int, default=20)
    args = p.parse_args()
    with tempfile.TemporaryDirectory() as folder: rounds = measure(args.rounds, args.steps, folder)
    ratios = [w/p for p,w,*_ in rounds]
    for p,w,fps,seen in rounds: print(f"unwatched {p:6.1f} s   watched {w:6.1f} s   ratio {w/p:.3f}   {fps:.1f} drawings/s   {seen} spectra")
    print(f"watched over unwatched: min {min(ratios):.3f}, median {statistics.median(ratios):.3f}, max {max(ratios):.3f}")
