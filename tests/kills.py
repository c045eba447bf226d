"""Kills a training process at random moments, some of them inside a save, and resumes each run to its end. `python tests/kills.py FOLDER N SEED` prints JSON.

It is a process of its own, which never computes: its children are forked from it with everything imported, so that a run takes a second."""
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
from conftest import counting, tiny_llama

from lora_nb.adapter import add_lora
from lora_nb.trainer import Trainer, checkpoints


def train(out, resume=None):
    torch.set_num_threads(1)
    model, data = tiny_llama(), counting()
    add_lora(model, r=8, alpha=16, dropout=.1)
    t = Trainer.resume(resume, model, data) if resume else Trainer(model, data, out=out, lr=1e-2, epochs=2, save_every=1, keep=2)
    t.start().wait(False)


def child(*args):
    if pid := os.fork(): return pid
    try: train(*args)
    except BaseException as e: print(f'{type(e).__name__}: {e}', file=sys.stderr)
    os._exit(0)


def losses(run): return {e['step']: e['loss'] for e in map(json.loads, (run/'events.jsonl').read_text().splitlines()) if e['kind']=='step'}
def half_written(run): return list(run.glob('.checkpoint-*.tmp-*'))


def until(moment, pid, seconds=300):
    "Wait for `moment()`; False if the child ended before."
    end = time.time()+seconds
    while not moment():
        if os.waitpid(pid, os.WNOHANG)[0]: return False
        assert time.time() < end, 'the child hangs'
    return True


def kill(out, inside, rng):
    "Start a run in `out`, kill it at a random moment after its first checkpoint; returns whether that was inside a save. None: it had ended."
    pid = child(out)
    at = rng.randint(1, 12)
    alive = until(lambda: any(int(p.name.split('-')[1]) >= at for p in checkpoints(out)), pid)
    if inside: alive = alive and until(lambda: half_written(out), pid)
    else: time.sleep(rng.random()*.03)
    if not alive: return None
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return bool(half_written(out))


def main(folder, n, seed):
    rng, folder, seen = random.Random(seed), Path(folder), []
    folder.mkdir()
    os.waitpid(child(folder/'whole'), 0)
    whole = losses(folder/'whole')
    while len(seen) < n:
        out = folder/f'try-{len(os.listdir(folder))}'
        inside = kill(out, len(seen)%2==0, rng)
        if inside is None: continue
        cut, last = losses(out), checkpoints(out)[-1]
        os.waitpid(child(None, out), 0)
        rest = losses(out.with_name(out.name+'-2'))
        seen.append(dict(inside=inside, resumed_at=min(rest)-1, newest=int(last.name.split('-')[1]), cut_right=all(whole[k]==v for k, v in cut.items()),
                         same=rest=={k: v for k, v in whole.items() if k >= min(rest)}, final=rest[max(whole)]==whole[max(whole)], left=len(half_written(out))))
    print(json.dumps(dict(steps=len(whole), kills=seen)))


if __name__=='__main__': main(sys.argv[1], *map(int, sys.argv[2:]))
