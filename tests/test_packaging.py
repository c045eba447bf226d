"settings.ini is the only place for version and requirements; a wheel carries the tutorials; imports never point down."
import ast
import configparser
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
ini = configparser.ConfigParser(delimiters=['='])
ini.read(ROOT/'settings.ini')
CFG = ini['DEFAULT']
CONSTRAINTS = [line for line in (ROOT/'constraints.txt').read_text().splitlines() if not line.startswith('#')]
name_of = lambda r: re.split('[<>=]', r)[0]


def test_every_direct_requirement_has_a_tested_version():
    pinned = {Requirement(line).name for line in CONSTRAINTS}
    assert pinned == {name_of(r) for r in (CFG['requirements']+' '+CFG['dev_requirements']).split()}


def test_the_tested_versions_are_the_installed_ones():
    from importlib.metadata import version
    pins = [r for r in map(Requirement, CONSTRAINTS) if r.marker is None or r.marker.evaluate()]
    assert [] == [(str(r), version(r.name)) for r in pins if not r.specifier.contains(version(r.name))]


def test_version_stands_in_one_place():
    import lora_nb
    assert lora_nb.__version__ == CFG['version']
    assert CFG['version'] not in (ROOT/'setup.py').read_text()+(ROOT/'pyproject.toml').read_text()


ORDER = ['codebook', 'quantize', 'linear4bit', 'lora', 'adapter', 'models', 'data', 'loss', 'fast', 'memory', 'trainer', 'spectra', 'sensitivity', 'merge', 'ranks', 'fit', 'recall', 'widgets', 'all', 'cli']


@pytest.mark.parametrize('path', sorted((ROOT/'lora_nb').rglob('*.py')), ids=lambda p: p.stem)
def test_an_import_never_points_down_the_table(path):
    parts = path.relative_to(ROOT/'lora_nb').with_suffix('').parts
    if parts[0].startswith('_'): return
    rank = ORDER.index(parts[0])
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = list(parts[:-node.level]) + (node.module or '').split('.')
            tops = [base[0]] if base[0] else [a.name for a in node.names]
            assert all(ORDER.index(t) <= rank for t in tops), (path.name, tops)


def test_the_package_needs_neither_peft_nor_nbdev_nor_fastcore():
    "transformers itself imports peft where it is installed; here it is not to be had."
    absent = ('peft', 'nbdev', 'fastcore', 'execnb', 'ghapi', 'trl', 'matplotlib')
    code = f"import sys; sys.modules.update(dict.fromkeys({absent})); import lora_nb.all, lora_nb.cli"
    subprocess.run([sys.executable, '-c', code], check=True, cwd='/')


def test_the_sdist_makes_a_wheel_with_tutorials_data_and_command(tmp_path):
    uv = Path(sys.executable).with_name('uv')
    subprocess.run([uv, 'build', '-q', '--out-dir', tmp_path, ROOT], check=True)     # the wheel is made from the sdist
    wheel, = tmp_path.glob('*.whl')
    names = zipfile.ZipFile(wheel).namelist()
    assert {'lora_nb/_nbs/tutorials/01_live_qlora.ipynb', 'lora_nb/_nbs/data/lora_qa.jsonl', 'lora_nb/trainer.py', 'lora_nb/widgets/live_run.py'} <= set(names)
    site = tmp_path/'site'
    subprocess.run([uv, 'pip', 'install', '-q', '--python', sys.executable, '--no-deps', '--target', site, wheel], check=True)
    code = f"import sys; sys.path.insert(0, {str(site)!r}); from lora_nb import cli; print(cli.__file__); print(len(cli.copy_tutorials({str(tmp_path/'mine')!r})))"
    out = subprocess.run([sys.executable, '-P', '-c', code], capture_output=True, text=True, check=True, cwd=tmp_path).stdout.split()
    assert out[0].startswith(str(site)) and int(out[1]) > 1 and (tmp_path/'mine/tutorials/01_live_qlora.ipynb').exists()


def test_copying_the_tutorials_never_overwrites(tmp_path):
    from lora_nb.cli import copy_tutorials
    first = copy_tutorials(tmp_path)
    first[0].write_text('mine')
    assert not copy_tutorials(tmp_path) and first[0].read_text() == 'mine'


def test_a_package_that_is_too_old_or_missing_is_named_with_the_command_that_mends_it(monkeypatch):
    import lora_nb.all as a
    a.check_requirements('a package that is not installed')
    for lines, says in ((['transformers>=99', 'torch>=2.6'], r'lora_nb needs transformers>=99 \(here: 5\..*pip install "transformers>=99" and restart'), (['nobody>=1'], 'not installed')):
        monkeypatch.setattr(a, 'requires', lambda _: lines)
        with pytest.raises(ImportError, match=says): a.check_requirements()


def test_the_check_comes_before_what_it_guards():
    code = "import importlib.metadata as m, sys; was = m.version; m.version = lambda n: '4.57.1' if n=='transformers' else was(n); import lora_nb.all"
    out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=ROOT)
    assert out.returncode and 'lora_nb needs transformers>=' in out.stderr.splitlines()[-1] and '4.57.1' in out.stderr
