"What a run survives. benchmarks/faults.py causes these and more, many times; here those that need no rights and little time."
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from conftest import counting, tiny_llama
from lora_nb.adapter import add_lora
from lora_nb.trainer import NonFiniteLoss, Run, Trainer, checkpoints, read_events

ROOT = Path(__file__).resolve().parents[1]


def trainer(out, **kw):
    model = tiny_llama()
    add_lora(model, r=8, alpha=16)
    return Trainer(model, counting(), out=out, **dict(lr=1e-2, epochs=2)|kw)


def test_a_signal_a_raising_thread_and_three_kernels():
    p = subprocess.run([sys.executable, str(ROOT/'benchmarks/faults.py'), '--tries', '1', '--only', 'SIGTERM, while a cell|worker|three'], capture_output=True, text=True, timeout=600)
    assert p.returncode == 0 and p.stdout.count('1 survived  0 lost') == 3, p.stdout+p.stderr[-2000:]


def test_events_wait_for_room_on_the_disk(tmp_path):
    class Full:
        "A file on a disk that is full from the 200th byte on, until there is room."
        def __init__(self, f): self.f, self.room = f, False
        def write(self, b):
            if self.room: return self.f.write(b)
            left = max(0, 200-self.f.tell())
            if not left: raise OSError(28, 'No space left on device')
            return self.f.write(bytes(b)[:left])     # as the system does: what fits
        def __getattr__(self, name): return getattr(self.f, name)
    t = trainer(tmp_path)
    run = Run(t, tmp_path/'r')
    def hear(e):
        if e['kind'] == 'state' and e['state'] == 'running': run._file = Full(run._file)
        if e['kind'] == 'step' and e['step'] == 5: assert all(x in run.events for x in read_events(run.out/'events.jsonl')) and len(read_events(run.out/'events.jsonl')) < 5
        if e['kind'] == 'step' and e['step'] == 9: run._file.room = True
    run.subscribe(hear)
    t._work(run)
    told = [e for e in run.events if e['kind'] == 'warning']
    assert run.state == 'finished' and len(told) == 1 and 'No space left' in told[0]['text']
    assert read_events(run.out/'events.jsonl') == [e for e in run.events if e['kind'] != 'warning']


def test_a_checkpoint_that_the_disk_refuses_does_not_end_the_run(tmp_path, monkeypatch):
    from lora_nb import trainer as module
    save, t = module.save_file, trainer(tmp_path, save_every=4)
    run = Run(t, tmp_path/'r')
    def full(*args, **kw):
        if run.step == 4: raise OSError(28, 'No space left on device')
        return save(*args, **kw)
    monkeypatch.setattr(module, 'save_file', full)
    t._work(run)
    assert run.state == 'finished' and [p.name for p in checkpoints(run.out)] == ['checkpoint-12', 'checkpoint-14']
    assert 'checkpoint of step 4 could not be written' in next(e['text'] for e in run.events if e['kind'] == 'warning')


@pytest.mark.parametrize('where', ['loss', 'gradient'])
def test_nan_leaves_the_step_before(tmp_path, where):
    t = trainer(tmp_path/'r')
    backward = t._backward
    def poisoned(batches, n):
        total = backward(batches, n)
        if t.scheduler.last_epoch == 6:
            if where == 'loss': return math.nan
            t.named[0][1].grad[0] = math.nan
        return total
    t._backward = poisoned
    with pytest.raises(NonFiniteLoss, match=f'{where}.*step 7.*checkpoint-6'): t.fit()
    assert all(p.isfinite().all() for p in t.adapter.parameters())
    model = tiny_llama()
    add_lora(model, r=8, alpha=16)
    again = Trainer.resume(tmp_path/'r', model, counting()).fit()
    whole = trainer(tmp_path/'whole').fit()
    assert again.log.loss.tolist() == whole.log.loss.tolist()[6:]


def test_a_run_on_a_busy_model_is_refused(tmp_path):
    t = trainer(tmp_path/'r')
    run = t.start()
    run.pause()
    with pytest.raises(RuntimeError, match='is being trained already, by the run in'): Trainer(t.model, counting(), out=tmp_path/'s').start()
    run.resume()
    run.wait(False)
    assert not (tmp_path/'s').exists() and Trainer(t.model, counting(), out=tmp_path/'s', epochs=1).fit().state == 'finished'


def test_a_folder_in_use_is_not_resumed(tmp_path):
    t = trainer(tmp_path/'r', save_every=1)
    run = t.start()
    while run.step < 2: pass
    run.pause()
    while run.state != 'paused': pass
    model = tiny_llama()
    add_lora(model, r=8, alpha=16)
    with pytest.raises(RuntimeError, match=r'still going \(in this kernel\)'): Trainer.resume(tmp_path/'r', model, counting())
    run.stop()
    run.wait(False)
    assert not (tmp_path/'r/.lock').exists() and Trainer.resume(tmp_path/'r', model, counting()).fit().state == 'finished'
