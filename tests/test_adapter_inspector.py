"AdapterInspector without a browser: what it draws is what the adapter holds, live or saved, one or two."
import json
import numpy as np, pytest, torch
from ipywidgets.widgets.widget import _instances
from types import SimpleNamespace
from conftest import tiny_llama
from live_tiny import tiny_trainer
from test_live_run import HOSTILE, Parts
from lora_nb.adapter import add_lora, load_adapter
from lora_nb.spectra import frobenius_norm, spectra_by_layer
from lora_nb.widgets import adapter_inspector as ai
from lora_nb.widgets.adapter_inspector import AdapterInspector, Factors, colour_limits, matrix_map, norm_frame, norm_grid

LAYER = 'model.layers.1.mlp.down_proj'


def filled(model, **kwargs):
    a = add_lora(model, **dict(r=4, alpha=8) | kwargs)
    with torch.no_grad():
        for l in a.layers.values(): torch.nn.init.normal_(l.B[a.name], std=.1)
    return a


@pytest.fixture
def pair(llama): return filled(llama, name='one'), filled(llama, r=8, scaling='rslora', rank_pattern={'q_proj': 2}, alpha_pattern={'down_proj': 3.}, name='two')


def test_norms_are_those_of_the_whole_update(pair):
    for a in pair:
        frame = norm_frame(a)
        assert list(frame.index)==list(a.layers)
        for path,l in a.layers.items():
            want = l.A[a.name].norm(), l.B[a.name].norm(), l.delta(a.name).norm()
            assert np.allclose(frame.loc[path, ['A', 'B', 'ΔW']].astype(float), [t.item() for t in want], rtol=1e-5)
        assert np.allclose(frame['ΔW'], [frobenius_norm(s).item() for s in spectra_by_layer(a).values()], rtol=1e-4)


@pytest.mark.parametrize('kwargs', [dict(), dict(scaling='rslora'), dict(rank_pattern={'v_proj': 2}, alpha_pattern={'mlp.*': 5}), dict(init='pissa')], ids=str)
def test_a_saved_adapter_shows_the_same(llama, tmp_path, kwargs):
    a = filled(llama, **kwargs)
    folder = a.save(tmp_path/'saved')
    mine, saved = Factors(a), Factors(folder)
    assert set(mine.layers)==set(saved.layers)
    for path in mine.layers:
        for x, y in zip(mine(path), saved(path)): assert torch.allclose(torch.as_tensor(x), torch.as_tensor(y))
    assert np.allclose(norm_frame(folder).loc[list(mine.layers), 'ΔW'], norm_frame(a)['ΔW'])


def test_figures_hold_the_matrices(pair):
    seen = AdapterInspector(*pair, layer=LAYER)
    for side, a in zip(('left', 'right'), pair):
        l = a.layers[LAYER]
        for name, M in {'A': l.A[a.name], 'Bᵀ': l.B[a.name].T, 'ΔW': l.delta(a.name)}.items():
            trace = seen.figure(name, side).data[0]
            assert np.allclose(trace.z, M.detach(), atol=1e-6) and np.array_equal(seen.data(name, side), trace.z)
            assert len(trace.x)==M.shape[1] and len(trace.y)==M.shape[0]
        grid = norm_grid(norm_frame(a))
        assert np.array_equal(seen.figure('overview', side).data[0].z, grid) and grid.loc['mlp.down_proj', 1]==norm_frame(a).loc[LAYER, 'ΔW']
    seen.close()


def test_colours_are_shared_as_chosen(pair):
    seen = AdapterInspector(*pair, layer=LAYER)
    ends = lambda: {(s, n): seen.figure(n, s).data[0].zmax for s in ('left', 'right') for n in ai.MATRICES}
    most = {k: float(np.abs(m).max(axis=None)) for k, m in seen.maps().items()}
    assert all(ends()[s, n]==max(most['left', n], most['right', n]) for s, n in most)
    seen.controls['colours'].value = 'all'
    assert set(ends().values())=={max(most.values())}
    seen.controls['colours'].value = 'own'
    assert ends()==most
    top = max(norm_frame(a)['ΔW'].max() for a in pair)
    assert {seen.figure('overview', s).data[0].zmax for s in ('left', 'right')}=={top}


def test_tiles_keep_the_greatest_entry_and_windows_are_exact():
    g = torch.Generator().manual_seed(0)
    A, B = torch.randn(3, 700, generator=g), torch.randn(500, 3, generator=g)
    whole = (2*B@A).numpy()
    for keep in (7, 64, 499, 5000):
        m = matrix_map((A, B, 2.), keep=keep)
        assert m.shape==(min(keep, 500), min(keep, 700))
        rows, cols = [*m.index, 500], [*m.columns, 700]
        for i in range(0, len(m), 11):
            for j in range(0, m.shape[1], 13):
                tile = whole[rows[i]:rows[i+1], cols[j]:cols[j+1]]
                assert np.isclose(abs(m.iloc[i, j]), np.abs(tile).max(), rtol=1e-5) and np.isclose(tile, m.iloc[i, j], atol=1e-5).any()
    m = matrix_map((A, B, 2.), rows=(490, 600), columns=(-5, 3))
    assert np.allclose(m, whole[490:, :4], atol=1e-5) and list(m.index)==list(range(490, 500)) and list(m.columns)==[0, 1, 2, 3]
    assert np.array_equal(matrix_map((A, B, 2.), 'A', columns=(3, 5)), A[:, 3:6])


def test_the_map_of_a_large_layer_is_made_in_bands(monkeypatch):
    A, B = torch.randn(4, 8192), torch.randn(4096, 4)
    made = []
    shrink = ai.shrink
    monkeypatch.setattr(ai, 'shrink', lambda M, keep: made.append(M.size) or shrink(M, keep))
    m = matrix_map((A, B, 1.))
    assert m.shape==(256, 256) and max(made) < 2**22 and np.isclose(np.abs(m).max(axis=None), (B@A).abs().max())


def test_zoom_shows_that_window_on_both_sides(pair):
    seen = AdapterInspector(*pair, layer=LAYER)
    seen.figures['left']['ΔW'].update_layout(xaxis=dict(autorange=False, range=[4.6, 9.2]), yaxis=dict(autorange=False, range=[20.4, 9.7]))   # as a mouse does
    for side, a in zip(('left', 'right'), pair):
        trace = seen.figure('ΔW', side).data[0]
        assert np.allclose(trace.z, a.layers[LAYER].delta(a.name)[10:21, 5:10].detach(), atol=1e-6) and list(trace.x)==[5, 6, 7, 8, 9] and trace.y[0]==10
    seen.figures['right']['ΔW'].update_layout(xaxis=dict(autorange=True, range=None), yaxis=dict(autorange='reversed', range=None))           # a double click
    assert np.asarray(seen.figure('ΔW').data[0].z).shape==(64, 128)
    seen.zoom('A', columns=(3, 7))
    seen.select('model.layers.0.mlp.down_proj')                                                                                               # another layer: all of it
    assert seen.data('A').shape==(4, 128) and seen.figures['left']['A'].layout.xaxis.autorange


def test_layers_are_chosen_by_block_module_and_click(pair):
    seen = AdapterInspector(pair[0], layer=LAYER)
    assert (seen.controls['block'].value, seen.controls['module'].value)==(1, 'mlp.down_proj')
    seen.controls['block'].value = 0
    assert seen.layer=='model.layers.0.mlp.down_proj'
    seen.controls['module'].value = 'self_attn.k_proj'
    assert seen.layer=='model.layers.0.self_attn.k_proj' and np.allclose(seen.figure('A').data[0].z, pair[0].layers[seen.layer].A['one'].detach())
    table = seen.data('overview')
    seen._clicked('left', None, SimpleNamespace(point_inds=[(list(table.index).index('mlp.up_proj'), 1)]), None)
    assert seen.layer=='model.layers.1.mlp.up_proj' and seen.controls['module'].value=='mlp.up_proj'
    assert seen.figure('overview').data[1].y[0]=='up_proj' and seen.figure('overview').data[1].x[0]==1
    seen.controls['norm'].value = 'B'
    assert np.array_equal(seen.figure('overview').data[0].z, norm_grid(norm_frame(pair[0]), 'B'))


def test_adapters_of_different_layers(llama):
    seen = AdapterInspector(filled(llama, targets='attention', name='a'), filled(llama, targets='mlp', name='m'))
    assert seen.layer.split('.')[-2]=='self_attn' and 'no such layer' in seen._heads['right']['ΔW'].value
    seen.select(LAYER)
    assert 'no such layer' in seen._heads['left']['ΔW'].value and np.asarray(seen.figure('ΔW', 'right').data[0].z).any()


def test_steps_of_a_run(tmp_path):
    run = tiny_trainer(tmp_path/'run', epochs=4, save_every=5, keep=9).start().wait(progress=False)
    seen = AdapterInspector(run, layer='model.layers.1.mlp.up_proj')
    names = list(seen.sources)
    assert names==['step 5', 'step 10', 'step 15', 'step 20', 'step 20, now'] and seen.shown==dict(left='step 20, now', right=None)
    seen.controls['right'].value = 'step 5'
    assert not np.array_equal(seen.data('A'), seen.data('A', 'right')) and seen.data('overview').index.equals(seen.data('overview', 'right').index)
    seen.controls['left'].value = 'step 5'
    assert np.array_equal(seen.data('A'), seen.data('A', 'right')) and seen._panels['right'].layout.display is None
    seen.controls['right'].value = ''
    assert seen._panels['right'].layout.display=='none'
    assert list(AdapterInspector(run.out).sources)==names[:-1]
    live = SimpleNamespace(events=[], out=tmp_path/'none', state='running', step=3, adapter=run.adapter)
    with pytest.raises(FileNotFoundError, match='save_now'): AdapterInspector(live)


def test_faults_are_said(pair, tmp_path):
    with pytest.raises(KeyError, match="'down_prj'.*down_proj"): AdapterInspector(pair[0], layer='down_prj')
    with pytest.raises(FileNotFoundError, match='adapter_config.json'): AdapterInspector(tmp_path)
    seen = AdapterInspector(pair[0])
    for call in (seen.data, seen.figure):
        with pytest.raises(KeyError, match='overview'): call('overvew')
    folder = pair[1].save(tmp_path/'gone')
    both = AdapterInspector(pair[0], folder)
    both._factors, both._norms = {}, {}
    (folder/'adapter_model.safetensors').unlink()
    both.controls['left'].value = 'gone'
    assert 'FileNotFoundError' in both._trouble.value and both.shown['left']=='one'


def test_values_that_are_not_finite(pair):
    with torch.no_grad(): pair[0].layers[LAYER].B['one'][0, 0] = float('nan')
    seen = AdapterInspector(pair[0], layer=LAYER)
    assert np.isnan(norm_frame(pair[0]).loc[LAYER, 'ΔW']) and np.isfinite(seen.figure('ΔW').data[0].zmax) and 'nan' in ai.still_inspector(seen)


def test_nothing_is_changed_and_closing_leaves_nothing(pair):
    was = {k: v.clone() for k, v in pair[0].state_dict().items()}
    AdapterInspector(pair[0]).close()                        # the library of plotly's program
    open_now = len(_instances)
    for _ in range(3):
        seen = AdapterInspector(*pair)
        seen.select(LAYER).zoom('A', columns=(0, 5))
        seen.close()
        seen.close()
    assert len(_instances) <= open_now and all(torch.equal(v, was[k]) for k, v in pair[0].state_dict().items())


@pytest.mark.parametrize('text', HOSTILE[:7], ids=range(7))
def test_hostile_names_are_text(llama, tmp_path, text):
    folder = filled(llama, targets='down_proj').save(tmp_path/'saved')
    from safetensors.torch import load_file, save_file
    path = text.replace('.', '').replace('\x00', '')
    save_file({k.replace('mlp', path): v for k, v in load_file(folder/'adapter_model.safetensors').items()}, folder/'adapter_model.safetensors')
    (folder/'adapter_config.json').write_text(json.dumps(dict(r=4, lora_alpha=8)))
    seen = AdapterInspector(folder)
    for html in (ai.still_inspector(seen), seen._heads['left']['overview'].value, seen._heads['left']['side'].value):
        parts = Parts(html)
        assert {t for t, _ in parts.tags} <= set('p svg text rect title table thead tbody tr th td h3 span ul li i'.split())
        assert not any(k.startswith('on') or k in ('src', 'href') for _, attrs in parts.tags for k in attrs)
