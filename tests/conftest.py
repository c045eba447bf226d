"What the tests share: tiny random models and a task that they can learn."
import ctypes
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lora_nb.data import Sample


LONGEST = ['live', 'test_kills', 'test_notebooks', 'browser']  # what begins first, so that no long one is left at the end


def together(item):
    "Tests with the same name here run in one process, one after another: a file's, each notebook by itself, and those that need the whole first tutorial."
    file = item.path.stem
    return 'live' if file in ('test_tutorial', 'test_merge_trained') else item.name if file=='test_notebooks' else file


@pytest.hookimpl(tryfirst=True)                       # before xdist reads the groups
def pytest_collection_modifyitems(items):
    rank = lambda i: next((n for n, name in enumerate(LONGEST) if together(i)==name or i.path.stem.endswith(name)), len(LONGEST))
    items.sort(key=rank)
    for i in items: i.add_marker(pytest.mark.xdist_group(together(i)))


def pytest_collection_finish(session):
    "A pytest that xdist cannot group tests in would run the long ones twice, and browser tests apart from what went before them."
    if getattr(session.config.option, 'loadgroup', False) and not all('@' in i.nodeid for i in session.items): raise pytest.UsageError('pytest-xdist has not grouped the tests: install the versions of constraints.txt.')


def tiny_llama(seed=0, **kwargs):
    torch.manual_seed(seed)
    cfg = dict(vocab_size=40, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64)
    return LlamaForCausalLM(LlamaConfig(**{**cfg, **kwargs})).eval()


def counting(n=64, length=12, vocab=40, seed=0):
    "Sequences that count upwards from a random start; the first eight are held out."
    starts = torch.randint(1, vocab-length, (n,), generator=torch.Generator().manual_seed(seed)).tolist()
    samples = [Sample(list(range(s, s+length)), [-100]+list(range(s+1, s+length)), i) for i, s in enumerate(starts)]
    return SimpleNamespace(train=samples[8:], val=samples[:8], tok=SimpleNamespace(pad_token_id=0))


class OneRow:
    "bitsandbytes' native library, for which a 4-bit weight is a single row."
    def __init__(self, lib): self.lib = lib
    def __getattr__(self, name):
        fn = getattr(self.lib, name)
        if not name.startswith(('cdequantize_blockwise_cpu_nf4_', 'cdequantize_blockwise_cpu_fp4_')): return fn
        return lambda packed, absmax, out, blocksize, m, n: fn(packed, absmax, out, blocksize, ctypes.c_longlong(1), ctypes.c_longlong(m.value*n.value))


@pytest.fixture(scope='session', autouse=True)
def bitsandbytes_as_elsewhere():
    "On a CPU with AVX-512 its layers multiply in bf16 in eval mode, whatever their dtype, and its kernel misreads a weight whose rows end inside a block. Here they do what they do elsewhere."
    import bitsandbytes.backends.cpu.ops as ops
    with pytest.MonkeyPatch.context() as m:
        m.setattr('bitsandbytes.nn.modules.has_avx512bf16', lambda: False)
        m.setattr(ops, 'lib', OneRow(ops.lib))
        yield


@pytest.fixture
def llama(): return tiny_llama()


@pytest.fixture(scope='session')
def smol():
    "The real SmolLM2-135M in NF4 with double quantisation, shared; leave it as it was."
    from lora_nb.models import load_model
    from lora_nb.quantize import NF4
    return load_model('smollm2', quant=NF4(double=True))


@pytest.fixture(scope='session')
def live_qlora(tmp_path_factory):
    "The first tutorial at its small setting, run to its end by the command that users have: `out` (a CompletedProcess) and the `folder` where it lies."
    folder = tmp_path_factory.mktemp('lab')
    subprocess.run([sys.executable, '-c', f'from lora_nb.cli import copy_tutorials; copy_tutorials({str(folder)!r})'], check=True)
    command = [str(Path(sys.executable).with_name('lora-nb')), 'run', str(folder/'tutorials/01_live_qlora.ipynb')]
    return SimpleNamespace(folder=folder/'tutorials', out=subprocess.run(command, capture_output=True, text=True, timeout=3600, env=os.environ | {'LORA_NB_SMALL': '1'}))


@pytest.fixture(scope='module')
def server(tmp_path_factory):
    "A JupyterLab for a file's tests, and the folder that it shows."
    from browser import jupyterlab
    home, folder = tmp_path_factory.mktemp('home'), tmp_path_factory.mktemp('work')
    with jupyterlab(folder, home) as at: yield at, folder


@pytest.fixture(scope='module')
def browser():
    from browser import chromium
    with chromium() as b: yield b


@pytest.fixture
def lab(server, browser, request):
    "A page of it; the last sight of each test is kept."
    from browser import Lab
    at, folder = server
    page = Lab(browser, at)
    page.folder = folder
    yield page
    page.page.screenshot(path=page.artifact(f'{request.module.__name__}-{request.node.name}-end'))
    page.shut_down()
    page.close()
