"QuantExplorer without a browser: what it draws is what plain functions count, on either side, for every choice."
import numpy as np
import pytest
import torch
from conftest import tiny_llama
from hypothesis import given, settings, strategies as st
from lora_nb.data import Sample
from lora_nb.quantize import BLOCKSIZES, FP4, INT4, NF4, QuantConfig, quantize
from lora_nb.codebook import fit_codebook
from lora_nb.sensitivity import mean_loss
from lora_nb.widgets import quant_explorer as qe
from lora_nb.widgets.quant_explorer import QuantExplorer, facts, histogram_frame, level_frame, rounding, weights_of, zoom_frame


def samples(n=4):
    g = torch.Generator().manual_seed(1)
    return [Sample(x, x, i) for i, x in enumerate(torch.randint(0, 40, (n, 12), generator=g).tolist())]


@pytest.fixture(scope='module')
def model(): return tiny_llama()


@pytest.fixture
def explorer(model):
    e = QuantExplorer(model, samples(), layer='model.layers.0.mlp.up_proj', a=NF4(double=True), b=FP4(blocksize=128))
    yield e
    e.close()


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 9), cols=st.integers(1, 130), make=st.sampled_from([NF4, FP4, INT4]), size=st.sampled_from(BLOCKSIZES[:4]), double=st.booleans(),
       dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_levels_are_those_of_every_weight(rows, cols, make, size, double, dtype):
    torch.manual_seed(rows*1000+cols)
    w = torch.randn(rows, cols).to(dtype)
    seen = rounding(w, make(size, double))
    q = seen['q']
    codes, err = q.codes.flatten().numpy(), (q.dequantize(torch.float32)-w.float()).flatten().double().numpy()
    for row in level_frame(seen).itertuples():
        on = codes == row.code
        assert row.share == pytest.approx(on.mean()) and row.level == pytest.approx(q.codebook.levels[row.code])
        assert row.part == pytest.approx((err[on]**2).sum()/max((err**2).sum(), 1e-300), abs=1e-6)
        assert np.isnan(row.error) if not on.any() else row.error == pytest.approx(np.sqrt((err[on]**2).mean())/w.float().pow(2).mean().sqrt().item(), rel=1e-4, abs=1e-7)
    scaled = (w.float().flatten()/q.scales.repeat_interleave(size)[:w.numel()]).clamp(-1.1, 1.1).numpy()
    h = histogram_frame(seen)
    assert (h.density*(h.scaled[1]-h.scaled[0])).sum() == pytest.approx(1) and (h.density*h.scaled).sum()*(h.scaled[1]-h.scaled[0]) == pytest.approx(scaled.mean(), abs=.01)


def test_a_layer_of_many_chunks_is_counted_once():
    torch.manual_seed(0)
    w = torch.randn(2**11+3, 2**11)
    seen = rounding(w, NF4())
    assert seen['counts'].sum() == w.numel() and seen['share'].sum() == pytest.approx(1)
    assert np.sqrt((np.nan_to_num(seen['error'])**2*seen['share']).sum()) == pytest.approx(seen['q'].error(w), rel=1e-4)


def test_zeros_and_other_codebooks_and_tails():
    zero = rounding(torch.zeros(4, 64), NF4())
    assert zero['part'].sum() == 0 and zero['share'][7] == 1 and qe.fill_levels(qe.levels_picture('#000000'), zero) == 'no error'
    w = torch.randn(5, 77)
    own = QuantConfig(fit_codebook(w, 64), 64)
    assert level_frame(rounding(w, own)).level.is_monotonic_increasing
    z = zoom_frame(w, quantize(w, own), 5*77-10)
    assert len(z) == 10 and np.allclose(z.rounded, quantize(w, own).dequantize().flatten()[-10:]) and np.allclose(z.weight, w.flatten()[-10:])
    for start in (-1, 5*77):
        with pytest.raises(IndexError, match='385 entries'): zoom_frame(w, quantize(w, own), start)


def test_what_is_drawn_is_what_the_functions_say(model, explorer):
    W = model.model.layers[0].mlp.up_proj.weight
    explorer.start.value = 5
    for side, quant in dict(A=NF4(double=True), B=FP4(blocksize=128)).items():
        assert explorer.choice(side) == quant
        seen = rounding(W, quant)
        zoom = zoom_frame(W, seen['q'], 5*64)
        assert explorer.data('levels', side).equals(level_frame(seen)) and explorer.data('histogram', side).equals(histogram_frame(seen)) and explorer.data('zoom', side).equals(zoom)
        levels, hist, run = (explorer.figure(n, side) for n in ('levels', 'histogram', 'zoom'))
        assert np.array_equal(levels.data[0].y, level_frame(seen).part) and np.array_equal(levels.data[1].y, level_frame(seen).share)
        assert np.array_equal(hist.data[0].y, histogram_frame(seen).density) and set(hist.data[1].x) <= set(level_frame(seen).level)
        assert np.allclose(run.data[2].y, zoom.rounded) and np.allclose(run.data[3].y, W.detach().flatten()[320:384]) and np.allclose(run.data[1].y, -zoom.scale)
        assert explorer.data('facts')[side].drop('loss').to_dict() == pytest.approx(facts(W, seen['q']))
        assert f"{seen['q'].bits_per_param:.3f}" in explorer._facts[side].value
    assert explorer.figure('zoom', 'A').layout.yaxis.range == explorer.figure('zoom', 'B').layout.yaxis.range


def test_the_controls_change_one_side(model, explorer):
    left = explorer.figure('levels', 'A').data[0].y.copy()
    c = explorer.controls['B']
    c['type'].value, c['blocksize'].value, c['double'].value = 'INT4', 32, True
    W = model.model.layers[0].mlp.up_proj.weight
    assert explorer.choice('B') == INT4(32, True)
    assert np.array_equal(explorer.figure('levels', 'B').data[0].y, level_frame(rounding(W, INT4(32, True))).part)
    assert np.array_equal(explorer.figure('levels', 'A').data[0].y, left)


def test_another_layer_is_shown_and_the_zoom_stays_inside(model, explorer):
    explorer.start.value = explorer.start.max
    explorer.choose.value = 'model.layers.1.self_attn.k_proj'
    W = model.model.layers[1].self_attn.k_proj.weight
    assert explorer.start.max == W.numel()//64-1 and explorer.start.value == explorer.start.max
    assert np.allclose(explorer.figure('zoom', 'A').data[3].y, W.detach().flatten()[-64:])
    assert explorer.data('facts').loc['error', 'A'] == pytest.approx(quantize(W, NF4(double=True)).error(W))


def test_the_button_measures_the_whole_model(model, explorer):
    before = dict(model.named_modules())
    assert 'loss' not in explorer._facts['B'].value
    explorer.buttons['B'].click()
    want = mean_loss(model, samples(), FP4(blocksize=128))
    assert explorer.data('facts').loc['loss', 'B'] == pytest.approx(want) and f'{want:.4f}' in explorer._facts['B'].value
    assert np.isnan(explorer.data('facts').loc['loss', 'A'])
    assert all(m is before[n] for n, m in model.named_modules()) and not any(b.disabled for b in explorer.buttons.values())


def test_an_error_of_the_measurement_is_shown(model, explorer, monkeypatch):
    monkeypatch.setattr(qe, 'mean_loss', lambda *_: (_ for _ in ()).throw(RuntimeError('<b>out of memory</b>')))
    explorer.buttons['A'].click()
    assert 'role="alert"' in explorer._facts['A'].value and '&lt;b&gt;out of memory' in explorer._facts['A'].value
    assert not explorer.buttons['A'].disabled


def test_without_data_or_model_there_is_no_loss(model):
    for e in (QuantExplorer(model), QuantExplorer(dict(w=torch.randn(8, 64)), samples())):
        assert all(b.disabled for b in e.buttons.values())
        with pytest.raises(ValueError, match='No loss to measure'): e.measure()
        e.close()


def test_the_still_picture_is_plain_and_escaped():
    e = QuantExplorer({'<script>alert(1)</script>': torch.randn(8, 64)})
    html = qe.still_choices(e)
    assert '<script' not in html and '4.500' in html and 'INT4' in html and f"{e.data('facts').loc['error', 'A']:.2%}" in html
    e.close()


def test_what_cannot_be_shown_is_named(model):
    with pytest.raises(KeyError, match='Nearest.*up_proj'): QuantExplorer(model, layer='model.layers.0.mlp.up_prj')
    with pytest.raises(TypeError, match='NF4, FP4, INT4'): QuantExplorer(model, a=4)
    with pytest.raises(ValueError, match='quant=None'): weights_of(torch.nn.ReLU())
    e = QuantExplorer(model)
    for call in (lambda: e.figure('loss'), lambda: e.data('levels', 'C'), lambda: e.choice('C')):
        with pytest.raises(KeyError): call()
    e.close()
    assert not e.comm
