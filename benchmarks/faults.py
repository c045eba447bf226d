"""Faults during runs, each really caused: what survives and what is lost. Writes benchmarks/faults.md.

    python benchmarks/faults.py [--tries 5] [--only EXPRESSION]

A tiny model trains with dropout, 120 steps; the losses of a run that nothing happens to are the measure. A try survives where the run
ends as it should (the right error, told, or no harm at all); something is lost where a step that was finished, an event, a checkpoint or
a weight is not there afterwards, or where the resumed run's losses are not those of the whole one. The tries run in processes that are
forked from this one, which never trains. Full and read-only disks are tmpfs mounts (this needs root); nothing is simulated but the NaN.
"""
import argparse, contextlib, json, os, random, re, shutil, signal, subprocess, sys, tempfile, time, traceback, warnings
from pathlib import Path

os.environ.setdefault('OMP_NUM_THREADS', '1')
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import torch
from types import SimpleNamespace
from fuzz import tiny_model
from lora_nb.adapter import add_lora
from lora_nb.data import Sample
from lora_nb.trainer import NonFiniteLoss, PastRun, Trainer, checkpoints, read_events
from lora_nb.widgets.live_run import trouble_text

STEPS = 120
Lost = type('Lost', (AssertionError,), dict(__doc__="Something that was there is not."))


def data(n=64):
    starts = torch.randint(1, 28, (n,), generator=torch.Generator().manual_seed(0)).tolist()
    return SimpleNamespace(train=[Sample(list(range(s, s+12)), [-100]+list(range(s+1, s+12)), i) for i,s in enumerate(starts)], val=[], tok=SimpleNamespace(pad_token_id=0))


def trainer(out, steps=STEPS, **kw):
    torch.set_num_threads(1)
    model = tiny_model()
    add_lora(model, r=4, alpha=8, dropout=.1)
    return Trainer(model, data(), out=out, **dict(lr=1e-2, epochs=steps/8, batch_size=8)|kw)


def paced(run, seconds=.005):
    run.subscribe(lambda e: e['kind']=='step' and time.sleep(seconds))
    return run


def resumed(folder):
    torch.set_num_threads(1)
    model = tiny_model()
    add_lora(model, r=4, alpha=8, dropout=.1)
    return Trainer.resume(folder, model, data())


def losses(out): return {e['step']: e['loss'] for e in read_events(Path(out)/'events.jsonl') if e['kind']=='step'}

# --- processes ------------------------------------------------------------------------------------------------------------

def child(fn, *args):
    "fn(*args) in a forked process, whose exit is a script's: SystemExit and KeyboardInterrupt go to the top, handlers at exit run."
    if pid := os.fork(): return pid
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    try: fn(*args)
    except (KeyboardInterrupt,SystemExit): pass
    except BaseException: Path(args[0]).with_suffix('.trace').write_text(traceback.format_exc())
    import atexit
    atexit._run_exitfuncs()
    os._exit(0)


def ended(pid, seconds=120):
    "The exit code; the process is killed where it hangs."
    end = time.time()+seconds
    while time.time()<end:
        done,status = os.waitpid(pid, os.WNOHANG)
        if done: return os.waitstatus_to_exitcode(status)
        time.sleep(.02)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    raise AssertionError('it hangs')


def at_step(out, step, pid, seconds=90):
    "Wait until the run in `out` has logged `step`."
    end,file = time.time()+seconds,Path(out)/'events.jsonl'
    while time.time()<end:
        if file.exists() and f'"step": {step},' in file.read_text(errors='replace'): return
        assert os.waitpid(pid, os.WNOHANG)==(0, 0), f"it ended before step {step}: {trace(out)}"
        time.sleep(.01)
    raise AssertionError(f'it never came to step {step}')


def until(moment, seconds=60):
    end = time.time()+seconds
    while not moment():
        assert time.time()<end, 'it never came'
        time.sleep(.005)


def trace(out):
    f = Path(out).with_suffix('.trace')
    return f.read_text()[-600:] if f.exists() else ''


def in_child(fn, out, *args):
    code = ended(child(fn, out, *args))
    assert not trace(out), trace(out)
    return code


def goes_on(out, whole, newest=None):
    "The newest checkpoint is the last finished step's (or `newest`), and a resumed run has the whole run's losses."
    done = losses(out)
    if any(whole[k]!=v for k,v in done.items()): raise Lost('the losses before the fault are others')
    at = int(checkpoints(out)[-1].name.split('-')[1]) if checkpoints(out) else 0
    if at!=(max(done) if newest is None else newest(max(done))): raise Lost(f'{max(done)} steps were done, the newest checkpoint is of {at}')
    rest = Path(out).with_name(Path(out).name+'-2')
    in_child(lambda o: resumed(o).start().wait(False), out)
    if losses(rest)!={k: v for k,v in whole.items() if k>at}: raise Lost('the resumed run has other losses')


@contextlib.contextmanager
def tmpfs(folder, size, *options):
    folder.mkdir()
    subprocess.run(['mount', '-t', 'tmpfs', '-o', ','.join([f'size={size}', *options]), 'none', str(folder)], check=True)
    try: yield folder
    finally: subprocess.run(['umount', '-l', str(folder)], check=True)

# --- faults ---------------------------------------------------------------------------------------------------------------

def waits(out, **kw): paced(trainer(out, **kw).start()).wait(False)
def looks_away(out):
    run = paced(trainer(out).start())
    while True: time.sleep(.05)
def ends(out):
    run = paced(trainer(out).start())
    while run.step<30: time.sleep(.01)


def stopped_by(sig, fn, code):
    def one(out, whole, rng):
        pid = child(fn, out)
        at_step(out, rng.randint(5, 80), pid)
        os.kill(pid, sig)
        assert (got := ended(pid))==code, f'exit code {got}, expected {code}'
        goes_on(out, whole)
    return one


def script_ends(out, whole, rng):
    in_child(ends, out)
    goes_on(out, whole)


def killed(out, whole, rng):
    pid = child(lambda o: waits(o, save_every=5), out)
    at_step(out, rng.randint(10, 100), pid)
    time.sleep(rng.random()*.03)
    os.kill(pid, signal.SIGKILL)
    assert ended(pid)==-signal.SIGKILL
    at = int(checkpoints(out)[-1].name.split('-')[1])
    if at<max(losses(out))//5*5-5: raise Lost('a checkpoint that was written')
    goes_on(out, whole, lambda done: at)


def fill(folder):
    with contextlib.suppress(OSError), open(folder/'filler', 'wb', buffering=0) as f:
        while True: f.write(b'0'*4096)


def full_for_a_while(out, whole, rng):
    with tmpfs(out, '3m') as disk:
        at = rng.randint(15, 60)
        def work(o):
            run = paced(trainer(disk/'run', save_every=20).start())
            until(lambda: run.step>=at)
            fill(disk)
            until(lambda: run.step>=at+30)
            (disk/'filler').unlink()
            run.wait(False)
            assert [e for e in run.events if e['kind']=='warning'], 'nothing was told'
            kept = [e for e in run.events if e['kind']!='warning']
            if kept!=[e for e in read_events(disk/'run/events.jsonl') if e['kind']!='warning']: raise Lost('events')
        in_child(work, out)
        if losses(disk/'run')!=whole: raise Lost('steps')
        assert checkpoints(disk/'run')[-1].name==f'checkpoint-{STEPS}'


def full_to_the_end(out, whole, rng):
    with tmpfs(out, '3m') as disk:
        def work(o):
            t = trainer(disk/'run', save_every=20)
            run = paced(t.start())
            until(lambda: run.step>=50)
            fill(disk)
            try: run.wait(False)
            except OSError as e: assert 'No space left' in str(e), e
            else: raise AssertionError('no error')
            assert run.state=='failed' and 'No space left' in ' '.join(e.get('text', '') for e in run.events)
            if run.step!=STEPS or {e['step']: e['loss'] for e in run.events if e['kind']=='step'}!=whole: raise Lost('steps in memory')
            if int(checkpoints(disk/'run')[-1].name.split('-')[1])<40: raise Lost('the checkpoint before')
            run.adapter.save(out.with_name(out.name+'-saved'))
        in_child(work, out)


def read_only(out, whole, rng):
    with tmpfs(out, '1m', 'ro') as disk:
        def work(o):
            t = trainer(disk/'run')
            try: t.start()
            except OSError as e: assert e.errno==30, e
            else: raise AssertionError('no error')
            t.out = out.with_name(out.name+'-elsewhere')
            t.fit()
        in_child(work, out)
        if losses(out.with_name(out.name+'-elsewhere'))!=whole: raise Lost('steps')


def sleeps(seconds):
    def one(out, whole, rng):
        pid = child(waits, out)
        at_step(out, rng.randint(5, 80), pid)
        os.kill(pid, signal.SIGSTOP)
        time.sleep(seconds)
        os.kill(pid, signal.SIGCONT)
        assert ended(pid)==0
        if losses(out)!=whole: raise Lost('steps')
    return one


def not_a_number(where):
    def one(out, whole, rng):
        def work(o):
            t = trainer(o, steps=1100)
            backward = t._backward
            def poisoned(batches, n):
                total = backward(batches, n)
                if t.scheduler.last_epoch<999: return total
                if where=='loss': return float('nan')
                next(p for _,p in t.named).grad[0] = float('nan')
                return total
            t._backward = poisoned
            run = t.start()
            try: run.wait(False)
            except NonFiniteLoss as e: assert 'step 1000' in str(e) and 'checkpoint-999' in str(e), e
            else: raise AssertionError('no error')
            if not all(p.isfinite().all() for p in run.adapter.parameters()): raise Lost('the adapter in memory')
        in_child(work, out)
        if checkpoints(out)[-1].name!='checkpoint-999': raise Lost('the last good step')
        in_child(lambda o: resumed(o).start().wait(False), out)
        assert PastRun(out.with_name(out.name+'-2')).state=='finished'
    return one


def raises(out, whole, rng):
    at = rng.randint(5, 80)
    def work(o):
        t = trainer(o)
        make = t._batch
        def bad(samples):
            if t.scheduler.last_epoch==at: raise LookupError('a row that is gone')
            return make(samples)
        t._batch = bad
        run = paced(t.start())
        try: run.wait(False)
        except LookupError as e: assert 'a row that is gone' in trouble_text(run, run.events)
        else: raise AssertionError('no error')
    in_child(work, out)
    if checkpoints(out)[-1].name!=f'checkpoint-{at}': raise Lost('the last good step')
    if any(whole[k]!=v for k,v in losses(out).items()): raise Lost('losses')


def two_on_one_model(out, whole, rng):
    def work(o):
        t = trainer(o)
        run = paced(t.start())
        try: Trainer(t.model, data(), out=o).start()
        except RuntimeError as e: assert 'is being trained already' in str(e)
        else: raise AssertionError('the second run was let in')
        run.wait(False)
    in_child(work, out)
    if losses(out)!=whole: raise Lost("the first run's steps")


def two_in_one_kernel(out, whole, rng):
    def work(o):
        runs = [trainer(o).start() for _ in range(2)]
        for r in runs: r.wait(False)
        assert [r.out.name for r in runs]==[o.name, o.name+'-2']
    in_child(work, out)
    for o in (out, out.with_name(out.name+'-2')):
        if set(losses(o))!=set(whole) or checkpoints(o)[-1].name!=f'checkpoint-{STEPS}': raise Lost('steps')


def two_kernels(out, whole, rng):
    gate,checked = out.with_suffix('.go'),out.with_suffix('.checked')
    def work(o, i):
        t = trainer(out, save_every=5)
        while not gate.exists(): time.sleep(.001)
        run = t.start()
        run.subscribe(lambda e: e['kind']=='step' and e['step']==10 and until(checked.exists))
        run.wait(False)
    pids = [child(work, out.with_name(f'{out.name}_{i}'), i) for i in range(3)]
    time.sleep(1)
    gate.touch()
    at_step(out, 10, pids[0])
    def other(o):
        try: resumed(o)
        except RuntimeError as e: assert 'still going' in str(e), e
        else: raise AssertionError('a folder in use was resumed')
    ended(child(other, out))
    checked.touch()
    for p in pids: assert ended(p)==0
    for o in (out, *(out.with_name(f'{out.name}_{i}') for i in range(3))): assert not trace(o), trace(o)
    for o in (out, out.with_name(out.name+'-2'), out.with_name(out.name+'-3')):
        if losses(o)!=whole: raise Lost(f'steps in {o.name}')


KERNEL = """
import sys; sys.path[:0] = [{root!r}, {root!r}+'/benchmarks']
from faults import paced, trainer
run = paced(trainer({out!r}).start())
"""


def kernel(out, whole, rng, restart):
    from jupyter_client import KernelManager
    km = KernelManager(kernel_name='python3')
    km.start_kernel(env={**os.environ, 'PYTHONPATH': str(ROOT)}, stderr=subprocess.DEVNULL)
    kc = km.client()
    try:
        kc.start_channels()
        kc.wait_for_ready(timeout=90)
        kc.execute(KERNEL.format(root=str(ROOT), out=str(out)), reply=True, timeout=90)
        while not (out/'events.jsonl').exists() or len(losses(out))<20: time.sleep(.05)
        kc.stop_channels()
        if restart:
            km.shutdown_kernel(now=False)
            return goes_on(out, whole)
        time.sleep(1)
        back = km.client()
        back.start_channels()
        back.wait_for_ready(timeout=90)
        back.execute_interactive('run.wait(False);', timeout=90)
        back.stop_channels()
        if losses(out)!=whole: raise Lost('steps')
    finally:
        if km.is_alive(): km.shutdown_kernel(now=True)


FAULTS = [
    ('SIGTERM, while a cell waits', 'the step ends, a checkpoint is written, the process ends with 143; resumed to the same losses', stopped_by(signal.SIGTERM, waits, 143)),
    ('SIGTERM, while nobody waits', 'the same', stopped_by(signal.SIGTERM, looks_away, 143)),
    ('SIGINT, while a cell waits', 'the step ends, a checkpoint is written; resumed to the same losses', stopped_by(signal.SIGINT, waits, 0)),
    ('the script ends before its run', 'the same', script_ends),
    ('SIGKILL, a checkpoint every 5 steps', 'the newest checkpoint is whole; resumed to the same losses', killed),
    ('a full disk, with room again later', 'a warning; the run goes on, no event and no step is missing at the end', full_for_a_while),
    ('a full disk to the end', 'the run says so, older checkpoints are whole, the adapter in memory is that of the last step', full_to_the_end),
    ('a read-only folder', 'start() raises; the same trainer runs elsewhere', read_only),
    ('the computer sleeps (SIGSTOP, 3 s)', 'the same losses', sleeps(3)),
    ('the computer sleeps (SIGSTOP, 60 s)', 'the same losses', sleeps(60)),
    ('a NaN loss at step 1,000', 'NonFiniteLoss names the step; step 999 is checkpointed and goes on', not_a_number('loss')),
    ('a NaN gradient at step 1,000', 'the same; the adapter in memory is finite', not_a_number('gradient')),
    ('the worker thread raises', "shown by the widget, raised by wait(); the last whole step is checkpointed", raises),
    ('two runs on one model', 'the second is refused, the first unharmed', two_on_one_model),
    ('two runs in one kernel', 'each has its own folder; both end', two_in_one_kernel),
    ('three kernels start in one folder', 'each has its own folder; resuming one that is written is refused', two_kernels),
    ('the connection to the kernel is lost', 'the run goes on; the same losses', lambda *a: kernel(*a, restart=False)),
    ('the kernel is shut down or restarted', 'the step ends, a checkpoint is written; resumed to the same losses', lambda *a: kernel(*a, restart=True)),
]


def main():
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    p.add_argument('--tries', type=int, default=5)
    p.add_argument('--only', default='')
    args = p.parse_args()
    warnings.simplefilter('ignore')
    rows = []
    folder = Path(tempfile.mkdtemp()) # no TemporaryDirectory: a forked child's exit would remove it
    trainer(folder/'made') # imports what the children need
    in_child(lambda o: trainer(o).start().wait(False), folder/'whole')
    whole = losses(folder/'whole')
    assert len(whole)==STEPS
    for n,(fault,want,one) in enumerate(FAULTS):
        if not re.search(args.only, fault): continue
        tries,survived,lost = 1 if '60 s' in fault else args.tries,0,0
        for k in range(tries):
            try:
                one(folder/f'{n}-{k}', whole, random.Random(f'{n} {k}'))
                survived += 1
            except Exception as e:
                lost += isinstance(e, Lost) or 'Lost' in str(e)
                print(f'    {fault}: {type(e).__name__}: {e}', flush=True)
        rows.append((fault, want, tries, survived, lost))
        print(f'{fault:42} {tries} tries  {survived} survived  {lost} lost', flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    if not args.only:
        table = '\n'.join(f'| {f} | {w} | {t} | {s} | {l} |' for f,w,t,s,l in rows)
        (ROOT/'benchmarks/faults.md').write_text(f"# Faults during runs\n\nMade by `python benchmarks/faults.py`: each fault is really caused, in a process of its own, at a random step of a run of {STEPS} steps (1,100 for the NaN). "
            f"*Survived*: the run ended as the second column says. *Lost*: a finished step, an event, a checkpoint or a weight was not there afterwards.\n\n| fault | what should happen | tried | survived | lost |\n|---|---|---|---|---|\n{table}\n")
    sys.exit(any(t!=s or l for *_,t,s,l in rows))


if __name__=='__main__': main()
