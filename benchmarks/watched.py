"""2,000 steps watched by three widgets in a real JupyterLab: does the kernel grow, does the page still answer?

    python benchmarks/watched.py [--steps 2000]

A tiny model with a LiveRun, a RankSpectrum and an AdapterInspector on it, all on screen in Chromium. The kernel's memory (RSS) is read
from outside, every second; the growth is from a tenth of the steps to the last. A click opens a menu of JupyterLab every few seconds:
the time until it is there says how busy the page is. A click on Pause and Resume of the LiveRun goes to the kernel and back.
"""
import argparse, statistics, sys, tempfile, time
from pathlib import Path
import psutil

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT/'tests'))
from browser import LivePage, running, until

CODE = """import os, sys, time
sys.path[:0] = [{root!r}, {root!r}+'/tests']
from live_tiny import tiny_trainer
from lora_nb.widgets.live_run import LiveRun
from lora_nb.widgets.rank_spectrum import RankSpectrum
from lora_nb.widgets.adapter_inspector import AdapterInspector
print(os.getpid())
run = tiny_trainer('run', epochs={steps}/5, save_every=500, eval_every=500).start()
run.save_now()
while run.checkpoint is None: time.sleep(.05)      # the inspector looks into checkpoints while a run trains
display(LiveRun(run), RankSpectrum(run.adapter, run), AdapterInspector(run))"""


def menu_opens(page):
    "Seconds from the click on a menu to the sight of it."
    start = time.monotonic()
    page.locator('.lm-MenuBar-item', has_text='Help').first.click()
    page.locator('.lm-Menu').first.wait_for()
    took = time.monotonic()-start
    page.keyboard.press('Escape')
    return took


def pauses(live):
    "Seconds from the click on Pause to 'paused' on the page; then it goes on."
    start = time.monotonic()
    live.press('Pause')
    until(lambda: live.state()=='paused', 30, 'paused')
    took = time.monotonic()-start
    live.press_and_see('Resume', 'running')
    return took


def measure(steps):
    with tempfile.TemporaryDirectory() as home, tempfile.TemporaryDirectory() as folder, running(folder, home, 'watched', CODE.format(root=str(ROOT), steps=steps), height=3000) as lab:
        live = LivePage(lab).appear(120)
        until(lambda: lab.page.locator('.lnb').count()==3, 120, 'three widgets')
        kernel = psutil.Process(int(lab.cell(0).locator('.jp-OutputArea-output').first.inner_text()))
        memory, menus, pausing = [], [], []
        while live.state() in ('running', 'paused'):
            memory.append((live.step(), kernel.memory_info().rss))
            menus.append(menu_opens(lab.page))
            if len(menus)%4==0 and live.state()=='running' and live.step()<.9*steps: pausing.append(pauses(live))
            time.sleep(1)
        memory.append((live.step(), kernel.memory_info().rss))
        state, errors = live.state(), lab.errors
        lab.screenshot('watched-end')
    return memory, menus, pausing, state, errors


if __name__=='__main__':
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    p.add_argument('--steps', type=int, default=2000)
    args = p.parse_args()
    memory, menus, pausing, state, errors = measure(args.steps)
    start = next(m for s,m in memory if s>=args.steps/10)
    grown = memory[-1][1]-start
    print(f'{memory[-1][0]} steps, {state}; the kernel: {start/2**20:.0f} MiB at a tenth of the steps, {memory[-1][1]/2**20:.0f} at the end ({grown/2**20:+.1f})')
    for name, took in (('a menu opens', menus), ('Pause is answered', pausing)): print(f'{name} after {1e3*statistics.median(took):.0f} ms (median), {1e3*max(took):.0f} ms (slowest of {len(took)})')
    print(f'errors in the console: {len(errors)}', *sorted(set(errors)), sep='\n  ')
    sys.exit(not (grown<50*2**20 and not errors and state=='finished' and statistics.median(menus)<.3))
