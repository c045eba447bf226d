"The same numbers whatever the threads, and the same bits from the same seed."
import pytest
import torch

from conftest import counting, tiny_llama
from lora_nb.adapter import add_lora
from lora_nb.linear4bit import Linear4bit
from lora_nb.models import load_model
from lora_nb.quantize import FP4, INT4, NF4, quantize
from lora_nb.trainer import Trainer


@pytest.fixture(autouse=True)
def _threads():
    was = torch.get_num_threads()
    yield
    torch.set_num_threads(was)


def train(out, threads, quant=None, **kw):
    torch.set_num_threads(threads)
    model = tiny_llama(hidden_size=128, intermediate_size=256)
    if quant:
        for path in [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != 'lm_head']: model.set_submodule(path, Linear4bit.from_linear(model.get_submodule(path), quant))
    a = add_lora(model, r=8, alpha=16, dropout=.1)
    run = Trainer(model, counting(), out=out, lr=5e-3, epochs=2, **kw).fit()
    return torch.tensor(run.log.loss.tolist()), torch.cat([p.detach().flatten() for p in a.parameters()])


@pytest.mark.parametrize('quant', [None, NF4(double=True)], ids=['dense', 'nf4'])
def test_one_thread_and_two_train_alike(tmp_path, quant):
    "14 steps: losses within 1e-5, adapters within 1e-3 of their length. Sums are taken in another order, no more."
    one, two = (train(tmp_path/str(t), t, quant) for t in (1, 2))
    torch.testing.assert_close(one[0], two[0], rtol=0, atol=1e-5)
    assert (one[1]-two[1]).norm() <= 1e-3*one[1].norm()


@pytest.mark.parametrize('threads', [1, 2])
@pytest.mark.parametrize('settings', [{}, dict(accum=2, neftune=5.), dict(packing=True, batch_size=2), dict(optimizer='adamw8bit')], ids=str)
def test_a_seed_repeats_bit_for_bit(tmp_path, threads, settings):
    def once(name):
        data = counting()
        data.max_len = 24
        torch.set_num_threads(threads)
        model = tiny_llama()
        a = add_lora(model, r=8, alpha=16, dropout=.1)
        run = Trainer(model, data, out=tmp_path/name, lr=5e-3, epochs=1, **settings).fit()
        return run.log.loss.tolist(), [p.detach().clone() for p in a.parameters()]
    (losses, a), (again, b) = once('a'), once('b')
    assert losses == again and all(map(torch.equal, a, b))


def test_another_seed_is_another_run(tmp_path): assert not torch.equal(train(tmp_path/'a', 1, seed=1)[0], train(tmp_path/'b', 1, seed=2)[0])


@pytest.mark.parametrize('config', [NF4(), NF4(double=True), FP4(128), INT4()], ids=str)
def test_codes_do_not_depend_on_threads(config):
    w, seen = torch.randn(700, 1024, generator=torch.Generator().manual_seed(0)), []
    for t in (1, 2):
        torch.set_num_threads(t)
        q = quantize(w, config)
        seen.append((q.packed, q.absmax, q.dequantize()))
    assert all(map(torch.equal, *seen))


def test_fp16_on_the_cpu_loads_computes_and_is_not_trained(tmp_path):
    from fuzz_cases import folder_of
    model, tok = load_model(folder_of(tmp_path/'m'), dtype=torch.float16, device='cpu')
    full, _ = load_model(tmp_path/'m', dtype=torch.float32, device='cpu')
    x = torch.arange(3, 20)[None]
    got, want = model(x).logits.float(), full(x).logits
    assert got.isfinite().all() and (got-want).norm() < .01*want.norm()
    add_lora(model, r=4)
    with pytest.raises(ValueError, match='fp16 training on the CPU'): Trainer(model, counting(), out=tmp_path/'r')
