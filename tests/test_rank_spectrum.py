"RankSpectrum without a browser: its numbers against dense SVDs, its cuts against merged truth, its threads."
import asyncio, json
import numpy as np, pytest, torch
from ipywidgets.widgets.widget import _instances
from types import SimpleNamespace
from conftest import counting
from live_tiny import tiny_run, tiny_trainer
from test_live_run import HOSTILE, Parts
from lora_nb.adapter import add_lora, load_adapter, truncate
from lora_nb.spectra import effective_rank, spectra_by_layer
from lora_nb.widgets import rank_spectrum as rs
from lora_nb.widgets.rank_spectrum import RankSpectrum, effective_ranks, loss_after_cut, rank_table, samples_loss, spectra_history, spectrum_bands, truncated, watch_spectra

LAYER = 'model.layers.1.mlp.up_proj'


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    trainer = tiny_trainer(tmp_path_factory.mktemp('r')/'run', epochs=4, save_every=5, keep=9)
    run = trainer.start()
    watch_spectra(run, every=0.)
    return run.wait(progress=False)


def shapes(a): return {p: (l.out_features, l.in_features) for p, l in a.layers.items()}


def filled(model, **kwargs):
    a = add_lora(model, **dict(r=8, alpha=16) | kwargs)
    with torch.no_grad():
        for l in a.layers.values(): torch.nn.init.normal_(l.B[a.name], std=.1)
    return a


def test_figures_hold_the_spectra(run):
    seen = RankSpectrum(run.adapter, run, layer=LAYER)
    s = torch.linalg.svdvals(run.adapter.layers[LAYER].delta().double())[:4].numpy()
    assert np.allclose(seen.figure('spectrum').data[3].y, s, rtol=1e-4)
    assert np.isclose(seen.figure('ranks').data[2].y[-1], float(effective_rank(torch.tensor(s))), rtol=1e-4)
    assert np.allclose(seen.figure('cut').data[0].y, [np.sqrt((s[k:]**2).sum()/(s**2).sum()) for k in range(1, 5)], atol=1e-4)
    seen.choose.value = ''
    all_s = list(spectra_by_layer(run.adapter).values())
    assert np.allclose(seen.figure('spectrum').data[2].y, np.median([x/x[0] for x in all_s], 0), rtol=1e-4)
    assert np.isclose(seen.figure('ranks').data[2].y[-1], np.median([float(effective_rank(x)) for x in all_s]), rtol=1e-4)
    for name, trace, column in (('spectrum', 2, 'value'), ('spectrum', 0, 'high'), ('ranks', 1, 'low'), ('cut', 0, 'error')):
        assert np.array_equal(seen.figure(name).data[trace].y, seen.data(name)[column])
    assert list(seen.figure('cut').data[0].customdata)==list(seen.data('cut').parameters) and seen.data('cut').parameters.iloc[-1]==run.adapter.n_params


def test_error_left_is_that_of_the_cut(run):
    table = rank_table(spectra_by_layer(run.adapter), shapes(run.adapter))
    whole = {p: l.delta() for p, l in run.adapter.layers.items()}
    total = sum(w.double().square().sum() for w in whole.values())
    for k in (1, 2, 3):
        with truncated(run.adapter, k):
            off = sum((l.delta().double()-whole[p].double()).square().sum() for p, l in run.adapter.layers.items())
            assert table.parameters[k]==run.adapter.n_params
        assert np.isclose(table.error[k], (off/total).sqrt().item(), rtol=1e-3) and np.isclose(table.energy[k], 1-table.error[k]**2)
    assert table.error[4]==0


def test_history_joins_events_and_checkpoints(run):
    history = spectra_history(run.events, run.adapter, run.step)
    assert list(history)==sorted(history) and {5, 10, 15, 20} <= set(history) and 0 in history
    only = spectra_history([e for e in run.events if e['kind']=='checkpoint'])
    assert list(only)==[5, 10, 15, 20]
    noted = spectra_history([e for e in run.events if e['kind']=='spectra'])
    for p, s in only[5].items(): assert torch.allclose(noted[5][p], s, rtol=1e-4, atol=1e-7)
    assert all(torch.allclose(only[20][p], s, rtol=1e-4, atol=1e-7) for p, s in spectra_by_layer(run.adapter).items())
    one = spectra_history([dict(kind='spectrum', step=3, layer=LAYER, s=[2., 1.])])
    assert effective_ranks({**one, 4: history[20]}).index.tolist()==[4] and effective_ranks({**one, 4: history[20]}, LAYER).index.tolist()==[3, 4]


def test_the_run_file_holds_the_spectra(run):
    events = [json.loads(line) for line in (run.out/'events.jsonl').read_text().splitlines()]
    assert effective_ranks(spectra_history(events)).equals(effective_ranks(spectra_history(run.events)))


def test_the_slider_looks_back(run):
    seen = RankSpectrum(run.adapter, run, layer=LAYER)
    steps = seen.steps()
    assert (seen.when.max, seen.step())==(len(steps)-1, 20)
    seen.when.value = steps.index(5)
    assert np.allclose(seen.figure('spectrum').data[3].y, rs.folder_spectra(run.out/'checkpoint-5')[LAYER], rtol=1e-4) and seen.figure('ranks').data[3].x[0]==5
    seen.keep.value = 2
    assert f'error {seen.table().error[2]:.1%}' in Parts(seen._heads['cut'].value).text


@pytest.mark.parametrize('kwargs', [dict(), dict(scaling='rslora'), dict(init='pissa'), dict(dora=True), dict(rank_pattern={'q_proj': 3})], ids=str)
def test_cutting_for_a_moment_changes_no_bit(llama, kwargs):
    a = filled(llama, **kwargs)
    ids = torch.arange(24).reshape(2, 12)
    was, tensors, logits = {k: v.clone() for k, v in a.state_dict().items()}, list(map(id, a.parameters())), llama(ids).logits
    alphas, options = {p: l.alpha[a.name] for p, l in a.layers.items()}, dict(a.options)
    with truncated(a, 1):
        assert set(a.ranks.values())=={1}
        cut = llama(ids).logits
    assert not torch.equal(cut, logits) and torch.equal(llama(ids).logits, logits)
    with pytest.raises(ZeroDivisionError):
        with truncated(a, energy=.5): 1/0
    with pytest.raises(ValueError):
        with truncated(a, 0): pass
    assert tensors==list(map(id, a.parameters())) and list(a.state_dict())==list(was) and all(torch.equal(v, was[k]) for k, v in a.state_dict().items())
    assert alphas=={p: l.alpha[a.name] for p, l in a.layers.items()} and a.options==options and torch.equal(llama(ids).logits, logits)
    assert all(p.requires_grad for p in a.parameters())


def test_an_optimizer_goes_on_after_a_measurement(llama):
    a, data = filled(llama), counting(16)
    opt = torch.optim.SGD(a.parameters(), lr=.1)
    loss_after_cut(a, 2, data.val)
    llama.train()
    before = samples_loss(llama, data.train)
    assert llama.training
    from lora_nb.data import collate
    from lora_nb.loss import model_loss
    model_loss(llama, collate(data.train)).backward()
    opt.step()
    assert samples_loss(llama, data.train) < before


def test_losses_are_those_of_a_cut_adapter_loaded_anew(llama, tmp_path):
    a, data = filled(llama), counting(24)
    seen = RankSpectrum(a, loss=data.val)
    seen.measure([8, 3, 1])
    a.save(tmp_path/'a')
    for k in (8, 3, 1):
        again = load_adapter(llama, tmp_path/'a', name=f'again{k}')
        truncate(again, rank=k)
        assert np.isclose(samples_loss(llama, data.val), seen.losses[k], rtol=1e-6)
    assert list(seen.figure('cut').data[1].x)==[1, 3, 8] and list(seen.figure('cut').data[1].y)==[seen.losses[k] for k in (1, 3, 8)]
    assert seen.data('cut').loss.dropna().to_dict()==seen.losses


def test_the_held_out_loss_is_the_trainers(run):
    seen = RankSpectrum(run.adapter, run)
    seen.button.click()
    assert set(seen.losses)=={1, 2, 4} and np.isclose(seen.losses[4], run.evals.loss.iloc[-1], rtol=1e-5)
    assert f'{seen.losses[2]:.4f}' in seen._rows.value and seen.button.description=='Measure the loss' and not seen.button.disabled
    calls = []
    given = RankSpectrum(run.adapter, loss=lambda: calls.append(set(run.adapter.ranks.values())) or 1.)
    given.button.click()
    given.button.click()
    assert calls==[{4}, {2}, {1}]


def test_the_adapter_that_is_measured_is_the_one_that_is_shown(llama):
    one, data = filled(llama, name='one'), counting(24)
    want = samples_loss(llama, data.val)
    two = filled(llama, name='two')                                        # now `two` alone is active
    was = {l: list(l.active) for l in one.layers.values()}
    assert want!=samples_loss(llama, data.val) and loss_after_cut(one, 8, data.val)==want
    assert was=={l: l.active for l in one.layers.values()} and set(map(tuple, was.values()))=={('two',)}
    from lora_nb.adapter import activate
    activate(llama, 'one', 'two')
    assert loss_after_cut(one, 8, data.val)==samples_loss(llama, data.val)!=want


def test_faults_are_said(run):
    with pytest.raises(KeyError, match="'up_prj'.*up_proj"): RankSpectrum(run.adapter, layer='up_prj')
    bare = RankSpectrum(run.adapter)
    assert bare.button.disabled and 'loss=' in bare.button.tooltip
    with pytest.raises(ValueError, match='loss=data.val'): bare.measure()
    with pytest.raises(ValueError, match='No labelled token'): samples_loss(run.model, [])
    for call in (bare.data, bare.figure):
        with pytest.raises(KeyError, match="'cut'"): call('cutt')
    broken = RankSpectrum(run.adapter, loss=lambda: 1/0)
    broken.button.click()
    assert 'ZeroDivisionError' in Parts(broken._trouble.value).text and set(run.adapter.ranks.values())=={4}


def test_while_it_trains(tmp_path, monkeypatch):
    async def body():
        run = tiny_run(tmp_path/'run', pace=.02, epochs=5000)
        monkeypatch.setattr(rs, 'truncate', lambda *a: pytest.fail('cut while it trained'))
        async def until(true):
            for _ in range(600):
                if true(): return
                await asyncio.sleep(.1)
            raise AssertionError('a minute has passed')
        seen = RankSpectrum(run.adapter, run, loss=lambda: 1., every=.1)
        try:
            assert seen.button.disabled and len(run._probes)==1
            with pytest.raises(RuntimeError, match='wait until it has ended'): seen.measure()
            await until(lambda: len(seen.data('ranks')) > 3)
            assert seen.step()==seen.steps()[-1]
            seen.when.value, was = 1, seen.when.max
            await until(lambda: seen.when.max > was)
            assert seen.when.value==1                                          # not pulled forward
        finally:
            run.stop()
            await asyncio.to_thread(run._done.wait, 20)
        await until(lambda: seen._wake not in run._subs)
        assert not run._probes and not run._waiting and not seen.button.disabled and seen.steps()[-1]==run.step
    asyncio.run(body())


def test_closing_leaves_nothing_behind(tmp_path, run):
    RankSpectrum(run.adapter).close()                          # the library of plotly's program
    training = tiny_run(tmp_path/'run', pace=.02, epochs=60)
    open_now, subs = len(_instances), len(training._subs)
    try:
        for _ in range(3):
            seen = RankSpectrum(training.adapter, training)
            assert len(training._subs)==subs+1 and len(training._probes)==1 and len(training._waiting)==1
            seen.close()
            seen.close()
        assert len(training._subs)==subs and not training._probes and not training._waiting and len(_instances) <= open_now and training.state=='running'
    finally:
        training.stop()
        training._done.wait(20)


def test_an_untrained_adapter(llama):
    seen = RankSpectrum(add_lora(llama, r=4))
    assert not seen.data('cut').error.any() and not seen.data('spectrum').value.any() and seen.when.disabled
    assert '0.00' in rs.still_spectrum(seen)


@pytest.mark.parametrize('text', HOSTILE[:7], ids=range(7))
def test_hostile_names_are_text(text):
    l = SimpleNamespace(A={'a': torch.ones(1, 2)}, B={'a': torch.ones(2, 1)}, scaling={'a': 1.}, factors=lambda n: (torch.ones(1, 2), torch.ones(2, 1)), out_features=2, in_features=2)
    seen = RankSpectrum(SimpleNamespace(layers={text: l}, name='a'), layer=text)
    seen._say_button()
    for html in (rs.still_spectrum(seen), *(h.value for h in seen._heads.values())):
        parts = Parts(html)
        assert {t for t, _ in parts.tags} <= set('p svg path text polyline table thead tbody tr th td h3 span ul li i'.split())
        assert not any(k.startswith('on') or k in ('src', 'href') for _, attrs in parts.tags for k in attrs)
