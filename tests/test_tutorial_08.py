"A 7B model on a T4: what the tutorial computes is computed again, what it measured is in its outputs, and what only a GPU would run uses options that exist."
import ast
import inspect
import re
from pathlib import Path

import nbformat
import pytest
import torch
from lora_nb.fast import why_general
from lora_nb.fit import LIBRARIES, OPTIMIZER_BYTES, adapter_params, meta_model, plan
from lora_nb.quantize import NF4
from lora_nb.trainer import OPTIMIZERS, Settings, Trainer, check_settings
from outputs import printed, prose, result_of

PATH = Path(__file__).resolve().parent.parent/'nbs/tutorials/08_seven_billion.ipynb'
SHAPE, SETTING = 'qwen2.5-7b', dict(quant=NF4(double=True), r=16, seq=512, batch=2, checkpointing=True, optimizer='paged_adamw8bit')
GIB = 2**30


@pytest.fixture(scope='module')
def nb(): return nbformat.read(PATH, as_version=4)


@pytest.fixture(scope='module')
def result(nb): return result_of(nb)


def code(nb): return '\n'.join(c.source for c in nb.cells if c.cell_type == 'code' and '%pip' not in c.source)


def assigned(nb, name):
    "The right side of the first `name = …`."
    return next(n.value for n in ast.walk(ast.parse(code(nb))) if isinstance(n, ast.Assign) and any(isinstance(t, ast.Name) and t.id == name for t in n.targets))


def test_it_is_light(nb):
    assert PATH.stat().st_size < 150_000 and nb.metadata == {'kernelspec': {'display_name': 'python3', 'language': 'python', 'name': 'python3'}}


def test_the_setting_here_is_the_notebooks(nb):
    assert ast.literal_eval(assigned(nb, 'SHAPE')) == SHAPE
    given = {k.arg: k.value for k in assigned(nb, 'setting').keywords}
    assert ast.unparse(given.pop('quant')) == 'NF4(double=True)'
    assert {k: ast.literal_eval(v) for k, v in given.items()} | dict(quant=SETTING['quant']) == SETTING


def test_it_fits_on_a_t4_and_the_first_idea_does_not(nb, result):
    first, chosen = plan(SHAPE, quant=None, seq=512, batch=8, gpu='T4'), plan(SHAPE, gpu='T4', **SETTING)
    assert not first.fits and first.total == result['first'] and first.kinds['base weights'] > 14*GIB                  # "The weights alone nearly fill the card"
    assert [t for t, _ in first.changes()] == ['checkpointing=True', 'and quant=NF4(double=True)'] and first.changes()[-1][1].fits
    assert chosen.fits and (chosen.total, chosen.longest, chosen.largest) == tuple(result[k] for k in ('chosen', 'longest', 'largest'))
    assert repr(first) in printed(nb) and repr(chosen) in printed(nb)
    assert f'samples could have {chosen.longest:,} tokens, or at this length a batch {chosen.largest} of them' in prose(nb)
    assert f'{chosen.total/GIB:.2f} GiB are an estimate' in prose(nb) and chosen.total < .5*chosen.card.total                # "leaves the other half of the card free"
    for b in (2, 4, 8):
        for c, name in ((True, 'with checkpointing'), (False, 'without')):
            p = plan(SHAPE, gpu='T4', **SETTING | dict(batch=b, checkpointing=c))
            assert p.total/GIB == pytest.approx(result['totals'][f'batch {b}'][name]) and p.fits == (c or b == 2)         # "Without checkpointing two samples fit and four do not"


def test_autocast_takes_the_general_path():
    from transformers import Qwen2Config, Qwen2ForCausalLM
    small = dict(hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, vocab_size=64)
    model = Qwen2ForCausalLM(Qwen2Config(**small)).requires_grad_(False)
    assert why_general(model) is None
    with torch.autocast('cpu', torch.bfloat16): assert why_general(model) == 'autocast'
    assert not plan(SHAPE, gpu='T4', **SETTING).job.fast and plan(SHAPE, gpu='L4', **SETTING).job.fast
    assert "mixed_precision='fp16' if fp16" in inspect.getsource(Trainer._place)


def test_the_download_and_the_host(nb, result):
    sizes = [2*p.numel() for p in meta_model(SHAPE).parameters()]
    assert (sum(sizes), max(sizes)) == (result['download'], result['largest_tensor'])
    assert round(sum(sizes)/1e9) == 15 and sum(sizes) > 12.7e9 and round(max(sizes)/1e9, 1) == 1.1                       # "it fetches 15 GB", more than the host has
    n = adapter_params(meta_model(SHAPE), 16)
    assert result['seven_adapter'] == 4*n and round((8*n+OPTIMIZER_BYTES['paged_adamw8bit']*n)/1e9, 1) == .4
    assert all(round(b/1e6) == 78 for b in result['checkpoints'].values())


@pytest.mark.parametrize('big, small, cuda', [(True, False, True), (False, False, True), (False, True, True), (False, False, False), (False, True, False)])
def test_the_trainers_options_are_ones_that_it_has(nb, big, small, cuda):
    "Of both branches, with the values that each would have."
    names = dict(setting=SETTING | dict(optimizer='paged_adamw8bit' if cuda else 'adamw'), BIG=big, SMALL=small)
    names['save_every'] = eval(ast.unparse(assigned(nb, 'save_every')), names)
    options = eval(ast.unparse(assigned(nb, 'options')), names)
    more = next(n.value for n in ast.walk(ast.parse(code(nb))) if isinstance(n, ast.AugAssign) and n.target.id == 'options')
    options |= eval(ast.unparse(more), names)
    assert set(options) <= set(Settings.__dataclass_fields__)
    check_settings(Settings(**options))
    assert options['checkpointing'] and options['optimizer'] in OPTIMIZERS and options['optimizer'].startswith('paged') == cuda
    assert eval(ast.unparse(assigned(nb, 'lost_at')), names | dict(max=max)) > names['save_every']


def test_every_call_fits_its_signature(nb):
    "Of the functions of the package that the notebook calls, with their arguments by name; those of Trainer's **settings are in the test above."
    import lora_nb.all as lib
    seen = set()
    for call in (n for n in ast.walk(ast.parse(code(nb))) if isinstance(n, ast.Call)):
        parts = ast.unparse(call.func).split('.')
        fn = getattr(lib, parts[0], None)
        if fn is None or not parts[0] in lib.__all__: continue
        for p in parts[1:]: fn = getattr(fn, p, None)
        if fn is None or any(isinstance(a, ast.Starred) for a in call.args): continue
        inspect.signature(fn).bind_partial(*call.args, **{k.arg: k.value for k in call.keywords if k.arg})
        seen.add('.'.join(parts))
    assert {'plan', 'load_model', 'add_lora', 'chat_data', 'Trainer', 'Trainer.resume', 'peak_memory', 'FitPlanner', 'ask', 'load_adapter'} <= seen


def test_planned_against_measured(nb, result):
    assert LIBRARIES == 175*2**20 and '175 MiB' in prose(nb)
    said, total = printed(nb), result['table']['total']
    assert result['ratio'] == pytest.approx(total['planned']/total['measured'], abs=1e-6)
    assert f"planned/measured {result['ratio']:.2f}" in said and f"{result['of_growth']:.2f}" in said
    assert all(abs(result['table'][k]['planned']/result['table'][k]['measured']-1) < .005 for k in ('base weights', 'adapter', 'optimizer'))
    rest, short = result['table']['gradients, activations, process'], total['measured']-total['planned']
    assert abs(rest['measured']-rest['planned']-short) < 2**20 and .85 < result['ratio'] < 1
    assert f"{round(100*(1-result['ratio']))} % short" in prose(nb) and f'{short/2**20:.0f} MiB' in prose(nb) and f"{round(100*(1-result['of_growth']))} %" in prose(nb)


def test_what_was_lost_is_made_again(nb, result):
    said = printed(nb)
    assert re.search(r'Run stopped at step 6 of 20', said) and list(result['checkpoints']) == ['checkpoint-4', 'checkpoint-6']
    assert 'resumed from checkpoint-4: steps 5 to 20 of 20; the losses of steps 5 to 6' in said
    assert result['steps'] == 20 and result['apart'] < 1e-5


def test_it_answers_and_comes_back(nb, result):
    assert result['loss'][0] > 5 and result['loss'][1] < .05 and result['right']['base'] == 0 and f"{result['right']['adapter']} of {result['asked']}" in prose(nb)
    assert result['saved_loss'][0] == pytest.approx(result['saved_loss'][1], rel=1e-6)
    assert result['peak_memory'] < 3e9 and result['seconds'] < 600 and result['big'] is False


def test_nothing_is_fetched_without_a_gpu(nb):
    "The one hub id in the code stands behind BIG, which needs CUDA."
    assert code(nb).count('Qwen/') == 1 and re.search(r'\("Qwen/Qwen2.5-7B-Instruct",SHAPE\) if BIG else', code(nb)) and 'BIG = CUDA and not SMALL and plan(' in code(nb)
