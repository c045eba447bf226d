"Sensitivity: each figure against the long way round, the model left as it was, plans that load_model takes."
import math
import types

import pandas as pd
import pytest
import torch
from torch import nn
from conftest import tiny_llama
from lora_nb.adapter import add_lora
from lora_nb.data import ChatData, Sample
from lora_nb.linear4bit import Linear4bit
from lora_nb.models import load_model, quantisable
from lora_nb.quantize import FP4, INT4, NF4, quantize
from lora_nb.sensitivity import (few_samples, mean_loss, mixed_plan, output_error, padded_batches, perplexity, plan_bits, quantised, sensitivity,
                                 text_samples, token_losses)


def some(n=6, low=9, high=20, seed=1, vocab=40):
    g = torch.Generator().manual_seed(seed)
    rows = [torch.randint(0, vocab, (int(torch.randint(low, high, (1,), generator=g)),), generator=g).tolist() for _ in range(n)]
    return [Sample(x, [-100]*2+x[2:], i) for i, x in enumerate(rows)]


class Letters:
    def __call__(self, text, **_): return {'input_ids': [ord(c) % 40 for c in text]}


@pytest.fixture(scope='module')
def model():
    m = tiny_llama(num_hidden_layers=3)
    for p in m.parameters(): p.data *= 3
    return m


@pytest.fixture(scope='module')
def report(model): return sensitivity(model, some(), dict(NF4=NF4(), INT4=INT4(blocksize=128)))


def test_a_row_for_each_layer_and_type_sorted(model, report):
    assert len(report) == 2*21 and set(report.layer) == set(quantisable(model))
    assert report.loss_change.is_monotonic_decreasing
    assert set(report[report.quant == 'NF4'].bits) == {4.5} and set(report[report.quant == 'INT4'].bits) == {4.25}
    assert report.attrs['tokens'] == sum(s.n_labels for s in few_samples(some(), 256))


def test_loss_change_is_that_of_a_model_whose_layer_is_really_replaced(model, report):
    def losses(m):
        out = []
        for s in few_samples(some(), 256):  # one at a time: no padding, no records, transformers' own loss
            ids = torch.tensor([s.input_ids])
            out += [m(ids, labels=torch.tensor([s.labels])).loss.detach().double()*s.n_labels]
        return sum(out).item()/report.attrs['tokens']
    base = losses(model)
    assert report.attrs['loss'] == pytest.approx(base, abs=1e-5)
    for row in report.iloc[::5].itertuples():
        other = tiny_llama(num_hidden_layers=3)
        other.load_state_dict(model.state_dict())
        quant = dict(NF4=NF4(), INT4=INT4(blocksize=128))[row.quant]
        other.set_submodule(row.layer, Linear4bit.from_linear(other.get_submodule(row.layer), quant))
        assert row.loss_change == pytest.approx(losses(other)-base, abs=1e-5)


def test_errors_are_those_of_the_weight_and_of_the_output_on_real_inputs(model, report):
    seen = {}
    hooks = [m.register_forward_pre_hook(lambda _, a, n=n: seen.setdefault(n, []).append(a[0].flatten(0, -2))) for n, m in quantisable(model).items()]
    for s in few_samples(some(), 256): model(torch.tensor([s.input_ids]))
    for h in hooks: h.remove()
    for row in report[report.quant == 'NF4'].iloc[::4].itertuples():
        W, x = model.get_submodule(row.layer).weight.detach(), torch.cat(seen[row.layer])
        what = quantize(W, NF4()).dequantize()
        assert row.weight_error == pytest.approx(((what-W).norm()/W.norm()).item(), rel=1e-5)
        assert row.output_error == pytest.approx((((x@what.T)-(x@W.T)).norm()/(x@W.T).norm()).item(), rel=1e-3)


def test_standard_error_is_of_the_paired_differences(model, report):
    row = report.iloc[0]
    batch, = padded_batches(few_samples(some(), 256))
    base = token_losses(model, batch)
    with quantised(model, {row.layer: dict(NF4=NF4(), INT4=INT4(blocksize=128))[row.quant]}): diff = token_losses(model, batch)-base
    assert row.loss_se == pytest.approx((diff.std()/math.sqrt(len(diff))).item(), rel=1e-3)
    assert row.loss_change == pytest.approx(diff.mean().item(), abs=1e-5)


def test_the_first_blocks_are_not_computed_again(model):
    calls, last = [0], model.model.layers[0].self_attn
    hook = last.register_forward_hook(lambda *_: calls.__setitem__(0, calls[0]+1))
    sensitivity(model, some(), dict(NF4=NF4()), layers='model.layers.2.*')
    hook.remove()
    assert calls[0] == 1  # the recording alone, in one batch


def test_the_model_is_as_it_was_even_when_interrupted(model):
    before, modes = dict(model.named_modules()), {n: m.training for n, m in model.named_modules()}
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    n = [0]
    def stop(*_):
        n[0] += 1
        if n[0] == 4: raise KeyboardInterrupt
    hook = model.model.norm.register_forward_hook(stop)
    with pytest.raises(KeyboardInterrupt): sensitivity(model, some(), layers='*.layers.1.*')
    hook.remove()
    assert all(m is before[n] for n, m in model.named_modules()) and modes == {n: m.training for n, m in model.named_modules()}
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
    assert not any('forward' in m.__dict__ or m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def test_blocks_that_run_twice_are_measured_the_long_way():
    m = tiny_llama(num_hidden_layers=2)
    forward = m.model.forward
    def twice(self, **kwargs):
        forward(**kwargs)
        return forward(**kwargs)
    m.model.forward = types.MethodType(twice, m.model)
    r = sensitivity(m, some(), dict(NF4=NF4()), layers='*.down_proj')
    del m.model.forward
    assert r.loss_change.tolist() == pytest.approx(sensitivity(m, some(), dict(NF4=NF4()), layers='*.down_proj').loss_change.tolist(), abs=1e-6)


def test_tokens_bound_what_is_measured():
    s = [Sample(list(range(10)), [-100]*6+list(range(6, 10)), i) for i in range(5)]
    assert [len(x) for x in few_samples(s, 27)] == [10, 10, 7] and [len(x) for x in few_samples(s, 24)] == [10, 10]
    assert [x.row for x in few_samples(ChatData(s[:2], s[2:], None, 10))] == [2, 3, 4]
    assert [x.row for x in few_samples(ChatData(s[:2], [], None, 10))] == [0, 1]
    with pytest.raises(ValueError, match='first 5 tokens'): few_samples(s, 5)


def test_padded_batches_hold_every_sample_and_bound_the_padding():
    s = some(20, 3, 30)
    bs = padded_batches(s, most=64)
    assert sum(len(b['input_ids']) for b in bs) == 20 and sum(int(b['real'].sum()) for b in bs) == sum(map(len, s))
    assert all(b['input_ids'].numel() <= 64 for b in bs) and all((b['labels'][~b['real']] == -100).all() for b in bs)


def test_perplexity_weighs_tokens(model):
    texts = ['a', 'short one', 'and another that is a good deal longer than the first of them']
    total, n = 0., 0
    for t in texts:
        ids = Letters()(t)['input_ids']
        for i in range(0, len(ids), 16):
            w = torch.tensor([ids[i:i+16]])
            if w.numel() < 2: continue
            total, n = total+model(w, labels=w).loss.item()*(w.numel()-1), n+w.numel()-1
    assert math.log(perplexity(model, Letters(), texts, max_len=16)) == pytest.approx(total/n, rel=1e-5)
    with pytest.raises(ValueError, match='two tokens'): perplexity(model, Letters(), ['a', ''])


def test_mean_loss_is_that_of_a_model_loaded_in_4_bits(model, tmp_path):
    other = tiny_llama(num_hidden_layers=3)
    other.load_state_dict(model.state_dict())
    for path, l in quantisable(other).items(): other.set_submodule(path, Linear4bit.from_linear(l, INT4()))
    assert mean_loss(model, some(), INT4()) == pytest.approx(mean_loss(other, some()), abs=1e-6)
    assert mean_loss(model, some()) == pytest.approx(sensitivity(model, some(), dict(NF4=NF4()), layers='*.q_proj').attrs['loss'], abs=1e-6)


def test_a_head_that_is_not_plain(model):
    batch, = padded_batches(few_samples(some(), 256))
    plain = token_losses(model, batch)
    model.config.final_logit_softcapping = 30.
    try: assert torch.allclose(token_losses(model, batch), plain, atol=1e-5)
    finally: del model.config.final_logit_softcapping


def test_output_error_counts_the_bias():
    torch.manual_seed(0)
    l, x = nn.Linear(32, 16), torch.randn(50, 32)
    what = l.weight.detach()+.01
    assert output_error(l, what, x) == pytest.approx(((nn.functional.linear(x, what, l.bias)-l(x)).norm()/l(x).norm()).item(), rel=1e-4)
    assert math.isnan(output_error(l, what, None))


def test_a_plan_makes_the_round_trip(model, report, tmp_path):
    model.save_pretrained(tmp_path)
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({'a': 0, '<e>': 1}, unk_token='a')), eos_token='<e>').save_pretrained(tmp_path)
    plan = mixed_plan(report, keep=3)
    loaded, _ = load_model(tmp_path, quant=plan, device='cpu', dtype=torch.float32)
    dense = set(quantisable(loaded))
    assert dense == set(report[report.quant == 'NF4'].nlargest(3, 'loss_change').layer) and len(dense) == 3
    assert sum(isinstance(m, Linear4bit) and m.config == NF4(double=True) for m in loaded.modules()) == 18
    batch, = padded_batches(few_samples(some(), 256))
    with quantised(model, plan): here = token_losses(model, batch)
    assert torch.allclose(token_losses(loaded, batch), here, atol=1e-5)


def test_a_budget_is_met_and_used_where_it_helps_most():
    r = pd.DataFrame([dict(layer=l, quant='NF4', params=p, loss_change=c) for l, p, c in (('a', 100, .5), ('b', 10, .4), ('c', 10, .1), ('d', 80, -.2))])
    rest = NF4(double=True)
    assert list(mixed_plan(r, budget=5.)) == ['b', ''] and plan_bits(r, mixed_plan(r, budget=5.)) <= 5
    assert list(mixed_plan(r, budget=11.)) == ['b', 'c', ''] and list(mixed_plan(r, budget=11.3)) == ['b', 'c', 'a', '']
    assert list(mixed_plan(r, budget=16.)) == ['b', 'c', 'a', '']  # d is better off in 4 bits
    assert list(mixed_plan(r, keep=2)) == ['a', 'b', ''] and mixed_plan(r, keep=2)[''] == rest
    assert plan_bits(r, {'': rest}) == pytest.approx(rest.bits_per_param)
    for bad in (dict(), dict(keep=1, budget=5.), dict(keep=9), dict(budget=4.)):
        with pytest.raises(ValueError): mixed_plan(r, **bad)
    with pytest.raises(KeyError, match="has 'NF4'"): mixed_plan(r, keep=1, quant='FP4')


def test_what_cannot_be_measured_is_named(model):
    with pytest.raises(KeyError, match='Nearest'): sensitivity(model, some(), layers='*.q_prj')
    with pytest.raises(TypeError, match='text_samples'): sensitivity(model, 'text')
    with pytest.raises(ValueError, match='empty'): sensitivity(model, some(), {})
    with pytest.raises(TypeError, match=r"quants\['x'\]"): sensitivity(model, some(), dict(x=4))
    with quantised(model, FP4()), pytest.raises(ValueError, match='21 layers are in 4 bits already'): sensitivity(model, some())
    other = tiny_llama()
    add_lora(other, r=2, alpha=2)
    with pytest.raises(ValueError, match='adapter'): sensitivity(other, some())
    other = tiny_llama()
    other.model.layers[1].mlp.up_proj.weight.data[0, 0] = math.nan
    with pytest.raises(ValueError, match='model.layers.1.mlp.up_proj.weight.*1 NaN'): sensitivity(other, some())


def test_texts_become_windows_that_do_not_overlap():
    s = text_samples(Letters(), ['abcdefghij', 'xyz'], max_len=4)
    assert [len(x) for x in s] == [4, 4, 2, 3] and [x.row for x in s] == [0, 0, 0, 1]
    assert sum((x.input_ids for x in s[:3]), []) == Letters()('abcdefghij')['input_ids']
