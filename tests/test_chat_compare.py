"ChatCompare without a browser: its answers against `ask`, its threads, and a run that must not notice that it was asked."
import asyncio, json, threading, time
import pytest, torch
from chat_tiny import chatty, words
from test_live_run import HOSTILE, Parts, becomes
from lora_nb.adapter import activate, add_lora
from lora_nb.models import ask
from lora_nb.widgets import chat_compare as cc
from lora_nb.widgets.chat_compare import ChatCompare, Turn, answer_turn, compare


@pytest.fixture
def adapter(tmp_path):
    a = chatty(tmp_path/'run').adapter
    a.model.eval()
    return a


@pytest.fixture(scope='module')
def tok(): return words()


def both(a, tok, q, n=8):
    with a.disabled(): base = ask(a.model, tok, q, n)
    return dict(question=q, base=base, adapter=ask(a.model, tok, q, n))


def active(a): return [list(l.active) for l in a.layers.values()]


# compare

def test_compare_is_ask_without_and_with_the_adapter(adapter, tok):
    for q in ('w5 w6', 'w9', [dict(role='system', content='w3'), dict(role='user', content='w4')]):
        heard = dict(base=[], adapter=[])
        want = both(adapter, tok, q)
        assert compare(adapter, tok, q, lambda side, piece: heard[side].append(piece), max_new_tokens=8)==want
        assert want['base']!=want['adapter'] and {s: ''.join(p) for s, p in heard.items()}=={s: want[s] for s in heard} and len(heard['base'])==8


def test_compare_leaves_the_model_as_it_was(adapter, tok):
    adapter.model.train()
    adapter.model.model.layers[1].eval()
    modes, rng = [m.training for m in adapter.model.modules()], torch.get_rng_state()
    def fails(side, piece): raise OSError('the page is gone')
    compare(adapter, tok, 'w5', max_new_tokens=4)
    for bad in (fails, lambda side, piece: side=='adapter' and fails(side, piece)):
        with pytest.raises(OSError): compare(adapter, tok, 'w5', bad, max_new_tokens=4)
        assert set(map(tuple, active(adapter)))=={('default',)} and [m.training for m in adapter.model.modules()]==modes
    assert torch.equal(torch.get_rng_state(), rng)


def test_an_adapter_that_is_not_active_answers_all_the_same(adapter, tok):
    want = both(adapter, tok, 'w5')
    other = add_lora(adapter.model, r=2, name='other')
    with torch.no_grad():
        for l in other.layers.values(): l.B['other'].normal_(std=.3)
    activate(adapter.model, 'other')
    assert compare(adapter, tok, 'w5', max_new_tokens=8)==want and set(map(tuple, active(other)))=={('other',)}
    assert compare(other, tok, 'w5', max_new_tokens=8)['base']==want['base'] and compare(other, tok, 'w5', max_new_tokens=8)['adapter'] not in (want['base'], want['adapter'])
    other.remove()
    with pytest.raises(KeyError, match='not on its model'): compare(other, tok, 'w5')


def test_threads_take_turns(adapter, tok):
    want, got = both(adapter, tok, 'w5', 12), []
    threads = [threading.Thread(target=lambda: got.append(compare(adapter, tok, 'w5', lambda *_: time.sleep(.002), max_new_tokens=12))) for _ in range(6)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert got==[want]*6 and set(map(tuple, active(adapter)))=={('default',)}


def test_a_stop_ends_both(adapter, tok):
    stop, heard = threading.Event(), []
    def hear(side, piece):
        heard.append(side)
        if len(heard)==3: stop.set()
    got = compare(adapter, tok, 'w5', hear, stop, max_new_tokens=100)
    assert heard==['base']*4 and got['adapter']=='' and both(adapter, tok, 'w5')['base'].startswith(got['base'])


def test_a_turn_notes_speed_and_error(adapter, tok):
    adapter.model.register_forward_hook(lambda *_: time.sleep(.02))
    turn = answer_turn(Turn('w5'), adapter, tok, 11)
    speeds = [turn.speed(side) for side in cc.SIDES]
    assert turn.state=='answered' and all(0 < v < 50 for v in speeds), speeds                 # 20 ms a token, and a little more
    tok = words()
    tok.chat_template = None
    turn = answer_turn(Turn('w5'), adapter, tok, 11)
    assert turn.state=='failed' and 'no chat template' in str(turn.error) and not turn.busy


# The widget on an adapter that rests

def test_an_adapter_answers_in_a_thread_of_its_own(adapter, tok):
    where = set()
    adapter.model.register_forward_hook(lambda *_: where.add(threading.current_thread()))
    chat = ChatCompare(adapter, tok, max_new_tokens=8)
    want = both(adapter, tok, 'w5 w6')
    where.clear()
    assert chat.ask(' w5 w6\n').wait() is chat
    assert threading.main_thread() not in where and len(where)==1
    assert chat.data().drop(columns='step').to_dict('records')==[want] and chat.data().step.isna().all()
    assert Parts(chat._answers['base'].value).text==want['base'] and Parts(chat._answers['adapter'].value).text==want['adapter']
    assert 'Answered' in chat._status.value and chat.buttons['stop'].disabled and 'tokens/s' in chat._heads['base'].value and 'tokens/s' in chat._heads['adapter'].value
    chat.ask('w7').wait()
    earlier = Parts(chat._past.value).text
    assert want['base'] in earlier and want['adapter'] in earlier and 'w5 w6' in earlier and 'w7' in chat._now.value and len(chat.data())==2


def test_the_tokenizer_is_the_runs_or_must_be_given(tmp_path, adapter):
    run = chatty(tmp_path/'other', epochs=1).start().wait(progress=False)
    assert ChatCompare(run).tok is run.data.tok and ChatCompare(run, t := words()).tok is t
    with pytest.raises(ValueError, match=r'Adapter does not say which tokenizer.*ChatCompare\(source, tok\)'): ChatCompare(adapter)
    with pytest.raises(TypeError, match='a Run or an Adapter; given LlamaForCausalLM'): ChatCompare(adapter.model, t)


def test_what_is_wrong_is_told_in_the_widget(adapter, tok):
    said = lambda: Parts(chat._trouble.value)
    chat = ChatCompare(adapter, tok, max_new_tokens=60)
    for empty in ('', ' \n\t'):
        chat.text.value = empty
        chat.buttons['ask'].click()
        assert 'The question is empty' in said().text and said().tags[0][1]['role']=='alert' and not chat.turns
    slow = adapter.model.register_forward_hook(lambda *_: time.sleep(.02))
    chat.text.value = 'w5'
    chat.buttons['ask'].click()
    assert not said().text and chat.busy and not chat.buttons['stop'].disabled
    chat.buttons['ask'].click()
    chat.refresh()
    assert 'One question at a time' in said().text and len(chat.turns)==1
    chat.buttons['stop'].click()
    chat.wait()
    assert not said().text                             # it can be asked again
    slow.remove()

    broken = adapter.model.register_forward_hook(lambda *_: 1/0)
    chat.buttons['ask'].click()
    with pytest.raises(ZeroDivisionError): chat.wait()
    assert 'ZeroDivisionError' in said().text and 'Failed' in chat._status.value and len(chat.data())==1
    broken.remove()
    chat.ask('w5').wait()
    assert not said().text and 'ZeroDivisionError' in chat._past.value and len(chat.data())==2

    mute = words()
    mute.chat_template = None
    chat = ChatCompare(adapter, mute)
    chat.text.value = 'w5'
    chat.buttons['ask'].click()
    with pytest.raises(ValueError, match='no chat template'): chat.wait()
    assert 'no chat template' in said().text


def test_stop_ends_within_a_few_tokens(adapter, tok):
    counted = []
    adapter.model.register_forward_hook(lambda *_: (counted.append(1), time.sleep(.01))[0])
    chat = ChatCompare(adapter, tok, max_new_tokens=500).ask('w5')
    while len(counted) < 5: time.sleep(.005)
    chat.stop()
    at = len(counted)
    chat.wait()
    assert len(counted) <= at+2 and chat.turns[-1].state=='stopped' and chat.data().base[0] and not chat.data().adapter[0]
    assert 'Stopped' in chat._status.value
    chat.stop()                                        # nothing to stop: nothing happens
    counted.clear()
    chat.ask('w5')
    while chat.turns[-1].adapter=='':
        assert chat.busy
        if chat.turns[-1].base.count(' ') > 5: break
        time.sleep(.005)
    chat.close()
    by = time.monotonic()+300
    while chat.busy: assert time.monotonic() < by; time.sleep(.01)
    assert len(counted) < 30


@pytest.mark.parametrize('text', HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_text_is_text(text):
    turns = [Turn(text, 'answered', 1, text, text), Turn(text, 'failed', error=ValueError(text)), Turn(text, 'stopped', None, text)]
    for html in (cc.still_chat(turns), cc.earlier_html(turns), cc.answer_html(turns[0], 'base')):
        parts = Parts(html)
        assert {t for t, _ in parts.tags} <= set('div span b p table thead tbody tr th td'.split())
        assert not any(k.startswith('on') or k in ('src', 'href') for _, attrs in parts.tags for k in attrs)
        if len(text) < 1000 and text.isprintable(): assert text in parts.text


def test_closing_leaves_nothing_behind(tmp_path):
    from ipywidgets.widgets.widget import _instances
    run = chatty(tmp_path/'run', epochs=3000).start()
    try:
        before = len(_instances)
        for _ in range(5):
            chat = ChatCompare(run, max_new_tokens=4)
            chat.ask('w5').wait()
            assert len(run._subs)==len(run._waiting)==1 and len(_instances) > before
            chat.close()
            chat.close()
            with pytest.raises(RuntimeError, match='closed'): chat.ask('w5')
        assert not run._subs and not run._waiting and not run._probes and len(_instances)==before and run.state=='running'
    finally:
        run.stop()
        run._done.wait(20)


# A run that trains

def paced(run, pace=.02):
    run.subscribe(lambda e: e['kind']=='step' and time.sleep(pace))
    return run


async def in_a_loop(tmp_path, body, **settings):
    run = paced(chatty(tmp_path/'run', **dict(epochs=2000) | settings).start())
    try: return await body(run, ChatCompare(run, max_new_tokens=8))
    finally:
        run.stop()
        await asyncio.to_thread(run._done.wait, 20)


@pytest.mark.parametrize('settings', [dict(), dict(dropout=.5), dict(checkpointing=True, neftune=5.)], ids=['plain', 'dropout', 'checkpointing and noise'])
def test_a_run_does_not_notice_that_it_was_asked(tmp_path, settings):
    alone = chatty(tmp_path/'alone', epochs=6, **settings).start().wait(progress=False)
    def asks():
        run = paced(chatty(tmp_path/'asked', epochs=6, **settings).start())
        chat = ChatCompare(run, max_new_tokens=8)
        while run.state=='running': chat.ask(f'w{len(chat.turns)}').wait()
        return run, chat
    run, chat = asks()
    run.wait(progress=False)
    steps = chat.data().step
    assert len(set(steps)) >= 5 and steps.is_monotonic_increasing and (chat.data().base!=chat.data().adapter).any()
    assert run.log.loss.tolist()==alone.log.loss.tolist() and run.log.grad_norm.tolist()==alone.log.grad_norm.tolist()
    assert run.evals.loss.tolist()==alone.evals.loss.tolist()
    for a, b in zip(run.adapter.parameters(), alone.adapter.parameters(), strict=True): assert torch.equal(a, b)
    assert not [e for e in run.events if e['kind']=='warning']


def test_the_runs_worker_answers_at_a_step_boundary(tmp_path):
    async def body(run, chat):
        where, training = set(), []
        run.model.register_forward_hook(lambda m, *_: None if torch.is_grad_enabled() else (where.add(threading.current_thread().name), training.append(m.training))[0] and None)
        await becomes(lambda: run.step > 0)
        chat.ask('w5')
        await becomes(lambda: not chat.busy)
        assert where=={run._thread.name} and not any(training)
        step = chat.data().step[0]
        event = next(e for e in run.events if e['kind']=='sample')
        assert event['step']==step > 0 and {k: event[k] for k in ('question', 'base', 'adapter')}==chat.data().drop(columns='step').iloc[0].to_dict()
        await becomes(lambda: run.step > step)                                   # and it trains on
        chat.ask('w5')
        await becomes(lambda: not chat.busy)
        assert chat.data().base[0]==chat.data().base[1] and chat.data().step[1] > step and not run._probes
    asyncio.run(in_a_loop(tmp_path, body))


def test_each_answer_is_that_of_the_adapter_at_its_step(tmp_path):
    "The adapter's weights are noted in the worker beside the answer, and asked again afterwards."
    run = paced(chatty(tmp_path/'run', epochs=2000).start())
    chat, kept = ChatCompare(run, max_new_tokens=8), {}
    run.subscribe(lambda e: e['kind']=='sample' and kept.update({e['step']: {k: v.clone() for k, v in run.adapter.state_dict().items()}}))
    for _ in range(3):
        chat.ask('w5').wait()
        time.sleep(.1)
    run.stop()
    run.wait(progress=False)
    assert len(kept)==3
    for row in chat.data().itertuples():
        run.adapter.load_state_dict(kept[row.step])
        assert both(run.adapter, run.data.tok, 'w5')==dict(question='w5', base=row.base, adapter=row.adapter)


def test_it_streams_into_the_loop_and_not_too_often(tmp_path):
    drawn, held = [], []
    async def body(run, chat):
        chat.max_new_tokens = 40
        run.model.register_forward_hook(lambda m, *_: None if torch.is_grad_enabled() else time.sleep(.03))
        chat._answers['base'].observe(lambda c: drawn.append((threading.current_thread(), time.monotonic(), Parts(c['new']).text)), 'value')
        chat.ask('w5')
        await becomes(lambda: chat.turns[-1].base)
        step = run.step
        while chat.busy:
            assert run.step==step                                                # training holds
            held.append(chat._status.value)
            await asyncio.sleep(.05)
        await becomes(lambda: 'Answered' in chat._status.value)
        texts = [t for _, _, t in drawn if t not in ('…', '')]
        assert len(texts) >= 4 and all(b.startswith(a) for a, b in zip(texts, texts[1:])) and texts[-1]==chat.data().base[0]
    asyncio.run(in_a_loop(tmp_path, body))
    assert {t for t, _, _ in drawn}=={threading.main_thread()} and any('Training holds' in h for h in held)
    times = [t for _, t, _ in drawn][1:]
    assert all(b-a > .15 for a, b in zip(times, times[1:])), times


def test_it_draws_while_a_cell_waits_for_the_run(tmp_path):
    drawn = []
    async def body(run, chat):
        chat._shown = 'somewhere'
        run.model.register_forward_hook(lambda m, *_: None if torch.is_grad_enabled() else time.sleep(.05))
        threading.Timer(.3, lambda: chat._press()).start()                       # the page's click comes in the second thread
        chat.text.value = 'w5'
        chat._answers['base'].observe(lambda c: drawn.append(c['new']), 'value')
        run.wait(progress=False)                                                 # blocks this loop
        assert len(drawn) >= 3 and chat.turns[0].state=='answered' and 'Answered at step' in chat._status.value
        assert chat._told not in run._subs and not run._waiting
    asyncio.run(in_a_loop(tmp_path, body, epochs=20))


def test_it_answers_while_paused(tmp_path):
    async def body(run, chat):
        run.pause()
        await becomes(lambda: run.state=='paused')
        chat.ask('w5')
        await becomes(lambda: not chat.busy)
        assert chat.data().step.tolist()==[run.step] and run.state=='paused'
        run.resume()
        await becomes(lambda: run.state=='running')
    asyncio.run(in_a_loop(tmp_path, body))


def test_stop_during_a_run_ends_the_answer_and_not_the_run(tmp_path):
    async def body(run, chat):
        chat.max_new_tokens = 1000
        run.model.register_forward_hook(lambda m, *_: None if torch.is_grad_enabled() else time.sleep(.01))
        chat.ask('w5')
        await becomes(lambda: chat.turns[-1].base.count(' ') > 3)
        step, words_then = run.step, chat.turns[-1].base.count(' ')
        chat.stop()
        await becomes(lambda: not chat.busy)
        assert chat.data().base[0].count(' ') <= words_then+3 and chat.data().adapter[0]==''
        await becomes(lambda: run.step > step+1)
        assert run.state=='running' and not [e for e in run.events if e['kind']=='sample']    # half an answer is no sample
        chat.max_new_tokens = 4
        hold = threading.Event()
        run.subscribe(lambda e: e['kind']=='step' and hold.wait(5))
        step = run.step
        await becomes(lambda: run.step > step)
        chat.ask('w6')                                                                         # waits for the end of a long step
        chat.stop()
        assert not chat.busy and chat.turns[-1].state=='stopped' and not run._probes
        hold.set()
    asyncio.run(in_a_loop(tmp_path, body))


def test_an_error_is_told_and_the_run_goes_on(tmp_path):
    async def body(run, chat):
        broken = run.model.register_forward_hook(lambda m, *_: None if torch.is_grad_enabled() else 1/0)
        chat.ask('w5')
        await becomes(lambda: 'ZeroDivisionError' in chat._trouble.value)
        step = run.step
        await becomes(lambda: run.step > step)
        broken.remove()
        assert run.state=='running'
        chat.ask('w5')
        await becomes(lambda: len(chat.data())==1)
    asyncio.run(in_a_loop(tmp_path, body))


@pytest.mark.parametrize('end', ['finished', 'stopped', 'failed'])
def test_a_run_that_ends_leaves_the_question_to_the_widget(tmp_path, end):
    "Asked after the worker looked for the last time: nobody would ever come."
    trainer = chatty(tmp_path/'run', epochs=2 if end=='finished' else 2000)
    late = lambda e: e['kind']=='checkpoint' if end!='failed' else e['kind']=='error'          # after the last probe was served
    run = trainer.start()
    chat = ChatCompare(run, max_new_tokens=4)
    run.subscribe(lambda e: late(e) and chat.ask('w5'))
    if end=='stopped': run.stop()
    if end=='failed':
        with torch.no_grad(): next(trainer.adapter.parameters()).fill_(float('nan'))
    run._done.wait(30)
    assert run.state==end
    by = time.monotonic()+300
    while chat.busy: assert time.monotonic() < by, 'nobody answers'; time.sleep(.02)
    chat.wait()
    assert chat.turns[0].state=='answered' and chat.data().step.tolist()==[run.step]
    assert chat._told not in run._subs and not [e for e in run.events if e['kind']=='warning']


def test_questions_from_many_threads_while_a_run_ends_are_each_answered_once(tmp_path):
    for i in range(8):
        run = chatty(tmp_path/f'run{i}', epochs=1).start()
        chats = [ChatCompare(run, max_new_tokens=3) for _ in range(4)]
        def asks(chat):
            for _ in range(3): chat.ask('w5').wait()
        threads = [threading.Thread(target=asks, args=(c,)) for c in chats]
        for t in threads: t.start()
        for t in threads: t.join(30)
        run.wait(progress=False)
        assert [len(c.data()) for c in chats]==[3]*4 and not run._probes and run.step==5
        assert set(map(tuple, active(run.adapter)))=={('default',)}


def test_a_saved_notebook_shows_what_was_asked(tmp_path):
    "nbconvert's HTML of a notebook that ran without a page: no widget there, but questions and answers."
    import nbformat
    from nbclient import NotebookClient
    from nbconvert import HTMLExporter
    tests = str(__import__('pathlib').Path(__file__).parent)
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in (
        f"import sys; sys.path.insert(0, {tests!r})\nfrom chat_tiny import chatty\nfrom lora_nb.widgets.chat_compare import ChatCompare\nrun = chatty('run', epochs=60).start()\nchat = ChatCompare(run, max_new_tokens=8)\nchat",
        "chat.ask('w5 <i>').wait()\nrun.wait(progress=False)\nchat.ask('w6').wait()\nprint(chat.data().to_json(orient='values'))")])
    NotebookClient(nb, timeout=300, startup_timeout=300, store_widget_state=False, resources=dict(metadata=dict(path=str(tmp_path)))).execute()
    rows = json.loads(nb.cells[1].outputs[-1].text)
    view, still = nb.cells[0].outputs[-2:]
    assert 'application/vnd.jupyter.widget-view+json' in view.data
    shown = Parts(still.data['text/html']).text
    assert len(rows)==2 and all(str(v) in shown for row in rows for v in row) and '<i>' not in still.data['text/html']
    html, _ = HTMLExporter().from_notebook_node(nb)
    assert rows[0][2] in html and 'ChatCompare, ' not in html
