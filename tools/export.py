"Export the notebooks, clean them, write README.md and environment.yml; with --check, fail where that changes anything."
import os, re, subprocess, sys
from configparser import ConfigParser
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MADE = ['lora_nb', 'nbs', 'README.md', 'environment.yml']


def run(*cmd): subprocess.run(cmd, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def environment(cfg):
    "environment.yml with the requirements of settings.ini."
    reqs = '\n'.join(f'      - "{r}"' for r in cfg['requirements'].split())
    return f"# Made by `make export` from settings.ini.\nname: lora_nb\nchannels: [conda-forge]\ndependencies:\n  - python>={cfg['min_python']}\n  - pip\n  - pip:\n{reqs}\n"


def readme():
    "README.md from nbs/index.ipynb."
    from nbconvert import MarkdownExporter
    exporter = MarkdownExporter(exclude_input_prompt=True, exclude_output_prompt=True)
    body, _ = exporter.from_filename(str(ROOT/'nbs/index.ipynb'))
    body = re.sub(r'^#\| .*\n', '', body, flags=re.M)
    body = re.sub(r'\]\((?!\w+:|#)([^)\s]+)\)', lambda m: f"]({os.path.normpath('nbs/'+m[1])})", body)   # links of nbs/index.ipynb, seen from the root
    return '<!-- Made by `make export` from nbs/index.ipynb; edit that. -->\n\n' + re.sub(r'\n{3,}', '\n\n', body).strip() + '\n'


def export():
    cfg = ConfigParser(delimiters=['='])
    cfg.read(ROOT/'settings.ini')
    run('nbdev_export')
    run('nbdev_clean', '--fname', 'nbs')
    run('nbdev_clean', '--clear_all', '--fname', 'nbs/api')
    (ROOT/'README.md').write_text(readme(), encoding='utf-8')
    (ROOT/'environment.yml').write_text(environment(cfg['DEFAULT']), encoding='utf-8')


def contents():
    return {p: p.read_bytes() for top in MADE for p in [ROOT/top, *(ROOT/top).rglob('*')] if p.is_file() and '__pycache__' not in p.parts and '.ipynb_checkpoints' not in p.parts}


if __name__ == '__main__':
    before = contents()
    export()
    after = contents()
    changed = sorted(str(p.relative_to(ROOT)) for p in before.keys() | after.keys() if before.get(p) != after.get(p))
    if '--check' in sys.argv and changed:
        for p, b in before.items(): p.write_bytes(b)
        for p in after.keys() - before.keys(): p.unlink()
        sys.exit('Not exported: ' + ', '.join(changed) + '\nRun `make export` and commit the result.')
