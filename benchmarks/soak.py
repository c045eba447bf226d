"""Ten thousand steps, watched: does anything grow? Writes benchmarks/soak.svg.

    python benchmarks/soak.py [--steps 10000]

A tiny model, a LiveRun on it and a checkpoint every 500 steps, in a real kernel, where the widget draws as in a notebook. The process's
memory (RSS) is sampled each second; after a tenth of the steps its growth should be under 1 %. The events that a run keeps are part of it: they are
its record, 0.3 KB a step, and are counted beside it.
"""
import argparse, json, sys, tempfile
from pathlib import Path
import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[1]
CODE = """
import gc, json, os, sys, time, psutil, torch
sys.path[:0] = [{root!r}, {root!r}+'/tests']
torch.set_num_threads(1)
from live_tiny import tiny_trainer
from lora_nb.widgets.live_run import LiveRun
from IPython.display import display
t = tiny_trainer({out!r}, epochs={steps}/5, save_every=500, eval_every=500, keep=2)
run = t.start()
live = LiveRun(run)
display(live)
me, seen = psutil.Process(), []
def look():
    if not seen or time.time()-seen[-1][2]>1: seen.append((run.step, me.memory_info().rss, time.time()))
off = run.while_waiting(look)
run.wait(False)
seen.append((run.step, me.memory_info().rss, time.time()))
"""
END = """
drawn = live.refresh()
size = lambda x: sum(sys.getsizeof(e)+sum(map(sys.getsizeof, e.values())) for e in x)
print(json.dumps(dict(seen=seen, state=run.state, step=run.step, events=len(run.events), kept=size(run.events), log=os.path.getsize(run.out/'events.jsonl'),
    checkpoints=[p.name for p in sorted(run.out.iterdir()) if p.is_dir()], alive=live.comm is not None and not live._closed if hasattr(live, '_closed') else live.comm is not None, threads=len(__import__('threading').enumerate()))))
"""


def measure(steps):
    cell = nbformat.v4.new_code_cell
    with tempfile.TemporaryDirectory() as folder:
        last = cell(END)
        cells = [cell(CODE.format(root=str(ROOT), out=f'{folder}/run', steps=steps)), last]
        NotebookClient(nbformat.v4.new_notebook(cells=cells), timeout=7200, resources={'metadata': {'path': str(ROOT)}}).execute()
    return json.loads(last.outputs[-1].text.strip().splitlines()[-1])


def draw(found, warm, file):
    import matplotlib
    matplotlib.use('svg')
    import matplotlib.pyplot as plt
    plt.rcParams['svg.hashsalt'] = 'soak'
    steps,rss = [s for s,_,_ in found['seen']],[r/2**20 for _,r,_ in found['seen']]
    fig,ax = plt.subplots(figsize=(7, 3))
    ax.plot(steps, rss, color='#0072b2')
    ax.axvline(warm, color='#999999', ls=':')
    ax.set(xlabel='step', ylabel='memory of the kernel, MiB', ylim=(0, 1.15*max(rss)), title=f'{found["step"]:,} steps of a tiny model with a LiveRun on it')
    fig.tight_layout()
    fig.savefig(file, metadata=dict(Date=None))


if __name__=='__main__':
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    p.add_argument('--steps', type=int, default=10_000)
    args = p.parse_args()
    found = measure(args.steps)
    warm = args.steps//10
    after = [r for s,r,_ in found['seen'] if s>=warm]
    tail = after[-max(1, len(after)//10):]
    start,end = sorted(after[:max(1, len(after)//10)]),sorted(tail)
    start,end = start[len(start)//2],end[len(end)//2]
    draw(found, warm, ROOT/'benchmarks/soak.svg')
    grown = (end-start)/start
    print(f"{found['step']:,} steps in {found['seen'][-1][2]-found['seen'][0][2]:.0f} s: {start/2**20:.1f} MiB after the warm-up, {end/2**20:.1f} at the end: {grown:+.2%}")
    print(f"events {found['events']:,} ({found['kept']/2**20:.1f} MiB in memory, {found['log']/2**20:.1f} on disk), checkpoints {found['checkpoints']}, {found['threads']} threads, widget alive: {found['alive']}, run {found['state']}")
    sys.exit(not (grown<.01 and found['alive'] and found['state']=='finished' and len(found['checkpoints'])<=3))
