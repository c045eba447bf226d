"One of the processes that a launcher starts: trains on the same data as a single process would, and writes its losses."
import json
import sys
from pathlib import Path

import torch
from conftest import counting, tiny_llama

from lora_nb.adapter import add_lora
from lora_nb.linear4bit import Linear4bit
from lora_nb.quantize import NF4
from lora_nb.trainer import Run, Trainer


def model(dropout=0., quant=False):
    m = tiny_llama()
    if quant:
        for layer in m.model.layers: layer.mlp.up_proj = Linear4bit.from_linear(layer.mlp.up_proj, NF4())
    add_lora(m, r=8, alpha=16, dropout=dropout)
    return m


def data():
    d = counting(n=65)
    for i, s in enumerate(d.train): s.labels[:1+i%5] = [-100]*(1+i%5)
    d.max_len = 30
    return d


def train(out, world, packing=False, accum=1, quant=False, **settings):
    return Trainer(model(quant=quant), data(), out=out, lr=1e-2, epochs=2, batch_size=8//world, packing=packing, accum=accum, **settings)


CASES = dict(plain={}, packed=dict(packing=True), accumulated=dict(accum=3), quantised=dict(quant=True), linear=dict(schedule='linear', eval_every=3))


def stopped(out, world):
    "Only the first process is told to pause, change the rate and stop; the others follow."
    t = train(out, world)
    def tell(e):
        if e['kind']=='step' and t.rank==0:
            if e['step']==3: r.set_lr(1e-3), r.save_now()
            if e['step']==5: r.pause()
            if e['step']==9: r.stop()
        if e.get('state')=='paused' and t.rank==0: r.resume()
    r = Run(t, out)
    r.subscribe(tell)
    t._work(r)
    return r


def resumed(out, world):
    "Cut at step 4 with dropout, then resumed."
    t = Trainer(model(.1), data(), out=out/'cut', lr=1e-2, epochs=2, batch_size=8//world)
    cut = Run(t, out/'cut')
    cut.subscribe(lambda e: e['kind']=='step' and e['step']==4 and cut.stop())
    t._work(cut)
    whole = Trainer(model(.1), data(), out=out/'whole', lr=1e-2, epochs=2, batch_size=8//world).fit()
    rest = Trainer.resume(out/'cut', model(.1), data()).fit()
    return cut.log.loss.tolist()+rest.log.loss.tolist(), whole.log.loss.tolist()


def main(folder, world=2):
    torch.set_num_threads(1)
    folder, got = Path(folder), {}
    for name, case in CASES.items():
        run = train(folder/name, world, **case).fit()
        got[name] = dict(loss=run.log.loss.tolist(), norm=run.log.grad_norm.tolist(), held_out=run.evals.loss.tolist(), accuracy=run.evals.accuracy.tolist(), steps=run.total_steps)
    r = stopped(folder/'stopped', world)
    got['stopped'] = dict(state=r.state, step=r.step, error=repr(r.error), lr=r.log.lr.tolist(), states=[e['state'] for e in r.events if e['kind']=='state'], saved=[Path(e['path']).name for e in r.events if e['kind']=='checkpoint'])
    got['resumed'] = resumed(folder/'resumed', world)
    rank = train(folder/'rank', world).rank
    (folder/f'rank-{rank}.json').write_text(json.dumps(got))


if __name__=='__main__': main(sys.argv[1])
