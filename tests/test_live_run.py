"LiveRun without a browser: its functions against a real run, its threads, its probes, its still picture."
import asyncio, re, threading, time
import numpy as np, pandas as pd, pytest, torch
from html.parser import HTMLParser
from types import SimpleNamespace
from live_tiny import tiny_run, tiny_trainer
from lora_nb.widgets import live_run as lr
from lora_nb.widgets.live_run import LiveRun, matrices
from lora_nb.widgets.look import as_text, seconds_text, shrink, thin

HOSTILE = ['<script>alert(1)</script>', '<img src=x onerror=alert(1)>', '"><svg onload=alert(1)>', "'; alert(1) //", '&lt;b&gt;', '\x1b[31mred\x1b[0m', '\x00\x07', 'a\u202egnp.exe', '\u2066\u2069', '{{7*7}}', '$x^2$', 'x'*100_000]


@pytest.fixture(scope='module')
def finished(tmp_path_factory): return tiny_run(tmp_path_factory.mktemp('r')/'run', epochs=6).wait(progress=False)


class Parts(HTMLParser):
    "The tags and the text of a piece of HTML."
    def __init__(self, html):
        super().__init__()
        self.tags, self.text = [], ''
        self.feed(html)
    def handle_starttag(self, tag, attrs): self.tags.append((tag, dict(attrs)))
    def handle_data(self, data): self.text += data


# What is drawn is what the run published

def test_pictures_and_tables_hold_the_runs_numbers(finished):
    live = LiveRun(finished)
    log = finished.log.set_index('step')
    assert np.array_equal(live.figure('loss').data[0].x, log.index) and np.array_equal(live.figure('loss').data[0].y, log.loss)
    assert np.array_equal(live.figure('loss').data[2].y, finished.evals.loss)
    assert np.array_equal(live.figure('rates').data[0].y, log.lr) and np.array_equal(live.figure('rates').data[1].y, log.tokens_per_s)
    assert live.data('loss').training.dropna().tolist()==log.loss.tolist() and live.data('loss').held_out.dropna().tolist()==finished.evals.loss.tolist()
    layer = finished.adapter.layers[live.layer]
    assert np.array_equal(live.data('A'), layer.A['default'].detach()) and np.array_equal(live.data('B'), layer.B['default'].detach())
    s = torch.linalg.svdvals(layer.delta('default').double())[:4]
    assert np.allclose(live.figure('spectrum').data[0].y, s, rtol=1e-4)
    assert np.allclose(live.figure('matrices').data[1].z, layer.B['default'].detach().T)
    memory = live.data('memory').iloc[-1]
    *kinds, card = live.figure('memory').data
    shown = [float(trace.y[-1]) for trace in kinds]
    assert np.allclose(np.array(shown)/sum(shown), memory[[t.name for t in kinds]]/memory.sum()) and not len(card.y) and live.data('card').empty


def test_every_layer_can_be_chosen(finished):
    live = LiveRun(finished)
    assert list(live.choose.options)==list(finished.adapter.layers) and len(live.layers)==14
    for name in live.layers:
        live.choose.value = name
        assert np.array_equal(live.data('A'), finished.adapter.layers[name].A['default'].detach())
        assert np.allclose(live.figure('spectrum').data[0].y, matrices(finished.adapter, name)['s'])


def test_the_slider_looks_back(finished):
    live = LiveRun(finished)
    live._events['spectrum'] = [dict(kind='spectrum', layer=live.layer, step=i, time=i, s=[float(i)]*4) for i in range(5)]
    live.refresh(everything=True)
    assert (live.when.max, live.when.value)==(4, 4) and live.figure('spectrum').data[0].y[0]==4
    live.when.value = 1
    assert live.figure('spectrum').data[0].y[0]==1
    live._events['spectrum'].append(dict(kind='spectrum', layer=live.layer, step=5, time=5, s=[5.]*4))
    live.refresh(everything=True)
    assert live.when.value==1 and live.when.max==5          # a reader who looks back is not pulled forward


def test_unknown_names_are_answered_with_the_known(finished):
    with pytest.raises(KeyError, match="'model.layers.0.self_attn.q_proj'.*all 14"): LiveRun(finished, layer='layers.0.q_prj')
    for method in ('figure', 'data'):
        with pytest.raises(KeyError, match="'los'.*'loss'"): getattr(LiveRun(finished), method)('los')


def test_matrices_are_copies_on_the_cpu(finished):
    layer = finished.adapter.layers['model.layers.0.mlp.up_proj']
    seen = matrices(finished.adapter, 'model.layers.0.mlp.up_proj')
    was = seen['A'].copy()
    with torch.no_grad(): layer.A['default'].mul_(2)
    try: assert np.array_equal(seen['A'], was)
    finally:
        with torch.no_grad(): layer.A['default'].div_(2)


# Threads

async def in_a_loop(tmp_path, body, **settings):
    run = tiny_run(tmp_path/'run', **dict(pace=.02, epochs=2000) | settings)
    try: return await body(run, LiveRun(run))
    finally:
        run.stop()
        await asyncio.to_thread(run._done.wait, 20)


async def becomes(true, seconds=300):
    "Wait in the loop until `true()`; a busy machine may take its time."
    end = time.monotonic()+seconds
    while not true():
        assert time.monotonic() < end
        await asyncio.sleep(.05)


def test_draws_in_the_kernels_loop_only_and_not_too_often(tmp_path, monkeypatch):
    drawn = []
    fill = lr.fill_loss
    monkeypatch.setattr(lr, 'fill_loss', lambda fig, events: (drawn.append((threading.current_thread(), time.monotonic(), len(events))), fill(fig, events))[1])
    async def body(run, live):
        live._shown = 'somewhere'
        await becomes(lambda: len(drawn) >= 6)
    asyncio.run(in_a_loop(tmp_path, body))
    assert {t for t,_,_ in drawn}=={threading.main_thread()}
    assert np.diff([t for _,t,_ in drawn][1:6]).min() > .35 and drawn[5][2]-drawn[1][2] > 4    # several steps to a drawing


def test_no_probe_while_nobody_watches(tmp_path):
    async def body(run, live):
        await becomes(lambda: run.step > 5)
        assert not run._probes and not lr.of_kind(run.events, 'spectrum')     # made, not displayed
        page = lambda: live.watcher._message(None, {}, [])
        page()                                                                # a page speaks
        assert len(run._probes)==2
        await becomes(lambda: (page(), lr.of_kind(run.events, 'spectrum') and lr.of_kind(run.events, 'memory'))[1])
        live.watcher.last -= 60                                               # and falls silent
        await becomes(lambda: not run._probes)
        page()
        assert len(run._probes)==2
    asyncio.run(in_a_loop(tmp_path, body))


def test_closing_leaves_nothing_behind(tmp_path):
    from ipywidgets.widgets.widget import _instances
    async def body(run, _):
        _.close()
        subs, open_now = len(run._subs), len(_instances)
        for i in range(10):
            live = LiveRun(run)
            live._shown = str(i)
            live._watch()
            assert len(run._subs)==subs+1 and len(run._probes)==2 and len(run._waiting)==1
            live.close()
            live.close()
        assert len(run._subs)==subs and not run._probes and not run._waiting
        assert len(_instances) <= open_now+1                                  # the library of plotly's program
        assert run.state=='running'
    asyncio.run(in_a_loop(tmp_path, body))


def test_buttons_steer_the_run(tmp_path):
    async def body(run, live):
        async def is_now(state):
            await becomes(lambda: run.state==state)
            live.refresh()
        live.buttons['pause'].click()
        assert live.buttons['pause'].disabled and 'Pausing' in live._line.value
        await is_now('paused')
        step = run.step
        assert 'paused' in live._state.value and live.buttons['pause'].disabled and not live.buttons['resume'].disabled
        await asyncio.sleep(.5)
        assert run.step==step
        live.buttons['resume'].click()
        await is_now('running')
        await becomes(lambda: run.step > step)
        live.buttons['stop'].click()
        await is_now('stopped')
        assert all(b.disabled for b in live.buttons.values()) and run.checkpoint.is_dir() and live._wake not in run._subs
    asyncio.run(in_a_loop(tmp_path, body))


def test_a_blocking_wait_draws(tmp_path):
    drawn = []
    async def body(run, live):
        live._shown = 'somewhere'
        refresh = live.refresh
        live.refresh = lambda *a, **k: (drawn.append(run.step), refresh(*a, **k))[1]
        run.wait(progress=False)                    # blocks this loop
        assert len(set(drawn)) >= 3 and drawn[-1]==run.step and 'finished' in live._state.value
        assert len(live.data('memory')) >= 2 and len(live.data('spectrum')) >= 3
    asyncio.run(in_a_loop(tmp_path, body, epochs=20))


def test_without_a_loop_it_draws_on_demand(tmp_path):
    run = tiny_run(tmp_path/'run', epochs=3)
    live = LiveRun(run)
    assert live._loop is None
    run.wait(progress=False)
    assert len(live.data('loss').training.dropna())==run.step==15 and 'finished' in live._state.value


def test_a_loop_that_ended_does_not_hurt_the_run(tmp_path):
    async def make(): return LiveRun(tiny_run(tmp_path/'run', pace=.02, epochs=6))
    live = asyncio.run(make())
    live.run.wait(progress=False)
    assert live.run.state=='finished' and not lr.of_kind(live.run.events, 'warning') and len(live.data('loss')) > 5


# Failure and hostile text

def test_the_workers_error_is_said_in_words(tmp_path):
    trainer = tiny_trainer(tmp_path/'run', epochs=200)
    with torch.no_grad(): next(trainer.adapter.parameters()).fill_(float('nan'))
    run = trainer.start()
    with pytest.raises(FloatingPointError): run.wait(progress=False)
    live = LiveRun(run)
    said = Parts(live._trouble.value)
    assert 'NonFiniteLoss' in said.text and 'failed at step' in said.text and said.tags[0][1]['role']=='alert'
    assert all(b.disabled for b in live.buttons.values()) and 'NonFiniteLoss' in Parts(lr.still_html(run)).text


def test_a_broken_probe_does_not_hurt_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(lr, 'matrices', lambda *a: 1/0)
    async def body(run, live):
        live._shown = 'somewhere'
        live._watch()
        await becomes(lambda: 'ZeroDivisionError' in live._trouble.value)
        assert run.state=='running'
    asyncio.run(in_a_loop(tmp_path, body))


@pytest.mark.parametrize('text', HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_text_is_text(text):
    event = dict(kind='sample', step=1, time=1., question=text, base=text, adapter=text)
    run = SimpleNamespace(state='failed', error=ValueError(text), step=1, total_steps=2, events=[event, dict(kind='checkpoint', path=text, time=1., step=1), dict(kind='warning', text=text, time=1., step=1)])
    for html in (lr.samples_html([event]), lr.still_html(run)):
        parts = Parts(html)
        assert {t for t,_ in parts.tags} <= set('div span b p pre table thead tbody tr th td'.split())
        assert not any(k.startswith('on') or k in ('src','href') for _,attrs in parts.tags for k in attrs)
        assert len(html) < 60_000
        if len(text)<1000 and text.isprintable(): assert text in parts.text
        assert not re.search('[\x00-\x08\x0b-\x1f\x7f\u202a-\u202e\u2066-\u2069]', html)


# Plain helpers

def test_thin_and_shrink_keep_what_stands_out():
    y = np.zeros(50_000)
    y[33_333], y[44_444] = 9, -9
    kept = thin(y, 1000)
    assert {33_333, 44_444} <= set(kept) and len(kept) <= 1000 and (np.diff(kept) > 0).all()
    M = np.zeros((8, 4096))
    M[2, 4000], M[5, 1] = -3, 2
    small = shrink(M, 100)
    assert small.shape==(8, 100) and small.min()==-3 and small.max()==2 and np.array_equal(shrink(np.eye(5), 9), np.eye(5))


def test_time_left_ignores_a_pause():
    steps = [dict(kind='step', step=i, time=t) for i,t in enumerate([0, 2, 4, 500, 502, 504])]
    assert lr.time_left(steps, 15)==20 and lr.time_left(steps[:1], 15) is None and seconds_text(20)=='20 s'


def test_two_thousand_steps_are_drawn_in_a_fraction_of_a_second(finished):
    live = LiveRun(finished)
    for i in range(2000):
        live._events['step'].append(dict(kind='step', step=i, time=i/10, loss=1/(i+1), lr=1e-4, tokens_per_s=1e3, grad_norm=1.))
        live._events['spectrum'].append(dict(kind='spectrum', layer=live.layer, step=i, time=i/10, s=[1.]*4))
    times = []
    for _ in range(5):
        t = time.perf_counter()
        live.refresh(everything=True)
        times.append(time.perf_counter()-t)
    assert min(times) < .5


def test_saved_notebook_shows_the_last_state(tmp_path):
    "nbconvert's HTML of a notebook that ran without a page: no widget there, but the numbers and the curve."
    import nbformat
    from nbclient import NotebookClient
    from nbconvert import HTMLExporter
    tests = str(__import__('pathlib').Path(__file__).parent)
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in (
        f"import sys; sys.path.insert(0, {tests!r})\nfrom live_tiny import tiny_run\nfrom lora_nb.widgets.live_run import LiveRun\nrun = tiny_run('run', pace=.02, epochs=4)\nLiveRun(run)",
        "run.wait(progress=False)\nprint(f'{run.log.loss.iloc[-1]:.6f}')")])
    NotebookClient(nb, timeout=300, startup_timeout=300, store_widget_state=False, resources=dict(metadata=dict(path=str(tmp_path)))).execute()
    output = nb.cells[0].outputs[-1]
    assert 'application/vnd.jupyter.widget-view+json' in output.data
    assert 'finished' in output.data['text/html'] and 'step 20 of 20' in output.data['text/html'] and '<svg' in output.data['text/html']
    html, _ = HTMLExporter().from_notebook_node(nb)
    assert 'step 20 of 20' in html and 'LiveRun, finished' not in html


# A run that is over, from its folder

def test_a_folder_gives_the_same_view_without_a_model(finished):
    live, past = LiveRun(finished), LiveRun(str(finished.out))
    assert sorted(past.choose.options)==sorted(finished.adapter.layers) and past.run.model is None
    for layer in past.layers[::5]:
        live.choose.value = past.choose.value = layer
        assert past.data('A').equals(live.data('A')) and past.data('B').equals(live.data('B'))
        assert np.allclose(past.figure('spectrum').data[0].y, live.figure('spectrum').data[0].y)
    for name in ('loss', 'rates'): assert past.data(name).equals(live.data(name))
    assert 'finished' in past._state.value and f'step {finished.step} of {finished.total_steps}' in past._line.value
    assert all(b.disabled for b in past.buttons.values()) and not past._trouble.value
    assert "'layers.0.q_prj'" in str(pytest.raises(KeyError, LiveRun, finished.out, layer='layers.0.q_prj').value)


def test_other_runs_lie_beside_it(tmp_path, finished):
    slow = tiny_run(tmp_path/'run', epochs=2, lr=1e-3).wait(progress=False)
    live = LiveRun(slow, beside=[finished.out, tmp_path/'run'])                                   # all three folders are called 'run'
    fig = live.figure('loss')
    theirs = {t.name:t for t in fig.data}
    assert np.array_equal(fig.data[0].y, slow.log.loss) and np.array_equal(theirs[f'{finished.out}, held-out'].y, finished.evals.loss)
    assert np.array_equal(theirs[f'{finished.out}, training'].y, lr.smooth(finished.log.loss.to_numpy()))
    table = live.data('losses')
    assert table[str(finished.out)].training.dropna().tolist()==finished.log.loss.tolist() and table[str(slow.out)].training.dropna().tolist()==slow.log.loss.tolist()
    for html in (live._heads['loss'].value, lr.still_html(slow, live.others)): assert str(finished.out) in Parts(html).text


def test_hostile_folder_names_are_text(tmp_path):
    folder = tmp_path/'<img src=x onerror=alert(1)>'
    for out in (folder, tmp_path/'b'): tiny_run(out, epochs=1).wait(progress=False)
    beside = LiveRun(tmp_path/'b', beside=[folder])
    for html in (beside._heads['loss'].value, lr.still_html(beside.run, beside.others)): assert 'img' not in [t for t, _ in Parts(html).tags] and '<img src' in Parts(html).text


@pytest.mark.parametrize('text, state', [('', 'cut off'), ('{"kind": "state", "time": 0.0, "step": 0, "state": "running"}\n{"kind": "st', 'cut off'),
                                         ('{"kind": "error", "time": 1.0, "step": 3, "text": "OSError: disk full"}\n{"kind": "state", "time": 1.0, "step": 3, "state": "failed"}\n', 'failed')])
def test_a_run_that_did_not_end_well_is_shown(tmp_path, text, state):
    (tmp_path/'events.jsonl').write_text(text)
    live = LiveRun(tmp_path)
    assert state in live._state.value and ('disk full' in live._trouble.value)==(state=='failed') and live.data('loss').empty and live.choose.options==()


@pytest.mark.parametrize('bad', ['{"kind": "memory", "step": 1, "time": 1, "bytes": 3}', '{"kind": "memory", "step": 1, "time": 1, "bytes": {}, "card": {"total": "x"}}', '{"kind": "spectrum", "step": 1, "time": 1, "layer": "a", "s": ["1"]}',
                                 '{"kind": "state", "step": 1, "time": 1, "state": {}}', '{"kind": "error", "step": 1, "time": 1}', '[]', '{"kind": 3, "step": 1, "time": 1}', '{"kind": "step"}', 'step 3', '\x00\x01'])
def test_a_damaged_line_is_named(tmp_path, bad):
    good = '{"kind": "state", "time": 0.0, "step": 0, "state": "running"}\n'
    (tmp_path/'events.jsonl').write_text(good+bad+'\n'+good)
    with pytest.raises(ValueError, match='events.jsonl, line 2: no event of a run'): LiveRun(tmp_path)


def test_a_folder_without_a_run(tmp_path):
    with pytest.raises(FileNotFoundError, match="give a folder that Trainer"): LiveRun(tmp_path)


def test_a_card_is_drawn_beside_the_kinds(monkeypatch):
    "What PyTorch has reserved as a line, what all processes use of the card in words; on a CPU nothing of it."
    said = dict(device='cuda:1', name='Tesla T4', allocated=3*2**30, reserved=4*2**30, peak=3*2**30, used=5*2**30, total=15*2**30, source='nvml')
    monkeypatch.setattr(lr, 'gpu_memory', lambda: [None, said])
    assert lr.card_now(torch.device('cuda:1'))==dict(card=said) and lr.card_now(torch.device('cpu'))=={}
    kinds = {k: 2**29 for k in lr.MEMORY}
    events = [dict(kind='memory', time=t, bytes=kinds, **extra) for t in (1., 2.) for extra in [lr.card_now(torch.device('cuda:1'))]]
    fig = lr.memory_picture()
    words = lr.fill_memory(fig, events)
    assert words=="2.5 GiB in all · 5 GiB of the card's 15 GiB" and fig.data[-1].y.tolist()==[4., 4.] and fig.data[0].y.tolist()==[.5, .5]
    assert lr.memory_legend(events)['reserved by PyTorch (dotted)'][1]=="4 GiB"
    assert lr.card_frame(events).loc[2.].to_dict()==dict(allocated=3*2**30, reserved=4*2**30, used=5*2**30, total=15*2**30)
    plain = [dict(kind='memory', time=1., bytes=kinds)]
    assert lr.fill_memory(fig, plain)=='2.5 GiB in all' and not len(fig.data[-1].x) and lr.card_frame(plain).empty and list(lr.memory_legend(plain))==list(reversed(lr.MEMORY))


def test_a_costly_look_is_made_seldom(monkeypatch):
    now = [100.]
    monkeypatch.setattr(lr.time, 'monotonic', lambda: now[0])
    def slow(run): now[0] += .01; return dict(kind='memory')
    look, seen = lr.sparing(slow, share=1/50), []
    for _ in range(200):
        if look(None): seen.append(now[0])
        now[0] += .1
    assert np.allclose(np.diff(seen), .6, atol=.02) and len(seen) > 30     # .01 of every .5 and a bit
